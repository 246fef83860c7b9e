"""Which layer gets which scheme when time saved has a price: the multiple-choice knapsack, as a nested chain of maps.

Invariant: the maps of a chain are nested, a layer only climbs its own ladder (its schemes by cost), and gain and cost
both grow. Torch-free, so that it is tested on invented tables. The chain is the Lagrangian path of the knapsack: each
item climbs the upper concave hull of its (cost, gain) options, and the steps of all items are taken by gain per cost.
Each prefix is then the optimum for its own cost (Sinha and Zoltners 1979, "The multiple-choice knapsack problem").
Free optima of an integer program, one per budget, gain a little more between the prefixes but do not nest, and maps
that do not nest cannot be tested safest first.

Siblings that share a quantised input are in it (`ladders.Sharing`): with one scheme to choose, the best set of siblings to
begin with is among those looked at, and the chain stays the optimum for its own costs. What stays heuristic: siblings with
several schemes (a joint move to one scheme is weighed against single moves, one at a time, and no layer goes back to meet
its siblings), and everything under a limit of bytes (first the cheapest bytes until the map fits, then gain per cost; a
step that does not fit waits until there is room).
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from precimap.errors import InputError
from precimap.searching.allocation.climbing import Move, gain_of, ladder, smallness
from precimap.searching.allocation.ladders import Family, Option, State, families
from precimap.searching.allocation.threshold import LONGEST_CHAIN


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a map must keep to be an answer.

    `minimum_gain`: in the unit of `Option.gain`. `maximum_bytes`: of all layers together, those kept included.
    """

    minimum_gain: float = 0.0
    maximum_bytes: int | None = None


UNCONSTRAINED = Constraints()


@dataclass(frozen=True, slots=True)
class Step:
    """One map of a chain: layer -> scheme name (layers not named are kept), with the totals of the map."""

    choice: dict[str, str]
    gain: float
    cost: float
    bytes: int


def chain(
    options: Iterable[Option],
    base_bytes: Mapping[str, int],
    constraints: Constraints = UNCONSTRAINED,
    longest: int = LONGEST_CHAIN,
) -> tuple[Step, ...]:
    """At most `longest` nested maps, safest first, each the most gain for its cost (see the module on what is exact).

    `base_bytes`: of every layer, those without an option included. Free steps (cost 0) are all in the first map; the
    last map takes every step that gains; between them the maps are spaced evenly in gain. Equal ratios are taken by the
    layers' names, equal options by cost, gain, bytes, name: the order of the rows does not matter. Empty when no map saves
    `minimum_gain`.

    Raises InputError for a table that contradicts itself, and when no map is as small as `maximum_bytes`.
    """
    if longest < 1:
        raise InputError(f"a chain needs room for at least one map; longest is {longest}")
    table = families(options, base_bytes)
    size = sum(base_bytes.values())
    start = tuple((0,) * len(family.items) for family in table)
    room = math.inf
    if constraints.maximum_bytes is not None:
        start, size = _smaller(table, start, size, constraints.maximum_bytes)
        room = constraints.maximum_bytes - size
    moves = list(_walk(table, start, room))
    marks = _undominated(_prefixes(table, start, size, moves))
    marks = [mark for mark in marks if mark[1] >= constraints.minimum_gain]
    if not marks:
        return ()
    spaced = [marks[place] for place in _spaced([gain for _, gain, _, _ in marks], longest)]
    return tuple(_steps(table, start, moves, spaced))


def bytes_at(effective_bits: float, numels: Mapping[str, int]) -> int:
    """The `maximum_bytes` that a limit of average bits per weight means. `numels`: weights of every layer."""
    if not 0 < effective_bits < math.inf:
        raise InputError(f"effective bits are the average bits of a weight, above 0; got {effective_bits}")
    return math.floor(Fraction(effective_bits) * sum(numels.values()) / 8)


