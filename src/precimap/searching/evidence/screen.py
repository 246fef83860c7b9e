"""The screen: one instrumented pass tells, for every layer and scheme at once, what quantising it would change.

Where each score depends on one row of the batch alone, or a unit has few scores (several heads: a backward pass each),
it gives the first-order change of every score: adding the changes of a map's layers to the baseline's scores predicts
its metric without a forward pass. Otherwise it gives the change of every unit's loss. Beside it stands the output
error, E|change of the scores|^2, in the latter case through random probes of the output, which read no label
(Hutchinson 1990, "A stochastic estimator of the trace").

Invariant: what the screen gives is *predicted*, never called measured; a layer that it cannot see is named with the
reason, and is for the probe. Measuring every layer on its own, the alternative, costs layers x schemes passes.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import FAILURES, first_line
from precimap.layers.code_products import Operand
from precimap.layers.first_order import FirstOrder, routed_changes, routed_rows, row_changes, row_weights
from precimap.searching.evidence.screen_plan import ScreenPlan, decode, first_order, located, plan_screen
from precimap.searching.pairs import Key, Pair
from precimap.searching.run import Run
from precimap.searching.subject import Subject
from precimap.task import Task, to_device

Floats = NDArray[np.float64]
PROBE_SEED = 20_260_331
ALL_UNITS = sys.maxsize


@dataclass(frozen=True, slots=True, eq=False)
class ScreenedBatch:
    """One batch. changes: float32 [pairs, rows], of scores or of losses. scores: as forward gave them, float64;
    empty where losses were screened.

    outputs: float64 [pairs, units], squared change of a unit's scores; an estimate without bias where rows are units.
    """

    changes: NDArray[np.float32]
    scores: Floats
    outputs: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Screen:
    """The table of first-order changes. `by_scores`: a row is a score; otherwise it is a unit, and the change its loss's.

    pairs: the row of each (layer, scheme name) in `changes`. unseen: layer -> why it has no row.
    """

    by_scores: bool
    pairs: Mapping[Key, int]
    batches: Mapping[int, ScreenedBatch]
    unseen: Mapping[str, str]
    plan: ScreenPlan

    def change(self, keys: Sequence[Key], number: int) -> Floats:
        """The summed change of these layers in batch `number`, float64 [rows]."""
        rows = [self.pairs[key] for key in keys]
        summed: Floats = self.batches[number].changes[rows].sum(0, dtype=np.float64)
        return summed

    def output_error(self, key: Key) -> tuple[float, float]:
        """Mean over units of the squared change of the unit's scores, and its standard error."""
        row = self.pairs[key]
        values = np.concatenate([batch.outputs[row] for batch in self.batches.values()])
        spread = float(values.std(ddof=1)) if len(values) > 1 else float("inf")
        return float(values.mean()), spread / len(values) ** 0.5


def screen(
    subject: Subject, pairs: Sequence[Pair], memory: int, units: int, of_units: Callable[[int], tuple[int, ...]]
) -> Screen:
    """Screen the search split, or batches of it with `units` units where a row is a unit: spreads need no more.

    of_units: which batches stand for a number of units, such as `Parts.scattered`. memory: bytes that one batch's errors
    and saved tensors may take. A batch that would take more is screened one scheme at a time, and if that is too much every
    layer is `unseen`. So it is when neither the scores nor the losses carry a gradient, and when a pass with gradients
    fails. The model is not modified.
    """
    run = subject.run
    plan = plan_screen(subject, pairs, memory)
    # Decoding costs a tenth of a pass; one scheme at a time is asked for when memory is short, so it is not kept then.
    decoded = decode(plan.passes[0]) if len(plan.passes) == 1 else None
    wanted = of_units(ALL_UNITS if plan.by_scores else units) if plan.passes else ()
    batches: dict[int, ScreenedBatch] = {}
    for number, batch in enumerate(run.task.splits.search):
        if number in wanted:
            run.progress("screen", len(batches), len(wanted))
            try:
                batches[number] = _screened(run, plan, decoded, batch, number)
            except _NotScreenedError as error:
                run.progress("screen", len(wanted), len(wanted))
                return _nothing(plan, f"batch {number} of the search split cannot be screened ({error})")
    run.progress("screen", len(wanted), len(wanted))
    return _seen_throughout(
        Screen(by_scores=plan.by_scores, pairs=plan.rows, batches=batches, unseen=plan.unseen, plan=plan)
    )


class _NotScreenedError(Exception):
    """A pass with gradients failed."""


def _nothing(plan: ScreenPlan, why: str) -> Screen:
    """A screen that saw no layer: each is probed instead, and where the model itself fails, the probe says so."""
    none = replace(plan, rows={}, layouts={}, routed=frozenset(), passes=())
    return Screen(
        by_scores=plan.by_scores,
        pairs={},
        batches={},
        unseen={**plan.unseen, **{name: why for name, _ in plan.rows}},
        plan=none,
    )


def _seen_throughout(screen: Screen) -> Screen:
    """Take out the layers whose calls differ from batch to batch: their rows hold NaN."""
    faulty = np.zeros(len(screen.pairs), bool)
    for batch in screen.batches.values():
        faulty |= ~np.isfinite(batch.changes).all(1)
    names = {name for (name, _), row in screen.pairs.items() if faulty[row]}
    why = "its calls differ from batch to batch, or its change is not finite"
    kept = {key: row for key, row in screen.pairs.items() if key[0] not in names}
    return replace(screen, pairs=kept, unseen={**screen.unseen, **dict.fromkeys(names, why)})


