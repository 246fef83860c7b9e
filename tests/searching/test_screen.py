"""The screen on small models: against direct probes, a full Jacobian, a count of bytes; and what it cannot see is named."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.small_tasks import planted_task, subject_on
from precimap import Effort, Splits, Task, search
from precimap.journal import run_journal
from precimap.layers.discover import discover
from precimap.layers.emulation import SharedInputs, emulate, quantized
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.views import parameter_names
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES
from precimap.searching.calibrate import InputRanges, prepare
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.evidence.screen_plan import plan_screen
from precimap.searching.progress import silent
from precimap.searching.run import Run, scattered
from precimap.task import score

PLENTY = 4 * 2**30
UNITS = 32


class Small(nn.Module):
    """Two ways through: `left` and `right` are added before the last layer."""

    def __init__(self, outputs: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 16)
        self.last = nn.Linear(16, outputs)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.first(x))
        scores: Tensor = self.last(torch.tanh(self.left(hidden)) + self.taken_out(self.right(hidden)))
        return scores

    def taken_out(self, value: Tensor) -> Tensor:
        """What a subclass does to the right way."""
        return value


class Detached(Small):
    def taken_out(self, value: Tensor) -> Tensor:
        return value.detach()


class Routed(Small):
    """The right way only says which column is added to."""

    def taken_out(self, value: Tensor) -> Tensor:
        return F.one_hot(value.argmax(1), 16).to(value.dtype)


class ChangedInPlace(Small):
    """Right under its own no_grad, and impossible to differentiate: what sigmoid saved is changed afterwards."""

    @torch.no_grad()
    def taken_out(self, value: Tensor) -> Tensor:
        return torch.sigmoid(value).mul_(2)


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(scores, batch["labels"], reduction="none")


def numpy_loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(np.square(scores.numpy()).mean(1))


def rounded_loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (1e3 * loss(scores, batch)).round() / 1e3


def batches(seed: int, count: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(UNITS, 16, generator=generator).to(dtype),
            "labels": torch.randint(16, (UNITS,), generator=generator),
        }
        for _ in range(count)
    ]


def small_task(model: nn.Module, loss: Callable[[Any, Any], Tensor] = loss, **fields: Any) -> Task:
    dtype = next(model.parameters()).dtype
    splits = Splits(*(batches(seed, dtype=dtype) for seed in (1, 2, 3)))
    given: dict[str, Any] = {"splits": splits, "forward": lambda m, b: m(b["x"]), "metric": Loss(), **fields}
    return Task(model.eval(), loss=loss, **given)


def screened(task: Task, schemes: Sequence[str] = ("fp8",), memory: int = PLENTY, units: int = 10**6) -> Screen:
    inventory = discover(task.model, task.forward, next(iter(task.splits.search)))
    names = [layer.name for layer in inventory.layers if layer.dead is None]
    pairs = [(name, SCHEMES[scheme]) for name in names for scheme in schemes]
    sizes = [len(batch["x"]) for batch in task.splits.search]
    with run_journal(None, {"a": "test"}) as journal:
        subject = subject_on(Run(task, journal, silent), [SCHEMES[scheme] for scheme in schemes], inventory)
        return screen(subject, pairs, memory, units, partial(scattered, sizes))


def changes(found: Screen, key: tuple[str, str]) -> np.ndarray:
    return np.concatenate([found.change([key], number) for number in sorted(found.batches)])


def probed(task: Task, key: tuple[str, str]) -> np.ndarray:
    """The change of every unit's loss when the layer really is quantised."""
    inventory = discover(task.model, task.forward, next(iter(task.splits.search)))
    layers = prepare(task, inventory, InputRanges({}), {key[0]: SCHEMES[key[1]]})
    losses = []
    for choice in ({}, layers):
        with quantized(task.model, choice):
            losses.append(score(task, task.model, task.splits.search).losses)
    difference: np.ndarray = losses[1] - losses[0]
    return difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_agree_with_probes(dtype: torch.dtype) -> None:
    task = small_task(Small().to(dtype))
    found = screened(task, ["fp8", "fp8-e5m2"])
    assert not found.unseen
    assert not found.by_scores
    assert len(found.pairs) == 8
    for key in found.pairs:
        predicted, direct = changes(found, key), probed(task, key)
        assert predicted.dtype == np.float64
        assert np.corrcoef(predicted, direct)[0, 1] > (0.97 if dtype == torch.float32 else 0.9), key
        assert 0.8 < predicted.std() / direct.std() < 1.25


