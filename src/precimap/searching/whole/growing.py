"""From the best map so far to larger ones: each is measured as a whole, and a layer that breaks one is left out alone.

The chain that came first owes nothing to luck: improvements buy nothing there, errors are added to costs, and all that
stands behind a layer which breaks a map is lost with it. Here the plan is bolder, because whole maps are measured: layers
are added in the order of what they are predicted to cost, improvements first, and a map is looked at when superposition
*with* credit, brought to what the map below it measured, says that it keeps the margin.

Invariant: a map that leaves passed on the search split as a whole, or lies between two that did, and all of them are
nested; which are looked at is decided by the search split alone, in at most `MOST_GROWTH` looks. A map that fails is
halved until the layers that break it are found: those are left out, and the rest is tried without them.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from precimap.errors import InputError
from precimap.searching.allocation.knapsack import Step, chain
from precimap.searching.allocation.ladders import Option
from precimap.searching.allocation.repair import repair
from precimap.searching.allocation.rules import Rule
from precimap.searching.evidence.gather import Evidence
from precimap.searching.evidence.known import Known, Price, mean_cost
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen_plan import Key
from precimap.searching.whole.assemble import Findings
from precimap.searching.whole.whole_maps import Chosen, Joint, hoped, predicted_joint, sequence

MOST_GROWTH = 6
MOST_CONFIRMED = 3
MOST_PREDICTIONS = 96
WORTH_A_LOOK = 0.02  # of the gain of everything: a smaller one is not worth a pass
LATITUDE = 2.0  # layers interact: a map may lose half of what superposition says, and a look costs no certainty
UNFORESEEN, FORETOLD = (
    0.5,
    0.1,
)  # of the margin: what a prediction is off by when a layer is suspected, when all is well
CREDIT_SCALE = 1e-3  # of the margin: what a layer that improves the metric costs at most, only to set an order


@dataclass(slots=True)
class _Growth:
    """base: the largest map that passed, the empty one at first. failed: the smallest above it that did not.

    below: the chain up to the map that it began with. left_behind: maps that passed with a layer which is banned by now, or
    which the base does without.
    """

    findings: Findings
    rule: Rule
    rows: tuple[Option, ...]
    margin: float
    base: Joint
    failed: Joint | None
    predictor: Predictor | None
    suspects: Callable[[Iterable[Key]], frozenset[Key]]
    below: list[Joint]
    banned: set[Key] = field(default_factory=set)
    passed: list[Joint] = field(default_factory=list)
    broken: list[Joint] = field(default_factory=list)
    left_behind: list[Joint] = field(default_factory=list)

    def steps(self, within: Mapping[str, str] | None = None) -> tuple[Step, ...]:
        """Nested maps above the base, what costs least first; `within`: only of its layers and schemes."""
        return steps_above(self.findings, self.rule, self.rows, self.base.step, self.banned, within)


def steps_above(
    findings: Findings,
    rule: Rule,
    rows: Sequence[Option],
    base: Step,
    banned: set[Key],
    within: Mapping[str, str] | None,
) -> tuple[Step, ...]:
    """The chain of the rows with those of `base` for nothing, less what does not hold its layers."""
    kept = set(base.choice.items())
    allowed = None if within is None else kept | set(within.items())
    table = [
        replace(row, cost=0.0) if (row.layer, row.scheme) in kept else row
        for row in rows
        if (row.layer, row.scheme) not in banned and (allowed is None or (row.layer, row.scheme) in allowed)
    ]
    sizes = {layer.name: layer.bytes for layer in findings.inventory.layers}
    try:
        steps = chain(table, sizes, rule.limits(findings.inventory)) if table else ()
    except InputError:  # these rows alone make no map that is small enough
        return ()
    return tuple(step for step in steps if step.choice.keys() >= base.choice.keys() and step.gain > base.gain)


def eager(rows: Sequence[Option], known: Mapping[Key, Known], counted: Price) -> tuple[Option, ...]:
    """The table with costs that order layers by their mean alone: what improves costs next to nothing, most first."""
    made = []
    for row in rows:
        mean = mean_cost(known[row.layer, row.scheme], counted)
        if mean is None or row.gain <= 0:
            made.append(row)
            continue
        rate, least = mean / row.gain, CREDIT_SCALE * counted.margin
        made.append(replace(row, cost=row.gain * (least + rate if rate >= 0 else least / (1 - rate / counted.margin))))
    return tuple(made)


def grown(
    findings: Findings,
    rule: Rule,
    chosen: Chosen,
    evidence: Evidence,
    rows: Sequence[Option],
    margin: float,
    look: Callable[[Joint], Joint],
    out_of_time: Callable[[], bool],
) -> Chosen:
    """The chain with what could be added to its best map, each addition measured as a whole; `rows` as of `eager`."""
    known, state = evidence.by_key(), _started(findings, rule, chosen, rows, margin, evidence.suspects)
    everything = max((step.gain for step in state.steps()), default=0.0)
    worth = WORTH_A_LOOK * everything
    for number in range(MOST_GROWTH):
        step = (
            None if out_of_time() else (_repaired(state, worth) if not number else None) or _next(state, known, worth)
        )
        if step is None:
            break
        joint = look(predicted_joint(state.predictor, known, step))
        if state.predictor is not None and joint.on_screened is not None:
            state.predictor = state.predictor.fitted(list(step.choice.items()), joint.on_screened)
        _learn(state, joint, joint.passed(margin) and rule.accepts(findings.inventory, step))
    made = _rechained(state, chosen, known)
    sure = evidence.audit is not None and not evidence.audit.distrusted and _foretold(made, margin)
    return made if sure else _confirmed(made, margin, look, out_of_time)


def _learn(state: _Growth, joint: Joint, passed: bool) -> None:
    choice, base = joint.step.choice, state.base.step.choice
    if not passed:
        state.failed = joint if choice.keys() >= base.keys() else state.failed
        state.broken.append(joint)
        return
    if not choice.items() >= base.items():  # the chain is made anew, of what this map holds
        state.left_behind += [state.base, *state.passed]
        state.below, state.passed = [], []
    state.base = joint
    state.passed.append(joint)
    if state.failed is not None and not state.failed.step.choice.keys() > choice.keys():
        state.failed = None


def _repaired(state: _Growth, worth: float) -> Step | None:
    """From everything down: layers that make good for each other stay together, which no step up from the base finds."""
    predictor, steps = state.predictor, state.steps()
    if predictor is None or not predictor.predicts_metric or not steps or state.failed is not None:
        return None
    told = [row for row in state.rows if predictor.tells((row.layer, row.scheme))]
    sizes = {layer.name: layer.bytes for layer in state.findings.inventory.layers}
    if any(not predictor.tells(key) for key in (*steps[-1].choice.items(), *state.base.step.choice.items())):
        return None

    def predicted(choice: Mapping[str, str]) -> float:
        return hoped(predictor, state.base, choice, state.margin)

    try:
        step = repair(steps[-1], told, sizes, predicted, state.margin, most_tries=MOST_PREDICTIONS)
    except InputError:  # nothing that is predicted to pass is small enough
        return None
    return step if step.gain - state.base.step.gain >= max(worth, 1e-12) else None


def _started(
    findings: Findings,
    rule: Rule,
    chosen: Chosen,
    rows: Sequence[Option],
    margin: float,
    suspects: Callable[[Iterable[Key]], frozenset[Key]],
) -> _Growth:
    """From the best map, or from none; with the smallest map above it that failed, if it holds it."""
    below = [] if chosen.best is None else list(chosen.joints[: chosen.best + 1])
    base = below[-1] if below else _nothing(findings)
    above = [
        joint
        for joint in chosen.joints
        if joint.measured is not None
        and not joint.passed(margin)
        and base.step.choice.keys() <= joint.step.choice.keys()
    ]
    failed = min(above, key=lambda joint: joint.step.gain, default=None)
    return _Growth(findings, rule, tuple(rows), margin, base, failed, chosen.predictor, suspects, below)


def _next(state: _Growth, known: Mapping[Key, Known], worth: float) -> Step | None:
    """The map to look at: half way to one that failed, or the largest that is hoped to pass."""
    while state.failed is not None:
        if _unforeseen(state.failed, state.margin) and _banned(state, state.suspects(state.failed.step.choice.items())):
            break
        added = state.failed.step.gain - state.base.step.gain
        steps = [s for s in state.steps(state.failed.step.choice) if worth <= s.gain - state.base.step.gain < added]
        if steps:
            middle = state.base.step.gain + added / 2
            return min(steps, key=lambda step: abs(step.gain - middle))
        state.banned |= state.failed.step.choice.items() - state.base.step.choice.items()
        state.failed = None
    for step in reversed(state.steps()):
        if step.gain - state.base.step.gain < worth:
            break
        if _hoped(state, known, step) <= _reach(state):
            return step
    return None


def _banned(state: _Growth, wrong: frozenset[Key]) -> bool:
    """Leave these out from now on; False where all of them are. What passed with one of them passed by luck."""
    new = wrong - state.banned
    if not new:
        return False
    state.banned |= new
    state.failed = None
    if new & state.base.step.choice.items():
        state.left_behind += [joint for joint in (state.base, *state.passed) if joint not in state.left_behind]
        state.base, state.passed, state.below = _nothing(state.findings), [], []
    return True


def _nothing(findings: Findings) -> Joint:
    return Joint(Step({}, 0.0, 0.0, sum(layer.bytes for layer in findings.inventory.layers)), None, 0.0, 0.0)


def _unforeseen(failed: Joint, margin: float) -> bool:
    """Whether a map lost much more than superposition says on the same units: then a layer is not what it seemed."""
    if failed.predicted is None or failed.on_screened is None:
        return True
    return failed.on_screened.drop.estimate - failed.predicted.drop.estimate > UNFORESEEN * margin


def _foreseen(joint: Joint, margin: float) -> bool:
    """Whether a map between others is to be sent before them: layers may make good for each other, and fewer cost more."""
    if joint.measured is not None:
        return joint.passed(margin)
    return joint.predicted is None or joint.predicted.strictest(margin) <= margin


def _hoped(state: _Growth, known: Mapping[Key, Known], step: Step) -> float:
    predictor = state.predictor
    if predictor is not None and predictor.predicts_metric:
        return hoped(predictor, state.base, step.choice, state.margin)
    added = [known[key].decisive for key in step.choice.items() - state.base.step.choice.items()]
    drops = [found.drop.estimate for found in added if found is not None]
    if len(drops) == len(added):
        return _bound_of(state) + sum(drops)
    # Nothing is known: without the layer that broke a map the rest is worth a look; otherwise it is not.
    return -math.inf if state.banned else math.inf


def _bound_of(state: _Growth) -> float:
    return 0.0 if state.base.measured is None else state.base.measured.strictest(state.margin)


def _reach(state: _Growth) -> float:
    """The predicted bound up to which a map is worth a look: `LATITUDE` times the room that is left."""
    base = _bound_of(state)
    return base + LATITUDE * (state.margin - base)


def _rechained(state: _Growth, chosen: Chosen, known: Mapping[Key, Known]) -> Chosen:
    """Up to the last map that passed, with nested maps between; beyond it what else was looked at, or holds that map."""
    made = [joint for joint in state.below[:-1] if _foreseen(joint, state.margin)] + state.below[-1:]
    for start, end in pairwise([*(made[-1:] or [_nothing(state.findings)]), *state.passed]):
        between = steps_above(state.findings, state.rule, state.rows, start.step, state.banned, end.step.choice)
        joints = [predicted_joint(state.predictor, known, s) for s in between if s.gain < end.step.gain]
        made += [joint for joint in joints if _foreseen(joint, state.margin)]
        made.append(end)
    top = made[-1].step.choice.keys() if made else set()
    seen = {id(joint) for joint in made}
    others = [j for j in (*chosen.joints, *state.broken, *state.left_behind) if id(j) not in seen]
    beyond = [j for j in others if j.measured is not None or j.step.choice.keys() > top]
    unique = {id(joint): joint for joint in beyond if joint.step.choice}
    return Chosen(
        (*made, *sorted(unique.values(), key=lambda joint: joint.step.gain)),
        len(made) - 1 if made else None,
        state.predictor,
    )


def _foretold(chosen: Chosen, margin: float) -> bool:
    """Whether superposition was right about the best map; then it is for those below, too."""
    best = None if chosen.best is None else chosen.joints[chosen.best]
    if best is None or best.predicted is None or best.on_screened is None:
        return False
    return abs(best.on_screened.drop.estimate - best.predicted.drop.estimate) <= FORETOLD * margin


def _confirmed(
    chosen: Chosen, margin: float, look: Callable[[Joint], Joint], out_of_time: Callable[[], bool]
) -> Chosen:
    """The maps that are sent before the best one, measured too; less what fails.

    A sequence ends at its first failure: a map of fewer layers that loses more would take the best one with it.
    """
    for _ in range(MOST_CONFIRMED):
        asked = next((joint for joint in sequence(chosen) if joint.measured is None), None)
        if asked is None or chosen.best is None or out_of_time():
            break
        at = next(place for place, joint in enumerate(chosen.joints) if joint is asked)
        found = look(asked)
        kept = (found,) if found.passed(margin) else ()
        joints = (*chosen.joints[:at], *kept, *chosen.joints[at + 1 :])
        chosen = replace(chosen, joints=joints, best=chosen.best - (not kept))
    return chosen
