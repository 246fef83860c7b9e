"""Paired drops and their bounds, against scipy, a hand-written loop, the exact binomial bound, and by invariances."""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from precimap.errors import TaskError
from precimap.metrics import MRR, NDCG, LogLoss, Loss, Metric
from precimap.metrics.paired import Drop, detectable_drop, lower_bound, paired_drop, units_needed, upper_bound
from precimap.metrics.units import Floats, Units

ALPHA = 0.05


def drops(metric: Metric, baseline: Floats, other: Floats) -> Floats:
    return metric.paired(baseline, other, Units(n=len(baseline))).d


def sample(seed: int, n: int = 60) -> tuple[Floats, Units]:
    """Clustered, weighted, skewed differences."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 12, n)
    d = rng.normal(0.1, 1, n) + rng.normal(0, 1, 12)[clusters] + (rng.random(n) < 0.05) * 3
    return d, Units(n=n, clusters=clusters, weights=rng.uniform(0.2, 3, n))


# Differences


def test_positive_is_worse_whatever_the_direction() -> None:
    baseline, other = np.array([1.0, 0.5, 0.25]), np.array([0.5, 0.5, 0.75])
    assert drops(NDCG(10), baseline, other).tolist() == [0.5, 0, -0.5]
    assert drops(LogLoss(), baseline, other).tolist() == [-0.5, 0, 0.5]


def test_differences_of_other_units_are_refused() -> None:
    with pytest.raises(TaskError, match=r"MRR@5 of the same units.*\[3\] values of the baseline and \[2\]"):
        drops(MRR(5), np.zeros(3), np.zeros(2))
    with pytest.raises(TaskError, match=r"got \[2, 2\] values"):
        drops(MRR(5), np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(TaskError, match=r"got inf as loss of the other model for unit 1 \(1 such units\)"):
        drops(Loss(), np.zeros(2), np.array([0, np.inf]))
    with pytest.raises(TaskError, match=r"got nan as loss of the baseline for unit 0"):
        drops(Loss(), np.full(2, np.nan), np.zeros(2))


# Estimate and error


@given(st.integers(0, 10**6), st.integers(2, 80))
def test_plain_units_agree_with_the_t_test(seed: int, n: int) -> None:
    d = np.random.default_rng(seed).normal(0.3, 2, n)
    drop = paired_drop(d, Units(n=n))
    test = stats.ttest_1samp(d, 0)
    assert drop.estimate / drop.error == pytest.approx(test.statistic)
    assert drop.estimate == pytest.approx(d.mean())
    assert (drop.n, drop.clusters, drop.changed) == (n, n, n)
    one_sided = test.confidence_interval(1 - 2 * ALPHA)
    assert lower_bound(d, Units(n=n), ALPHA) == pytest.approx(one_sided.low)


@given(st.integers(0, 10**6))
def test_clusters_and_weights_agree_with_a_loop(seed: int) -> None:
    d, units = sample(seed)
    assert units.clusters is not None
    assert units.weights is not None
    rows = list(zip(units.clusters.tolist(), units.weights.tolist(), d.tolist(), strict=True))
    whole = sum(w for _, w, _ in rows)
    mean = sum(w * x for _, w, x in rows) / whole
    z: dict[int, float] = defaultdict(float)
    for c, w, x in rows:
        z[c] += w * (x - mean)
    error = math.sqrt(len(z) / (len(z) - 1) * sum(v * v for v in z.values())) / whole
    drop = paired_drop(d, units)
    assert drop.estimate == pytest.approx(mean)
    assert drop.error == pytest.approx(error)
    assert drop.clusters == len(z)
    low = mean - error * stats.t.ppf(1 - ALPHA, len(z) - 1)
    assert lower_bound(d, units, ALPHA) == pytest.approx(low)


def test_a_copied_row_is_no_new_evidence() -> None:
    """Each cluster holding its one value five times is the unclustered sample; without clusters it would look surer."""
    d = np.random.default_rng(0).normal(size=40)
    once, copied = Units(n=40), Units(n=200, clusters=np.repeat(np.arange(40), 5))
    many = np.repeat(d, 5)
    assert paired_drop(many, copied).error == pytest.approx(paired_drop(d, once).error)
    for worst in (None, 5.0):
        assert upper_bound(many, copied, ALPHA, worst) == pytest.approx(upper_bound(d, once, ALPHA, worst))
    assert paired_drop(many, Units(n=200)).error < 0.5 * paired_drop(d, once).error


def test_changed_counts_units_and_not_clusters() -> None:
    drop = paired_drop(np.array([0, 0, 1e-12, -2, 2]), Units(n=5, clusters=np.array([0, 0, 1, 1, 1])))
    assert (drop.n, drop.clusters, drop.changed) == (5, 2, 3)


# The upper bound


def slow_upper_bound(d: Floats, units: Units, alpha: float, worst: float | None) -> float:
    """The docstring of `upper_bound`, step by step, with scipy.stats for the distributions."""
    clusters = range(units.n) if units.clusters is None else units.clusters.tolist()
    weights = [1.0] * units.n if units.weights is None else units.weights.tolist()
    total: dict[int, float] = defaultdict(float)
    weight: dict[int, float] = defaultdict(float)
    for c, w, x in zip(clusters, weights, d.tolist(), strict=True):
        total[c] += w * x
        weight[c] += w
    kish = sum(w * w for w in weight.values()) / sum(weight.values())
    seen = sum(total.values()) / sum(weight.values())
    farthest = max(abs(total[c] - seen * weight[c]) for c in total)
    unseen = seen * kish + farthest if worst is None else worst * kish
    totals, weights = [*total.values(), unseen], [*weight.values(), kish]
    mean = sum(totals) / sum(weights)
    z = [t - mean * w for t, w in zip(totals, weights, strict=True)]
    count = len(z)
    error = math.sqrt(count / (count - 1) * sum(v**2 for v in z)) / sum(weights)
    if error == 0:
        return mean
    skewness = 2 * sum(v**3 for v in z) / sum(v**2 for v in z) ** 1.5
    raised = stats.pearson3.ppf(1 - alpha, max(skewness, 0)) - stats.norm.ppf(1 - alpha)
    if skewness < 1e-3:  # as `_quantile` says, less than a thousandth of the error: left out there
        raised = 0.0
    return mean + error * (stats.t.ppf(1 - alpha, len(total) - 1) + max(raised, 0))


@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.05, 0.1, 0.3]), st.sampled_from([None, 9.0, 30.0]))
@example(666, 0.01, None)  # a skewness of 7e-4, and a bound next to zero
def test_the_bound_is_what_its_docstring_says(seed: int, alpha: float, worst: float | None) -> None:
    d, units = sample(seed)
    d = np.minimum(d, 9)
    for case in (units, replace(units, clusters=None), replace(units, weights=None), Units(n=len(d))):
        expected = slow_upper_bound(d, case, alpha, worst)
        assert upper_bound(d, case, alpha, worst) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.025, 0.05, 0.1])
@pytest.mark.parametrize("n", [200, 500, 1000, 5000])
def test_flips_get_the_exact_binomial_bound(n: int, alpha: float) -> None:
    """k of n units lose everything: never below Clopper and Pearson's bound, and at most 1 % above it."""
    for k in (0, 1, 2, 3, 5, 10, 30, n // 4):
        d = np.zeros(n)
        d[:k] = 1
        exact = stats.beta.ppf(1 - alpha, k + 1, n - k)
        assert exact <= upper_bound(d, Units(n=n), alpha, worst=1.0) <= 1.012 * exact, k


def test_symmetric_differences_get_t_with_one_more_value() -> None:
    half = np.abs(np.random.default_rng(0).normal(size=500))
    d = np.concatenate([half, -half])
    with_worst = np.append(d, np.abs(d).max())
    t = with_worst.mean() + stats.sem(with_worst) * stats.t.ppf(1 - ALPHA, len(d) - 1)
    assert t <= upper_bound(d, Units(n=1000), ALPHA, None) <= t * 1.01


def test_a_rare_gain_never_lowers_the_quantile() -> None:
    """Negative skewness would argue for a smaller bound; an improvement is not credited."""
    d = np.random.default_rng(0).normal(size=400) * 0.01
    d[:4] = -1
    units = Units(n=400)
    with_worst = np.append(d, 1.0)
    t = with_worst.mean() + stats.sem(with_worst) * stats.t.ppf(1 - ALPHA, 399)
    assert upper_bound(d, units, ALPHA, 1.0) >= t


def test_when_nothing_changed() -> None:
    """A bounded metric keeps the rule of three; a loss has nothing to go by, and `changed` says so."""
    d, units = np.zeros(300), Units(n=300)
    assert upper_bound(d, units, ALPHA, worst=1.0) == pytest.approx(3 / 300, rel=0.02)
    assert upper_bound(d, units, ALPHA, worst=0.5) == pytest.approx(1.5 / 300, rel=0.02)
    assert upper_bound(d, units, ALPHA, worst=None) == 0
    assert paired_drop(d, units) == Drop(estimate=0, error=0, n=300, clusters=300, changed=0)


def test_one_cluster_bounds_nothing() -> None:
    d, units = np.array([0.1, 0.2, 0.3]), Units(n=3, clusters=np.zeros(3, np.int64))
    assert upper_bound(d, units, ALPHA, 1.0) == math.inf
    assert lower_bound(d, units, ALPHA) == -math.inf
    assert paired_drop(d, units).error == math.inf
    assert paired_drop(d, units).estimate == pytest.approx(0.2)


def test_large_bad_clusters_weigh_in_the_pseudo_cluster() -> None:
    """The unseen cluster is as large as the one a unit finds itself in, and not as the mean cluster."""
    sizes = np.array([1] * 90 + [100] * 10)
    units = Units(n=sizes.sum(), clusters=np.repeat(np.arange(100), sizes))
    effective = sizes.sum() ** 2 / (sizes**2).sum()  # 11.9 of 100
    bound = upper_bound(np.zeros(units.n), units, ALPHA, 1.0)
    assert bound > 1 - ALPHA ** (1 / effective) > 3 * (1 - ALPHA ** (1 / 100))


# Invariances


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3), st.permutations(range(60)))
def test_names_order_and_scale_of_weights_do_not_matter(seed: int, factor: float, order: list[int]) -> None:
    d, units = sample(seed)
    assert units.clusters is not None
    assert units.weights is not None
    names = np.random.default_rng(seed).permutation(12) * 7 - 40
    shuffled = np.array(order)
    same = Units(n=60, clusters=names[units.clusters][shuffled], weights=units.weights[shuffled] * factor)
    expected, drop = paired_drop(d, units), paired_drop(d[shuffled], same)
    assert (drop.estimate, drop.error) == pytest.approx((expected.estimate, expected.error), abs=1e-12)
    for worst in (None, 12.0):
        assert upper_bound(d[shuffled], same, ALPHA, worst) == pytest.approx(upper_bound(d, units, ALPHA, worst))