def test_a_single_score_per_unit_is_screened_by_scores() -> None:
    task = small_task(Small(outputs=1), loss=lambda scores, batch: F.softplus(scores[:, 0]))
    found = screened(task)
    assert found.by_scores
    for key in found.pairs:
        slope = torch.cat([torch.sigmoid(torch.from_numpy(b.scores[:, 0])) for b in found.batches.values()]).numpy()
        assert np.corrcoef(slope * changes(found, key), probed(task, key))[0, 1] > 0.97
        squares = changes(found, key) ** 2
        mean, error = found.output_error(key)
        assert mean == pytest.approx(squares.mean(), rel=1e-6)
        assert error == pytest.approx(squares.std(ddof=1) / len(squares) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(surroundings: Callable[[], Any]) -> None:
    expected = screened(small_task(Small()))
    with surroundings():
        found = screened(small_task(Small()))
    assert found.pairs
    assert all(np.array_equal(found.batches[n].changes, expected.batches[n].changes) for n in expected.batches)
    assert all(np.array_equal(found.batches[n].outputs, expected.batches[n].outputs) for n in expected.batches)


@pytest.mark.parametrize(
    ("model", "hidden"),
    [(Detached(), {"right.weight", "first.weight"}), (Routed(), {"right.weight"})],
    ids=["detach", "argmax"],
)
def test_what_no_gradient_tells_is_unseen_and_probed(model: nn.Module, hidden: set[str], tmp_path: Any) -> None:
    task = small_task(model)
    found = screened(task)
    assert set(found.unseen) == hidden
    assert all("gradient" in why or "detach" in why for why in found.unseen.values())
    assert {name for name, _ in found.pairs} == {"first.weight", "left.weight", "right.weight", "last.weight"} - hidden
    result = search(task, schemes=["fp8"], margin=0.5, ledger=tmp_path)
    rows = {row.layer: row for row in result.evidence.known}
    for name in hidden:
        assert rows[name].predicted is None
        assert rows[name].decisive is rows[name].probed is not None
        assert rows[name].probed is not None
        direct = probed(task, (name, "fp8"))
        assert rows[name].decisive.drop.estimate == pytest.approx(direct.mean(), abs=1e-7)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        (small_task(Small(), loss=numpy_loss), "numpy"),
        (small_task(Small(), loss=rounded_loss), "no gradient"),
        (small_task(Small(), forward=lambda m, b: m(b["x"]).detach()), "does not require grad|not .* used|no gradient"),
        (small_task(ChangedInPlace()), "in place"),
    ],
    ids=["numpy loss", "rounded loss", "detached scores", "changed in place"],
)
def test_without_a_gradient_every_layer_is_probed(task: Task, reason: str, tmp_path: Any) -> None:
    found = screened(task)
    names = {"first.weight", "left.weight", "right.weight", "last.weight"}
    assert (set(found.unseen), dict(found.pairs)) == (names, {})
    for why in found.unseen.values():
        assert re.search(reason, why), why
    result = search(task, schemes=["fp8"], margin=10.0, ledger=tmp_path)
    assert {row.layer for row in result.evidence.known if row.probed is not None} == names
    assert result.certified
    assert set(result.map.low) == names


def _tensors_saved_by_hand(task: Task) -> int:
    """Bytes of what the backward of `Small` needs, written down from its ops: weights, and inputs of silu and tanh."""
    model = task.model
    assert isinstance(model, Small)
    weights = sum(layer.weight.numel() for layer in (model.left, model.right, model.last))
    return 4 * (weights + UNITS * (32 + 16))


