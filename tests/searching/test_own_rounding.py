"""What a probe shows of the model's own rounding: measured by nudging, and no reason to mistrust a screen."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.small_tasks import INPUTS, Planted, batches, loss, planted_task
from precimap import Splits, Task, search
from precimap.journal import open_journal
from precimap.layers.nudging import MOVED, Nudged, nudged
from precimap.layers.recording import Recording
from precimap.layers.replay import Replay
from precimap.layers.views import parameter_names
from precimap.metrics import Loss
from precimap.searching.evidence import gather as evidence_module
from precimap.searching.evidence.audit import LEAST_CORRELATION, Audited
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.question import Effort

QUICK = Effort(rounding_draws=0)
NUMPY = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16}


def as_numpy(values: Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(NUMPY[values.dtype])


@given(st.sampled_from(list(NUMPY)), st.integers(0, 2**32 - 1))
def test_values_move_to_a_neighbour_or_stay(dtype: torch.dtype, seed: int) -> None:
    """Against numpy's and ml_dtypes' nextafter, over every bit pattern there is."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    before, after = as_numpy(every), as_numpy(nudged(every, torch.Generator().manual_seed(seed)))
    same = before.view(np.int16) == after.view(np.int16)
    with np.errstate(all="ignore"):  # numpy tells of subnormal results
        up = after == np.nextafter(before, np.full_like(before, np.inf))
        down = after == np.nextafter(before, np.full_like(before, -np.inf))
        largest = np.abs(before) == ml_dtypes.finfo(before.dtype).max
        stays = ~np.isfinite(before) | (before == 0) | largest
    assert (same | up | down).all()
    assert same[stays].all()
    assert float(1 - same.mean()) == pytest.approx(MOVED, abs=0.01)


@pytest.mark.parametrize("dtype", list(NUMPY))
def test_as_many_move_as_make_the_spread_of_another_rounding(dtype: torch.dtype) -> None:
    """Two roundings to nearest of sums that differ by more than a unit: the squared difference of their errors, in units."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(1 << 18, generator=generator, dtype=torch.float64) + 1  # one binade: one unit for all
    unit = torch.finfo(dtype).eps
    errors = exact.to(dtype).double() - exact
    anew = errors[torch.randperm(len(errors), generator=generator)]
    moved = nudged(exact.to(dtype), generator).double() - exact.to(dtype).double()
    assert float((moved**2).mean()) / unit**2 == pytest.approx(float(((errors - anew) ** 2).mean()) / unit**2, rel=0.05)


def passes(model: nn.Module, x: Tensor, layer: str) -> tuple[Tensor, Tensor, Recording]:
    weights, recording = parameter_names(model), Recording(1e9)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            before = model(x).clone()
        with Nudged(weights, layer, recording, seed=1):
            after = model(x).clone()
    return before, after, recording


def test_only_16_bits_are_nudged_and_a_float32_model_is_replayed() -> None:
    x = torch.randn(40, INPUTS, generator=torch.Generator().manual_seed(1))
    before, after, recording = passes(Planted().eval(), x, "first.weight")
    assert torch.equal(before, after)
    assert recording.computed == 1, "the mask is written into; all else is known"
    before, after, recording = passes(Bf16Scores().eval(), x, "blocks.3.weight")
    assert recording.replayed > 10
    assert not torch.equal(before, after)
    assert torch.equal(after, passes(Bf16Scores().eval(), x, "blocks.3.weight")[1]), "the seed decides"
    near = (after - before).float().abs().mean() / before.float().abs().mean()
    assert float(near) < 0.02


def test_what_is_written_into_is_nudged_there() -> None:
    class Out(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            held = torch.zeros(len(x), 8, dtype=x.dtype)
            torch.mm(x, self.weight.t(), out=held)
            return held

    before, after, _ = passes(Out().eval(), torch.randn(200, 16).bfloat16(), "weight")
    assert float((before != after).float().mean()) == pytest.approx(MOVED, abs=0.05)


# --- the audit ----------------------------------------------------------------------------------------------------


def audited(predicted: np.ndarray, probed: np.ndarray, rounding: float) -> Audited:
    norms = float(np.linalg.norm(predicted) * np.linalg.norm(probed))
    return Audited(
        layer="layer",
        scheme="fp8",
        correlation=float(predicted @ probed) / norms,
        ratio=float(np.linalg.norm(predicted) / np.linalg.norm(probed)),
        predicted=float(predicted.mean()),
        probed=float(probed.mean()),
        error=0.0,
        n=len(probed),
        missed=float(np.mean((probed - predicted) ** 2)),
        foretold=float(np.mean(predicted**2)),
        rounding=rounding,
    )


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("n", [32, 128])
def test_a_right_screen_is_trusted_whatever_the_models_own_rounding(size: float, n: int) -> None:
    """`size`: of the layer's change over the rounding's. By simulation; a twentieth of the tests may go wrong."""
    draw, right = np.random.default_rng(3), 0
    for _ in range(400):
        change, noise, nudge = size * draw.normal(size=n) + 1e-9, draw.normal(size=n), draw.normal(size=n)
        right += audited(change, change + noise, float(np.mean(nudge**2))).agrees
    assert right >= 400 * 0.93


@pytest.mark.parametrize("spoil", [lambda c: -c, lambda c: 0 * c + 1e-9, lambda c: 3 * c, lambda c: np.roll(c, 1)])
def test_a_wrong_screen_is_caught_where_the_change_stands_out(spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    draw, caught = np.random.default_rng(4), 0
    for _ in range(200):
        change, noise, nudge = 2 * draw.normal(size=32), draw.normal(size=32), draw.normal(size=32)
        caught += not audited(spoil(change), change + noise, float(np.mean(nudge**2))).agrees
    assert caught >= 200 * 0.99


def test_without_rounding_of_its_own_a_model_is_judged_as_ever() -> None:
    draw = np.random.default_rng(5)
    for share in (0.0, 0.2, 0.4, 0.6, 1.0):
        change = draw.normal(size=32)
        found = audited(change, change + share * draw.normal(size=32), 0.0)
        assert found.agrees == (found.correlation >= LEAST_CORRELATION and 0.5 <= found.ratio <= 2)


class Bf16Scores(nn.Module):
    """A BF16 model of ten layers that each do little, whose rounding hides what each of them does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.blocks = nn.ModuleList(nn.Linear(INPUTS, INPUTS) for _ in range(10))
        self.last = nn.Linear(INPUTS, 16)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.bfloat16()
        for block in self.blocks:
            hidden = hidden + 0.05 * torch.relu(block(hidden))
        scores: Tensor = 2 * self.last(hidden)
        return scores


