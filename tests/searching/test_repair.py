"""Local repair on invented superposed metrics: never above the limit, planted interactions found, groups whole."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import InputError
from precimap.searching.allocation.knapsack import Step, chain
from precimap.searching.allocation.ladders import Option, settled
from precimap.searching.allocation.repair import Goal, repair

BASE = 8
Predicted = Callable[[Mapping[str, str]], float]


def sizes(options: list[Option]) -> dict[str, int]:
    return {option.layer: BASE for option in options}


def step_of(options: list[Option], choice: dict[str, str]) -> Step:
    low = [o for o in options if choice.get(o.layer) == o.scheme]
    size = BASE * (len(sizes(options)) - len(low)) + sum(o.bytes for o in low)
    return Step(choice, sum(o.gain for o in low), sum(o.cost for o in low), size)


def superposed(seed: int, rows: int = 50) -> Predicted:
    """Score changes per row add over layers; the drop is their mean square plus their mean, so layers interact."""

    def change(layer: str, scheme: str) -> np.ndarray:
        return np.random.default_rng([seed, *f"{layer}/{scheme}".encode()]).normal(0.02, 1.0, rows)

    def predicted(choice: Mapping[str, str]) -> float:
        total = sum((change(layer, scheme) for layer, scheme in choice.items()), np.zeros(rows))
        return float(np.mean(total**2) + np.mean(total))

    return predicted


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Option], dict[str, str]]:
    options, choice = [], {}
    for number in range(draw(st.integers(1, 8))):
        fused = draw(st.sampled_from([None, None, "g"]))
        for scheme in ("a", "b"):
            gain, cost = draw(st.integers(0, 20)) / 4, draw(st.integers(0, 20)) / 4
            options.append(
                Option(
                    layer=f"l{number}",
                    scheme=scheme,
                    gain=gain,
                    cost=cost,
                    bytes=draw(st.integers(1, BASE)),
                    fused=fused,
                )
            )
        choice[f"l{number}"] = draw(st.sampled_from(["a", "b", ""]))
    members = [o.layer for o in options if o.fused]
    choice.update(dict.fromkeys(members, choice[members[0]] if members else ""))
    return options, {layer: scheme for layer, scheme in choice.items() if scheme}


@given(cases(), st.integers(0, 1000), st.floats(0, 8), st.integers(1, 60))
def test_a_repaired_map_is_within_the_limit(
    case: tuple[list[Option], dict[str, str]], seed: int, limit: float, most_tries: int
) -> None:
    options, choice = case
    metric, asked = superposed(seed), 0

    def predicted(layers: Mapping[str, str]) -> float:
        nonlocal asked
        asked += 1
        return metric(layers)

    start = step_of(options, choice)
    repaired = repair(start, options, sizes(options), Goal(predicted, limit, most_tries=most_tries))
    assert asked <= most_tries
    assert metric(repaired.choice) <= limit
    assert repaired == step_of(options, repaired.choice)
    if metric(choice) <= limit:
        assert repaired.gain >= start.gain
    assert len({repaired.choice.get(o.layer) for o in options if o.fused}) <= 1
    assert repaired == repair(start, options[::-1], sizes(options), Goal(metric, limit, most_tries=most_tries))


def pair_metric(first: str, second: str) -> Predicted:
    """Each layer takes a little; two of them together take a lot."""
    return lambda choice: 0.001 * len(choice) + (1.0 if first in choice and second in choice else 0.0)


@pytest.mark.parametrize("layers", [12, 1000])
def test_two_layers_that_only_hurt_together_are_found(layers: int) -> None:
    options = [
        Option(layer=f"l{number:03}", scheme="a", gain=1.0 + number / layers, cost=0.01, bytes=4)
        for number in range(layers)
    ]
    everything = chain(options, sizes(options))[-1]
    limit = 0.001 * layers
    repaired = repair(everything, options, sizes(options), Goal(pair_metric("l003", "l009"), limit))
    # Exactly one of the two is reverted, the one that gains less.
    assert set(everything.choice) - set(repaired.choice) == {"l003"}
    assert repaired.gain == pytest.approx(everything.gain - 1.0 - 3 / layers)


def test_the_cheapest_reverts_that_are_enough_are_taken() -> None:
    # Per gain, the big one takes most away, but nearly all of that is more than the excess.
    own = {"big": 10.0, "small": 0.2, "little": 0.2}
    options = [Option(layer=layer, scheme="a", gain=9.0 if layer == "big" else 0.5, cost=1.0, bytes=4) for layer in own]
    start = step_of(options, dict.fromkeys(own, "a"))
    repaired = repair(start, options, sizes(options), Goal(lambda choice: sum(own[layer] for layer in choice), 10.05))
    assert repaired.choice == {"big": "a"}


def test_what_fits_is_added_and_swapped_in() -> None:
    options = [
        Option(layer="in", scheme="a", gain=1.0, cost=1.0, bytes=4),
        Option(layer="more", scheme="a", gain=3.0, cost=1.0, bytes=4),
        Option(layer="free", scheme="a", gain=1.0, cost=0.5, bytes=4),
    ]
    own = {"in": 1.0, "more": 1.0, "free": 0.0}
    start = step_of(options, {"in": "a"})
    repaired = repair(start, options, sizes(options), Goal(lambda choice: sum(own[layer] for layer in choice), 1.0))
    assert repaired.choice == {"free": "a", "more": "a"}


def test_siblings_are_added_together_for_what_they_share() -> None:
    options = [
        Option(layer=layer, scheme="a", gain=-1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=5.0)
        for layer in "qk"
    ]
    repaired = repair(Step({}, 0.0, 0.0, 16), options, sizes(options), Goal(len, 2.0))
    assert repaired == Step({"k": "a", "q": "a"}, 3.0, 2.0, 8)


def test_a_sibling_whose_partner_is_reverted_goes_too() -> None:
    """q hurts and goes; k alone loses time, whatever room is left for it."""
    options = [
        Option(layer=layer, scheme="a", gain=-1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=5.0)
        for layer in "qk"
    ] + [Option(layer="z", scheme="a", gain=1.0, cost=1.0, bytes=4)]
    start = Step({"k": "a", "q": "a", "z": "a"}, 4.0, 3.0, 12)
    repaired = repair(start, options, sizes(options), Goal(lambda choice: 9.0 if "q" in choice else 0.0, 1.0))
    assert repaired == Step({"z": "a"}, 1.0, 1.0, 20)


def test_siblings_that_no_longer_pay_together_all_go() -> None:
    """Three gain .2; of two each is worth .6 to the other, and together they lose .4."""
    options = [
        Option(layer=layer, scheme="a", gain=-1.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=1.6)
        for layer in "qkv"
    ]
    start = Step(dict.fromkeys("kqv", "a"), 0.2, 3.0, 12)
    assert repair(start, options, sizes(options), Goal(lambda choice: 9.0 * ("q" in choice), 1.0)).choice == {}
    assert settled(options, {"k": "a", "v": "a"}) == {}
    assert settled(options, start.choice) == start.choice


def test_what_is_lost_with_a_sibling_counts_when_it_is_decided_who_goes() -> None:
    """p and z gain 2 alone and cost alike, but without p its sibling saves nothing."""
    options = [
        Option(layer="p", scheme="a", gain=2.0, cost=1.0, bytes=4, fused=None, siblings="s", shared=1.5),
        Option(layer="q", scheme="a", gain=2.0, cost=0.1, bytes=4, fused=None, siblings="s", shared=1.5),
    ]
    options.append(Option(layer="z", scheme="a", gain=2.0, cost=1.0, bytes=4))
    start = Step(dict.fromkeys("pqz", "a"), 7.5, 2.1, 12)
    repaired = repair(start, options, sizes(options), Goal(lambda choice: 1.0 * ("p" in choice) + ("z" in choice), 1.0))
    assert repaired == Step(dict.fromkeys("pq", "a"), 5.5, 1.1, 16)


def test_with_few_tries_a_bisection_still_ends_within_the_limit() -> None:
    options = [
        Option(layer=f"l{number:03}", scheme="a", gain=1.0, cost=float(number), bytes=4) for number in range(100)
    ]
    everything = chain(options, sizes(options))[-1]
    repaired = repair(everything, options, sizes(options), Goal(len, 60.0, most_tries=9))
    # Nothing is known of the metric by then, so the most expensive go first.
    assert sorted(repaired.choice) == [f"l{number:03}" for number in range(60)]
    assert repair(everything, options, sizes(options), Goal(len, 60.0, most_tries=1)).choice == {}


def test_no_number_is_above_every_limit() -> None:
    options = [Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4)]
    start = step_of(options, {"x": "a"})
    assert repair(start, options, sizes(options), Goal(lambda choice: math.nan, 1.0)) == Step({}, 0.0, 0.0, BASE)


def test_steps_and_limits_that_make_no_sense_are_refused() -> None:
    options = [
        Option(layer="x", scheme="a", gain=1.0, cost=1.0, bytes=4),
        Option(layer="y", scheme="a", gain=1.0, cost=math.inf, bytes=4),
    ]
    for choice in ({"x": "b"}, {"y": "a"}, {"z": "a"}):
        with pytest.raises(InputError, match="no map of this table"):
            repair(Step(choice, 0.0, 0.0, 0), options, sizes(options), Goal(len, 1.0))
    empty = Step({}, 0.0, 0.0, 16)
    with pytest.raises(InputError, match="limit"):
        repair(empty, options, sizes(options), Goal(len, math.nan))
    with pytest.raises(InputError, match="at least one try"):
        repair(empty, options, sizes(options), Goal(len, 1.0, most_tries=0))
    hopeless = Goal(lambda choice: 1.0, 0.5, most_tries=1)
    assert repair(step_of(options, {"x": "a"}), options, sizes(options), hopeless).choice == {}
