"""A map as a compressed-tensors checkpoint: its bits, its names, and what is refused before anything is written.

What engines make of it is in tests/engines.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import precimap as pm
from helpers.small_maps import map_of
from helpers.tiny_llama import SIZES, llama_task, load_llama, mixed_choice, save_llama
from precimap.errors import DeployError, ModelError
from precimap.exporting.checkpoints import compressed_tensors
from precimap.exporting.checkpoints.stated import quantization_config
from precimap.layers.quantized import quantize_map
from precimap.numerics.schemes import SCHEMES

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and compressed-tensors warn about parts of their own


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def task(base: Path) -> pm.Task:
    return llama_task(load_llama(base))


@pytest.fixture(scope="module")
def exported(task: pm.Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pm.Exported]:
    folder = tmp_path_factory.mktemp("served") / "out"
    found = pm.export(task, map_of(task, mixed_choice(), "emulated"), to="vllm", output=folder, uncertified=True)
    return folder, found


def all_tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def by_hand(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes and scale of a row, written out."""
    rows, most = weight.float(), 127.0 if scheme == "int8" else 448.0
    scale = rows.abs().amax(1, keepdim=True) / most
    scaled = rows * (1 / scale)
    codes = scaled.round().clamp(-128, 127).to(torch.int8) if scheme == "int8" else scaled.clamp(-448, 448)
    return (codes if scheme == "int8" else codes.to(torch.float8_e4m3fn)), scale


def test_its_bits_are_the_certified_ones(exported: tuple[Path, pm.Exported], task: pm.Task, base: Path) -> None:
    stored, original, choice = all_tensors(exported[0]), all_tensors(base), mixed_choice()
    certified = quantize_map(task.model, map_of(task, choice, "emulated"))
    assert {*stored} == {*original} | {f"{name}_scale" for name in choice}
    for name, tensor in original.items():
        if name not in choice:
            assert stored[name].dtype is torch.bfloat16
            assert stored[name].equal(tensor), name
            continue
        codes, scale = by_hand(tensor, choice[name])
        assert stored[name].dtype is codes.dtype
        assert stored[name].float().equal(codes.float()), name
        assert stored[f"{name}_scale"].equal(scale), name
        assert (stored[name].float() * stored[f"{name}_scale"]).equal(certified[name].weight()), name


def test_its_config_is_one_that_compressed_tensors_reads(exported: tuple[Path, pm.Exported], base: Path) -> None:
    folder, found = exported
    config = json.loads((folder / "config.json").read_text())
    stated = config.pop("quantization_config")
    assert config == json.loads((base / "config.json").read_text())
    read = QuantizationConfig.model_validate(stated)
    assert read.format == "mixed-precision"
    assert {name: group.format for name, group in read.config_groups.items()} == {
        "int8": "int-quantized",
        "fp8": "float-quantized",
    }
    named = {target for group in stated["config_groups"].values() for target in group["targets"]}
    assert named == {name.removesuffix(".weight") for name in mixed_choice()}
    linears = {name.removesuffix(".weight") for name, tensor in all_tensors(base).items() if tensor.dim() == 2}
    assert named | {*stated["ignore"]} == linears - {"model.embed_tokens"}
    assert named.isdisjoint(stated["ignore"])
    assert found.layers["model.layers.0.mlp.down_proj.weight"] == "INT8 channel x dynamic token"