@given(st.integers(0, 10**6), st.floats(-100, 100))
def test_a_loss_that_shifts_in_every_unit_shifts_the_bound(seed: int, shift: float) -> None:
    """What all units share is known exactly and costs no margin, also when clusters are of unequal size."""
    d, units = sample(seed)
    expected = upper_bound(d, units, ALPHA, None) + shift
    assert upper_bound(d + shift, units, ALPHA, None) == pytest.approx(expected, abs=1e-9)
    assert lower_bound(d + shift, units, ALPHA) == pytest.approx(lower_bound(d, units, ALPHA) + shift, abs=1e-9)


@given(st.integers(0, 10**6), st.floats(1e-6, 1e6))
def test_everything_scales_with_the_differences(seed: int, factor: float) -> None:
    d, units = sample(seed)
    drop, scaled = paired_drop(d, units), paired_drop(d * factor, units)
    assert (scaled.estimate, scaled.error) == pytest.approx((drop.estimate * factor, drop.error * factor), rel=1e-9)
    for worst in (None, 12.0):
        bound = upper_bound(d * factor, units, ALPHA, None if worst is None else worst * factor)
        assert bound == pytest.approx(upper_bound(d, units, ALPHA, worst) * factor, rel=1e-9)


@given(hnp.arrays(np.float64, st.integers(2, 30), elements=st.floats(-1, 1)), st.floats(0.001, 0.4))
def test_bounds_lie_on_their_sides_and_tighten_with_alpha(d: Floats, alpha: float) -> None:
    units = Units(n=len(d))
    drop = paired_drop(d, units)
    for worst in (None, 1.0):
        bound = upper_bound(d, units, alpha, worst)
        assert bound >= drop.estimate - 1e-12
        assert bound <= upper_bound(d, units, alpha / 2, worst) + 1e-12
    assert lower_bound(d, units, alpha / 2) - 1e-12 <= lower_bound(d, units, alpha) <= drop.estimate + 1e-12