def _smaller(table: Sequence[Family], start: tuple[State, ...], size: int, most: int) -> tuple[tuple[State, ...], int]:
    """The start of a chain that must fit: cheapest cost per byte saved first, until it does."""
    states = [list(state) for state in start]
    moves = [
        (-move.ratio, number, index, order, move)
        for number, family in enumerate(table)
        for index, item in enumerate(family.items)
        for order, move in enumerate(ladder(Family((item,)), (0,), math.inf, smallness))
    ]
    for _, number, index, _, move in sorted(moves, key=lambda entry: entry[:4]):
        if size <= most:
            break
        states[number][index] = move.to[0][1]
        size += move.bytes
    if size > most:
        raise InputError(
            f"no map has at most {most} bytes: the smallest that these schemes reach has {size}; allow more"
        )
    return tuple(tuple(state) for state in states), size


def _walk(table: Sequence[Family], start: Sequence[State], room: float) -> Iterator[tuple[int, Move]]:
    """The moves of all families, (family number, move), by gain per cost; none leaves `room` below 0 bytes."""
    states = [list(state) for state in start]
    ladders: list[list[Move]] = [[] for _ in table]
    heap: list[tuple[float, int]] = []

    def push(number: int) -> None:
        if ladders[number]:
            heapq.heappush(heap, (-ladders[number][-1].ratio, number))

    def look(number: int) -> None:
        ladders[number] = ladder(table[number], tuple(states[number]), room, gain_of)[::-1]
        push(number)

    waiting: set[int] = set(range(len(table)))
    looked = -math.inf
    while waiting and room > looked:  # look again at those without room, when others have made some
        looked = room
        for number in sorted(waiting):
            look(number)
        waiting = set(waiting) if room < math.inf else set()
        while heap:
            _, number = heapq.heappop(heap)
            move = ladders[number][-1]
            if move.bytes > room:
                look(number)
                continue
            ladders[number].pop()
            for index, rung in move.to:
                states[number][index] = rung
            room -= move.bytes
            yield number, move
            push(number)


_Mark = tuple[int, float, float, int]  # how many moves, and the gain, cost and bytes after them


def _prefixes(
    table: Sequence[Family], start: Sequence[State], size: int, moves: Iterable[tuple[int, Move]]
) -> Iterator[_Mark]:
    """Every map of the path that is not empty, safest first."""
    gain = sum((Fraction(f.gain(state)) for f, state in zip(table, start, strict=True)), Fraction(0))
    cost = sum((Fraction(f.cost(state)) for f, state in zip(table, start, strict=True)), Fraction(0))
    if any(any(state) for state in start):
        yield 0, float(gain), float(cost), size
    for count, (_, move) in enumerate(moves, 1):
        gain, cost, size = gain + move.worth, cost + move.cost, size + move.bytes
        yield count, float(gain), float(cost), size


def _undominated(marks: Iterable[_Mark]) -> list[_Mark]:
    """Without the maps that save no more than the one before, or cost no less than the one after."""
    kept: list[_Mark] = []
    for mark in marks:
        if kept and mark[1] <= kept[-1][1]:
            continue
        if kept and mark[2] <= kept[-1][2]:
            kept.pop()
        kept.append(mark)
    return kept


def _spaced(gains: Sequence[float], longest: int) -> list[int]:
    """Places of at most `longest` of the rising `gains`: the first, the last, and evenly in gain between them."""
    places, last = [0], len(gains) - 1
    for left in range(longest - 1, 0, -1):
        here = places[-1]
        if here == last:
            break
        target = gains[last] if left == 1 else gains[here] + (gains[last] - gains[here]) / left
        places.append(min(max(bisect_left(gains, target), here + 1), last))
    return places


def _steps(
    table: Sequence[Family], start: Sequence[State], moves: Sequence[tuple[int, Move]], marks: Iterable[_Mark]
) -> Iterator[Step]:
    states = [list(state) for state in start]
    done = 0
    for count, gain, cost, size in marks:
        for number, move in moves[done:count]:
            for index, rung in move.to:
                states[number][index] = rung
        done = count
        yield Step(choice_of(table, states), gain, cost, size)


def choice_of(table: Sequence[Family], states: Sequence[Sequence[int]]) -> dict[str, str]:
    """Layer -> scheme of all layers that are not kept, by name."""
    pairs = (
        (item, rung)
        for family, state in zip(table, states, strict=True)
        for item, rung in zip(family.items, state, strict=True)
    )
    return dict(sorted((layer, item.rungs[rung].scheme) for item, rung in pairs if rung for layer in item.layers))
