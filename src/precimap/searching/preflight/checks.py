"""One batch through everything, before hours are spent.

Invariant: whatever can be known to be wrong from one batch and the splits' content is said here, in the user's terms, as
a TaskError; what is only worth knowing is a note. The model is scored, never changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from precimap.errors import ModelError, TaskError
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.layers.special import check_visible, is_exported, is_finite
from precimap.layers.views import plain_name
from precimap.metrics.click import NE, NE_MARGINS
from precimap.metrics.guard import Head
from precimap.metrics.metric import RELATIVE
from precimap.searching.preflight.batch_invariance import BatchDependence
from precimap.searching.preflight.batches import along_units
from precimap.searching.preflight.in_place import check_tables, written_by
from precimap.searching.preflight.own_model import USERS_ERRORS, ModelState, Uses, check_given_model, check_no_memory
from precimap.searching.preflight.sample_size import Outlook
from precimap.searching.preflight.split_checks import check_clusters, check_slice, check_splits
from precimap.searching.splits.axes import is_square
from precimap.searching.splits.columns import counted_by
from precimap.searching.splits.reads import Path, Reads, watched
from precimap.searching.splits.three_splits import first_of
from precimap.task import Scored, Task, join_parts, score_batch, to_device
from precimap.user_code import can_be_written

# Other units may move by rounding when one unit changes (another kernel for another padding), not by more.
INFLUENCE_TOLERANCE = 1e-4
NAMED_AT_MOST = 5
LARGE_RELATIVE_MARGIN = 0.1
LARGE_NE_MARGIN = 0.01


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Preflight:
    """What a few batches showed. outlook: what the splits can tell, of the gate first, then of each guard.

    batch_dependence: of each scheme under which units of one batch share a scale.
    """

    search_units: int
    certify_units: int
    outlook: tuple[Outlook, ...]
    notes: tuple[str, ...]
    batch_dependence: tuple[BatchDependence, ...] = ()

    def __repr__(self) -> str:
        said = f"{self.search_units:,} units to search, {self.certify_units:,} to certify, {len(self.notes)} notes"
        return f"Preflight({said}{'' if self.impossible is None else ', no map can be certified'})"

    @property
    def detectable(self) -> float:
        """The margin of the gate at which the certify split certifies a map without a drop, as noisy as everything low."""
        return self.outlook[0].detectable

    @property
    def impossible(self) -> str | None:
        """Why no map can be certified with these splits, None where one can."""
        return next((found.impossible for found in self.outlook if found.impossible is not None), None)


def check_weights(task: Task) -> None:
    """Raises ModelError for a model in training mode, without weights, that cannot be looked into, or with parameters that
    are not finite; TaskError inside of torch.inference_mode()."""
    if torch.is_inference_mode_enabled():
        raise TaskError(
            "expected a call outside of torch.inference_mode(), whose tensors take no gradient; leave the block"
        )
    if task.model.training and not is_exported(task.model):
        raise ModelError("expected a model in evaluation mode, got one in training mode; call model.eval() first")
    tensors = dict((*task.model.named_parameters(), *task.model.named_buffers()))
    unnamed = [name for name in tensors if not can_be_written(name)]
    if unnamed:
        raise ModelError(f"expected names that can be written to a file, got {unnamed[0]!r}, which is no Unicode text")
    empty = [plain_name(name) for name, x in tensors.items() if x.is_meta or is_lazy(x)]
    if empty:
        raise ModelError(
            f"expected a model with its weights, got none yet in {', '.join(empty[:5])} (on the meta device, or of a lazy "
            "module that no batch has run through); load them first"
        )
    check_visible(task.model)
    broken = [plain_name(n) for n, p in task.model.named_parameters() if not is_finite(p)]
    if broken:
        raise ModelError(f"expected finite weights, got NaN or Inf in {', '.join(broken[:5])}; repair the model first")


@dataclass(frozen=True, slots=True, eq=False)
class FirstBatch:
    """The first search batch under the model as given. reads: what forward and loss read of it."""

    scored: Scored
    reads: Reads
    notes: tuple[str, ...]


def check_task(task: Task) -> FirstBatch:
    """Look at every batch; score the first search batch twice, with one unit replaced, and with a copy of the model.

    Raises ModelError as `check_weights`, TaskError as `check_splits`, for a forward that fails, that is not deterministic,
    that writes the model or computes with another one than it is given, or whose units influence each other.
    """
    check_weights(task)
    check_splits(task)
    check_tables(task.model)
    batch = to_device(first_of(task), task.device)
    state = ModelState.of(task.model)
    with Uses.of(task.model) as fresh:
        first, reads = _score_watched(task, batch)
    state.check_unwritten()
    state = ModelState.of(task.model)  # what the first call builds once is no matter
    with Uses.of(task.model) as again:
        second = _score_one(task, batch)
    notes = [f"forward adds to {name} of the model with every call; is that a cache?" for name in state.grown()]
    state.check_unwritten()
    if not (first.losses == second.losses).all():
        why = written_by(task, batch) or "switch off dropout and sampling, and fix the seed in forward"
        raise TaskError(f"the same batch scored twice gives other losses; {why}")
    with Uses.of(task.model) as another:
        influence = _influence(task, batch, first)
    check_no_memory(fresh, again, another)
    found = check_given_model(task, batch), influence
    return FirstBatch(first, reads, (*notes, *(note for note in found if note)))


def check_unchanged(task: Task, first: Scored) -> None:
    """Raises TaskError when the first search batch is scored otherwise than in the beginning."""
    again = _score_one(task, to_device(first_of(task), task.device))
    if not (again.losses == first.losses).all():
        raise TaskError(
            f"{int((again.losses != first.losses).sum())} units of the first search batch have other losses now than "
            "when this search began: forward, loss or the model changed on the way, so the baseline and the maps were not "
            "measured alike. Remove what counts calls, draws numbers or writes state, and choose another run directory"
        )


def _influence(task: Task, batch: Any, first: Scored) -> str | None:
    """A note where units could not be told apart. Raises TaskError where one that is replaced changes others."""
    changed = _with_unit_replaced(batch, len(first.losses), 0)
    if changed is None:
        return "whether units influence each other was not checked: no tensor of the batch has one row per unit"
    try:
        after = _score_one(task, changed)
    except TaskError:  # what has a row per unit may be counts or places, which no other unit's fit
        return (
            "whether units influence each other was not checked: forward fails when one unit is put in another's place"
        )
    moved = _moved(first, after)
    if moved.any() and is_square(batch, len(first.losses)):  # its units may lie along the later dim
        moved = _moved(first, _score_one(task, _with_unit_replaced(batch, len(first.losses), 1)))
    if moved.any():
        raise TaskError(
            f"replacing one unit of a batch changed the losses of {int(moved.sum())} others; units must not influence each "
            "other (in-batch negatives, batch statistics): score each against a frozen index, or make the group the unit"
        )
    return None


def _moved(first: Scored, after: Scored) -> np.ndarray:
    """Which of the units but the first have another loss."""
    moved: np.ndarray = abs(after.losses[1:] - first.losses[1:]) > INFLUENCE_TOLERANCE * (1 + abs(first.losses[1:]))
    return moved


def _score_watched(task: Task, batch: Any) -> tuple[Scored, Reads]:
    """The scores of the batch, and what was read for them; where a function takes no watched dict, that is not known."""
    read: list[set[Path]] = [set(), set()]

    def watching(function: Callable[[Any, Any], Any], read: set[Path]) -> Callable[[Any, Any], Any]:
        def called(first: Any, _: Any) -> Any:
            try:
                return function(first, watched(batch, read))
            except USERS_ERRORS:  # it may want the very dict; if it fails with that one, too, that is what is said
                read.clear()
                return function(first, batch)

        return called

    seen = replace(task, forward=watching(task.forward, read[0]), loss=watching(task.loss, read[1]))
    scored = _score_one(seen, batch)
    forward, loss = (frozenset(paths) if paths else None for paths in read)
    return scored, Reads(forward, loss, counted_by(batch, len(scored.losses)))


def _score_one(task: Task, batch: Any) -> Scored:
    with torch.no_grad(), quantized(task.model, {}):
        return join_parts(task, [score_batch(task, task.model, batch, "the first batch of the search split")])


def _with_unit_replaced(batch: Any, units: int, least: int) -> Any:
    """The batch with its first unit overwritten by its last one; None where nothing has one row per unit.

    least: the first dim along which the units of a tensor may lie; the first one of their number does not count before it.
    """

    def replaced(rows: Any) -> Any:
        if not isinstance(rows, Tensor):
            return [rows[-1], *rows[1:]]
        axis = next((k for k, size in enumerate(rows.shape) if k >= least and size == units), 0)
        return rows.index_select(axis, torch.tensor([units - 1, *range(1, units)], device=rows.device))

    return along_units(batch, units, replaced) if units > 1 else None


def check_baseline(task: Task, baseline: Scored, split: str = "search") -> None:
    """Raises TaskError when the split's metric cannot show a drop at all."""
    if len(baseline.values) < 2:
        raise TaskError(f"expected at least 2 units in the {split} split, got {len(baseline.values)}")
    if baseline.units.clusters is not None:
        check_clusters(baseline.units.clusters, split)
    if (baseline.values == baseline.values[0]).all() and task.metric.worst is None:
        raise TaskError(
            f"{task.metric.name} is {baseline.values[0]} for every unit of the {split} split; "
            "a constant cannot show a drop. Are the labels right?"
        )
    for name, value in _values(task, baseline, split).items():
        if not isfinite(value):
            raise TaskError(f"{name} is {value} on the {split} split; it needs labels of both classes")


