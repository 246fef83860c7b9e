"""A map as an ONNX file: it holds the certified codes, engines multiply them in INT8, and are certified themselves."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import precimap as pm
from helpers.small_maps import map_of
from precimap.errors import DeployError, InputError
from precimap.exporting import onnx_qdq
from precimap.exporting.exported import Exported
from precimap.exporting.onnx_engines import ENGINES, onnxruntime, openvino
from precimap.exporting.shipped import shipped
from precimap.layers.quantized import QuantizedLayer
from precimap.report.exported_page import exported_page
from precimap.runtime.x86.target import has_bf16, int8_scheme

onnx = pytest.importorskip("onnx", reason="what an export to ONNX needs: pip install 'precimap[onnx,openvino]'")
pytest.importorskip("openvino", reason="the second engine: pip install 'precimap[openvino]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torch.export, torch.onnx and engines warn about parts of their own
    pytest.mark.skipif(
        int8_scheme() != "int8-static" or not has_bf16(), reason="cpu-int8 runs these maps on CPUs with AMX"
    ),
]
PROVEN = ("onnxruntime", "openvino")


class Reviews(nn.Module):
    """Attention over words in one packed projection, a table of bags beside it, wide layers over rows and over stacks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.words, self.tags = nn.Embedding(200, 32), nn.EmbeddingBag(60, 16, mode="mean", padding_idx=0)
        self.packed, self.out = nn.Parameter(0.2 * torch.randn(96, 32)), nn.Linear(32, 32)
        self.each, self.norm = nn.Linear(32, 64), nn.LayerNorm(64)
        self.deep, self.gate, self.head = nn.Linear(80, 96), nn.Linear(80, 96), nn.Linear(96, 1)

    def forward(self, words: Tensor, scale: float = 1.0, *, tags: Tensor) -> dict[str, Any]:
        x = self.words(words)
        queries, keys, values = self.packed.chunk(3)
        x = x + self.out(F.scaled_dot_product_attention(torch.relu(x) @ queries.t(), x @ keys.t(), x @ values.t()))
        states = self.norm(torch.relu(self.each(x)))
        x = torch.cat([states.mean(1), self.tags(tags)], 1)
        hidden = torch.relu(self.deep(x)) * torch.sigmoid(self.gate(x))
        return {"logit": scale * self.head(hidden).squeeze(1), "more": (states, None)}


Batch = dict[str, Tensor]
LOW = {
    "words.weight": "int8-row",
    "tags.weight": "int4-row",
    "packed": "int8-static",
    "each.weight": "int8-static",
    "deep.weight": "int8-static",
    "gate.weight": "bf16",
    "head.weight": "int8-static",
}
PRODUCTS = [name for name, scheme in LOW.items() if scheme == "int8-static"]


def forward(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["words"], 4.0, tags=batch["tags"])["logit"]
    return logits


