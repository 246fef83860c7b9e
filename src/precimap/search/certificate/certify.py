"""The proof: a fixed sequence of maps, judged once on data that chose nothing.

Invariant: the order of the maps is fixed before the certify split is scored; they are tested from the safest on, each at
the full alpha, and testing stops at the first failure; the last one that passed is certified. That keeps the family-wise
error at alpha without a correction (fixed-sequence testing, Maurer, Hothorn and Lehmacher 1995). A map passes when the
gate and every guard do, each at the full alpha (intersection-union). Going from the
aggressive end down until something passes is not this: measured, 9 to 27 % false certificates at 5 %.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import nn

from precimap.certificate import Certificate, GuardAnswer, Unrepaired
from precimap.errors import TaskError
from precimap.layers.quantized import quantize_map
from precimap.layers.realign import realigned
from precimap.layers.target import Target
from precimap.metrics.guard import Guard
from precimap.metrics.paired import Drop, units_needed
from precimap.precision_map import PrecisionMap
from precimap.search.evidence.probe import Comparison, compare, finite
from precimap.search.run import Parts, Run, scored
from precimap.search.splits.split_print import SplitPrint, same_units
from precimap.task import Scored, Task

BOUND = "cluster t raised for skewness, plus one pseudo-cluster of worst loss"


@dataclass(frozen=True, slots=True)
class Question:
    """What the certify split is asked: is the drop of a map at most `margin`, with confidence 1 - alpha?

    known: the content of the split, by which units that stand in it more than once are told; None counts all as they stand.
    """

    margin: float
    alpha: float
    spent_alpha: float
    split: str
    known: SplitPrint | None = None


def certify(run: Run, target: Target, chain: Sequence[PrecisionMap], question: Question) -> tuple[Certificate, ...]:
    """Test the maps of `chain`, safest first, up to the first failure.

    Returns one certificate for each map that was tested; all but the last are certified.
    """
    task, looks = run.task, len(chain) + 1
    run.progress("certify", 0, looks)
    baseline = _certify_split(run, target, question, None)
    certificates: list[Certificate] = []
    for number, precision_map in enumerate(chain):
        run.progress("certify", number + 1, looks)
        other = _certify_split(run, target, question, precision_map)
        found = _certificate(task, target, baseline, other, question, precision_map.fingerprint)
        if precision_map.realignment is not None:
            plain = _certify_split(run, target, question, precision_map.model_copy(update={"realignment": None}))
            found = found.model_copy(update={"unrepaired": _unrepaired(task, baseline, plain, question.alpha)})
        certificates.append(found)
        if not certificates[-1].certified:
            break
    run.progress("certify", looks, looks)
    return tuple(certificates)


def _certify_split(run: Run, target: Target, question: Question, precision_map: PrecisionMap | None) -> Scored:
    """The certify split as the target runs the map (None: the baseline); quantised only if a batch is to be scored."""
    task = run.task

    def running() -> AbstractContextManager[nn.Module]:
        if precision_map is None:
            return target.running(task.model, {})
        model = realigned(task.model, precision_map.realignment)
        return target.running(model, quantize_map(model, precision_map))

    subject = "baseline" if precision_map is None else precision_map.fingerprint
    timer = None if precision_map is None else target.whole_timer
    check = (lambda _: None) if timer is None else timer.check
    said = "" if question.known is None else f" {question.known.said}"
    name = f"{subject} on {target.name} with {question.split}{said}"
    parts = scored(run, "certify", name, task.splits.certify, running, check=check)
    return _counted_once(parts, question.known)


def _counted_once(parts: Parts, known: SplitPrint | None) -> Scored:
    """The scores of the split; units that stand in it more than once are one cluster, unless the task has clusters.

    Where it has, equal units have one cluster already: it is a part of what makes them equal.
    """
    whole = parts.whole
    ids = None if known is None or whole.units.clusters is not None else same_units(known, parts.sizes)
    return whole if ids is None else replace(whole, units=replace(whole.units, clusters=ids))


def _unrepaired(task: Task, baseline: Scored, plain: Scored, alpha: float) -> Unrepaired:
    found = compare(task, baseline, plain, alpha)
    guards = {name: (guard.found.drop.estimate, guard.found.drop.error) for name, guard in found.guards.items()}
    upper = found.evidence().upper
    return Unrepaired(drop=found.drop.estimate, error=found.drop.error, upper=upper, guards=guards)


def _certificate(
    task: Task, target: Target, baseline: Scored, other: Scored, question: Question, fingerprint: str
) -> Certificate:
    found = compare(task, baseline, other, question.alpha)
    guards = {guard.label: _guard_answer(guard, baseline, found, question.alpha) for guard in task.guarded}
    certified = found.upper <= question.margin and all(answer.held for answer in guards.values())
    needed = _needed(found.drop, found.upper, question.margin, question.alpha, task.metric.worst or found.largest)
    evidence = found.evidence()
    return Certificate(
        metric=task.metric.name,
        unit=task.metric.unit,
        certified=certified,
        verdict=_verdict(found, guards, question.margin, needed),
        claim=target.claim,
        drop=found.drop.estimate,
        error=found.drop.error,
        upper=evidence.upper,
        margin=question.margin,
        alpha=question.alpha,
        spent_alpha=question.spent_alpha,
        bound=BOUND,
        baseline=task.metric.value(baseline.values, baseline.units),
        n=found.drop.n,
        clusters=found.drop.clusters,
        changed=found.drop.changed,
        needed=needed,
        guards=guards,
        reported={name: (drop.estimate, drop.error) for name, drop in found.reported.items()},
        split=question.split,
        map=fingerprint,
    )


def _needed(drop: Drop, upper: float, margin: float, alpha: float, worst: float | None) -> int | None:
    """The units that would certify a true drop of this size; None for one that is certified, or that no number would."""
    return None if upper <= margin else units_needed(drop, margin, alpha, worst=worst)


def _guard_answer(guard: Guard, baseline: Scored, found: Comparison, alpha: float) -> GuardAnswer:
    """Raises TaskError when the certify split holds no two units of the guard's slice."""
    if guard.label not in found.guards:
        raise TaskError(
            f"the certify split cannot judge the guard {guard.label}: it has no two units (or clusters) of it"
        )
    judged = found.guards[guard.label].found
    return GuardAnswer(
        held=judged.upper <= guard.margin,
        drop=judged.drop.estimate,
        error=judged.drop.error,
        upper=finite(judged.upper),
        margin=guard.margin,
        unit=guard.metric.unit,
        baseline=guard.metric.value(*baseline.of_guard(guard.label)),
        n=judged.drop.n,
        clusters=judged.drop.clusters,
        needed=_needed(judged.size, judged.upper, guard.margin, alpha, guard.metric.worst or judged.largest),
    )


def _verdict(found: Comparison, guards: Mapping[str, GuardAnswer], margin: float, needed: int | None) -> str:
    """Of the gate first, then of the first guard that is not held."""
    if found.upper > margin:
        return _failed("the drop", found.lower > margin, needed)
    for name, answer in guards.items():
        if not answer.held:
            return _failed(f"the guard {name}", found.guards[name].found.lower > answer.margin, answer.needed)
    return "certified"


def _failed(what: str, surely: bool, needed: int | None) -> str:
    if surely:
        return f"no: {what} is above the margin"
    if needed is None:
        return f"cannot tell: the estimate of {what} is not below the margin"
    return f"cannot tell at this sample size: needs about {needed:,} units for {what}"
