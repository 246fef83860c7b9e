"""The proof: a fixed sequence of maps, judged once on data that chose nothing.

Invariant: the order of the maps is fixed before the certify split is scored; they are tested from the safest on, each at
the full alpha, and testing stops at the first failure; the last one that passed is certified. That keeps the family-wise
error at alpha without a correction (fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995). A map passes when the
gate and every guard do, each at the full alpha (intersection-union). Going from the
aggressive end down until something passes is not this: measured, 9 to 27 % false certificates at 5 %.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from precimap.certificate import BOUND_FARTHEST, BOUND_WORST, Certificate, GuardAnswer, Unrepaired, units_said
from precimap.errors import TaskError
from precimap.layers.prepared import prepared
from precimap.layers.target import Target, as_given
from precimap.metrics.guard import Guard
from precimap.metrics.paired import Drop
from precimap.metrics.power import needed_range
from precimap.precision_map import PrecisionMap
from precimap.searching.comparison import Comparison, compare, finite
from precimap.searching.run import Parts, Pass, Run, scored
from precimap.searching.splits.split_print import SplitPrint, counted_once
from precimap.task import Scored, Task, score_batch, to_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the certify split: is the drop of a map that `target` runs at most `margin`, with confidence 1 - alpha?

    split: its name. known: the content of the split, by which units that stand in it more than once are told; None counts
    all as they stand. made: maps as `target` runs them, by fingerprint, that need not be made again.
    """

    target: Target
    margin: float
    alpha: float
    spent_alpha: float
    split: str
    known: SplitPrint | None = None
    made: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class SecondModel:
    """What `compare` judges in a map's place: no map of the task's model, but another one.

    model: what the task's forward is called with. fingerprint: by which the ledger knows it.
    """

    model: Any
    fingerprint: str


Judged = PrecisionMap | SecondModel


def certify(run: Run, look: Look, asked: Sequence[tuple[Judged, Comparison | None]]) -> tuple[Certificate, ...]:
    """Test the maps that are asked about, safest first, up to the first failure.

    Beside each map stands what it, or one above it, did on the search split: the worst unit there counts in the bound, too.
    Returns one certificate for each map that was tested; all but the last are certified.
    """
    task, looks = run.task, len(asked) + 1
    run.progress("certify", 0, looks)
    baseline = _certify_split(run, look, None)
    certificates: list[Certificate] = []
    for number, (precision_map, seen) in enumerate(asked):
        run.progress("certify", number + 1, looks)
        other = _certify_split(run, look, precision_map)
        compared = compare(task, baseline, other, look.alpha, seen)
        found = _certificate(task, baseline, compared, look, precision_map.fingerprint)
        if isinstance(precision_map, PrecisionMap) and precision_map.realignment is not None:
            plain = _certify_split(run, look, precision_map.model_copy(update={"realignment": None}))
            found = found.model_copy(update={"unrepaired": _unrepaired(task, baseline, plain, look.alpha)})
        certificates.append(found)
        if not certificates[-1].certified:
            break
    run.progress("certify", looks, looks)
    return tuple(certificates)


def baseline_to_certify(run: Run, look: Look) -> Scored:
    """The baseline on the certify split, which every certificate needs and no map has chosen: to be looked at first."""
    return _certify_split(run, look, None)


