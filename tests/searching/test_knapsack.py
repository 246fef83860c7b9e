"""The knapsack's chain on invented tables: nested, optimal for its own cost, whole groups, bytes kept, order-free."""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from precimap.errors import InputError
from precimap.searching.allocation.knapsack import Constraints, Step, bytes_at, chain
from precimap.searching.allocation.ladders import Option, settled, total_gain

SCHEMES = ("a", "b", "c")
BASE = 8
MANY = 10_000  # longer than any path here: every prefix is in the chain

quarters = st.integers(0, 40).map(lambda whole: whole / 4)  # exact in binary, so that sums can be compared exactly


def sizes(options: Sequence[Option], extra: int = 0) -> dict[str, int]:
    return {option.layer: BASE for option in options} | {f"kept{number}": BASE for number in range(extra)}


@st.composite
def tables(draw: st.DrawFn, layers: int = 6, grouped: bool = False, schemes: Sequence[str] = SCHEMES) -> list[Option]:
    options = []
    # g3 reads two inputs, each of them with layers outside of it.
    groups = st.sampled_from(
        [(None, None), ("g", None), ("g2", "s"), ("g3", "s"), ("g3", "t"), (None, "s"), (None, "t")]
    )
    shared = {(input, scheme): draw(quarters) for input in "st" for scheme in schemes} if grouped else {}
    for number in range(draw(st.integers(1, layers))):
        fused, siblings = draw(groups) if grouped else (None, None)
        for scheme in draw(st.lists(st.sampled_from(schemes), min_size=1, unique=True)):
            gain = draw(st.integers(-8, 40)) / 4
            cost = draw(st.one_of(quarters, quarters, st.just(math.inf)))
            size = draw(st.integers(1, BASE))
            saved = shared.get((siblings or "", scheme), 0.0)
            options.append(
                Option(
                    layer=f"l{number}",
                    scheme=scheme,
                    gain=gain,
                    cost=cost,
                    bytes=size,
                    fused=fused,
                    siblings=siblings,
                    shared=saved,
                )
            )
    return options


def every_map(options: Sequence[Option]) -> list[tuple[dict[str, str], float, float, int]]:
    """Brute force: (choice, gain, cost, bytes) of every map with whole groups, never an infinite cost."""
    rows: dict[str, list[Option | None]] = {}
    for option in options:
        rows.setdefault(option.layer, [None])
        if option.cost < math.inf:
            rows[option.layer].append(option)
    maps = []
    for picked in itertools.product(*rows.values()):
        low = [option for option in picked if option is not None]
        choice = {o.layer: o.scheme for o in low}
        if any(o.fused is not None and choice.get(p.layer) != choice.get(o.layer) for o, p in whole(options)):
            continue
        size = sum(o.bytes for o in low) + BASE * (len(picked) - len(low))
        gain = sum(o.gain for o in low) + shared_of(choice, options)
        maps.append((choice, gain, sum(o.cost for o in low), size))
    return maps


def whole(options: Sequence[Option]) -> list[tuple[Option, Option]]:
    """Pairs of rows whose layers have to go together."""
    return [(o, p) for o, p in itertools.combinations(options, 2) if o.fused is not None and o.fused == p.fused]


def shared_of(choice: Mapping[str, str], options: Sequence[Option]) -> float:
    """The definition, read from the table: of all that read one input under one scheme, each but one saves `shared`."""
    total = 0.0
    for group, scheme in {(o.siblings, o.scheme) for o in options if o.siblings is not None}:
        reads = [o for o in options if (o.siblings, o.scheme) == (group, scheme) and choice.get(o.layer) == scheme]
        total += sum(o.shared for o in reads[1:])
    return total