def _screened(
    run: Run, plan: ScreenPlan, decoded: Mapping[Key, Operand] | None, batch: Any, number: int
) -> ScreenedBatch:
    found = run.journal.find("screen", f"@{number}", plan.digest)
    if found is None:
        started = time.perf_counter()
        try:
            screened, backwards = _screen_batch(run.task, plan, decoded, to_device(batch, run.task.device), number)
        except FAILURES as error:
            raise _NotScreenedError(first_line(error)) from error
        arrays: dict[str, NDArray[Any]] = {
            "changes": screened.changes,
            "scores": screened.scores,
            "outputs": screened.outputs,
        }
        row = {"seconds": round(time.perf_counter() - started, 4), "backwards": backwards}
        run.journal.record("screen", f"@{number}", row, plan.digest, arrays)
        return screened
    return ScreenedBatch(found.arrays["changes"], found.arrays["scores"], found.arrays["outputs"])


def _screen_batch(
    task: Task, plan: ScreenPlan, decoded: Mapping[Key, Operand] | None, batch: Any, number: int
) -> tuple[ScreenedBatch, int]:
    """A batch, and with how many backward passes after each forward pass; those that look for routed rows are not in."""
    changes: NDArray[np.float32] = np.zeros((0, 0, 0), np.float32)  # [pairs, rows, values of a row]
    outputs: Floats = np.zeros((0, 0))
    scored: Floats = np.zeros(0)
    backwards = 0
    for layers in plan.passes:
        mode = first_order(task, layers, decode(layers) if decoded is None else decoded, {})
        with torch.enable_grad(), mode:
            scores = task.forward(task.model, batch)
        with torch.enable_grad():
            values = plan.what.values(task, scores, batch)
            totals = [value.sum() for value in values]
            routed = find_routed(mode, plan, located(values))
        count = len(values[0])
        if not changes.size:
            changes = np.zeros((len(plan.rows), count, len(values)), np.float32)
            outputs = np.zeros((len(plan.rows), len(scores)))
            scored = scores.detach().double().cpu().numpy() if plan.by_scores else scored
        for head, total in enumerate(totals):
            mode.backward(total)
            add_changes(mode, plan, routed, changes[..., head], count)
        if not plan.by_scores:
            with torch.enable_grad():
                mode.backward((scores.float() * _direction(scores, number)).sum())
            change = np.zeros_like(outputs)
            add_changes(mode, plan, routed, change, len(scores))
            outputs += change**2
        backwards = len(totals) + (not plan.by_scores)
        mode.clear()
    every = changes.reshape(len(changes), -1)
    if plan.by_scores:
        outputs = np.square(every, dtype=np.float64).reshape(*outputs.shape, -1).sum(2)
    return ScreenedBatch(every, scored, outputs), backwards


def find_routed(mode: FirstOrder, plan: ScreenPlan, rows: Tensor) -> dict[int, Tensor]:
    """By place among the taps, to which row each line belongs, for layers that gather rows in an order of their own.

    Two more backward passes, in models that have such layers. A call whose lines cannot be told has no entry.
    """
    if not plan.routed:
        return {}
    weights = row_weights(len(rows)).to(rows.device)
    with torch.enable_grad():
        total, weighed = rows.sum(), (rows * weights).sum()
    mode.backward(total)
    plain = [tapped.gradient for tapped in mode.taps]
    mode.backward(weighed)
    found = {}
    for at, (tapped, gradient) in enumerate(zip(mode.taps, plain, strict=True)):
        if tapped.layer in plan.routed and gradient is not None and tapped.gradient is not None:
            lines = routed_rows(gradient, tapped.gradient, weights)
            if lines is not None:
                found[at] = lines
    return found


def add_changes(
    mode: FirstOrder, plan: ScreenPlan, routed: Mapping[int, Tensor], into: NDArray[Any], count: int
) -> None:
    """Add each layer's change of each row to `into` [pairs, rows], after a backward pass of the summed rows."""
    for at, tapped in enumerate(mode.taps):
        layout = plan.layouts.get((tapped.layer, tapped.number))
        if layout is not None:
            changes = row_changes(tapped, layout, count)
        elif at in routed:
            changes = routed_changes(tapped, routed[at], count)
        elif tapped.layer in plan.routed and (tapped.gradient is None or not tapped.gradient.any()):
            continue  # an expert without tokens
        else:  # called otherwise than in the batch of the plan: `_seen_throughout` takes the layer out
            changes = {scheme: torch.full((count,), torch.nan, dtype=torch.float32) for scheme in tapped.errors}
        for scheme, change in changes.items():
            into[plan.rows[tapped.layer, scheme]] += change.numpy()


def _direction(scores: Tensor, number: int) -> Tensor:
    """One random direction of a batch's scores: over many units that is as good as many directions for a few."""
    generator = torch.Generator().manual_seed(PROBE_SEED + number)
    return torch.randn(scores.shape, generator=generator, dtype=torch.float32).to(scores.device)
