"""The table of an allocation, read into what may move: items (must-share groups) with their ladders, in families.

Invariant: an item's rungs are ordered from the safest (rung 0, the base precision) to the most aggressive, and families
are independent of each other: no choice in one changes what another gains, costs or weighs. Torch-free. Rows are given
per layer, as they are measured; the alternative, rows per group, would ask every caller to know the groups.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from types import MappingProxyType

from precimap.errors import InputError

NO_BONUS: Mapping[str, float] = MappingProxyType({})
NO_COSTS: Mapping[tuple[str, str], float] = MappingProxyType({})

State = tuple[int, ...]  # one rung per item of a family


@dataclass(frozen=True, slots=True)
class Option:
    """One layer under one scheme.

    `gain`: time saved, in any one unit (a share of FLOPs, measured seconds). `cost`: what it takes from the budget, at
    least 0 (an improvement is never a credit), infinite for never. `bytes`: of the layer's weight under this scheme.
    `fused`: the must-share group (an engine runs its members as one, under one scheme). `siblings`: the may-share group
    (layers with the same input; sharing its quantised form saves a bonus).
    """

    layer: str
    scheme: str
    gain: float
    cost: float
    bytes: int
    fused: str | None = None
    siblings: str | None = None


@dataclass(frozen=True, slots=True)
class Rung:
    """An item under one scheme (empty for the base precision)."""

    scheme: str
    gain: float
    cost: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Item:
    """What moves as one: a layer, or a must-share group. Only schemes that all its layers can take are rungs."""

    layers: tuple[str, ...]
    rungs: tuple[Rung, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Items that earn `bonus` when all of them have one scheme. `joint`: for each scheme they all have, its rungs."""

    items: tuple[Item, ...]
    bonus: float = 0.0
    joint: tuple[State, ...] = ()

    def shares(self, state: Sequence[int]) -> bool:
        """Whether the bonus is earned."""
        return bool(self.joint) and tuple(state) in self.joint

    def gain(self, state: Sequence[int]) -> float:
        own = math.fsum(item.rungs[rung].gain for item, rung in zip(self.items, state, strict=True))
        return own + self.bonus if self.shares(state) else own

    def cost(self, state: Sequence[int]) -> float:
        return math.fsum(item.rungs[rung].cost for item, rung in zip(self.items, state, strict=True))

    def bytes(self, state: Sequence[int]) -> int:
        return sum(item.rungs[rung].bytes for item, rung in zip(self.items, state, strict=True))


def families(
    options: Iterable[Option],
    base_bytes: Mapping[str, int],
    bonus: Mapping[str, float] = NO_BONUS,
    group_costs: Mapping[tuple[str, str], float] = NO_COSTS,
) -> tuple[Family, ...]:
    """The families of a table, by the names of their layers; items that can take no scheme are in none.

    Entries of `bonus` and `group_costs` for groups without an option are not read. Raises InputError for a table that
    contradicts itself.
    """
    table = sorted(options, key=lambda row: (row.layer, row.scheme))
    _check(table, base_bytes, bonus, group_costs)
    rows: dict[tuple[str, str], list[Option]] = defaultdict(list)
    for row in table:
        rows[("layer", row.layer) if row.fused is None else ("group", row.fused)].append(row)
    alone: list[Item] = []
    together: dict[str, list[Item]] = defaultdict(list)
    for found in rows.values():
        item, siblings = _item(found, base_bytes, group_costs), found[0].siblings
        if len(item.rungs) > 1 and siblings is not None and bonus.get(siblings):
            together[siblings].append(item)
        elif len(item.rungs) > 1:
            alone.append(item)
    made = [Family((item,)) for item in alone] + [_family(items, bonus[name]) for name, items in together.items()]
    return tuple(sorted(made, key=lambda family: family.items[0].layers))


def _item(rows: Sequence[Option], base_bytes: Mapping[str, int], group_costs: Mapping[tuple[str, str], float]) -> Item:
    layers = tuple(sorted({row.layer for row in rows}))
    by_scheme: dict[str, list[Option]] = defaultdict(list)
    for row in rows:
        by_scheme[row.scheme].append(row)
    rungs = []
    for scheme, found in by_scheme.items():
        cost = math.fsum(row.cost for row in found)
        if len(found) == len(layers) and cost < math.inf:  # never for one member is never for the group
            cost = group_costs.get((found[0].fused or "", scheme), cost) if found[0].fused is not None else cost
            rungs.append(Rung(scheme, math.fsum(row.gain for row in found), cost, sum(row.bytes for row in found)))
    rungs = sorted((rung for rung in rungs if rung.cost < math.inf), key=lambda r: (r.cost, r.gain, -r.bytes, r.scheme))
    return Item(layers, (Rung("", 0.0, 0.0, sum(base_bytes[layer] for layer in layers)), *rungs))


def _family(items: list[Item], bonus: float) -> Family:
    items = sorted(items, key=lambda item: item.layers)
    if len(items) == 1:
        # Fused siblings always share, so the bonus is part of their gain; one layer has nobody to share with.
        (item,) = items
        extra = bonus if len(item.layers) > 1 else 0.0
        base, *rungs = item.rungs
        return Family((Item(item.layers, (base, *(replace(rung, gain=rung.gain + extra) for rung in rungs))),))
    places = [{rung.scheme: place for place, rung in enumerate(item.rungs) if place} for item in items]
    common = sorted(set.intersection(*(set(place) for place in places)))
    return Family(tuple(items), bonus, tuple(tuple(place[scheme] for place in places) for scheme in common))


