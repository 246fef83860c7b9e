"""A layer that cannot take a scheme stays in base precision with that sentence, whatever fails; all others go on."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precimap.layers.first_order as screening
import precimap.layers.watching as watching
from precimap import PrecisionMap, SearchResult, Splits, Task, search
from precimap.errors import SchemeError, TaskError
from precimap.layers.discover import discover
from precimap.layers.quantized import QuantizedLayer
from precimap.metrics import Loss
from precimap.searching.question import Effort

calibrating = import_module("precimap.searching.calibrate")
EFFORT = Effort(rounding_draws=0, screen_units=100, audit_units=50, check_units=100)


class Odd(nn.Module):
    """Two plain layers, and between them something that only some inputs, some formats or some ops can bear."""

    def __init__(self, odd: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.e, self.m, self.h = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 16)
        self.g, self.o = nn.Parameter(torch.ones(32)), nn.Parameter(torch.ones(16))
        self.odd = odd

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.odd(self, torch.relu(self.m(x)) + x))


def rare(net: Any, x: Tensor) -> Tensor:
    """An expert without a row in the calibration and the search split."""
    rows = x[:, 0] > 20
    return x.index_put((rows,), net.e(x[rows]))


def infinite(net: Any, x: Tensor) -> Tensor:
    return x + net.e(x.masked_fill(x > 2.5, torch.inf)).nan_to_num(0, 1, 0)


def elementwise(net: Any, x: Tensor) -> Tensor:
    return torch.einsum("bi,i->bi", x, net.g)


def outer(net: Any, x: Tensor) -> Tensor:
    return x + torch.einsum("b,i->bi", x[:, 0], net.g)


def outer_tensordot(net: Any, x: Tensor) -> Tensor:
    return x + torch.tensordot(x[:, 0], net.g, dims=0)


def sparse(net: Any, x: Tensor) -> Tensor:
    return x + torch.relu(x - 2).to_sparse().matmul(net.e.weight.t())


def chosen_by_its_result(net: Any, x: Tensor) -> Tensor:
    """Its result picks a column: other values of it are no index."""
    column = (net.e(x).sigmoid() * 31.9).long()
    return x + torch.gather(x, 1, column)


def odd_task(odd: Callable[[Any, Tensor], Tensor], **changes: Any) -> Task:
    torch.manual_seed(0)
    model = Odd(odd).eval()

    def split(seed: int, n: int) -> list[dict[str, Tensor]]:
        x = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            labels = model(x).argmax(1)
        return [{"x": x[i : i + 50], "labels": labels[i : i + 50]} for i in range(0, n, 50)]

    splits = Splits(split(1, 100), split(2, 200), split(3, 400))
    fields: dict[str, Any] = {
        "splits": splits,
        "forward": lambda model, batch: model(batch["x"]),
        "loss": lambda scores, batch: F.cross_entropy(scores, batch["labels"], reduction="none"),
        "metric": Loss(),
    }
    return Task(model, **{**fields, **changes})


def found(task: Task, folder: Path, *schemes: str, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"margin": 5.0, "effort": EFFORT, "ledger": folder / "ledger"}
    return search(task, schemes=list(schemes), **{**asked, **changes})


ODD = {
    "a cold expert": (rare, "int8-static", "e.weight", "no row of the calibration split reached it"),
    "infinity, static": (infinite, "int8-static", "e.weight", "NaN or infinity in its input on the calibration split"),
    "infinity, dynamic": (infinite, "fp8", "e.weight", "NaN or infinity in its input on the first search batch"),
    "a sparse input": (sparse, "int8-static", None, ""),
    "an index": (chosen_by_its_result, "fp8-tensor", None, ""),
    "an elementwise einsum": (elementwise, "fp8", None, ""),
    "an outer product": (outer, "int8-static", None, ""),
    "an outer product by tensordot": (outer_tensordot, "fp8-tensor", None, ""),
}


@pytest.mark.parametrize("case", ODD)
def test_one_layer_does_not_end_the_search(case: str, tmp_path: Path) -> None:
    odd, scheme, out, reason = ODD[case]
    result = found(odd_task(odd), tmp_path, scheme)
    assert result.certified
    assert {"m.weight", "h.weight"} <= set(result.map.low)
    if out is not None:
        assert result.map.layers[out].scheme is None
        assert result.map.layers[out].verdict == "ineligible"
        assert reason in result.map.layers[out].reason
    assert not {"g", "o"} & set(result.map.layers), "a weight that nothing is summed with is no layer"
    assert PrecisionMap.parse(result.map.text()) == result.map


def test_a_layer_without_a_range_is_not_calibrated_again(tmp_path: Path) -> None:
    """What was refused is written down, too: the run that is taken up decides the same and calibrates nothing."""
    calls: list[int] = []

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.append(id(batch["x"]))
        scores: Tensor = model(batch["x"])
        return scores

    task = odd_task(rare, forward=forward)
    first = found(task, tmp_path, "int8-static", run=tmp_path / "run")
    made = len(calls)
    again = found(task, tmp_path, "int8-static", run=tmp_path / "run")
    assert again.map == first.map
    places = [id(batch["x"]) for batch in task.splits.calibration]
    assert not set(places) & set(calls[made:])
    assert set(places) <= set(calls[:made])


def test_a_layer_whose_codes_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = calibrating.quantize_layer

    def failing(name: str, *asked: Any) -> QuantizedLayer:
        if name == "e.weight":
            raise SchemeError("e.weight: planted: no scale holds it")
        return plain(name, *asked)

    monkeypatch.setattr(calibrating, "quantize_layer", failing)
    result = found(odd_task(lambda net, x: x + net.e(x)), tmp_path, "fp8", "int8-static")
    assert result.certified
    assert result.map.layers["e.weight"].reason == "planted: no scale holds it"
    assert {"m.weight", "h.weight"} == set(result.map.low)


def test_a_layer_that_cannot_be_screened_on_a_later_batch_is_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = screening.emulate, [0]

    def failing(call: Any, layer: QuantizedLayer, *asked: Any) -> Any:
        if layer.name == "e.weight":
            calls[0] += 1
            if calls[0] > 2:
                raise RuntimeError("planted: no product of this size")
        return plain(call, layer, *asked)

    monkeypatch.setattr(screening, "emulate", failing)
    result = found(odd_task(lambda net, x: x + net.e(x)), tmp_path, "fp8")
    assert result.certified
    known = {row.layer: row for row in result.evidence.known}
    assert known["e.weight"].predicted is None
    assert known["e.weight"].probed is not None
    assert known["m.weight"].predicted is not None


def strict_task(strict: int) -> Task:
    """Batch `strict` of the search split bears no other values of the layer e than the model's own."""
    task = odd_task(lambda net, x: x + net.e(x))
    places = {id(batch["x"]): number for number, batch in enumerate(task.splits.search)}
    expected: dict[int, Tensor] = {}

    def odd(net: Any, x: Tensor) -> Tensor:
        out = net.e(x)
        if places.get(odd.batch) == strict and not torch.equal(expected.setdefault(strict, out.clone()), out):  # type: ignore[attr-defined]
            raise AssertionError("planted: the strict batch met other values")
        return x + out

    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        odd.batch = id(batch["x"])  # type: ignore[attr-defined]
        scores: Tensor = model(batch["x"])
        return scores

    task.model.odd = odd
    with torch.no_grad():
        forward(task.model, list(task.splits.search)[strict])
    return replace(task, forward=forward)