def too_small(task: Task, baseline: Scored, look: Look, fingerprint: str) -> Certificate | None:
    """What a split that can certify no map says of one that was not scored there; None for a split that can tell.

    Nothing but the baseline was looked at: a drop on so few units would be a look that nobody paid for.
    """
    found = compare(task, baseline, baseline, look.alpha)
    assert found.sight is not None
    sights = {"the drop": found.sight, **{f"the guard {name}": one.found.sight for name, one in found.guards.items()}}
    short = [f"{what}: {sight.shortage}" for what, sight in sights.items() if sight.shortage is not None]
    if not short:
        return None
    return Certificate(
        metric=task.metric.name,
        unit=task.metric.unit,
        certified=False,
        verdict=f"cannot tell {short[0]}; the map was not scored on the certify split, and no alpha was used",
        claim=look.target.claim,
        drop=None,
        error=None,
        upper=None,
        margin=look.margin,
        alpha=look.alpha,
        spent_alpha=look.spent_alpha,
        bound=BOUND_FARTHEST if found.sight.limit is None else BOUND_WORST,
        baseline=task.metric.value(baseline.values, baseline.units),
        n=found.drop.n,
        clusters=found.sight.clusters,
        changed=0,
        effective=found.sight.effective,
        needed=None,
        blind_spot=None,
        split=look.split,
        map=fingerprint,
    )


def check_still(run: Run, look: Look) -> None:
    """Score the first batch of the split again. Raises TaskError where it gives other losses than those in the run.

    Batches may name their data (files, rows of a store) and not hold them.
    """
    batch = to_device(next(iter(run.task.splits.certify)), run.task.device)
    known = _parts(run, look, None, numbers=[0]).whole
    with torch.no_grad(), as_given(look.target, run.task.model) as model:
        now = score_batch(run.task, model, batch, "batch 0 of the certify split")
    if now.losses.shape != known.losses.shape or not np.allclose(now.losses, known.losses, rtol=1e-5, atol=1e-7):
        raise TaskError(
            "batch 0 of the certify split gives other losses now than those that this run holds: the data that it stands "
            "for, or what computes them, have changed. Choose another run directory"
        )


def _certify_split(run: Run, look: Look, judged: Judged | None) -> Scored:
    """The certify split as the target runs the map (None: the baseline); quantised only if a batch is to be scored."""
    return _counted_once(_parts(run, look, judged), look.known)


def _parts(run: Run, look: Look, judged: Judged | None, numbers: Sequence[int] | None = None) -> Parts:
    task, target = run.task, look.target

    def running() -> AbstractContextManager[nn.Module]:
        if judged is None:
            return as_given(target, task.model)
        made = look.made.get(judged.fingerprint)
        return mapped(task.model, target, judged) if made is None else nullcontext(made)

    subject = "baseline" if judged is None else judged.fingerprint
    timer = None if judged is None else target.whole_timer
    said = "" if look.known is None else f" {look.known.said}"
    asked = Pass(
        kind="certify",
        of=f"{subject} on {target.name} with {look.split}{said}",
        batches=task.splits.certify,
        running=running,
        numbers=numbers,
        check=(lambda _: None) if timer is None else timer.check,
    )
    return scored(run, asked)


def _counted_once(parts: Parts, known: SplitPrint | None) -> Scored:
    """The scores of the split, further copies of it left out; units that still stand there twice are one cluster.

    Where the task has clusters of its own, equal units have one already: it is a part of what makes them equal.
    """
    whole = parts.whole
    found = None if known is None else counted_once(known, parts.sizes)
    if found is None:
        return whole
    rows, ids = found
    kept = whole.only(rows)
    if kept.units.clusters is not None or len(np.unique(ids)) == len(ids):
        return kept
    return replace(kept, units=replace(kept.units, clusters=ids))


def mapped(model: nn.Module, target: Target, precision_map: Judged) -> AbstractContextManager[nn.Module]:
    """The model as the target runs the map; a second model as it is."""
    if isinstance(precision_map, SecondModel):
        return nullcontext(precision_map.model)
    return target.running(*prepared(model, precision_map))


def _unrepaired(task: Task, baseline: Scored, plain: Scored, alpha: float) -> Unrepaired:
    found = compare(task, baseline, plain, alpha)
    guards = {name: (guard.found.drop.estimate, guard.found.drop.error) for name, guard in found.guards.items()}
    upper = found.evidence().upper
    return Unrepaired(drop=found.drop.estimate, error=found.drop.error, upper=upper, guards=guards)