def test_other_files_come_along_and_other_weights_do_not(exported: tuple[Path, pm.Exported], base: Path) -> None:
    folder, found = exported
    assert (folder / "README.md").read_text() == "mine\n"
    assert not (folder / "pytorch_model.bin").exists()
    assert any("pytorch_model.bin" in note for note in found.notes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in folder.glob("*.safetensors"):
        assert {name for name, where in index["weight_map"].items() if where == file.name} == {*load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in all_tensors(folder).values())
    assert {*found.files} == {path.name for path in folder.iterdir()} - {"export.json"}
    assert pm.Exported.load(folder) == found


@pytest.mark.parametrize("to", ["sglang", "transformers"])
def test_the_engines_get_the_same_files(
    to: str, exported: tuple[Path, pm.Exported], task: pm.Task, tmp_path: Path
) -> None:
    pm.export(task, map_of(task, mixed_choice(), "emulated"), to=to, output=tmp_path / "out", uncertified=True)
    for path in exported[0].iterdir():
        if path.name != "export.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


class Inside(nn.Module):
    """A task's model with a head of its own, around the part of the folder without its last layer."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head = load_llama(folder).model, nn.Linear(256, 1, dtype=torch.bfloat16)  # type: ignore[union-attr]

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.head(self.body(input_ids=input_ids).last_hidden_state[:, -1])
        return states.squeeze(1)


def test_a_model_inside_another_has_the_folders_names(base: Path, tmp_path: Path) -> None:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["input_ids"])
        return scores

    plain = llama_task(load_llama(base))
    task = pm.Task(Inside(base).eval(), splits=plain.splits, metric="log-loss", forward=forward)
    name = "body.layers.0.mlp.down_proj.weight"
    found = pm.export(task, map_of(task, {name: "int8"}), to="vllm", output=tmp_path / "out", uncertified=True)
    stored = all_tensors(tmp_path / "out")
    assert stored["model.layers.0.mlp.down_proj.weight"].dtype is torch.int8
    assert stored["lm_head.weight"].equal(all_tensors(base)["lm_head.weight"])
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["format"] == "int-quantized"
    assert "lm_head" in stated["ignore"]
    assert any("head.weight" in note for note in found.notes)
    assert any("lm_head.weight" in note for note in found.notes)
    head = map_of(task, {"head.weight": "int8"})
    with pytest.raises(DeployError, match=r"head\.weight: the folder does not hold it"):
        pm.export(task, head, to="transformers", output=tmp_path / "head", uncertified=True)


def test_a_cast_model_is_written_in_its_dtype(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "float", torch.float32, shard="1GB")
    task = llama_task(load_llama(folder, torch.float32), batches=3)
    name = "model.layers.0.mlp.down_proj.weight"
    plain = map_of(task, {name: "int8"}, "emulated")
    with pytest.raises(DeployError, match=r"certified with float32 around its low layers.*--to transformers"):
        pm.export(task, plain, to="vllm", output=tmp_path / "plain", uncertified=True)
    cast = plain.model_copy(update={"cast": "bfloat16"})
    pm.export(task, cast, to="vllm", output=tmp_path / "cast", uncertified=True)
    stored, original = all_tensors(tmp_path / "cast"), all_tensors(folder)
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "bfloat16"
    codes, scale = by_hand(original[name], "int8")  # of the float32 values, not of those that the cast rounded
    assert stored.pop(name).equal(codes)
    assert stored.pop(f"{name}_scale").equal(scale)
    assert all(tensor.equal(original[other].bfloat16()) for other, tensor in stored.items())
    pm.export(task, plain, to="transformers", output=tmp_path / "kept", uncertified=True)
    kept = all_tensors(tmp_path / "kept")
    assert kept["lm_head.weight"].equal(original["lm_head.weight"])


REFUSED: list[tuple[dict[str, str], str]] = [
    ({"model.layers.0.mlp.down_proj.weight": "fp8-tensor"}, "fp8-tensor: vLLM's CPU has no kernel for it"),
    ({"model.embed_tokens.weight": "int8-row"}, "model.embed_tokens.weight: int8-row: rows of a table"),
    ({"model.layers.0.mlp.down_proj.weight": "int8-weight"}, "int8-weight: the format has no form of it"),
    (
        {f"model.layers.0.self_attn.{one}_proj.weight": "fp8" if one == "v" else "int8" for one in "qkv"},
        "engines run these as one product, which has one scheme (q_proj int8, k_proj int8, v_proj fp8)",
    ),
    ({"model.layers.0.self_attn.q_proj.weight": "int8"}, "which has one scheme (q_proj int8, k_proj base, v_proj base)"),
]  # fmt: skip


@pytest.mark.parametrize(("choice", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_the_engine_would_misread_is_refused(
    choice: dict[str, str], said: str, task: pm.Task, tmp_path: Path
) -> None:
    with pytest.raises(DeployError) as refused:
        pm.export(task, map_of(task, choice, "emulated"), to="vllm", output=tmp_path / "out", uncertified=True)
    assert said in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_place_that_vllm_builds_without_a_quantisation_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    torch.manual_seed(2)
    config = LlamaConfig(**SIZES, num_labels=16, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).bfloat16().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    plain = llama_task(load_llama(save_llama(tmp_path / "other")), batches=3)
    task = pm.Task(
        model,
        splits=plain.splits,
        metric="log-loss",
        forward=lambda model, batch: model(input_ids=batch["input_ids"]).logits[:, 3],
    )
    given = map_of(task, {"score.weight": "int8"}, "emulated")
    with pytest.raises(DeployError, match=r"score\.weight: vllm is not known to build it with a quantisation"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True)
    pm.export(task, given, to="transformers", output=tmp_path / "out", uncertified=True)


def test_experts_stand_one_by_one_in_the_folder(tmp_path: Path) -> None:
    """transformers loads them into one parameter; they stay as they are, and are compared with it."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    torch.manual_seed(2)
    sizes = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
    AutoModelForCausalLM.from_config(Qwen2MoeConfig(**SIZES, **sizes)).bfloat16().save_pretrained(tmp_path / "base")
    task = llama_task(load_llama(tmp_path / "base"), batches=3)
    low = map_of(task, {"model.layers.0.self_attn.o_proj.weight": "int8"}, "emulated")
    pm.export(task, low, to="vllm", output=tmp_path / "out", uncertified=True)
    stored, original = all_tensors(tmp_path / "out"), all_tensors(tmp_path / "base")
    for name in original:
        assert name == "model.layers.0.self_attn.o_proj.weight" or stored[name].equal(original[name]), name
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    expert = "model.layers.1.mlp.experts.2.up_proj"
    assert {expert, "model.layers.1.mlp.gate", "lm_head"} <= {*stated["ignore"]}
    assert "model.embed_tokens" not in stated["ignore"]
    gate = original[expert.replace("up", "gate") + ".weight"]
    other = changed(tmp_path / "base", tmp_path / "other", **{f"{expert}.weight": gate})
    with pytest.raises(DeployError, match=r"experts\.2\.up_proj.* is not model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        pm.export(task, low, to="vllm", output=tmp_path / "no", uncertified=True, checkpoint=other)
    fewer = changed(tmp_path / "base", tmp_path / "fewer", **{f"{expert}.weight": None})
    with pytest.raises(DeployError, match=r"holds [\d,]+ of the [\d,]+ values of model\.layers\.1"):
        pm.export(task, low, to="vllm", output=tmp_path / "no", uncertified=True, checkpoint=fewer)


def test_a_model_that_was_cast_when_it_was_loaded(tmp_path: Path) -> None:
    """The folder is in float32, and what was certified is in bfloat16: that is what is written."""
    folder = save_llama(tmp_path / "float", torch.float32)
    task = llama_task(load_llama(folder, torch.bfloat16), batches=3)
    name = "model.layers.0.mlp.down_proj.weight"
    pm.export(task, map_of(task, {name: "int8"}, "emulated"), to="vllm", output=tmp_path / "out", uncertified=True)
    stored, original = all_tensors(tmp_path / "out"), all_tensors(folder)
    assert stored.pop(f"{name}_scale").equal(by_hand(original[name].bfloat16(), "int8")[1])
    assert stored.pop(name).equal(by_hand(original[name].bfloat16(), "int8")[0])
    assert all(tensor.equal(original[other].bfloat16()) for other, tensor in stored.items())


def test_transformers_fuses_nothing(task: pm.Task, tmp_path: Path) -> None:
    choice = {"model.layers.0.self_attn.q_proj.weight": "int8", "lm_head.weight": "int8"}
    pm.export(task, map_of(task, choice, "emulated"), to="transformers", output=tmp_path / "out", uncertified=True)


def test_a_tied_head_is_refused(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "tied", tie_word_embeddings=True)
    task = llama_task(load_llama(folder), batches=3)
    both = map_of(task, {"model.embed_tokens.weight": "int8"}, "emulated")
    with pytest.raises(DeployError, match=r"model\.embed_tokens\.weight: read by"):
        pm.export(task, both, to="transformers", output=tmp_path / "out", uncertified=True)
    one = map_of(task, {"model.layers.0.mlp.down_proj.weight": "int8"}, "emulated")
    pm.export(task, one, to="vllm", output=tmp_path / "out", uncertified=True)
    assert "lm_head.weight" not in all_tensors(tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in stated["ignore"]


def changed(base: Path, to: Path, **tensors: Tensor | None) -> Path:
    """The folder, with tensors that are another one's, or gone."""
    shutil.copytree(base, to)
    for file in to.glob("*.safetensors"):
        held = load_file(file)
        for name, tensor in tensors.items():
            if name in held:
                held.pop(name)
                held |= {} if tensor is None else {name: tensor}
        save_file(held, file, metadata={"format": "pt"})
    return to


def test_a_folder_of_other_weights_is_refused(base: Path, task: pm.Task, tmp_path: Path) -> None:
    """Also where the one value that differs is of a tensor that stays as it is."""
    given = map_of(task, {"model.layers.0.mlp.down_proj.weight": "int8"}, "emulated")
    norm = all_tensors(base)["model.norm.weight"].clone()
    norm[7] += 0.0625
    other = changed(base, tmp_path / "other", **{"model.norm.weight": norm})
    with pytest.raises(DeployError, match=r"model\.norm\.weight .* is not model\.norm\.weight"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True, checkpoint=other)
    index = "model.safetensors.index.json"
    less = changed(base, tmp_path / "less", **{"model.norm.weight": None})
    with pytest.raises(ModelError, match=r"names model\.norm\.weight, which"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True, checkpoint=less)
    listed = json.loads((less / index).read_text())
    del listed["weight_map"]["model.norm.weight"]
    (less / index).write_text(json.dumps(listed))
    with pytest.raises(DeployError, match=r"in other pieces: the model has model\.norm\.weight"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True, checkpoint=less)
    with pytest.raises(ModelError, match="cannot be read"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True, checkpoint=tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_export_is_not_exported_again(exported: tuple[Path, pm.Exported], task: pm.Task, tmp_path: Path) -> None:
    given = map_of(task, {"model.layers.0.mlp.down_proj.weight": "int8"}, "emulated")
    with pytest.raises(DeployError, match="is quantised already"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True, checkpoint=exported[0])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_a_byte_that_is_written_wrongly_is_found(
    name: str, task: pm.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(tensors: dict[str, Tensor], path: str, **given: Any) -> None:
        if name in tensors:
            tensors[name] = tensors[name].clone()
            tensors[name].view(torch.uint8).view(-1)[5] ^= 1
        save_file(tensors, path, **given)

    monkeypatch.setattr(compressed_tensors, "save_file", wrong)
    given = map_of(task, {"model.layers.0.mlp.down_proj.weight": "int8"}, "emulated")
    with pytest.raises(DeployError, match=f"{name.removesuffix('.weight')}.*what was written"):
        pm.export(task, given, to="vllm", output=tmp_path / "out", uncertified=True)
    assert not list(tmp_path.iterdir())


def test_encoders_are_named_as_vllm_names_them_too() -> None:
    import re

    low = {"encoder.layer.1.attention.self.query": SCHEMES["int8"], "encoder.layer.1.output.dense": SCHEMES["int8"]}
    stated = quantization_config(low, ["encoder.layer.11.output.dense", "pooler.dense"])
    first, second = stated["config_groups"]["int8"]["targets"]
    for pattern, names in (
        (first, ("encoder.layer.1.attention.self.query", "model.encoder.layer.1.attention.output.query")),
        (second, ("encoder.layer.1.output.dense", "bert.encoder.layer.1.output.dense")),
    ):
        assert all(re.match(pattern.removeprefix("re:"), name) for name in names)
        for other in (
            "encoder.layer.11.attention.self.query",
            "encoder.layer.1.output.dense2",
            "encoderXlayer.1.output",
        ):
            assert not re.match(pattern.removeprefix("re:"), other)