def test_memory_is_counted_and_bounded() -> None:
    schemes = ["fp8", "int8", "fp8-e5m2"]
    task = small_task(Small())
    errors = 4 * UNITS * (32 + 16 + 16 + 16)
    decoded = 4 * (16 * 32 + 32 * 16 + 32 * 16 + 16 * 16)
    saved = _tensors_saved_by_hand(task)
    together, apart = screened(task, schemes), screened(task, schemes, memory=errors + decoded + 2 * saved)
    assert together.plan.bytes == pytest.approx(3 * (errors + decoded) + saved, rel=0.05)
    assert apart.plan.bytes == pytest.approx(errors + decoded + saved, rel=0.05)
    assert (len(together.plan.passes), len(apart.plan.passes)) == (1, 3)
    for key in together.pairs:
        np.testing.assert_array_equal(changes(apart, key), changes(together, key))
        assert apart.output_error(key) == together.output_error(key)
    none = screened(task, schemes, memory=1000)
    assert not none.pairs
    assert not none.batches
    assert len(none.unseen) == 4
    assert all("more than the" in why and "smaller batches" in why for why in none.unseen.values())


def test_the_plan_looks_at_the_largest_batch() -> None:
    """One unit alone would fit every layout, and the smallest batch says nothing of the memory."""
    whole = small_task(Small())
    sorted_by_size = [{name: value[:n] for name, value in whole.splits.search[0].items()} for n in (1, 3, UNITS)]  # type: ignore[index]
    splits = Splits(whole.splits.calibration, sorted_by_size, whole.splits.certify)
    task = small_task(Small(), splits=splits)
    assert screened(task).plan.bytes == screened(whole).plan.bytes
    expected = changes(screened(whole), ("first.weight", "fp8"))[:UNITS]
    found = changes(screened(task), ("first.weight", "fp8"))
    np.testing.assert_allclose(found, np.concatenate([expected[:1], expected[:3], expected]), atol=1e-6)