def _certificate(task: Task, baseline: Scored, found: Comparison, look: Look, fingerprint: str) -> Certificate:
    sight, alpha = found.sight, look.alpha
    assert sight is not None
    guards = {guard.label: _guard_answer(guard, baseline, found, alpha) for guard in task.guarded}
    held = found.upper <= look.margin and sight.shortage is None
    certified = held and all(answer.held for answer in guards.values())
    needed = _needed(found.drop, found.upper, look.margin, alpha, sight.limit or found.largest)
    evidence = found.evidence()
    return Certificate(
        metric=task.metric.name,
        unit=task.metric.unit,
        certified=certified,
        verdict=_verdict(found, guards, look.margin, needed),
        claim=look.target.claim,
        drop=found.drop.estimate,
        error=found.drop.error,
        upper=evidence.upper,
        margin=look.margin,
        alpha=alpha,
        spent_alpha=look.spent_alpha,
        bound=BOUND_FARTHEST if sight.limit is None else BOUND_WORST,
        baseline=task.metric.value(baseline.values, baseline.units),
        n=found.drop.n,
        clusters=sight.clusters,
        changed=found.drop.changed,
        effective=sight.effective,
        needed=needed,
        blind_spot=sight.blind_spot(found.drop.estimate, look.margin, alpha) if certified else None,
        guards=guards,
        reported={name: (drop.estimate, drop.error) for name, drop in found.reported.items()},
        split=look.split,
        map=fingerprint,
    )


def _needed(drop: Drop, upper: float, margin: float, alpha: float, worst: float) -> tuple[int, int | None] | None:
    """The units that would certify a true drop of this size; None where the bound is within the margin already."""
    return None if upper <= margin else needed_range(drop, margin, alpha, worst)


def _guard_answer(guard: Guard, baseline: Scored, found: Comparison, alpha: float) -> GuardAnswer:
    """Raises TaskError when the certify split holds no two units of the guard's slice."""
    if guard.label not in found.guards:
        raise TaskError(
            f"the certify split cannot judge the guard {guard.label}: it has no two units (or clusters) of it"
        )
    judged = found.guards[guard.label].found
    held = judged.proves(guard.margin)
    limit = judged.sight.limit or judged.largest
    return GuardAnswer(
        held=held,
        drop=judged.drop.estimate,
        error=judged.drop.error,
        upper=finite(judged.upper),
        margin=guard.margin,
        unit=guard.metric.unit,
        baseline=guard.metric.value(*baseline.of_guard(guard.label)),
        n=judged.drop.n,
        clusters=judged.sight.clusters,
        effective=judged.sight.effective,
        needed=_needed(judged.size, judged.upper, guard.margin, alpha, limit),
        blind_spot=judged.sight.blind_spot(judged.size.estimate, guard.margin, alpha) if held else None,
    )


def _verdict(
    found: Comparison, guards: Mapping[str, GuardAnswer], margin: float, needed: tuple[int, int | None] | None
) -> str:
    """Of the gate first, then of the first guard that is not held."""
    assert found.sight is not None
    if found.upper > margin or found.sight.shortage is not None:
        return _failed("the drop", found.lower > margin, found.sight.shortage, needed)
    for name, answer in guards.items():
        if not answer.held:
            judged = found.guards[name].found
            return _failed(f"the guard {name}", judged.lower > answer.margin, judged.sight.shortage, answer.needed)
    return "certified"


def _failed(what: str, surely: bool, shortage: str | None, needed: tuple[int, int | None] | None) -> str:
    if surely:
        return f"no: {what} is above the margin"
    if shortage is not None:
        takes = "" if needed is None else f"; for a drop of this size it takes {units_said(needed)}"
        return f"cannot tell {what}: {shortage}{takes}"
    if needed is None:
        return f"cannot tell: the estimate of {what} is not below the margin"
    return f"cannot tell at this sample size: needs {units_said(needed)} for {what}"