@given(tables(grouped=True), st.integers(1, 6), st.data())
def test_a_chain_is_nested_and_adds_up(options: list[Option], longest: int, data: st.DataObject) -> None:
    maps = chain(options, sizes(options, 2), longest=longest)
    table = {(o.layer, o.scheme): o for o in options}
    joint: dict[str, dict[str, list[Option]]] = {}
    for option in options:
        joint.setdefault(option.fused or option.layer, {}).setdefault(option.scheme, []).append(option)
    assert len(maps) <= longest
    for step in maps:
        low = [table[pair] for pair in step.choice.items()]
        assert step.choice
        assert step.cost == sum(o.cost for o in low) < math.inf
        assert step.gain == sum(o.gain for o in low) + shared_of(step.choice, options) == total_gain(low)
        assert step.bytes == BASE * (len(sizes(options, 2)) - len(low)) + sum(o.bytes for o in low)
        for group in ("g", "g2", "g3"):
            members = {o.layer for o in options if o.fused == group}
            assert len({step.choice.get(layer) for layer in members}) <= 1
    for before, after in itertools.pairwise(maps):
        assert before.gain < after.gain
        assert before.cost < after.cost
        assert before.choice.keys() <= after.choice.keys()
        for layer, scheme in before.choice.items():
            key = table[layer, scheme].fused or layer
            assert sum(o.cost for o in joint[key][scheme]) <= sum(o.cost for o in joint[key][after.choice[layer]])
    shuffled = data.draw(st.permutations(options))
    assert chain(shuffled, sizes(options, 2), longest=longest) == maps


@given(st.one_of(tables(layers=5), tables(layers=7, grouped=True, schemes=["a"])))
def test_every_prefix_is_the_optimum_for_its_own_cost(options: list[Option]) -> None:
    """Of several schemes where no input is shared, and of one scheme where inputs are."""
    maps = every_map(options)
    steps = chain(options, sizes(options), longest=MANY)
    for step in steps:
        assert step.gain >= max(gain for _, gain, cost, _ in maps if cost <= step.cost)
    most = max(gain for _, gain, _, _ in maps)
    assert (steps[-1].gain if steps else 0.0) == most  # the last map takes everything that gains


def relaxed(options: Sequence[Option], budget: float) -> float:
    """The most gain of fractional maps within a budget, from HiGHS: at least the optimum of whole ones."""
    usable = [o for o in options if o.cost < math.inf]
    layers = sorted({o.layer for o in usable})
    one_each = np.array([[float(o.layer == layer) for o in usable] for layer in layers])
    rows = np.vstack([[o.cost for o in usable], one_each])
    found = linprog([-o.gain for o in usable], A_ub=rows, b_ub=[budget] + [1.0] * len(layers), bounds=(0, 1))
    return -float(found.fun)


@settings(max_examples=40, deadline=None)
@given(tables(), st.floats(0, 1))
def test_no_relaxed_map_beats_the_path_by_more_than_one_step(options: list[Option], part: float) -> None:
    steps = [Step({}, 0.0, 0.0, 0), *chain(options, sizes(options), longest=MANY)]
    if not any(o.cost < math.inf for o in options):
        assert steps[1:] == []
        return
    budget = part * steps[-1].cost
    largest = max((b.gain - a.gain for a, b in itertools.pairwise(steps)), default=0.0)
    best = max(step.gain for step in steps if step.cost <= budget)
    assert best >= relaxed(options, budget) - largest - 1e-6
    for step in steps[1:]:
        assert step.gain == pytest.approx(relaxed(options, step.cost), abs=1e-6)


@given(tables(layers=5), st.integers(0, 48), st.floats(-5, 5))
def test_a_map_is_found_whenever_one_is_small_enough(options: list[Option], most: int, least: float) -> None:
    smallest = min(size for *_, size in every_map(options)) + 2 * BASE
    if smallest > most:
        with pytest.raises(InputError, match=f"reach has {smallest}"):
            chain(options, sizes(options, 2), Constraints(maximum_bytes=most))
        return
    steps = chain(options, sizes(options, 2), Constraints(-math.inf, most), MANY)
    assert all(step.bytes <= most for step in steps)
    if sum(sizes(options, 2).values()) > most:
        assert steps
    some = chain(options, sizes(options, 2), Constraints(least, most), MANY)
    assert some == tuple(step for step in steps if step.gain >= least)