def some_batch(size: int, length: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    words, tags = (
        torch.randint(200, (size, length), generator=generator),
        torch.randint(60, (size, 5), generator=generator),
    )
    return {"words": words, "tags": tags}


@pytest.fixture(scope="module")
def task() -> pm.Task:
    model, loader = Reviews().eval(), []
    for number in range(40):
        batch = some_batch(100, 5 + number % 3, number)
        with torch.no_grad():
            chance = torch.sigmoid(8 * forward(model, batch))
        loader.append({**batch, "labels": torch.bernoulli(chance, generator=torch.Generator().manual_seed(number))})
    return pm.Task.from_loader(model, loader, metric="log-loss", forward=forward, name="reviews")


@pytest.fixture(scope="module")
def certified(task: pm.Task, tmp_path_factory: pytest.TempPathFactory) -> pm.PrecisionMap:
    found = pm.certify(task, map_of(task, LOW), margin=0.05, ledger=tmp_path_factory.mktemp("ledger"))
    assert found.not_certified is None
    return found


Written = tuple[Path, Exported]


@pytest.fixture(scope="module")
def written(task: pm.Task, certified: pm.PrecisionMap, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("served") / "reviews"
    return folder, pm.export(task, certified, to="onnx", output=folder)


def test_engines_multiply_in_int8_and_compute_the_certified_model(written: Written, certified: pm.PrecisionMap) -> None:
    folder, found = written
    assert sorted(path.name for path in folder.iterdir()) == ["call.json", "export.json", "model.onnx"]
    assert Exported.load(folder) == found
    assert (found.map, found.not_certified) == (certified.fingerprint, None)
    assert [engine.engine for engine in found.served] == list(ENGINES)
    for engine in found.served:
        assert engine.layers == dict.fromkeys(PRODUCTS, "INT8"), engine.engine
        assert engine.refused is None
    for engine in found.served[:2]:
        assert engine.difference is not None
        assert engine.difference.rms <= 0.1 * engine.difference.quantising, engine.engine
    assert found.layers["deep.weight"] == "int8-static as Q/DQ (onnxruntime INT8, openvino INT8, openvino-bf16 INT8)"
    assert found.layers["gate.weight"] == "bf16 (operands and result rounded)"
    assert found.layers["out.weight"] == "float32"
    assert found.inputs == ("words: int64 [n, n1]", "tags: int64 [n, 5]")
    assert any("OpenVINO 2026.4 cuts values off where they become BF16" in note for note in found.notes)
    page = exported_page(found, folder).plain  # type: ignore[union-attr]
    assert "onnxruntime 1." in page
    assert "products of layers: 4 in INT8; scores beside the certified form (cpu-int8)" in page


def constants(path: Path) -> dict[str, Any]:
    return {one.name: onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer}


def range_of(path: Path, product: str) -> tuple[Any, int]:
    """Scale and zero of the pair that a product reads its input through."""
    graph, held = onnx.load(str(path)).graph, constants(path)
    made_by = {name: node for node in graph.node for name in node.output}
    (node,) = (node for node in graph.node if node.name == product)
    back = made_by[node.input[0]]
    quantise = made_by[back.input[0]]
    assert (back.op_type, quantise.op_type) == ("DequantizeLinear", "QuantizeLinear")
    assert list(back.input[1:]) == list(quantise.input[1:])
    assert held[back.input[2]].dtype == np.uint8
    return held[back.input[1]], int(held[back.input[2]])


def test_the_file_holds_the_certified_codes_and_scales(
    written: Written, task: pm.Task, certified: pm.PrecisionMap
) -> None:
    """Read by onnx, and decoded by numpy in its own way."""
    held, layers = constants(written[0] / "model.onnx"), shipped(task, certified, uncertified=False).layers
    places = {name: [name] for name in PRODUCTS} | {"packed": ["packed", "packed#2", "packed#3"]}
    for name, parts in places.items():
        layer, codes = layers[name], np.concatenate([held[f"{part}.codes"].T for part in parts])
        scales = np.concatenate([np.atleast_1d(held[f"{part}.scale"]) for part in parts])
        assert codes.dtype == np.int8
        assert np.array_equal(codes, layer.codes.numpy())
        assert np.array_equal(codes.astype(np.float32) * scales[:, None], layer.weight().numpy())
        assert layer.input_range is not None
        for part in parts:
            assert range_of(written[0] / "model.onnx", part) == (np.float32(layer.input_range.scale), 60)
    rows = layers["words.weight"]
    assert np.array_equal(held["words.weight.codes"], rows.codes.numpy())
    decoded = held["words.weight.codes"] * held["words.weight.scale"].astype(np.float64) + held["words.weight.offset"]
    assert np.array_equal(decoded.astype(np.float32), rows.weight().numpy())
    properties = {one.key: one.value for one in onnx.load(str(written[0] / "model.onnx")).metadata_props}
    assert properties["precimap.map"] == certified.fingerprint
    assert json.loads(properties["precimap.schemes"]) == LOW


def test_the_standard_says_the_same_of_the_file(written: Written, task: pm.Task, certified: pm.PrecisionMap) -> None:
    """onnx's own reference, in numpy, is a third implementation of the operators."""
    from onnx.reference import ReferenceEvaluator

    batch = some_batch(7, 4, 99)
    feed = {name: batch[name].numpy() for name in ("words", "tags")}
    logits = ReferenceEvaluator(str(written[0] / "model.onnx")).run(["logit"], feed)[0]
    expected = forward(pm.deploy(task.model, certified, target="cpu-int8"), batch)
    low = (forward(task.model, batch) - expected).abs().mean()
    assert (torch.from_numpy(logits) - expected).abs().mean() <= 0.1 * low


@pytest.mark.parametrize("engine", PROVEN)
def test_an_engine_answers_as_the_model_does_at_any_size(
    written: Written, task: pm.Task, certified: pm.PrecisionMap, engine: str
) -> None:
    model, deployed = pm.load_exported(written[0], engine=engine), pm.deploy(task.model, certified, target="cpu-int8")
    for size, length in ((1, 1), (3, 9), (257, 6)):
        batch = some_batch(size, length, size)
        found, expected = (each(batch["words"], 4.0, tags=batch["tags"]) for each in (model, deployed))
        assert list(found) == ["logit", "more"]
        assert found["more"][1] is None
        base = forward(task.model, batch)
        low = (base - expected["logit"]).abs().mean()
        assert (found["logit"] - expected["logit"]).abs().mean() <= 0.3 * low
        assert found["more"][0].shape == (size, length, 64)
    with pytest.raises(DeployError, match=r"fixed as \[4\.0\], got 2\.0"):
        model(batch["words"], 2.0, tags=batch["tags"])
    with pytest.raises(
        DeployError, match="calls with 2 positional arguments and tags by name, got one with 3 positional"
    ):
        model(batch["words"], 4.0, batch["tags"])


@pytest.mark.parametrize("engine", PROVEN)
def test_the_map_is_certified_on_the_engine(written: Written, task: pm.Task, engine: str, tmp_path: Path) -> None:
    model, terms = pm.load_exported(written[0], engine=engine), {"alpha_budget": 0.5, "ledger": tmp_path}
    assert pm.compare(task, model, margin=0.05, **terms).certified
    assert not pm.compare(task, lambda batch: -forward(model, batch), margin=0.05, **terms).certified


def test_engines_are_those_of_the_folder(written: Written, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an engine out of onnxruntime, openvino, openvino-bf16, got 'aoti'"):
        pm.load_exported(written[0], engine="aoti")
    found = Exported.load(written[0])
    bad = found.served[1].model_copy(update={"refused": "computes another model"})
    found.model_copy(update={"served": (found.served[0], bad)}).save(tmp_path)
    with pytest.raises(DeployError, match=r"openvino must not serve .*computes another model"):
        pm.load_exported(tmp_path, engine="openvino")


def test_a_product_that_an_engine_computes_in_float_is_told(written: Written, tmp_path: Path) -> None:
    """The same Q/DQ around another spelling, of which ONNX Runtime makes a float product without a word."""
    model = onnx.load(str(written[0] / "model.onnx"))
    (node,) = (node for node in model.graph.node if node.name == "deep.weight")
    assert node.op_type == "Gemm"
    node.op_type = "MatMul"
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert onnxruntime(tmp_path / "model.onnx").layer(["deep.weight"]) == "float32"
    assert onnxruntime(tmp_path / "model.onnx").layer(["each.weight"]) == "INT8"
    assert openvino(tmp_path / "model.onnx").layer(["deep.weight"]) == "INT8"


def plain_task(model: nn.Module, inputs: list[list[Tensor]]) -> pm.Task:
    made = [[{"x": x, "labels": torch.randint(8, x.shape[:1])} for x in split] for split in inputs]
    return pm.Task(
        model.eval(),
        splits=pm.Splits(*made),
        metric="log-loss",
        forward=lambda model, batch: model(batch["x"]),
        name="plain",
    )


@pytest.fixture(scope="module")
def small() -> pm.Task:
    """What a fault is planted in."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 8))
    return plain_task(model, [[torch.randn(60 + n, 32) for n in range(2)] for _ in range(3)])


BOTH = {"0.weight": "int8-static", "2.weight": "int8-static"}


def exported_with(changed: Any, monkeypatch: pytest.MonkeyPatch, task: pm.Task, folder: Path) -> Exported:
    """An export whose graph was changed after torch made it."""
    right = onnx_qdq._translated

    def wrong(program: Any) -> Any:
        made, structure = right(program)
        changed(made.model.graph)
        return made, structure

    monkeypatch.setattr(onnx_qdq, "_translated", wrong)
    return pm.export(task, map_of(task, BOTH), to="onnx", output=folder, uncertified=True)


def first(graph: Any) -> Any:
    (product,) = (
        node
        for node in graph
        if node.metadata_props.get("precimap.layer") == "0.weight" and node.metadata_props["precimap.role"] == "product"
    )
    return product


def without_a_pair(graph: Any) -> None:
    product = first(graph)
    pair = product.inputs[0].producer()
    product.replace_input_with(0, pair.inputs[0].producer().inputs[0])


def with_another_input_scale(graph: Any) -> None:
    quantise = next(node for node in graph if node.op_type == "QuantizeLinear")
    quantise.inputs[1].const_value.numpy()[...] *= 1.001


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            without_a_pair,
            r"0\.weight: expected its input through QuantizeLinear and DequantizeLinear of scale 0\.03",
        ),
        (with_another_input_scale, r"expected its input through .* and zero 60, found"),
    ],
)
def test_what_a_translator_changes_is_refused(
    fault: Any, said: str, small: pm.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeployError, match=said):
        exported_with(fault, monkeypatch, small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_a_writer_that_changes_the_codes_is_found(
    part: str, small: pm.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = onnx_qdq.weight_in_onnx

    def wrong(layer: QuantizedLayer, parameter: Tensor) -> Any:
        codes, scale = layer.codes.clone(), layer.weight_affine.scale.clone()
        if layer.name == "0.weight":
            codes[0, 0] ^= part == "codes"
            scale[0] *= 1.001 if part == "scales" else 1
        return right(replace(layer, codes=codes, weight_affine=replace(layer.weight_affine, scale=scale)), parameter)

    monkeypatch.setattr(onnx_qdq, "weight_in_onnx", wrong)
    with pytest.raises(DeployError, match=rf"0\.weight: expected the map's {part}"):
        pm.export(small, map_of(small, BOTH), to="onnx", output=tmp_path / "out", uncertified=True)


def test_a_file_of_another_model_is_refused(small: pm.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a translator that computes something else would give it: the sigmoid left out."""

    def wrong(graph: Any) -> None:
        (node,) = (node for node in graph if node.op_type == "Sigmoid")
        node.outputs[0].replace_all_uses_with(node.inputs[0])

    with pytest.raises(
        DeployError, match=r"no engine here serves it: onnxruntime: .*another model.*openvino: .*another model"
    ):
        exported_with(wrong, monkeypatch, small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_fp8_fp16_and_weights_alone(task: pm.Task, tmp_path: Path) -> None:
    schemes = {
        "words.weight": "int8-weight",
        "packed": "fp8-weight",
        "each.weight": "fp8-static",
        "deep.weight": "fp8-static",
        "gate.weight": "fp16",
        "head.weight": "int8-static-u7",
    }
    found = pm.export(task, map_of(task, schemes, "emulated"), to="onnx", output=tmp_path / "out", uncertified=True)
    ort, vino, _ = found.served
    assert ort.difference is not None
    assert ort.difference.rms <= 0.1 * ort.difference.quantising
    assert ort.layers["head.weight"] == vino.layers["head.weight"] == "INT8"
    assert ort.layers["deep.weight"] == vino.layers["deep.weight"] == "float32"
    assert found.layers["words.weight"] == "int8-weight (stored; decoded when read)"
    held = constants(tmp_path / "out" / "model.onnx")
    codes = shipped(task, map_of(task, schemes, "emulated"), uncertified=True).layers["each.weight"].codes
    assert held["each.weight.codes"].dtype.name == "float8_e4m3fn"
    assert np.array_equal(held["each.weight.codes"].T.view(np.uint8), codes.view(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("name", "scheme", "said"),
    [
        (
            "deep.weight",
            "int8",
            r"deep\.weight in int8: .*static scales alone; certify a map with int8-static, or --to aoti",
        ),
        ("deep.weight", "fp8", r"deep\.weight in fp8: .*certify a map with fp8-static"),
        ("deep.weight", "fp8-fnuz-static", "no engine that reads ONNX multiplies AMD's FP8"),
        ("tags.weight", "int8-static", r"tags\.weight in int8-static: a lookup multiplies nothing"),
    ],
)
def test_what_onnx_cannot_say_is_refused(name: str, scheme: str, said: str, task: pm.Task, tmp_path: Path) -> None:
    made = map_of(task, {name: scheme, "head.weight": "int8-static"}, "emulated")
    with pytest.raises(DeployError, match=said):
        pm.export(task, made, to="onnx", output=tmp_path / "out", uncertified=True)
    assert not list(tmp_path.iterdir())


def test_without_the_extra(task: pm.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    found = pm.export(task, map_of(task, LOW), to="onnx", output=tmp_path / "one", uncertified=True)
    assert [engine.engine for engine in found.served] == ["onnxruntime"]
    assert "openvino is not installed and was not tried: pip install 'precimap[openvino]'" in found.notes
    with pytest.raises(ImportError, match=r"pip install 'precimap\[openvino\]'"):
        pm.load_exported(tmp_path / "one", engine="openvino")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'precimap\[onnx\]'"):
        pm.export(task, map_of(task, LOW), to="onnx", output=tmp_path / "two", uncertified=True)


def test_a_convolution_is_refused_and_one_over_single_positions_is_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    task = plain_task(model, [[torch.randn(60 + n, 3, 8, 8) for n in range(2)] for _ in range(3)])
    with pytest.raises(DeployError, match=r"0\.weight: something reads it that is no product of matrices"):
        pm.export(
            task,
            map_of(task, {"0.weight": "int8-static"}, "emulated"),
            to="onnx",
            output=tmp_path / "a",
            uncertified=True,
        )
    low = {"0.weight": "bf16", "2.weight": "int8-static"}
    found = pm.export(task, map_of(task, low, "emulated"), to="onnx", output=tmp_path / "b", uncertified=True)
    ort = found.served[0]
    assert ort.layers == {"2.weight": "INT8"}
    assert ort.difference is not None
    assert ort.difference.rms <= 0.2 * ort.difference.quantising


class Ragged(nn.Module):
    """Bags that begin at offsets, a tied table, and a dataclass of transformers for a result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.bags, self.mean = (
            nn.EmbeddingBag(900, 16, mode="sum"),
            nn.EmbeddingBag(900, 16, mode="mean", padding_idx=3),
        )
        self.wide, self.head = nn.Linear(32, 64), nn.Linear(64, 2)

    def forward(self, ids: Tensor, offsets: Tensor) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        hidden = torch.relu(self.wide(torch.cat([self.bags(ids, offsets), self.mean(ids, offsets)], 1)))
        return SequenceClassifierOutput(logits=self.head(hidden))


def test_ragged_bags_and_a_dataclass_of_outputs(tmp_path: Path) -> None:
    from transformers.modeling_outputs import SequenceClassifierOutput

    def given(size: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, 9, (size,), generator=generator)
        lengths[0] = 0  # a bag of nothing
        ids = torch.randint(900, (int(lengths.sum()),), generator=generator)
        return {"ids": ids, "offsets": lengths.cumsum(0) - lengths, "labels": lengths % 2}

    def scores(model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(batch["ids"], batch["offsets"]).logits
        return found

    made = [[given(200 + number, 10 * split + number) for number in range(2)] for split in range(3)]
    task = pm.Task(Ragged().eval(), splits=pm.Splits(*made), metric="log-loss", forward=scores, name="ragged")
    low = {"bags.weight": "int8-row", "wide.weight": "int8-static"}
    found = pm.export(task, map_of(task, low), to="onnx", output=tmp_path / "out", uncertified=True)
    assert found.inputs == ("ids: int64 [n]", "offsets: int64 [n1]")
    deployed, batch = pm.deploy(task.model, map_of(task, low), target="cpu-int8"), given(7, 99)
    for engine in PROVEN:
        result = pm.load_exported(tmp_path / "out", engine=engine)(batch["ids"], batch["offsets"])
        assert type(result) is SequenceClassifierOutput
        off = (result.logits - scores(deployed, batch)).abs().mean()
        assert off <= 0.1 * (scores(task.model, batch) - scores(deployed, batch)).abs().mean(), engine
