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
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.price import Price, mean_cost
from precimap.searching.allocation.repair import Goal, repair
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.predict import Predictor
from precimap.searching.maps.candidates import Chain, Looking, MapCandidate, candidate_of, hoped, sequence
from precimap.searching.pairs import Key

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


@dataclass(slots=True, kw_only=True)
class _Growth:
    """base: the largest map that passed, the empty one at first. failed: the smallest above it that did not.

    below: the chain up to the map that it began with. left_behind: maps that passed with a layer which is banned by now, or
    which the base does without.
    """

    looking: Looking
    rows: tuple[Option, ...]
    base: MapCandidate
    failed: MapCandidate | None
    predictor: Predictor | None
    suspects: Callable[[Iterable[Key]], frozenset[Key]]
    below: list[MapCandidate]
    banned: set[Key] = field(default_factory=set)
    passed: list[MapCandidate] = field(default_factory=list)
    broken: list[MapCandidate] = field(default_factory=list)
    left_behind: list[MapCandidate] = field(default_factory=list)

    @property
    def margin(self) -> float:
        return self.looking.margin

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each layer in base precision."""
        return {layer.name: layer.bytes for layer in self.looking.inventory.layers}

    def steps(self, within: Mapping[str, str] | None = None, above: Step | None = None) -> tuple[Step, ...]:
        """Nested maps above a step (None: the base), what costs least first; `within`: only of its layers and schemes.

        The chain of the rows with those of the step for nothing, less what does not hold its layers.
        """
        base, looking = self.base.step if above is None else above, self.looking
        kept = set(base.choice.items())
        allowed = None if within is None else kept | set(within.items())
        table = [
            replace(row, cost=0.0) if row.key in kept else row
            for row in self.rows
            if row.key not in self.banned and (allowed is None or row.key in allowed)
        ]
        try:
            steps = chain(table, self.sizes, looking.rule.limits(looking.inventory)) if table else ()
        except InputError:  # these rows alone make no map that is small enough
            return ()
        return tuple(step for step in steps if step.choice.keys() >= base.choice.keys() and step.gain > base.gain)

    def candidate(self, step: Step) -> MapCandidate:
        """With what is predicted of it by now."""
        return candidate_of(self.predictor, self.looking.known, step)


def eager(rows: Sequence[Option], known: Mapping[Key, LayerEvidence], counted: Price) -> tuple[Option, ...]:
    """The table with costs that order layers by their mean alone: what improves costs next to nothing, most first."""
    made = []
    for row in rows:
        mean = mean_cost(known[row.key], counted)
        if mean is None or row.gain <= 0:
            made.append(row)
            continue
        rate, least = mean / row.gain, CREDIT_SCALE * counted.margin
        made.append(replace(row, cost=row.gain * (least + rate if rate >= 0 else least / (1 - rate / counted.margin))))
    return tuple(made)


def grown(looking: Looking, found: Chain, evidence: EvidenceTable, rows: Sequence[Option]) -> Chain:
    """The chain with what could be added to its best map, each addition measured as a whole; `rows` as of `eager`."""
    state = _started(looking, found, evidence, rows)
    everything = max((step.gain for step in state.steps()), default=0.0)
    worth = WORTH_A_LOOK * everything
    for number in range(MOST_GROWTH):
        if looking.out_of_time():
            break
        step = (_repaired(state, worth) if not number else None) or _next(state, worth)
        if step is None:
            break
        candidate = looking.look(state.candidate(step))
        if state.predictor is not None and candidate.on_screened is not None:
            state.predictor = state.predictor.fitted(list(step.choice.items()), candidate.on_screened)
        _learn(state, candidate, looking.passed(candidate) and looking.rule.accepts(looking.inventory, step))
    made = _rechained(state, found)
    sure = evidence.audit is not None and not evidence.audit.distrusted and _foretold(made, looking.margin)
    return made if sure else _confirmed(made, looking)


def _learn(state: _Growth, candidate: MapCandidate, passed: bool) -> None:
    choice, base = candidate.step.choice, state.base.step.choice
    if not passed:
        state.failed = candidate if choice.keys() >= base.keys() else state.failed
        state.broken.append(candidate)
        return
    if not choice.items() >= base.items():  # the chain is made anew, of what this map holds
        state.left_behind += [state.base, *state.passed]
        state.below, state.passed = [], []
    state.base = candidate
    state.passed.append(candidate)
    if state.failed is not None and not state.failed.step.choice.keys() > choice.keys():
        state.failed = None


def _repaired(state: _Growth, worth: float) -> Step | None:
    """From everything down: layers that make good for each other stay together, which no step up from the base finds."""
    predictor, steps = state.predictor, state.steps()
    if predictor is None or not predictor.predicts_metric or not steps or state.failed is not None:
        return None
    told = [row for row in state.rows if predictor.tells(row.key)]
    if any(not predictor.tells(key) for key in (*steps[-1].choice.items(), *state.base.step.choice.items())):
        return None

    def predicted(choice: Mapping[str, str]) -> float:
        return hoped(predictor, state.base, choice, state.margin)

    step = repair(steps[-1], told, state.sizes, Goal(predicted, state.margin, MOST_PREDICTIONS))
    return step if step.gain - state.base.step.gain >= max(worth, 1e-12) else None


def _started(looking: Looking, found: Chain, evidence: EvidenceTable, rows: Sequence[Option]) -> _Growth:
    """From the best map, or from none; with the smallest map above it that failed, if it holds it."""
    below = [] if found.best is None else list(found.candidates[: found.best + 1])
    base = below[-1] if below else _nothing(looking)
    above = [
        candidate
        for candidate in found.candidates
        if candidate.measured is not None
        and not looking.passed(candidate)
        and base.step.choice.keys() <= candidate.step.choice.keys()
    ]
    return _Growth(
        looking=looking,
        rows=tuple(rows),
        base=base,
        failed=min(above, key=lambda candidate: candidate.step.gain, default=None),
        predictor=found.predictor,
        suspects=evidence.suspects,
        below=below,
    )


def _next(state: _Growth, worth: float) -> Step | None:
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
        if _hoped(state, step) <= _reach(state):
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
        state.left_behind += [one for one in (state.base, *state.passed) if one not in state.left_behind]
        state.base, state.passed, state.below = _nothing(state.looking), [], []
    return True


def _nothing(looking: Looking) -> MapCandidate:
    bytes_before = sum(layer.bytes for layer in looking.inventory.layers)
    return MapCandidate(step=Step({}, 0.0, 0.0, bytes_before), singles=0.0, drift=0.0)


def _unforeseen(failed: MapCandidate, margin: float) -> bool:
    """Whether a map lost much more than superposition says on the same units: then a layer is not what it seemed."""
    if failed.predicted is None or failed.on_screened is None:
        return True
    return failed.on_screened.drop.estimate - failed.predicted.drop.estimate > UNFORESEEN * margin


def _foreseen(candidate: MapCandidate, margin: float) -> bool:
    """Whether a map between others is to be sent before them: layers may make good for each other, and fewer cost more."""
    if candidate.measured is not None:
        return candidate.passed(margin)
    return candidate.predicted is None or candidate.predicted.strictest(margin) <= margin


def _hoped(state: _Growth, step: Step) -> float:
    predictor = state.predictor
    if predictor is not None and predictor.predicts_metric:
        return hoped(predictor, state.base, step.choice, state.margin)
    added = [state.looking.known[key].decisive for key in step.choice.items() - state.base.step.choice.items()]
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


def _rechained(state: _Growth, found: Chain) -> Chain:
    """Up to the last map that passed, with nested maps between; beyond it what else was looked at, or holds that map."""
    made = [one for one in state.below[:-1] if _foreseen(one, state.margin)] + state.below[-1:]
    for start, end in pairwise([*(made[-1:] or [_nothing(state.looking)]), *state.passed]):
        between = state.steps(end.step.choice, above=start.step)
        candidates = [state.candidate(step) for step in between if step.gain < end.step.gain]
        made += [one for one in candidates if _foreseen(one, state.margin)]
        made.append(end)
    top = made[-1].step.choice.keys() if made else set()
    seen = {id(one) for one in made}
    others = [one for one in (*found.candidates, *state.broken, *state.left_behind) if id(one) not in seen]
    beyond = [one for one in others if one.measured is not None or one.step.choice.keys() > top]
    unique = {id(one): one for one in beyond if one.step.choice}
    return Chain(
        (*made, *sorted(unique.values(), key=lambda one: one.step.gain)),
        len(made) - 1 if made else None,
        state.predictor,
    )


def _foretold(found: Chain, margin: float) -> bool:
    """Whether superposition was right about the best map; then it is for those below, too."""
    best = None if found.best is None else found.candidates[found.best]
    if best is None or best.predicted is None or best.on_screened is None:
        return False
    return abs(best.on_screened.drop.estimate - best.predicted.drop.estimate) <= FORETOLD * margin


def _confirmed(found: Chain, looking: Looking) -> Chain:
    """The maps that are sent before the best one, measured too; less what fails.

    A sequence ends at its first failure: a map of fewer layers that loses more would take the best one with it.
    """
    for _ in range(MOST_CONFIRMED):
        asked = next((one for one in sequence(found) if one.measured is None), None)
        if asked is None or found.best is None or looking.out_of_time():
            break
        at = next(place for place, one in enumerate(found.candidates) if one is asked)
        looked_at = looking.look(asked)
        kept = (looked_at,) if looking.passed(looked_at) else ()
        candidates = (*found.candidates[:at], *kept, *found.candidates[at + 1 :])
        found = replace(found, candidates=candidates, best=found.best - (not kept))
    return found