def test_bytes_are_bought_where_they_are_cheapest_and_gain_follows() -> None:
    options = [
        Option(layer="cheap", scheme="w4", gain=0.0, cost=1.0, bytes=2),
        Option(layer="dear", scheme="w4", gain=0.0, cost=3.0, bytes=2),
        Option(layer="fast", scheme="fp8", gain=5.0, cost=1.0, bytes=4),
    ]
    steps = chain(options, sizes(options), Constraints(maximum_bytes=18))
    assert [step.choice for step in steps] == [{"cheap": "w4"}, {"cheap": "w4", "fast": "fp8"}]
    assert chain(options, sizes(options))[-1].choice == {"fast": "fp8"}


def test_a_step_waits_until_there_is_room() -> None:
    # From 4 bits to FP8 the weight grows again: only after another layer has made room for it.
    options = [
        Option(layer="a", scheme="w4", gain=0.0, cost=0.0, bytes=2),
        Option(layer="a", scheme="fp8", gain=9.0, cost=1.0, bytes=6),
        Option(layer="b", scheme="fp8", gain=1.0, cost=1.0, bytes=4),
    ]
    steps = chain(options, sizes(options), Constraints(maximum_bytes=10))
    assert [step.choice for step in steps] == [{"a": "w4"}, {"a": "w4", "b": "fp8"}, {"a": "fp8", "b": "fp8"}]


def test_two_steps_that_fit_alone_are_not_both_taken() -> None:
    options = [Option(layer=layer, scheme="w4", gain=0.0, cost=0.0, bytes=2) for layer in "ab"]
    options += [
        Option(layer="a", scheme="fp8", gain=9.0, cost=1.0, bytes=6),
        Option(layer="b", scheme="fp8", gain=8.0, cost=1.0, bytes=6),
    ]
    steps = chain(options, sizes(options), Constraints(maximum_bytes=8))
    assert [step.choice for step in steps] == [{"a": "w4", "b": "w4"}, {"a": "fp8", "b": "w4"}]
    assert [step.bytes for step in steps] == [4, 8]


def read(layers: str, scheme: str, gain: float, cost: float, shared: float) -> list[Option]:
    """Siblings of one input."""
    return [
        Option(layer=layer, scheme=scheme, gain=gain, cost=cost, bytes=4, siblings="x", shared=shared)
        for layer in layers
    ]


def test_siblings_that_only_pay_together_go_together() -> None:
    narrow, other = read("qkv", "fp8", -1.0, 1.0, 4.0), Option(layer="wide", scheme="fp8", gain=1.0, cost=1.0, bytes=4)
    unshared = [*read("qkv", "fp8", -1.0, 1.0, 0.0), other]
    assert [step.choice for step in chain(unshared, sizes(unshared))] == [{"wide": "fp8"}]
    steps = chain([*narrow, other], sizes([*narrow, other]))
    assert [step.choice for step in steps] == [dict.fromkeys("qkv", "fp8"), dict.fromkeys([*"qkv", "wide"], "fp8")]
    assert [step.gain for step in steps] == [5.0, 6.0]
    lone = [*read("q", "fp8", -1.0, 1.0, 4.0), *read("kv", "fp8", -1.0, math.inf, 4.0), other]
    assert [step.choice for step in chain(lone, sizes(lone))] == [{"wide": "fp8"}], "alone it never pays"


def test_the_first_siblings_are_those_that_pay_best_together() -> None:
    """a and b: 2 for 2; c alone with the sharing 1 for 4, so that it comes after d, which gains .5 a unit of cost."""
    options = [
        *read("ab", "fp8", -0.5, 1.0, 3.0),
        *read("c", "fp8", -2.0, 4.0, 3.0),
        Option(layer="d", scheme="fp8", gain=1.0, cost=2.0, bytes=4),
    ]
    steps = chain(options, sizes(options))
    assert [sorted(step.choice) for step in steps] == [["a", "b"], ["a", "b", "d"], ["a", "b", "c", "d"]]
    assert [step.gain for step in steps] == [2.0, 3.0, 4.0]


