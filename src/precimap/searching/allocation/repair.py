"""Local repair of one map on a metric that knows how layers interact: revert what hurts, then add what still fits.

Invariant: the map that comes out is predicted to be within the limit, and must-share groups moved as one. Torch-free:
the metric is any function of a map (the superposed metric: exact on the summed changes of all layers). Layer budgets
add up without interactions, so a chain of the knapsack can hold two layers that are harmless alone and not together;
an integer program on pairs of layers needs a table of all pairs, this needs a few predictions of whole maps.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from precimap.errors import InputError
from precimap.searching.allocation.knapsack import Step, choice_of
from precimap.searching.allocation.ladders import Family, Option, families, per_cost

_States = tuple[tuple[int, ...], ...]  # of all families
_Change = tuple[tuple[int, int, int], ...]  # (family, item, rung to go to)
_Place = tuple[int, int]  # (family, item)


@dataclass(frozen=True, slots=True)
class Goal:
    """predicted: takes layer -> scheme and gives the drop (or its upper bound) of the whole map. limit: of it.
    most_tries: how often it may be asked."""

    predicted: Callable[[Mapping[str, str]], float]
    limit: float
    most_tries: int = 200

    def __post_init__(self) -> None:
        if self.most_tries < 1 or math.isnan(self.limit):
            raise InputError(
                f"a repair needs a limit and at least one try; got limit {self.limit}, {self.most_tries} tries"
            )


@dataclass(slots=True)
class _Asker:
    """Asks for the predicted drop of a map at most `left` more times; what is not a number is infinitely bad."""

    table: Sequence[Family]
    predicted: Callable[[Mapping[str, str]], float]
    limit: float
    left: int

    def drop(self, states: _States) -> float:
        self.left -= 1
        drop = self.predicted(choice_of(self.table, states))
        return math.inf if math.isnan(drop) else drop


def repair(step: Step, options: Iterable[Option], base_bytes: Mapping[str, int], goal: Goal) -> Step:
    """A map near `step` whose predicted drop is at most the goal's limit; it may be the empty map, which is never asked for.

    While the map is above the limit, the item that takes most of the excess away per gain lost is reverted (of many items,
    blocks are tried first and split). When tries run short, the rest is reverted in that order, as far as a bisection says.
    Within the limit, whatever adds gain is tried, most gain per cost first, then swaps of one item for another with more
    gain. A search of neighbours, so not the optimum. The gain may end below a minimum, the bytes above a maximum.

    Raises InputError for a step that is no map of the table.
    """
    table = families(options, base_bytes)
    kept = sum(base_bytes.values()) - _bytes(table, [[0] * len(family.items) for family in table])
    asker = _Asker(table, goal.predicted, goal.limit, goal.most_tries)
    states = _states_of(table, step)
    drop = asker.drop(states)
    if not drop <= goal.limit:
        states = _revert(asker, states, drop)
    states = _swap(asker, *_add(asker, states))
    totals = list(zip(table, states, strict=True))
    return Step(
        choice_of(table, states),
        math.fsum(family.gain(state) for family, state in totals),
        math.fsum(family.cost(state) for family, state in totals),
        kept + _bytes(table, states),
    )


def _states_of(table: Sequence[Family], step: Step) -> _States:
    states = tuple(
        tuple(
            next(
                (place for place, rung in enumerate(item.rungs) if rung.scheme == step.choice.get(item.layers[0], "")),
                0,
            )
            for item in family.items
        )
        for family in table
    )
    if choice_of(table, states) != dict(sorted(step.choice.items())):
        raise InputError(
            "the step is no map of this table: expected finite-cost options, one scheme per must-share group"
        )
    return states


def _changed(states: _States, change: _Change) -> _States:
    rows = [list(state) for state in states]
    for number, index, rung in change:
        rows[number][index] = rung
    return tuple(tuple(row) for row in rows)


def _bytes(table: Sequence[Family], states: Sequence[Sequence[int]]) -> int:
    return sum(family.bytes(state) for family, state in zip(table, states, strict=True))


def _adds(table: Sequence[Family], states: _States, change: _Change) -> tuple[float, float]:
    """What a change adds to the gain (what siblings share included) and the cost."""
    rows: dict[int, list[int]] = {}
    for number, index, rung in change:
        rows.setdefault(number, list(states[number]))[index] = rung
    return (
        math.fsum(table[number].gain(row) - table[number].gain(states[number]) for number, row in rows.items()),
        math.fsum(table[number].cost(row) - table[number].cost(states[number]) for number, row in rows.items()),
    )


def _low(states: _States) -> list[_Place]:
    return [(number, index) for number, state in enumerate(states) for index, rung in enumerate(state) if rung]


def _cost_per_gain(table: Sequence[Family], states: _States, place: _Place) -> float:
    """What the item takes from the budget for what would be lost with it; infinite where nothing would."""
    gain, cost = _adds(table, states, ((*place, 0),))
    return per_cost(-cost, -gain) if cost < 0 else 0.0


# ---- above the limit


def _revert(asker: _Asker, states: _States, drop: float) -> _States:
    """Reverts item after item until the map is within the limit: lazily, the best by its last score is scored again."""
    table = asker.table
    places = sorted(_low(states), key=lambda place: (-_cost_per_gain(table, states, place), place))
    reserve = math.ceil(math.log2(len(places) + 1)) + 1  # for the bisection
    size = max(1, math.ceil(len(places) / max(1, (asker.left - reserve) // 2)))
    blocks = [tuple(places[first : first + size]) for first in range(0, len(places), size)]
    heap: list[tuple[float, int, tuple[_Place, ...], float]] = []  # minus score, when scored, places, drop without them
    last = dict.fromkeys(places, -math.inf)
    done = 0

    def score(block: tuple[_Place, ...]) -> None:
        change = tuple((number, index, 0) for number, index in block)
        gain, _ = _adds(table, states, change)
        if asker.left <= reserve:
            return
        without = asker.drop(_changed(states, change))
        relief = (
            min(drop - without, drop - asker.limit) if without < math.inf else 0.0
        )  # more than the excess is no use
        worth = per_cost(relief, -gain) if relief > 0 else -math.inf
        last.update(dict.fromkeys(block, worth))
        heapq.heappush(heap, (-worth, done, block, without))  # of equal scores the stalest first

    for block in blocks:
        score(block)
    while heap and asker.left > reserve:
        minus, when, block, without = heapq.heappop(heap)
        if len(block) > 1:
            score(block[: len(block) // 2])
            score(block[len(block) // 2 :])
        elif when < done:
            score(block)
        elif minus == math.inf:
            break  # nothing alone helps any more
        else:
            states = _changed(states, tuple((number, index, 0) for number, index in block))
            drop, done = without, done + 1
            if drop <= asker.limit:
                return states
    low = set(_low(states))
    return _bisect(asker, states, [p for p in sorted(places, key=lambda p: -last[p]) if p in low])


def _bisect(asker: _Asker, states: _States, order: Sequence[_Place]) -> _States:
    """As few reverts as a bisection finds, in the given order."""
    reverts: list[_States] = [states]
    for number, index in order:
        reverts.append(_changed(reverts[-1], ((number, index, 0),)))
    above, within = 0, len(reverts) - 1
    while within - above > 1 and asker.left > 0:
        middle = (above + within) // 2
        above, within = (above, middle) if asker.drop(reverts[middle]) <= asker.limit else (middle, within)
    return reverts[within]


# ---- within the limit


def _additions(table: Sequence[Family], states: _States) -> Iterator[_Change]:
    """Every other rung of every item, siblings that go to one scheme together, and siblings that give up one."""
    for number, (family, state) in enumerate(zip(table, states, strict=True)):
        for index, item in enumerate(family.items):
            least = 0 if family.sharing else 1  # one whose siblings were reverted may gain by going, too
            yield from (((number, index, rung),) for rung in range(least, len(item.rungs)) if rung != state[index])
        for one in family.sharing:
            for to in family.joined(state, one, least=[0] * len(state)):
                yield tuple((number, index, rung) for index, rung in enumerate(to) if rung != state[index])
            if one.readers(state) > 1:
                yield tuple((number, index, 0) for index, rung in one.at if state[index] == rung)


def _add(asker: _Asker, states: _States) -> tuple[_States, list[_Change]]:
    """The map with all that fits, most gain per cost first, and the single items that did not fit."""
    table = asker.table

    def order(change: _Change) -> tuple[float, _Change]:
        gain, cost = _adds(table, states, change)
        return -per_cost(gain, cost), change

    failed: list[_Change] = []
    for change in sorted(_additions(table, states), key=order):
        gain, _ = _adds(table, states, change)
        if asker.left < 1:
            break
        if gain <= 0:
            continue
        trial = _changed(states, change)
        if asker.drop(trial) <= asker.limit:
            states = trial
        elif len(change) == 1:
            failed.append(change)
    return states, failed


def _swap(asker: _Asker, states: _States, failed: Sequence[_Change]) -> _States:
    """One item out, one with more gain that did not fit alone in: the least extra cost first."""
    table = asker.table

    def cost(change: tuple[int, int, int]) -> float:
        return table[change[0]].items[change[1]].rungs[change[2]].cost

    swaps = (
        (cost(into) - cost((number, index, states[number][index])), ((number, index, 0), into))
        for (into,) in failed
        for number, index in _low(states)
        if (number, index) != into[:2]
    )
    for _, change in heapq.nsmallest(max(0, asker.left), swaps):
        gain, _ = _adds(table, states, change)
        if asker.left < 1:
            break
        if gain <= 0:
            continue
        trial = _changed(states, change)
        if asker.drop(trial) <= asker.limit:
            states = trial
    return states
