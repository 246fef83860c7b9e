"""How the items of one family climb: the moves from a state, best worth per cost first.

Invariant: an item only climbs its own ladder, and the ratio of worth to cost never rises from one move to the next, so that
the moves of all families can be merged by it. Exact where no input is shared, and for siblings that have one scheme to
choose; torch-free.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from precimap.searching.allocation.ladders import Family, Rung, State, per_cost


@dataclass(frozen=True, slots=True)
class Move:
    """Items of one family going up together: (item, rung) each, and what that adds. `ratio` is worth per cost.

    Exact rationals, so that totals depend neither on the order of the moves nor on how they were merged.
    """

    to: tuple[tuple[int, int], ...]
    worth: Fraction
    cost: Fraction
    bytes: int

    @property
    def ratio(self) -> float:
        return per_cost(float(self.worth), float(self.cost))


def gain_of(rung: Rung) -> float:
    return rung.gain


def smallness(rung: Rung) -> float:
    return -rung.bytes


def ladder(family: Family, start: State, room: float, worth: Callable[[Rung], float]) -> list[Move]:
    """All the moves of a family from `start`, best worth per cost first, merged until that ratio never rises.

    No move makes the family larger than `room` bytes more than at the start.
    """
    largest = (max(rung.bytes for rung in item.rungs[at:]) for item, at in zip(family.items, start, strict=True))
    if sum(largest) - family.bytes(start) <= room:
        room = math.inf  # nothing can be too large
    state = tuple(start)
    moves: list[Move] = []
    everyone = range(len(family.items))
    singles: list[_Way | None] = [None] * len(family.items)
    stale: Iterable[int] = everyone
    while True:
        for index in stale:
            singles[index] = _single(family, state, index, room, worth)
        ways = [way for way in singles if way is not None]
        ways += _together(family, state, room)
        if not ways:
            return _concave(moves)
        after = list(state)
        for index, rung in min(ways)[-1]:
            after[index] = rung
        moves.append(_move(family, state, after, worth))
        stale = [index for index in everyone if state[index] != after[index]]
        state, room = tuple(after), room - moves[-1].bytes
        if room < math.inf or family.sharing:
            stale = everyone


# What the best way is the smallest of: minus worth per cost; then the cost, but of free ways minus the worth, because
# taking less for nothing would be dominated; minus the gain; where it goes, as (item, rung).
_Way = tuple[float, float, float, tuple[tuple[int, int], ...]]


def _way(more: float, cost: float, gain: float, to: tuple[tuple[int, int], ...]) -> _Way:
    ratio = per_cost(more, cost)
    return -ratio, -more if ratio == math.inf else cost, -gain, to


def _single(family: Family, state: State, index: int, room: float, worth: Callable[[Rung], float]) -> _Way | None:
    """The best way up of one item, with what it leaves and joins; None when nothing above is worth more."""
    rungs, at = family.items[index].rungs, state[index]
    joins: dict[int, float] = {}  # by rung: what sharing with those that are there saves
    for one in family.sharing:
        for rung in (rung for item, rung in one.at if item == index):
            others = one.readers(state) - (rung == at)
            joins[rung] = joins.get(rung, 0.0) + (one.each if others else 0.0)
    here = worth(rungs[at]) + joins.get(at, 0.0)
    ways = [
        _way(more, rung.cost - rungs[at].cost, rung.gain, ((index, place),))
        for place, rung in enumerate(rungs[at + 1 :], at + 1)
        if (more := worth(rung) + joins.get(place, 0.0) - here) > 0 and rung.bytes - rungs[at].bytes <= room
    ]
    return min(ways, default=None)


def _together(family: Family, state: State, room: float) -> list[_Way]:
    """Siblings that begin to share under a scheme which none of them has; those that follow go alone."""
    ways = []
    before = family.gain(state), family.cost(state), family.bytes(state)
    for one in family.sharing:
        if one.readers(state):
            continue
        for after in family.joined(state, one, least=state):
            more = family.gain(after) - before[0]
            if more > 0 and (room == math.inf or family.bytes(after) - before[2] <= room):
                ways.append(_way(more, family.cost(after) - before[1], more, _movers(state, after)))
    return ways


def _movers(state: Sequence[int], after: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple((index, rung) for index, rung in enumerate(after) if state[index] != rung)


def _move(family: Family, state: Sequence[int], after: Sequence[int], worth: Callable[[Rung], float]) -> Move:
    to = _movers(state, after)
    rungs = [(family.items[index].rungs[state[index]], family.items[index].rungs[rung]) for index, rung in to]
    shared = sum(
        (Fraction(one.each) * (one.further(after) - one.further(state)) for one in family.sharing), Fraction(0)
    )
    more = sum((Fraction(worth(there)) - Fraction(worth(here)) for here, there in rungs), shared)
    cost = sum((Fraction(there.cost) - Fraction(here.cost) for here, there in rungs), Fraction(0))
    return Move(to, more, cost, sum(there.bytes - here.bytes for here, there in rungs))


def _concave(moves: Iterable[Move]) -> list[Move]:
    """The upper hull of a path: a move that a better one follows is only taken together with it."""
    hull: list[Move] = []
    for move in moves:
        while hull and move.ratio > hull[-1].ratio:
            first = hull.pop()
            to = tuple(sorted({**dict(first.to), **dict(move.to)}.items()))
            move = Move(to, first.worth + move.worth, first.cost + move.cost, first.bytes + move.bytes)
        hull.append(move)
    return hull