def test_siblings_share_within_each_scheme() -> None:
    options = [*read("pq", "a", 1.0, 1.0, 3.0), *read("rs", "b", 1.0, 1.0, 5.0)]
    assert chain(options, sizes(options))[-1].gain == 4 + 3 + 5


def test_a_sibling_that_leaves_gives_the_sharing_back() -> None:
    options = [
        *read("pq", "a", 1.0, 1.0, 3.0),
        *read("p", "b", 3.0, 2.0, 0.0),
        Option(layer="z", scheme="a", gain=1.0, cost=9.0, bytes=4),
    ]
    last = chain(options, sizes(options))[-1]
    assert last == Step({"p": "a", "q": "a", "z": "a"}, 6.0, 11.0, 12)
    options = [
        *read("pq", "a", 1.0, 1.0, 1.0),
        *read("p", "b", 3.0, 2.0, 0.0),
        Option(layer="z", scheme="a", gain=1.0, cost=9.0, bytes=4),
    ]
    last = chain(options, sizes(options))[-1]
    assert last == Step({"p": "b", "q": "a", "z": "a"}, 5.0, 12.0, 12)


def test_siblings_that_only_pay_to_leave_together_do() -> None:
    # The first to leave pays the sharing (2 per cost), the second does not (5): together (3.5) they come before z (3).
    options = [*read("pq", "a", 10.0, 1.0, 3.0), *read("p", "b", 15.0, 2.0, 0.0), *read("q", "c", 15.0, 2.0, 0.0)]
    options.append(Option(layer="z", scheme="a", gain=3.0, cost=1.0, bytes=4))
    steps = chain(options, sizes(options))
    assert [step.choice for step in steps[:2]] == [{"p": "a", "q": "a"}, {"p": "b", "q": "c"}]
    assert [step.gain for step in steps] == [23.0, 30.0, 33.0]


def test_what_leaving_costs_is_seen_before_the_layer_leaves() -> None:
    # p alone to c looks better per cost (2) than both to b (1.5), but it pays the sharing and can never come back.
    options = [*read("pq", "a", 10.0, 1.0, 3.0), *read("pq", "b", 11.5, 2.0, 3.0), *read("p", "c", 14.0, 3.0, 0.0)]
    steps = chain(options, sizes(options))
    assert [step.choice for step in steps] == [{"p": "a", "q": "a"}, {"p": "b", "q": "b"}]
    assert [step.gain for step in steps] == [23.0, 26.0]


def test_a_fused_group_shares_within_itself_and_with_others() -> None:
    """Experts that read two inputs: each layer after the first of its input saves, whoever it is fused with."""
    fused = [
        Option(layer=layer, scheme="a", gain=1.0, cost=1.0, bytes=4, fused="qk", siblings="x", shared=5.0)
        for layer in "qk"
    ]
    assert chain(fused, sizes(fused))[-1].gain == 7.0
    fused.append(Option(layer="d", scheme="a", gain=1.0, cost=1.0, bytes=4, fused="qk", siblings="y", shared=2.0))
    fused += [
        Option(layer="v", scheme="a", gain=-1.0, cost=1.0, bytes=4, fused=None, siblings="x", shared=5.0),
        Option(layer="e", scheme="a", gain=-1.0, cost=1.0, bytes=4, fused=None, siblings="y", shared=2.0),
    ]
    assert chain(fused, sizes(fused))[-1].gain == 3.0 - 2.0 + 2 * 5.0 + 2.0