def bf16_task() -> Task:
    model = Bf16Scores().eval()

    def labelled(units: int, seed: int) -> list[dict[str, Tensor]]:
        return batches(lambda x: model(x).float(), units, seed, 50)  # type: ignore[arg-type]

    return planted_task_of(model, Splits(labelled(100, 1), labelled(400, 2), labelled(400, 3)))


def planted_task_of(model: nn.Module, splits: Splits) -> Task:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["x"])
        return scores

    return Task(
        model, splits=splits, forward=forward, loss=lambda s, b: loss(s.float(), b), metric=Loss(), name="bf16 scores"
    )


def evidence_of(folder: Path, scheme: str) -> EvidenceTable:
    effort = replace(QUICK, audit_units=200)
    return search(bf16_task(), schemes=[scheme], margin=0.2, run=folder / "run", ledger=folder, effort=effort).evidence


def test_the_screen_of_a_bf16_model_is_trusted_though_its_rounding_hides_each_layer(tmp_path: Path) -> None:
    found = evidence_of(tmp_path, "fp8")
    assert found.audit is not None
    hidden = [row for row in found.audit.rows if row.correlation < LEAST_CORRELATION]
    assert hidden, "without the measured rounding these would not be believed"
    assert all(row.rounding > 0 for row in found.audit.rows)
    assert found.audit.distrusted == ()
    with open_journal(tmp_path / "run") as journal:
        nudges, probes = journal.count("nudge"), journal.count("probe")
    assert nudges
    assert probes < 4 * (len(found.audit.rows) + 4), "only the audit's layers, and the few that a decision hangs on"


def test_a_wrong_screen_of_a_bf16_model_is_still_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> Screen:
        found = screen(*args)  # type: ignore[arg-type]
        spoiled = {number: replace(batch, changes=-8 * batch.changes) for number, batch in found.batches.items()}
        return replace(found, batches=spoiled)

    monkeypatch.setattr(evidence_module, "screen", wrong)
    found = evidence_of(tmp_path, "fp8-e5m2")
    assert found.audit is not None
    assert found.audit.distrusted


def test_a_float32_model_is_nudged_once(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=["fp8"], margin=0.2, run=tmp_path / "run", ledger=tmp_path, effort=QUICK)
    assert found.evidence.audit is not None
    assert all(row.rounding == 0 for row in found.evidence.audit.rows)
    with open_journal(tmp_path / "run") as journal:
        assert journal.count("nudge") == 1
