"""all-MiniLM-L6-v2, mixed, as vLLM's embedding model: each product, and the embeddings of texts."""

import json
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import precimap as pm
from helpers.engines import asked, needs_engines, served
from helpers.small_maps import map_of
from precimap.demos.minilm import load_encoder, load_tokenizer, tokenize
from precimap.layers.emulation import quantized
from precimap.layers.prepared import prepared

pytestmark = [needs_engines, pytest.mark.filterwarnings("ignore")]  # transformers warns about parts of its own
NEAR = 0.003
TEXTS = [
    "How do I read a file line by line?",
    "Return the number of bytes that were written.",
    "The quick brown fox jumps over the lazy dog.",
    "Raises ValueError if the argument is negative, and TypeError if it is no number.",
    "sort a list",
    "A server that listens on a port for datagrams and answers each of them with the time of day.",
]
AT = "transformer.encoder.layer"


def choice() -> dict[str, str]:
    chosen = {f"{AT}.0.attention.self.{one}.weight": "int8" for one in ("query", "key", "value")}
    chosen |= {f"{AT}.{number}.intermediate.dense.weight": "int8" for number in (0, 1, 4)}
    chosen |= {f"{AT}.{number}.output.dense.weight": "int8" for number in (1, 2)}
    return chosen | {f"{AT}.3.attention.output.dense.weight": "fp8"}


@pytest.fixture(scope="module")
def task() -> pm.Task:
    tokenizer, generator = load_tokenizer(), torch.Generator().manual_seed(4)
    direction = F.normalize(torch.randn(384, generator=generator), dim=0)

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = 20 * model(batch["input_ids"], batch["attention_mask"]).float() @ direction
        return scores

    labels = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    splits = [[{**tokenize(tokenizer, [f"{said} {end}" for said in TEXTS], 64), "labels": labels}] for end in "abc"]
    return pm.Task(load_encoder(), splits=pm.Splits(*splits), metric="log-loss", forward=forward, name="texts")


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_every_product_and_every_embedding(task: pm.Task, tmp_path: Path) -> None:
    given = map_of(task, choice(), "emulated").model_copy(update={"cast": "bfloat16"})
    exported = pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True)
    assert "1_Pooling/config.json" in exported.files
    batch, generator = task.splits.calibration[0], torch.Generator().manual_seed(1)
    inputs = {str(width): torch.randn(64, width, generator=generator).bfloat16() for width in (384, 1536)}
    found = asked("vllm_layers.py", tmp_path / "out", {**inputs, "tokens": batch["input_ids"]}, tmp_path, "pooling")
    assert not found.error
    model, layers = prepared(task.model, given)
    assert len(found.kernels) == 24
    for module, kernel in found.kernels.items():
        name = module.removeprefix("model.").replace("attention.output.qkv_proj", "attention.self.qkv_proj")
        parts = [name.replace("qkv_proj", part) for part in ("query", "key", "value")] if "qkv" in name else [name]
        (scheme,) = {choice().get(f"transformer.{part}.weight") for part in parts}
        assert ("Int8" in kernel, "Fp8" in kernel) == (scheme == "int8", scheme == "fp8"), (module, kernel)
        own = [model.get_submodule(f"transformer.{part}") for part in parts]
        x = inputs[str(own[0].in_features)]
        with torch.no_grad(), quantized(model, layers):
            expected = torch.cat([one(x) for one in own], dim=1)
        assert off(found.outputs[module], expected) < NEAR, module
    with torch.no_grad():
        original = task.model(batch["input_ids"], batch["attention_mask"]).float()
        with quantized(model, layers):
            simulated = model(batch["input_ids"], batch["attention_mask"]).float()
    apart = 1 - F.cosine_similarity(found.outputs["embedding"], simulated, dim=1)
    changed = 1 - F.cosine_similarity(original, simulated, dim=1)
    assert bool((apart < changed).all())  # what quantising and BF16 change together, of which BF16 is half
    assert float(apart.max()) < 5e-4


def test_names_of_the_checkpoint_alone_stop_vllm(task: pm.Task, tmp_path: Path) -> None:
    """The linter says so: with the checkpoint's names as targets, vLLM does not find an encoder's projections."""
    given = map_of(task, choice(), "emulated").model_copy(update={"cast": "bfloat16"})
    pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True)
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace(r"(self|output)\\.", r"self\\."))
    assert [one.rule for one in pm.lint(tmp_path / "out", engine="vllm").misread] == ["encoder-names"]
    tokens = task.splits.calibration[0]["input_ids"]
    found = asked("vllm_layers.py", tmp_path / "out", {"tokens": tokens}, tmp_path, "pooling")
    assert "QKVParallelLinear" in found.error


def test_a_server_answers_over_http(task: pm.Task, tmp_path: Path) -> None:
    """`vllm serve` with the exported folder, as the guide says it, and a request for embeddings."""
    given = map_of(task, choice(), "emulated").model_copy(update={"cast": "bfloat16"})
    pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True)
    options = ("--runner", "pooling", "--dtype", "bfloat16", "--max-model-len", "128", "--enforce-eager")
    with served(tmp_path / "out", tmp_path / "log", *options) as address:
        body = json.dumps({"model": str(tmp_path / "out"), "input": TEXTS}).encode()
        request = urllib.request.Request(f"{address}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            found = torch.tensor([one["embedding"] for one in json.load(answer)["data"]])
    model, layers = prepared(task.model, given)
    batch = tokenize(load_tokenizer(), TEXTS, 64)
    with torch.no_grad(), quantized(model, layers):
        expected = model(batch["input_ids"], batch["attention_mask"]).float()
    assert found.shape == expected.shape
    assert (1 - F.cosine_similarity(found, expected, dim=1)).max() < 0.001