# How many units


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


def test_detectable_drop_agrees_with_the_power_of_a_t_test() -> None:
    sd, n = 0.3, 400
    drop = detectable_drop(sd, n, ALPHA, power=0.8)
    power = stats.nct.sf(stats.t.ppf(1 - ALPHA, n - 1), n - 1, drop / (sd / math.sqrt(n)))
    assert power == pytest.approx(0.8, abs=0.003)
    assert detectable_drop(sd, 4 * n, ALPHA) == pytest.approx(drop / 2, rel=0.01)
    assert detectable_drop(sd, 1, ALPHA) == math.inf
    assert detectable_drop(0.0, n, ALPHA) == 0


# What is refused


@pytest.mark.parametrize(
    ("clusters", "weights", "says"),
    [
        (np.arange(3), None, r"clusters of 2 units, \[2\], got \[3\]"),
        (np.zeros((2, 1), np.int64), None, r"got \[2, 1\]"),
        (np.array([0.0, 1.0]), None, r"integer clusters, got float64; number them with np\.unique"),
        (None, np.ones(1), r"weights of 2 units, \[2\], got \[1\]"),
        (None, np.array([1.0, 0.0]), r"positive, finite weights, got 0\.0 for unit 1 \(1 such units\)"),
        (None, np.array([-1.0, -2.0]), r"got -1\.0 for unit 0 \(2 such units\)"),
        (None, np.array([1.0, np.nan]), r"got nan for unit 1"),
        (None, np.array([np.inf, 1.0]), r"got inf for unit 0"),
    ],
)
def test_units_that_cannot_be_resampled_are_refused(clusters: object, weights: object, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        Units(n=2, clusters=clusters, weights=weights)  # type: ignore[arg-type]


def test_a_split_without_units_is_refused() -> None:
    with pytest.raises(TaskError, match="expected at least one unit, got 0; the split is empty"):
        Units(n=0)


def test_differences_that_do_not_fit_are_refused() -> None:
    units = Units(n=3)
    for call in (paired_drop, lambda d, u: upper_bound(d, u, ALPHA, 1.0), lambda d, u: lower_bound(d, u, ALPHA)):
        with pytest.raises(TaskError, match=r"differences of 3 units, \[3\], got \[2\]"):
            call(np.zeros(2), units)
        with pytest.raises(TaskError, match=r"got nan as the difference for unit 1"):
            call(np.array([0, np.nan, 0]), units)


def test_a_worst_that_is_none_is_refused() -> None:
    with pytest.raises(TaskError, match=r"drop by more than the metric's worst, 1\.0, got 1\.5 for unit 1"):
        upper_bound(np.array([0, 1.5]), Units(n=2), ALPHA, 1.0)
    for worst in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(TaskError, match="a positive, finite worst drop"):
            upper_bound(np.zeros(2), Units(n=2), ALPHA, worst)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_levels_out_of_range_are_refused(level: float) -> None:
    units, drop = Units(n=2), Drop(0.0, 1.0, 2, 2, 2)
    with pytest.raises(TaskError, match=r"error rate alpha between 0 and 0\.5"):
        upper_bound(np.zeros(2), units, level, 1.0)
    with pytest.raises(TaskError, match="error rate alpha"):
        lower_bound(np.zeros(2), units, level)
    with pytest.raises(TaskError, match="power between 0 and 1"):
        units_needed(drop, 1.0, ALPHA, level)
    with pytest.raises(TaskError, match="power between 0 and 1"):
        detectable_drop(1.0, 10, ALPHA, level)
    with pytest.raises(TaskError, match="error rate alpha"):
        detectable_drop(1.0, 10, level)


@pytest.mark.parametrize("sd", [-1.0, math.nan, math.inf])
def test_a_spread_that_is_none_is_refused(sd: float) -> None:
    with pytest.raises(TaskError, match="a standard deviation >= 0"):
        detectable_drop(sd, 10, ALPHA)