def test_a_layer_that_fails_when_it_is_probed(tmp_path: Path) -> None:
    """m is before e and changes what e gets, so it fails, too: each by itself, and h goes on."""
    result = found(strict_task(2), tmp_path, "fp8", effort=replace(EFFORT, probe_all=True), run=tmp_path / "run")
    assert result.certified
    assert result.map.low == ("h.weight",)
    for name in ("e.weight", "m.weight"):
        assert result.map.layers[name].verdict == "ineligible"
        assert result.map.layers[name].reason.startswith(
            "in fp8 it cannot be probed: forward failed on batch 2 of the search split (test_one_layer.py, line "
        )
        assert result.map.layers[name].reason.endswith("AssertionError: planted: the strict batch met other values")
    again = found(strict_task(2), tmp_path, "fp8", effort=replace(EFFORT, probe_all=True), run=tmp_path / "run")
    assert again.map == result.map


def test_a_model_that_fails_is_no_layer_s_fault(tmp_path: Path) -> None:
    """From some forward on everything fails, as without memory: an error, and not a map without its layers."""
    calls = [0]

    def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
        calls[0] += 1
        if calls[0] > 14:
            raise RuntimeError("planted: out of memory")
        scores: Tensor = model(batch["x"])
        return scores

    task = odd_task(lambda net, x: x + net.e(x), forward=forward)
    with pytest.raises((TaskError, RuntimeError), match="planted: out of memory"):
        found(task, tmp_path, "fp8", effort=replace(EFFORT, probe_all=True))
    assert calls[0] > 14
    assert not (tmp_path / "ledger").exists()


def test_a_call_that_cannot_be_described(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = watching.product_flops

    def failing(op: Any, left: Tensor, right: Tensor, *asked: Any) -> int:
        if tuple(right.shape) == (16, 32):
            raise ValueError("planted: an odd call")
        return plain(op, left, right, *asked)

    monkeypatch.setattr(watching, "product_flops", failing)
    task = odd_task(lambda net, x: x + net.e(x))
    inventory = discover(task.model, task.forward, next(iter(task.splits.search)))
    assert [layer.name for layer in inventory.layers] == ["e.weight", "m.weight"]
    (other,) = [other for other in inventory.others if other.name == "h.weight"]
    assert other.reason == "a call of linear on it could not be described (planted: an odd call)"
