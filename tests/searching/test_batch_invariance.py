"""Whether a unit's answer depends on its batch: against an oracle in numpy, and what cannot be cut is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from helpers.small_tasks import planted_task, subject_on
from precimap import Splits, Task, discover, search
from precimap.journal import run_journal
from precimap.layers.emulation import quantized
from precimap.metrics import Loss
from precimap.numerics.schemes import scheme
from precimap.report.run_record import read_run
from precimap.report.tables import preflight_text
from precimap.searching.calibrate import InputRanges, prepare
from precimap.searching.preflight.batch_invariance import BatchDependence, batch_dependence
from precimap.searching.preflight.batches import along_units, cut
from precimap.searching.progress import silent
from precimap.searching.run import Run
from precimap.task import first_batch

UNITS, WIDTH = 8, 16
NO_RANGES = InputRanges({})
Floats = NDArray[np.float64]


def _inputs(outlier: float = 0.0) -> Tensor:
    """Units whose largest value is 1; the last one is an outlier, of one value only so that its products are exact."""
    x = torch.randn(UNITS, WIDTH, generator=torch.Generator().manual_seed(7))
    x /= x.abs().amax(1, keepdim=True)
    if outlier:
        x[-1] = torch.eye(WIDTH)[0] * outlier
    return x


def _task(batch: Any, forward: Callable[[Any, Any], Tensor] = lambda model, batch: model(batch["x"])) -> Task:
    """One linear layer; the loss of a unit is its first score."""
    model = nn.Linear(WIDTH, WIDTH, bias=False).eval()
    with torch.no_grad():
        model.weight.copy_(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(8)))
    splits = Splits([batch], [batch], [batch])
    return Task(model, splits=splits, forward=forward, loss=lambda scores, _: scores[:, 0], metric=Loss("first score"))


def _measured(task: Task, *names: str) -> tuple[BatchDependence, ...]:
    with run_journal(None, {}) as journal:
        return batch_dependence(subject_on(Run(task, journal, silent), [scheme(name) for name in names]))


def _fp8(values: NDArray[np.float32]) -> Floats:
    """One scale for all of them, by ml_dtypes."""
    scale = np.float32(abs(values).max()) / np.float32(448)
    codes = (values * (np.float32(1) / scale)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    return codes.astype(np.float64) * float(scale)


def _rms(values: Floats) -> float:
    return float(np.sqrt((values**2).mean()))


def test_the_measured_change_is_that_of_an_oracle() -> None:
    x = _inputs(outlier=1e6)  # one scale flushes the seven other units to zero; a part without the outlier keeps them
    task = _task({"x": x})
    (found,) = _measured(task, "fp8-tensor")
    weight = task.model.weight.detach().numpy()
    exact, w = x.numpy().astype(np.float64) @ weight.T.astype(np.float64), _fp8(weight)
    whole = _fp8(x.numpy()) @ w.T
    assert (whole[:-1] == 0).all()
    assert (found.scheme, found.layers, found.n, found.refused) == ("fp8-tensor", 1, UNITS, None)
    assert [each.parts for each in found.cuts] == [2, UNITS]
    for each in found.cuts:
        parts = np.concatenate([_fp8(part) @ w.T for part in np.split(x.numpy(), each.parts)])
        moved, effect = parts - whole, _rms(whole - exact)
        assert each.rms == pytest.approx(_rms(moved) / effect, rel=1e-4)
        assert each.largest == pytest.approx(np.sqrt((moved**2).mean(1)).max() / effect, rel=1e-4)
        assert each.base_rms == pytest.approx(0, abs=1e-4)
        assert each.change.estimate == pytest.approx(moved[:, 0].mean(), rel=1e-4)
        assert each.change.error == pytest.approx(moved[:, 0].std(ddof=1) / np.sqrt(UNITS), rel=1e-4)
        assert each.change.changed == (UNITS // 2 if each.parts == 2 else UNITS - 1)
    assert "was scored in 2 parts and single units, too, with 1 layers in it. In 2 parts scores moved by" in found.note
    assert "In single units scores moved by" in found.note
    assert found.note.endswith("It cannot under fp8 (a scale for each token) or fp8-static (a fixed scale).")
    still = replace(found, cuts=tuple(replace(cut, rms=0.0) for cut in found.cuts))
    assert "too, with 1 layers in it: no score moved. It cannot" in still.note
    assert found.alternatives == ("fp8 (a scale for each token)", "fp8-static (a fixed scale)")


def test_units_of_one_range_do_not_depend_on_their_batch() -> None:
    (found,) = _measured(_task({"x": _inputs()}), "fp8-tensor")
    for each in found.cuts:
        assert each.rms == pytest.approx(0, abs=1e-5)
        assert each.change.estimate == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["fp8", "fp8-static", "int8", "int8-static", "fp8-weight"])
def test_other_schemes_are_not_measured(name: str) -> None:
    assert _measured(_task({"x": _inputs(outlier=1e6)}), name) == ()


def test_the_alternative_with_a_scale_for_each_token_is_one() -> None:
    task = _task({"x": _inputs(outlier=1e6)})
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    parts = cut(first_batch(task, task.splits.search), UNITS, UNITS)
    assert parts is not None
    with torch.no_grad(), quantized(task.model, prepare(task, inventory, NO_RANGES, {"weight": scheme("fp8")})):
        whole = task.forward(task.model, first_batch(task, task.splits.search))
        torch.testing.assert_close(torch.cat([task.forward(task.model, part) for part in parts]), whole)


def test_what_the_base_model_does_is_told_apart() -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        scores: Tensor = model(batch["x"])
        return scores + 0.01 * len(scores)  # as if another kernel ran for another size

    x = _inputs()
    (found,) = _measured(_task({"x": x}, forward), "fp8-tensor")
    weight = _task({"x": x}).model.weight.detach().numpy()
    effect = _rms(_fp8(x.numpy()) @ _fp8(weight).T - x.numpy().astype(np.float64) @ weight.T.astype(np.float64))
    for each in found.cuts:
        by_hand = 0.01 * (UNITS - UNITS // each.parts)
        assert each.base_rms == pytest.approx(by_hand / effect, rel=1e-3)
        assert each.base_change.estimate == pytest.approx(-by_hand, rel=1e-3)
        assert each.base_change.error == pytest.approx(0, abs=1e-6)
        assert each.rms == pytest.approx(each.base_rms, rel=1e-3), "the units themselves have one range"


class _Packed(NamedTuple):
    flat: Tensor
    starts: Tensor


def _bags(model: nn.Module, batch: _Packed) -> Tensor:
    starts = batch.starts.long().tolist()
    rows = [batch.flat[a:b].mean(0) for a, b in zip(starts, [*starts[1:], len(batch.flat)], strict=True)]
    scores: Tensor = model(torch.stack(rows))
    return scores


def _only_all(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"].view(UNITS, WIDTH))
    return scores


FLAT = torch.randn(3 * UNITS, WIDTH, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("batch", "forward", "said"),
    [
        (
            _Packed(FLAT, torch.arange(0.0, 3 * UNITS, 3)),
            _bags,
            "not cut along its units",
        ),  # no column of whole numbers
        ([FLAT], lambda model, batch: model(batch[0][::3]), "nothing in the batch has one row per unit"),
        ({"x": FLAT[:1]}, lambda model, batch: model(batch["x"]), "holds one unit"),
        ({"x": FLAT[:UNITS]}, _only_all, "forward failed on one of 2 parts"),
        ({"x": FLAT[:UNITS]}, lambda model, batch: model(FLAT[:UNITS]), "scores, and"),
    ],
)
def test_a_batch_that_cannot_be_cut_is_said_so(batch: Any, forward: Any, said: str) -> None:
    (found,) = _measured(_task(batch, forward), "fp8-tensor")
    assert found.cuts == ()
    assert found.refused is not None
    assert said in found.refused
    assert found.refused in found.note


def test_only_what_has_one_row_per_unit_is_changed() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "texts": ["a", "b", "c"], "rest": (torch.arange(5), ["a"], 3, None)}
    halves = cut(batch, 3, 2)
    assert halves is not None
    assert [half["texts"] for half in halves] == [["a"], ["b", "c"]]
    assert torch.equal(torch.cat([half["x"] for half in halves]), batch["x"])
    assert all(
        torch.equal(half["rest"][0], torch.arange(5)) and half["rest"][1:] == (["a"], 3, None) for half in halves
    )
    assert along_units(batch["rest"], 3, lambda rows: rows) is None


def test_a_search_says_it_and_writes_it_down(tmp_path: Path) -> None:
    task, run = planted_task(units=200), tmp_path / "run"
    found = search(task, schemes=["fp8-tensor", "fp8"], margin=0.2, pinned=["outlier*"], ledger=tmp_path, run=run)
    (measured,) = found.preflight.batch_dependence
    assert measured.note in found.preflight.notes
    assert ([each.parts for each in measured.cuts], measured.n, measured.layers) == ([2, 8], 125, 2)
    assert all(each.rms is not None and each.rms > 0 for each in measured.cuts)
    written = read_run(run).as_row()["preflight"]
    assert written["batch_dependence"][0]["cuts"][1]["rms"] == measured.cuts[1].rms
    assert measured.note in str(preflight_text(found.preflight))
    other = search(replace(task, name="other"), schemes=["fp8"], margin=0.2, ledger=tmp_path / "second")
    assert (other.preflight.notes, other.preflight.batch_dependence) == ((), ())