def doubts(task: Task, baseline: Scored, margin: float) -> tuple[str, ...]:
    """What is possible and mostly a mistake: probabilities given as logits, a margin of several times the metric."""
    found = []
    try:
        values = _values(task, baseline, "search")
    except TaskError:  # of one batch, which may hold one class
        return ()
    asked = {task.metric.name: (task.metric, margin), **{g.label: (g.metric, g.margin) for g in task.guarded}}
    for name, (metric, accepted) in asked.items():
        plain = metric.metric if isinstance(metric, Head) else metric
        if isinstance(plain, NE) and values[name] > 1:
            found.append(
                f"{name} of the baseline is {values[name]:.3f}; above 1 a model is worse than the mean label. Are the "
                "scores logits (not probabilities) and the labels theirs?"
            )
        large = LARGE_NE_MARGIN if isinstance(plain, NE) else LARGE_RELATIVE_MARGIN
        if metric.unit == RELATIVE and accepted >= large:
            usual = f" Teams that live by NE accept {', '.join(NE_MARGINS)}." if isinstance(plain, NE) else ""
            found.append(
                f"a margin of {accepted:g} for {name} is {accepted:.0%} of the baseline's; is that meant?{usual}"
            )
    return tuple(found)


def _values(task: Task, baseline: Scored, split: str) -> dict[str, float]:
    """The gate and the guards on a split. Raises TaskError for a slice that cannot be judged."""
    found = {task.metric.name: task.metric.value(baseline.values, baseline.units)}
    for guard in task.guarded:
        rows = baseline.slices.get(guard.label)
        if rows is not None:
            check_slice(rows, baseline.units.clusters, guard.label, split)
        found[guard.label] = guard.metric.value(*baseline.of_guard(guard.label))
    return found


def model_notes(inventory: Inventory, coupled: Sequence[BatchDependence]) -> tuple[str, ...]:
    """What is worth knowing before the search."""
    found = [dependence.note for dependence in coupled]
    if inventory.hidden_flops:
        share = (inventory.weight_flops - inventory.layer_flops) / inventory.flops
        hidden = _some([f"{where} ({flops:,} FLOPs)" for where, flops in inventory.hidden_flops])
        found.append(f"{share:.1%} of the FLOPs are in products that no layer stands for, in base precision: {hidden}")
    if inventory.uncounted:
        found.append(f"calls whose FLOPs nobody counts, and in no share that is given: {_some(inventory.uncounted)}")
    return tuple(found)


def _some(said: Sequence[str]) -> str:
    """The first few, and how many more; `precimap layers` lists all."""
    more = f"; and {len(said) - NAMED_AT_MOST} more" if len(said) > NAMED_AT_MOST else ""
    return "; ".join(said[:NAMED_AT_MOST]) + more