@given(tables(layers=7, grouped=True, schemes=["a", "b"]), st.data())
def test_no_sibling_is_left_that_loses(options: list[Option], data: st.DataObject) -> None:
    """Against every map within the given one: none gains more where only readers of shared inputs are taken out.

    Of groups that read one input; for those that read two it is no promise.
    """
    options = [o for o in options if o.fused != "g3"]
    maps = [choice for choice, *_ in every_map([replace(o, cost=0.0) for o in options])]
    choice = data.draw(st.sampled_from(maps))
    rows = {(o.layer, o.scheme): o for o in options}
    shares = {o.layer for o in options if o.siblings and o.shared > 0 and choice.get(o.layer) == o.scheme}
    shares |= {o.layer for o, p in (*whole(options), *((p, o) for o, p in whole(options))) if p.layer in shares}
    left = settled(options, choice)

    def gain(kept: Mapping[str, str]) -> float:
        return sum(rows[pair].gain for pair in kept.items()) + shared_of(kept, options)

    assert left.items() <= choice.items()
    assert choice.keys() - left.keys() <= shares
    inside = [m for m in maps if m.items() <= choice.items() and choice.keys() - m.keys() <= shares]
    assert gain(left) == max(gain(m) for m in inside)


def test_a_long_path_is_spaced_evenly_in_gain() -> None:
    options = [
        Option(layer=f"l{number:03}", scheme="a", gain=1.0, cost=float(number), bytes=4) for number in range(301)
    ]
    gains = [step.gain for step in chain(options, sizes(options))]
    assert gains == [1.0 + 20 * place for place in range(16)]
    # A layer that is most of the gain does not use up the places of the others.
    options[5] = Option(layer="l005", scheme="a", gain=10_000.0, cost=5.0, bytes=4)
    assert len(chain(options, sizes(options))) == 16
    assert [step.gain for step in chain(options, sizes(options), longest=1)] == [1.0]


def test_what_is_free_is_all_in_the_first_map() -> None:
    options = [Option(layer=layer, scheme="a", gain=1.0, cost=0.0, bytes=4) for layer in "xyz"] + [
        Option(layer="w", scheme="a", gain=9.0, cost=1.0, bytes=4)
    ]
    assert chain(options, sizes(options))[0].choice == dict.fromkeys("xyz", "a")


def test_a_thousand_layers_and_six_schemes() -> None:
    draw = random.Random(0)
    options = [
        Option(
            layer=f"l{n:04}",
            scheme=f"s{s}",
            gain=draw.random() * s,
            cost=draw.random() * s,
            bytes=draw.choice([1, 2, 4]),
            fused=None,
            siblings=f"g{n // 4}",
            shared=0.5,
        )
        for n, s in itertools.product(range(1000), range(1, 7))
    ]
    steps = chain(options, sizes(options), Constraints(maximum_bytes=5000))
    assert len(steps) == 16
    assert all(step.bytes <= 5000 for step in steps)


def test_effective_bits_are_bytes_of_all_weights() -> None:
    assert bytes_at(4.5, {"a": 16, "b": 5}) == 11  # 94.5 bits
    with pytest.raises(InputError, match="effective bits"):
        bytes_at(0, {"a": 1})


GOOD = Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([Option(layer="x", scheme="a", gain=1.0, cost=-0.1, bytes=4)], "an improvement counts as 0"),
        ([Option(layer="x", scheme="a", gain=1.0, cost=math.nan, bytes=4)], "cost of x"),
        ([Option(layer="x", scheme="a", gain=math.inf, cost=1.0, bytes=4)], "gain of x"),
        ([Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=-4)], "size of x"),
        ([Option(layer="elsewhere", scheme="a", gain=1.0, cost=1.0, bytes=4)], "size of elsewhere"),
        ([GOOD, GOOD], "twice"),
        ([GOOD, Option(layer="x", scheme="b", gain=1.0, cost=1.0, bytes=4, fused="g")], "different groups"),
        (
            [
                Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=1.0),
                Option(layer="y", scheme="a", gain=1.0, cost=1.0, bytes=4, fused=None, siblings="s"),
            ],
            "two different times",
        ),
        (
            [Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=-1.0)],
            "shared input of x",
        ),
        (
            [Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=math.inf)],
            "shared input of x",
        ),
    ],
)
def test_a_table_that_contradicts_itself_is_refused(options: list[Option], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chain(options, {"x": BASE, "y": BASE})


def test_other_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InputError, match="at least one map"):
        chain([GOOD], {"x": BASE}, longest=0)
