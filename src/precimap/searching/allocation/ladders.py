"""The table of an allocation, read into what may move: items (must-share groups) in families, what they save and share.

Invariant: an item's rungs are ordered from the safest (rung 0, the base precision) to the most aggressive, and families
are independent of each other: no choice in one changes what another gains, costs or weighs. Torch-free. Rows are given
per layer, as they are measured; the alternative, rows per group, would ask every caller to know the groups.

Siblings read one input. Under one scheme the first of them quantises it and each further one saves that: k of them gain
the sum of their own gains and (k - 1) times what sharing saves. Under two schemes they share within each.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from precimap.errors import InputError
from precimap.searching.pairs import Key

State = tuple[int, ...]  # one rung per item of a family


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One layer under one scheme.

    `gain`: time saved by the layer alone, in any one unit (a share of FLOPs, measured seconds). `cost`: what it takes from
    the budget, at least 0 (an improvement is never a credit), infinite for never. `bytes`: of the layer's weight under
    this scheme. `fused`: the must-share group (an engine runs its members as one, under one scheme). `siblings`: the
    may-share group (layers with the same input). `shared`: what the layer saves beside its gain when one of its siblings
    has quantised that input under this scheme; the same for all of them.
    """

    layer: str
    scheme: str
    gain: float
    cost: float
    bytes: int
    fused: str | None = None
    siblings: str | None = None
    shared: float = 0.0

    @property
    def key(self) -> Key:
        return self.layer, self.scheme


def total_gain(rows: Iterable[Option]) -> float:
    """What the rows of one map gain together, sharing included."""
    chosen = list(rows)
    readers = Counter((row.siblings, row.scheme) for row in chosen if row.siblings is not None)
    saved = {(row.siblings, row.scheme): row.shared for row in chosen}
    return math.fsum([*(row.gain for row in chosen), *((count - 1) * saved[key] for key, count in readers.items())])


def settled(rows: Iterable[Option], choice: Mapping[str, str]) -> dict[str, str]:
    """The choice without the siblings that lose because those which they would share an input with are not in it.

    Of maps that grow, what is left grows: each further sibling is worth more to the others.
    """
    kept = dict(choice)
    items: dict[str, list[Option]] = defaultdict(list)
    inputs: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row in (row for row in rows if choice.get(row.layer) == row.scheme):
        items[row.fused or row.layer].append(row)
        if row.siblings is not None and row.shared > 0:
            inputs[row.siblings, row.scheme].add(row.fused or row.layer)
    names = sorted({name for readers in inputs.values() for name in readers})
    places = {name: place for place, name in enumerate(names)}
    for members in _connected(len(names), [[places[name] for name in readers] for readers in inputs.values()]):
        left = {names[place]: items[names[place]] for place in members}
        while left:
            gain, without = _gain_of(left), {name: _gain_of({**left, name: []}) for name in left}
            name = max(without, key=lambda name: (without[name], name))
            gone = [name] if without[name] > gain else list(left) if gain < 0 else []
            if not gone:
                break
            for row in (row for name in gone for row in left.pop(name)):
                del kept[row.layer]
    return kept


def _gain_of(items: Mapping[str, Sequence[Option]]) -> float:
    return total_gain(row for rows in items.values() for row in rows)


@dataclass(frozen=True, slots=True)
class Rung:
    """An item under one scheme (empty for the base precision). Its gain holds what its own layers share."""

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
class Sharing:
    """One input under one scheme. at: (item, rung) of those that read it so; each of them after the first saves `each`."""

    at: tuple[tuple[int, int], ...]
    each: float

    def readers(self, state: Sequence[int]) -> int:
        return sum(state[index] == rung for index, rung in self.at)

    def further(self, state: Sequence[int]) -> int:
        """How many read it after the first."""
        return max(0, self.readers(state) - 1)


@dataclass(frozen=True, slots=True)
class Family:
    """Items that share inputs with each other and with no other item."""

    items: tuple[Item, ...]
    sharing: tuple[Sharing, ...] = ()

    def gain(self, state: Sequence[int]) -> float:
        own = (item.rungs[rung].gain for item, rung in zip(self.items, state, strict=True))
        return math.fsum([*own, *(one.each * one.further(state) for one in self.sharing)])

    def cost(self, state: Sequence[int]) -> float:
        return math.fsum(item.rungs[rung].cost for item, rung in zip(self.items, state, strict=True))

    def bytes(self, state: Sequence[int]) -> int:
        return sum(item.rungs[rung].bytes for item, rung in zip(self.items, state, strict=True))

    def joined(self, state: Sequence[int], one: Sharing, least: Sequence[int]) -> Iterator[State]:
        """States in which two or more items go to one scheme together, those that gain most per cost first.

        With one scheme the best way to begin sharing is among them: it is a prefix of the items by what each gains per
        cost once another one shares. `least`: the rung that no item may go below.
        """
        ranked = []
        for index, rung in one.at:
            if rung != state[index] and rung >= least[index]:
                here, there = self.items[index].rungs[state[index]], self.items[index].rungs[rung]
                after = _with(state, index, rung)
                gain = there.gain - here.gain + one.each
                gain -= sum(o.each * (o.further(state) - o.further(after)) for o in self.sharing if o is not one)
                ranked.append((-_per_cost_of(gain, there.cost - here.cost), index, rung))
        after = tuple(state)
        for count, (_, index, rung) in enumerate(sorted(ranked), 1):
            after = _with(after, index, rung)
            if count > 1:
                yield after