def _check(
    table: Sequence[Option],
    base_bytes: Mapping[str, int],
    bonus: Mapping[str, float],
    group_costs: Mapping[tuple[str, str], float],
) -> None:
    groups: dict[str, tuple[str | None, str | None]] = {}
    seen: set[tuple[str, str]] = set()
    inputs: dict[str, str | None] = {}
    for row in table:
        what = f"{row.layer} under {row.scheme}"
        if not row.cost >= 0:
            raise InputError(f"the cost of {what} is {row.cost}; expected 0 or more (an improvement is no credit)")
        if not math.isfinite(row.gain):
            raise InputError(f"the gain of {what} is {row.gain}; expected a finite number")
        if row.layer not in base_bytes or row.bytes < 0:
            raise InputError(
                f"the size of {what} is not known; give its bytes and, in base_bytes, those of the layer kept"
            )
        if (row.layer, row.scheme) in seen:
            raise InputError(f"{what} is in the table twice; give one row per layer and scheme")
        seen.add((row.layer, row.scheme))
        if groups.setdefault(row.layer, (row.fused, row.siblings)) != (row.fused, row.siblings):
            raise InputError(f"the rows of {row.layer} name different groups; a layer is in one of each kind")
        if row.fused is not None and inputs.setdefault(row.fused, row.siblings) != row.siblings:
            raise InputError(
                f"the members of {row.fused} are siblings of different layers; a must-share group reads one input"
            )
    for name, value in (*bonus.items(), *group_costs.items()):
        if not value >= 0:
            raise InputError(f"the bonus or group cost of {name} is {value}; expected 0 or more")
    if not all(math.isfinite(value) for value in bonus.values()):
        raise InputError("a bonus is infinite; expected the time that sharing one quantised input saves")


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


def per_cost(worth: float, cost: float) -> float:
    return worth / cost if cost > 0 else math.inf


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
    state = list(start)
    moves: list[Move] = []
    everyone = range(len(family.items))
    singles: list[_Way | None] = [None] * len(family.items)
    stale: Iterable[int] = everyone
    joint = list(family.joint)
    while True:
        shared = family.shares(state)
        lost = family.bonus if shared else 0.0
        for index in stale:
            singles[index] = _single(family.items[index], index, state[index], lost, room, worth)
        # Items only climb: a scheme that one of them has passed is never shared again.
        joint = [to for to in joint if all(at <= rung for at, rung in zip(state, to, strict=True))]
        ways = [way for way in singles if way is not None]
        ways += [way for to in joint if (way := _together(family, state, to, shared, room)) is not None]
        if not ways:
            return _concave(moves)
        after = list(state)
        for index, rung in min(ways)[-1]:
            after[index] = rung
        moves.append(_move(family, state, after, worth))
        stale = [index for index in everyone if state[index] != after[index]]
        state, room = after, room - moves[-1].bytes
        if room < math.inf or family.shares(state) != shared:
            stale = everyone


# What the best way is the smallest of: minus worth per cost; then the cost, but of free ways minus the worth, because
# taking less for nothing would be dominated; minus the gain; where it goes, as (item, rung).
_Way = tuple[float, float, float, tuple[tuple[int, int], ...]]


def _way(more: float, cost: float, gain: float, to: tuple[tuple[int, int], ...]) -> _Way:
    ratio = per_cost(more, cost)
    return -ratio, -more if ratio == math.inf else cost, -gain, to


def _single(item: Item, index: int, at: int, lost: float, room: float, worth: Callable[[Rung], float]) -> _Way | None:
    """The best way up of one item, when leaving its siblings loses `lost`; None when nothing above is worth more."""
    here = item.rungs[at]
    least = worth(here) + lost
    ways = [
        _way(worth(rung) - least, rung.cost - here.cost, rung.gain, ((index, place),))
        for place, rung in enumerate(item.rungs[at + 1 :], at + 1)
        if worth(rung) > least and rung.bytes - here.bytes <= room
    ]
    return min(ways, default=None)


def _together(family: Family, state: Sequence[int], to: State, shared: bool, room: float) -> _Way | None:
    """All siblings that are not there yet go to one scheme, and earn the bonus if they do not share one already."""
    moving = [(item.rungs[a], item.rungs[b]) for item, a, b in zip(family.items, state, to, strict=True) if a != b]
    gain = math.fsum(there.gain - here.gain for here, there in moving) + (0.0 if shared else family.bonus)
    if not moving or gain <= 0 or (room < math.inf and sum(there.bytes - here.bytes for here, there in moving) > room):
        return None
    movers = tuple((index, rung) for index, rung in enumerate(to) if state[index] != rung)
    return _way(gain, math.fsum(there.cost - here.cost for here, there in moving), gain, movers)


def _move(family: Family, state: Sequence[int], after: Sequence[int], worth: Callable[[Rung], float]) -> Move:
    to = tuple((index, rung) for index, rung in enumerate(after) if state[index] != rung)
    rungs = [(family.items[index].rungs[state[index]], family.items[index].rungs[rung]) for index, rung in to]
    bonus = Fraction(family.bonus) * (family.shares(after) - family.shares(state))
    more = sum((Fraction(worth(there)) - Fraction(worth(here)) for here, there in rungs), bonus)
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