class TakesTurns(Small):
    """In batches that start with a number of this sign the rows of the right way are a part of all rows."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.sign = sign

    def taken_out(self, value: Tensor) -> Tensor:
        return value

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.first(x))
        some = len(x) - 5 if self.sign * x[0, 0] > 0 else len(x)
        routed = F.pad(self.right(hidden[:some]), (0, 0, 0, len(x) - some))
        scores: Tensor = self.last(torch.tanh(self.left(hidden)) + routed)
        return scores


def test_rows_that_come_and_go_are_found_in_each_batch_or_the_layer_is_unseen() -> None:
    """Where the batch of the plan shows that rows are gathered, they are looked for in each; else the layer is out."""
    starts = [float(batch["x"][0, 0]) for batch in small_task(Small()).splits.search]
    assert min(starts) < 0 < max(starts)
    first = -1 if starts[0] < 0 else 1
    task = small_task(TakesTurns(first))
    found = screened(task)
    assert not found.unseen
    assert found.plan.routed == {"right.weight"}
    predicted, direct = changes(found, ("right.weight", "fp8")), probed(task, ("right.weight", "fp8"))
    assert np.corrcoef(predicted, direct)[0, 1] > 0.97
    found = screened(small_task(TakesTurns(-first)))
    assert set(found.unseen) == {"right.weight"}
    assert {name for name, _ in found.pairs} == {"first.weight", "left.weight", "last.weight"}


def test_the_output_error_is_unbiased() -> None:
    """Against |J_unit (Q(y) - y)|^2 with a full Jacobian of one unit at a time."""
    model = Small()
    many = [{"x": b["x"], "labels": b["labels"]} for b in batches(2, count=60)]
    task = small_task(model, splits=Splits(batches(1), many, batches(3)))
    found = screened(task)
    inventory = discover(model, task.forward, many[0])
    for name in ("first.weight", "left.weight"):
        layer = prepare(task, inventory, InputRanges({}), {name: SCHEMES["fp8"]})[name]
        exact = np.concatenate([_squares(model, name, layer, batch["x"]) for batch in many])
        estimate, error = found.output_error((name, "fp8"))
        assert abs(estimate - exact.mean()) < 4 * error
        assert error < 0.1 * estimate


def _squares(model: nn.Module, name: str, layer: Any, x: Tensor) -> np.ndarray:
    class Local(Interception):
        moved = torch.zeros(())

        def on_weight(self, call: WeightCall) -> Any:
            self.plain = call.run()
            self.error = emulate(call, layer, layer.weight(), SharedInputs()) - self.plain
            return self.plain + self.moved

    local = Local({name: parameter_names(model)[name]})

    def scores(moved: Tensor) -> Tensor:
        local.moved = moved
        with local:
            given: Tensor = model(x)
        return given.sum(0)  # of units that do not touch each other: the Jacobian of each, side by side

    width = parameter_names(model)[name].shape[0]
    zeros = torch.zeros(len(x), width)
    jacobian: Tensor = torch.autograd.functional.jacobian(scores, zeros)  # type: ignore[no-untyped-call]
    # jacobian: [scores, units, width]
    change = torch.einsum("sub,ub->us", jacobian, local.error.detach())
    squares: np.ndarray = change.square().sum(1).double().numpy()
    return squares


def test_random_directions_differ_between_batches() -> None:
    task = small_task(Small())
    same = task.splits.search[0]  # type: ignore[index]
    found = screened(small_task(Small(), splits=Splits(task.splits.calibration, [same, same], task.splits.certify)))
    first, second = found.batches.values()
    assert np.array_equal(first.changes, second.changes)
    assert not np.allclose(first.outputs, second.outputs)


def test_part_of_the_split_is_screened_where_a_row_is_a_unit() -> None:
    task = planted_task()
    found = screened(task, units=200)
    assert not found.unseen
    assert sum(batch.outputs.shape[1] for batch in found.batches.values()) == 250  # two batches of 125


def test_planning_leaves_no_trace() -> None:
    task = small_task(Small())
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    inventory = discover(task.model, task.forward, next(iter(task.splits.search)))
    pairs = [(layer.name, SCHEMES["fp8"]) for layer in inventory.layers]
    with run_journal(None, {}) as journal:
        plan_screen(subject_on(Run(task, journal, silent), [SCHEMES["fp8"]], inventory), pairs, PLENTY)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in task.model.parameters())


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(1, 2000))
def test_scattered_batches_reach_the_units_and_spread(sizes: list[int], units: int) -> None:
    chosen = scattered(sizes, units)
    assert list(chosen) == sorted(set(chosen))
    held = sum(sizes[number] for number in chosen)
    assert held >= min(units, sum(sizes))
    assert held - max(sizes) < units  # not many more than asked for
    if len(set(sizes)) == 1 and len(chosen) > 1:
        gaps = np.diff([-1, *chosen, len(sizes)])
        # Three-distance theorem: at most 2.62 times the mean.
        assert max(gaps) <= 3 * (len(sizes) + 1) / len(chosen) + 1


def test_a_run_taken_up_with_less_memory_takes_no_row_for_another(tmp_path: Any) -> None:
    """One scheme at a time orders the table otherwise; what was screened together may not be read as that."""
    task, asked = planted_task(), {"schemes": ["fp8-tensor", "fp8"], "margin": 0.2}
    together = search(task, run=tmp_path / "run", ledger=tmp_path, **asked)
    assert together.evidence.predictor is not None
    less = Effort(screen_memory=together.evidence.predictor.screen.plan.bytes - 1)
    apart = search(task, run=tmp_path / "run", ledger=tmp_path, effort=less, **asked)
    assert apart.evidence.predictor is not None
    assert len(apart.evidence.predictor.screen.plan.passes) == 2
    for key, known in apart.evidence.by_key().items():
        assert known.loss_square == pytest.approx(together.evidence.by_key()[key].loss_square, rel=1e-4)


def test_a_loss_without_gradient_gives_nothing_back_and_says_so(tmp_path: Any) -> None:
    """Single scores are screened without the loss; where every map fails, the loss's gradient would be asked for."""

    def numpy_loss(scores: Tensor, batch: Any) -> Tensor:
        return torch.from_numpy(np.log1p(np.exp(-scores.numpy()))).squeeze(1)

    found = search(small_task(Small(outputs=1), loss=numpy_loss), schemes=["fp8"], margin=1e-9, ledger=tmp_path)
    assert not found.certified
    assert "search split" in found.answer
    assert all(joint.measured is None or not joint.passed(1e-9) for joint in found.chain)
