"""The promise of a certificate, by simulation: a map whose true drop is the margin passes at most alpha of the time.

Each cell re-draws samples from a population whose mean is known, puts the margin on that mean and counts how often
`upper_bound` certifies: always falsely. The populations are the ones that break bounds: real log-loss differences, rare
losses of everything, and clusters of unequal size.
"""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from helpers.real_models import ncf_in_fp8
from precimap.metrics import LogLoss, Recall
from precimap.metrics.paired import paired_drop, upper_bound
from precimap.metrics.units import Floats, Units

ALPHA = 0.05
DRAWS = 2000
ALLOWED = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / DRAWS)  # 0.0646
Bound = Callable[[Floats, Units], float]


def unbounded(d: Floats, units: Units) -> float:
    return upper_bound(d, units, ALPHA, worst=None)


def at_worst_one(d: Floats, units: Units) -> float:
    return upper_bound(d, units, ALPHA, worst=1.0)


def plain_t(d: Floats, units: Units) -> float:
    drop = paired_drop(d, units)
    return drop.estimate + drop.error * float(stats.t.ppf(1 - ALPHA, drop.clusters - 1))


def t_with_a_pseudo_unit(d: Floats, units: Units) -> float:
    return plain_t(np.append(d, 1.0), Units(n=units.n + 1))


def rows_as_units(d: Floats, units: Units) -> float:
    return upper_bound(d, Units(n=units.n), ALPHA, worst=1.0)


# Re-draws


def samples(population: Floats, n: int) -> Iterator[tuple[Floats, Units]]:
    rng, units = np.random.default_rng(n), Units(n=n)
    for _ in range(DRAWS):
        yield population[rng.integers(0, len(population), n)], units


def cluster_samples(rows: Floats, size: NDArray[np.int64], clusters: int) -> Iterator[tuple[Floats, Units]]:
    """Whole clusters at a time: cluster c holds the first size[c] of rows[c]."""
    rng, held = np.random.default_rng(clusters), np.arange(rows.shape[1]) < size[:, None]
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(rows), clusters)
        d = rows[drawn][held[drawn]]
        yield d, Units(n=len(d), clusters=np.repeat(np.arange(clusters), size[drawn]))


def certified(draws: Iterator[tuple[Floats, Units]], bound: Bound, margin: float) -> float:
    """The share of samples whose bound is at most the margin."""
    return float(np.mean([bound(d, units) <= margin for d, units in draws]))


# Populations


def rare_flips(rate: float, of: int = 100_000) -> Floats:
    return (np.arange(of) < rate * of).astype(np.float64)


def uneven(clusters: int, largest: int) -> NDArray[np.int64]:
    sizes = np.random.default_rng(0).lognormal(2, 1, clusters)
    return np.clip(sizes.round(), 1, largest).astype(np.int64)


@cache
def ncf_differences() -> tuple[Floats, Floats]:
    """Real NCF-MLP, its matmuls in E4M3, a static scale per tensor: log-loss [users, candidates] and HR@10 [users]."""
    scores = ncf_in_fp8()
    users, candidates = scores[0].shape
    label = torch.zeros(users, dtype=torch.long)
    hits = [Recall(10).per_unit(s, label, torch.empty(0)).numpy() for s in scores]
    assert hits[0].mean() == pytest.approx(0.67036, abs=5e-6), "the tower is not the published model"
    relevant = torch.nn.functional.one_hot(label, candidates).reshape(-1)
    loss = [LogLoss().per_unit(s.reshape(-1), relevant, torch.empty(0)).numpy() for s in scores]
    rows = Units(n=users * candidates)
    return LogLoss().paired(*loss, rows).d.reshape(users, candidates), Recall(10).paired(*hits, Units(n=users)).d


# The promise


@pytest.mark.parametrize("sign", [1, -1], ids=["as it is", "sign-flipped"])
@pytest.mark.parametrize("n", [200, 500, 2000])
def test_real_log_loss(n: int, sign: int) -> None:
    population = sign * ncf_differences()[0].mean(axis=1)
    assert certified(samples(population, n), unbounded, population.mean()) <= ALLOWED


@pytest.mark.parametrize("sign", [1, -1], ids=["as it is", "sign-flipped"])
@pytest.mark.parametrize("n", [200, 1000])
def test_real_hit_rate(n: int, sign: int) -> None:
    population = sign * ncf_differences()[1]
    assert certified(samples(population, n), at_worst_one, population.mean()) <= ALLOWED


@pytest.mark.parametrize("n", [200, 500, 1000, 2000])
def test_rare_losses_of_everything(n: int) -> None:
    population = rare_flips(0.005)
    assert certified(samples(population, n), at_worst_one, population.mean()) <= ALLOWED