def _with(state: Sequence[int], index: int, rung: int) -> State:
    return (*state[:index], rung, *state[index + 1 :])


def families(options: Iterable[Option], base_bytes: Mapping[str, int]) -> tuple[Family, ...]:
    """The families of a table, by the names of their layers; items that can take no scheme are in none.

    Raises InputError for a table that contradicts itself.
    """
    table = sorted(options, key=lambda row: (row.layer, row.scheme))
    _check(table, base_bytes)
    rows: dict[tuple[str, str], list[Option]] = defaultdict(list)
    for row in table:
        rows[("layer", row.layer) if row.fused is None else ("group", row.fused)].append(row)
    items: list[Item] = []
    readers: dict[tuple[str, str], list[int]] = defaultdict(list)  # of an input under a scheme: items
    for found in rows.values():
        item = _item(found, base_bytes)
        schemes = {rung.scheme for rung in item.rungs[1:]}
        if schemes:
            inputs = {(row.siblings, row.scheme) for row in found if row.siblings is not None and row.shared > 0}
            for group, scheme in sorted((group, scheme) for group, scheme in inputs if scheme in schemes):
                readers[group, scheme].append(len(items))
            items.append(item)
    saved = {(row.siblings, row.scheme): row.shared for row in table if row.siblings is not None}
    shared = {key: found for key, found in readers.items() if len(found) > 1}
    made = []
    for members in _connected(len(items), shared.values()):
        place = {number: index for index, number in enumerate(members)}
        sharing = tuple(
            Sharing(tuple((place[number], _rung(items[number], scheme)) for number in found), saved[group, scheme])
            for (group, scheme), found in sorted(shared.items())
            if found[0] in place
        )
        made.append(Family(tuple(items[number] for number in members), sharing))
    return tuple(sorted(made, key=lambda family: family.items[0].layers))


def _connected(count: int, groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """The numbers below `count`, those that a chain of groups connects together; each list in order."""
    of = {number: [number] for number in range(count)}
    for group in groups:
        merged = sorted({number for first in group for number in of[first]})
        of.update(dict.fromkeys(merged, merged))
    return [members for number, members in of.items() if members[0] == number]


def _rung(item: Item, scheme: str) -> int:
    return next(place for place, rung in enumerate(item.rungs) if rung.scheme == scheme)


def _item(rows: Sequence[Option], base_bytes: Mapping[str, int]) -> Item:
    layers = tuple(sorted({row.layer for row in rows}))
    by_scheme: dict[str, list[Option]] = defaultdict(list)
    for row in rows:
        by_scheme[row.scheme].append(row)
    rungs = []
    for scheme, found in by_scheme.items():
        cost = math.fsum(row.cost for row in found)
        if len(found) == len(layers) and cost < math.inf:  # never for one member is never for the group
            rungs.append(Rung(scheme, total_gain(found), cost, sum(row.bytes for row in found)))
    rungs = sorted((rung for rung in rungs if rung.cost < math.inf), key=lambda r: (r.cost, r.gain, -r.bytes, r.scheme))
    return Item(layers, (Rung("", 0.0, 0.0, sum(base_bytes[layer] for layer in layers)), *rungs))


def _check(table: Sequence[Option], base_bytes: Mapping[str, int]) -> None:
    groups: dict[str, tuple[str | None, str | None]] = {}
    seen: set[tuple[str, str]] = set()
    saved: dict[tuple[str, str], float] = {}
    for row in table:
        what = f"{row.layer} under {row.scheme}"
        if not row.cost >= 0:
            raise InputError(f"the cost of {what} is {row.cost}; expected 0 or more (an improvement counts as 0)")
        if not math.isfinite(row.gain):
            raise InputError(f"the gain of {what} is {row.gain}; expected a finite number")
        if not 0 <= row.shared < math.inf:
            raise InputError(f"a shared input of {what} saves {row.shared}; expected 0 or more, and finite")
        if row.layer not in base_bytes or row.bytes < 0:
            raise InputError(
                f"the size of {what} is not known; give its bytes and, in base_bytes, those of the layer kept"
            )
        if row.key in seen:
            raise InputError(f"{what} is in the table twice; give one row per layer and scheme")
        seen.add(row.key)
        if groups.setdefault(row.layer, (row.fused, row.siblings)) != (row.fused, row.siblings):
            raise InputError(f"the rows of {row.layer} name different groups; a layer is in one of each kind")
        if row.siblings is not None and saved.setdefault((row.siblings, row.scheme), row.shared) != row.shared:
            raise InputError(
                f"sharing the {row.siblings} under {row.scheme} saves two different times; it is one input, quantised once"
            )


def per_cost(worth: float, cost: float) -> float:
    return worth / cost if cost > 0 else math.inf


def _per_cost_of(worth: float, cost: float) -> float:
    """As `per_cost`, also of what is worth nothing, or goes to where it costs less."""
    return worth / cost if cost > 0 else math.copysign(math.inf, worth)
