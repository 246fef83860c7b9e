"""How many units a margin takes, and what a number of units can tell: against simulation with the bound that certifies."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import TaskError
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import Drop, paired_drop, upper_bound
from precimap.metrics.power import least_margin, needed_range, smallest_margin, units_needed
from precimap.metrics.units import Floats, Units

ALPHA = 0.05


def fraction_certified(population: Floats, n: int, margin: float, worst: float | None) -> float:
    rng, units = np.random.default_rng(1), Units(n=n)
    bounds = [upper_bound(rng.choice(population, n), units, ALPHA, worst) for _ in range(500)]
    return float(np.mean(np.array(bounds) <= margin))


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("kind", ["symmetric", "rare flips"])
def test_the_units_needed_certify_about_as_often_as_they_promise(kind: str, power: float) -> None:
    if kind == "symmetric":
        population, worst = np.random.default_rng(0).normal(0.01, 0.1, 20_000), 0.5
        assumed = None  # about: the pseudo-unit is the sample's own largest
    else:
        population, worst, assumed = np.repeat([1.0, 0.0], [100, 19_900]), 1.0, 1.0
    drop = paired_drop(population, Units(n=len(population)))
    n = units_needed(drop, margin=2 * drop.estimate, alpha=ALPHA, power=power, worst=worst)
    assert n is not None
    certified = fraction_certified(population, n, 2 * drop.estimate, assumed)
    assert power - 0.06 <= certified <= power + 0.12


def test_units_needed_come_in_clusters() -> None:
    alone = Drop(estimate=0.001, error=0.002, n=1000, clusters=1000, changed=1000)
    grouped = replace(alone, n=20_000)
    needed, grouped_needed = (units_needed(drop, 0.003, ALPHA, worst=1.0) for drop in (alone, grouped))
    assert needed is not None
    assert grouped_needed == 20 * needed


def test_units_needed_when_nothing_changed_is_the_rule_of_three() -> None:
    n = units_needed(Drop(estimate=0, error=0, n=500, clusters=500, changed=0), 0.001, ALPHA, worst=1.0)
    assert n is not None
    assert n == pytest.approx(3 / 0.001, rel=0.01)
    zeros = np.zeros(n)
    assert upper_bound(zeros, Units(n=n), ALPHA, 1.0) <= 0.001 < upper_bound(zeros[1:], Units(n=n - 1), ALPHA, 1.0)


def test_no_number_of_units_certifies_what_is_not_below_the_margin() -> None:
    drop = Drop(estimate=0.01, error=0.001, n=100, clusters=100, changed=3)
    assert units_needed(drop, 0.01, ALPHA) is None
    assert units_needed(drop, 0.005, ALPHA) is None
    assert units_needed(drop, math.nextafter(0.01, 1), ALPHA) is None
    assert units_needed(replace(drop, error=math.inf, clusters=1), 0.1, ALPHA) is None


@given(st.floats(-1, 1), st.floats(1e-9, 1), st.floats(1e-6, 1), st.sampled_from([None, 1.0]))
def test_units_needed_fall_as_the_margin_grows(estimate: float, error: float, room: float, worst: float | None) -> None:
    drop = Drop(estimate=estimate, error=error, n=100, clusters=50, changed=100)
    tight, wide = (units_needed(drop, estimate + r, ALPHA, worst=worst) for r in (room, 2 * room))
    assert tight is not None
    assert wide is not None
    assert 4 <= wide <= tight  # two clusters of two at least


# What a number of units can tell


@pytest.mark.parametrize("worst", [None, 1.0], ids=["loss", "order"])
@pytest.mark.parametrize("n", [100, 400, 2000])
def test_the_smallest_margin_is_certified_about_as_often_as_it_promises(n: int, worst: float | None) -> None:
    """Simulated again with the bound itself, from a population that the pilot was drawn from."""
    rng = np.random.default_rng(0)
    population = rng.normal(0, 0.1, 20_000)
    population -= population.mean()
    margin = smallest_margin(
        PairedDrops(d=population[:512], units=Units(n=512), rows=512, changed=512, worst=worst), n, ALPHA
    )
    assert 0.74 <= fraction_certified(population, n, margin, worst) <= 0.88


def test_the_smallest_margin_of_clusters_follows_their_weights() -> None:
    """Clusters of the pilot that are drawn as they are, heavy ones too: more heavy ones, a larger margin."""
    rng = np.random.default_rng(0)
    sizes = np.repeat([1, 30], [90, 10])
    clusters = np.repeat(np.arange(100), sizes)
    d = rng.normal(size=100)[clusters]
    uneven = PairedDrops(d=d, units=Units(n=len(d), clusters=clusters), rows=len(d), changed=len(d), worst=None)
    even = PairedDrops(d=rng.normal(size=100), units=Units(n=100), rows=100, changed=100, worst=None)
    assert smallest_margin(uneven, 200, ALPHA) > 2 * smallest_margin(even, 200, ALPHA)


@pytest.mark.parametrize("n", [50, 1000, 40_000])
def test_nothing_is_certified_below_the_least_margin(n: int) -> None:
    pilot = PairedDrops(d=np.zeros(50), units=Units(n=50), rows=50, changed=0, worst=1.0)
    least = least_margin(pilot, n, ALPHA)
    assert least == pytest.approx(3 / n, rel=0.03)
    assert least == pytest.approx(upper_bound(np.zeros(n), Units(n=n), ALPHA, 1.0))
    assert smallest_margin(pilot, n, ALPHA) == pytest.approx(least, rel=1e-3), "not even where nothing changes"
    assert least_margin(replace(pilot, worst=None), n, ALPHA) == 0


def test_a_pilot_that_says_nothing_of_the_spread_promises_nothing() -> None:
    one_cluster = PairedDrops(
        d=np.ones(5), units=Units(n=5, clusters=np.zeros(5, np.int64)), rows=5, changed=5, worst=None
    )
    assert smallest_margin(one_cluster, 1000, ALPHA) == math.inf
    assert (
        smallest_margin(PairedDrops(d=np.ones(5), units=Units(n=5), rows=5, changed=5, worst=None), 1, ALPHA)
        == math.inf
    )
    assert (
        least_margin(PairedDrops(d=np.zeros(5), units=Units(n=5), rows=5, changed=0, worst=1.0), 1, ALPHA) == math.inf
    )


def test_the_range_holds_the_number_and_is_open_where_the_estimate_may_lie_above_the_margin() -> None:
    drop = Drop(estimate=0.01, error=0.002, n=1000, clusters=1000, changed=900)
    middle, found = units_needed(drop, 0.015, ALPHA), needed_range(drop, 0.015, ALPHA, None)
    assert middle is not None
    assert found is not None
    assert found[1] is not None
    assert found[0] < middle < found[1]
    assert needed_range(drop, 0.011, ALPHA, None) == (units_needed(replace(drop, estimate=0.008), 0.011, ALPHA), None)
    assert needed_range(drop, 0.01, ALPHA, None) is None


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_levels_out_of_range_are_refused(level: float) -> None:
    drop, pilot = (
        Drop(estimate=0.0, error=1.0, n=2, clusters=2, changed=2),
        PairedDrops(d=np.zeros(3), units=Units(n=3), rows=3, changed=0, worst=1.0),
    )
    for call in (
        lambda: units_needed(drop, 1.0, ALPHA, level),
        lambda: smallest_margin(pilot, 10, ALPHA, level),
    ):
        with pytest.raises(TaskError, match="power between 0 and 1"):
            call()
    for call in (lambda: smallest_margin(pilot, 10, level), lambda: least_margin(pilot, 10, level)):
        with pytest.raises(TaskError, match="error rate alpha"):
            call()