@pytest.mark.parametrize(("n", "rate"), [(200, 0.01325), (200, 0.0217), (500, 0.00866), (1000, 0.00266)])
def test_rare_losses_at_the_rates_that_are_hardest(n: int, rate: float) -> None:
    """Just where a sample without (or with one) loss begins to pass a t bound with a pseudo-unit: that gives 7 %."""
    population = rare_flips(rate)
    assert certified(samples(population, n), at_worst_one, rate) <= ALLOWED
    assert certified(samples(population, n), t_with_a_pseudo_unit, rate) > ALPHA + 0.01


@pytest.mark.parametrize("sign", [1, -1], ids=["as it is", "sign-flipped"])
@pytest.mark.parametrize("clusters", [30, 200])
def test_real_log_loss_of_rows_in_uneven_clusters(clusters: int, sign: int) -> None:
    """A user's rows share the user's error; users hold 1 to 100 of them."""
    rows = sign * ncf_differences()[0]
    size = uneven(len(rows), rows.shape[1])
    held = np.arange(rows.shape[1]) < size[:, None]
    assert certified(cluster_samples(rows, size, clusters), unbounded, rows[held].mean()) <= ALLOWED


@pytest.mark.parametrize("clusters", [30, 100, 300])
def test_bad_clusters_of_uneven_size(clusters: int) -> None:
    """2 % of the users lose every one of their rows: the intra-cluster correlation is 1."""
    size = uneven(5000, 60)
    rows = np.repeat(np.random.default_rng(1).random(5000) < 0.02, 60).reshape(5000, 60).astype(np.float64)
    margin = rows[:, 0] @ size / size.sum()
    assert certified(cluster_samples(rows, size, clusters), at_worst_one, margin) <= ALLOWED


# The simulation has teeth, and the bound is not merely large


@pytest.mark.parametrize(("n", "rate"), [(200, 0.35), (1000, 0.06)])
def test_a_plain_t_bound_breaks_the_promise_on_rare_losses(n: int, rate: float) -> None:
    population = rare_flips(0.005)
    assert certified(samples(population, n), plain_t, population.mean()) > max(rate, ALLOWED)


def test_rows_as_units_break_the_promise_on_clusters() -> None:
    size = uneven(5000, 60)
    rows = np.repeat(np.random.default_rng(1).random(5000) < 0.02, 60).reshape(5000, 60).astype(np.float64)
    margin = rows[:, 0] @ size / size.sum()
    assert certified(cluster_samples(rows, size, 300), rows_as_units, margin) > 3 * ALPHA


@pytest.mark.parametrize(("n", "least"), [(200, 0.62), (2000, 0.70)])
def test_the_bound_keeps_its_power_on_real_log_loss(n: int, least: float) -> None:
    """The margin is where a z test with known spread would pass 80 % of the samples."""
    population = ncf_differences()[0].mean(axis=1)
    z = float(stats.norm.ppf(1 - ALPHA) + stats.norm.ppf(0.8))
    margin = population.mean() + z * population.std() / np.sqrt(n)
    assert certified(samples(population, n), unbounded, margin) >= least


def test_the_bound_keeps_its_power_on_rare_losses() -> None:
    """Ten losses expected, three times that allowed."""
    population = rare_flips(0.005)
    assert certified(samples(population, 2000), at_worst_one, 0.015) >= 0.99


# A chain of maps, safest first


@cache
def chain_of_maps_at_the_margin() -> NDArray[np.bool_]:
    """Does map m of sample s pass? [DRAWS, 8]; every true drop is the margin, their differences correlate at 0.3."""
    rng, units, margin = np.random.default_rng(8), Units(n=500), 0.01
    passed = np.empty((DRAWS, 8), np.bool_)
    for draw in range(DRAWS):
        d = np.sqrt(0.3) * rng.normal(size=(500, 1)) + np.sqrt(0.7) * rng.normal(size=(500, 8))
        passed[draw] = [unbounded(margin + 0.1 * column, units) <= margin for column in d.T]
    return passed


def test_testing_in_a_fixed_sequence_keeps_the_family_wise_error() -> None:
    """From the first map on, each at the full alpha, until one fails: some certificate exists when the first passes."""
    in_sequence = np.logical_and.accumulate(chain_of_maps_at_the_margin(), axis=1)
    assert in_sequence.any(axis=1).mean() <= ALLOWED


def test_testing_from_the_most_aggressive_map_down_does_not() -> None:
    """Until one passes: some certificate exists when any map passes."""
    assert chain_of_maps_at_the_margin().any(axis=1).mean() >= 2 * ALPHA
