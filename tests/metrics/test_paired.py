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
from precimap.metrics import MRR, NDCG, Loss, Metric, PairedDrops
from precimap.metrics.paired import Drop, bounded, lower_bound, paired_drop, upper_bound
from precimap.metrics.totals import Farthest, Totals
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
    assert drops(Loss(), baseline, other).tolist() == [-0.5, 0, 0.5]


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
    share: dict[int, float] = defaultdict(float)
    for c, w, x in rows:
        z[c] += w * (x - mean)
        share[c] += w / whole
    error = math.sqrt(sum(z[c] ** 2 / (1 - share[c]) for c in z)) / whole
    drop = paired_drop(d, units)
    assert drop.estimate == pytest.approx(mean)
    assert drop.error == pytest.approx(error)
    assert drop.clusters == len(z)
    low = mean - error * stats.t.ppf(1 - ALPHA, slow_freedom(np.array(list(share.values()))))
    assert lower_bound(d, units, ALPHA) == pytest.approx(low)


def slow_freedom(weights: Floats) -> float:
    """Bell and McCaffrey's degrees of freedom by their definition: Satterthwaite on the eigenvalues of a matrix."""
    share = weights / weights.sum()
    count = len(share)
    # The residual of each cluster's total: its own less its share of the sum of all; then inflated (CR2).
    residual = np.eye(count) - np.outer(share, np.ones(count))
    inflated = np.diag(1 / np.sqrt(1 - share)) @ residual
    eigenvalues = np.linalg.eigvalsh(inflated @ np.diag(weights) @ inflated.T)
    return float(eigenvalues.sum() ** 2 / (eigenvalues**2).sum())


@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=30))
def test_degrees_of_freedom_are_those_of_bell_and_mccaffrey(weights: list[float]) -> None:
    found = Totals(np.zeros(len(weights)), np.array(weights)).freedom
    assert found == pytest.approx(slow_freedom(np.array(weights)), rel=1e-6)
    assert found <= len(weights) - 1 + 1e-6
    assert Totals(np.zeros(len(weights)), np.ones(len(weights))).freedom == pytest.approx(len(weights) - 1)


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
    beyond = {c: total[c] - seen * weight[c] for c in total}
    far = max(total, key=lambda c: abs(beyond[c]) if worst is None else beyond[c])
    unseen = [(seen * weight[far] + (abs(beyond[far]) if worst is None else beyond[far]), weight[far])]
    if worst is not None:
        unseen.append((worst * kish, kish))
    freedom = slow_freedom(np.array(list(weight.values())))
    return max(slow_bound([*total.values(), t], [*weight.values(), w], freedom, alpha) for t, w in unseen)


def slow_bound(totals: list[float], weights: list[float], freedom: float, alpha: float) -> float:
    mean = sum(totals) / sum(weights)
    z = [t - mean * w for t, w in zip(totals, weights, strict=True)]
    error = math.sqrt(sum(v**2 / (1 - w / sum(weights)) for v, w in zip(z, weights, strict=True))) / sum(weights)
    if error == 0:
        return mean
    skewness = 2 * sum(v**3 for v in z) / sum(v**2 for v in z) ** 1.5
    raised = stats.pearson3.ppf(1 - alpha, max(skewness, 0)) - stats.norm.ppf(1 - alpha)
    if skewness < 1e-3:  # as `quantile` says, less than a thousandth of the error: left out there
        raised = 0.0
    return mean + error * (stats.t.ppf(1 - alpha, freedom) + max(raised, 0))


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


def test_the_worst_unit_of_other_data_counts_where_it_is_worse() -> None:
    """A loss that this sample does not hold, and the search split did."""
    d, units = np.random.default_rng(0).normal(0, 0.01, 1000), Units(n=1000)
    alone = upper_bound(d, units, ALPHA, None)
    assert upper_bound(d, units, ALPHA, None, Farthest(0.001, 1.0)) == alone, "nearer than what is seen here"
    joined = np.append(d, d.mean() + 3.0)
    exact = stats.pearson3.ppf(1 - ALPHA, 2 * stats.skew(joined) / math.sqrt(1001)) - stats.norm.ppf(1 - ALPHA)
    expected = joined.mean() + stats.sem(joined) * (stats.t.ppf(1 - ALPHA, 999) + exact)
    assert upper_bound(d, units, ALPHA, None, Farthest(3.0, 1.0)) == pytest.approx(expected, rel=1e-4)
    assert expected > 3 * alone


@example(146, 1.0)  # the one elsewhere lies farther, weighs more, and bounds lower than the farthest here
@given(st.integers(0, 10**6), st.floats(0.1, 10))
def test_what_was_seen_elsewhere_is_carried_in_the_weights_of_rows(seed: int, factor: float) -> None:
    """Splits whose weights are scaled differently say the same."""
    d, units = sample(seed)
    assert units.weights is not None
    other, other_units = sample(seed + 1)
    far = bounded(
        PairedDrops(d=3 * other, units=other_units, rows=other_units.n, changed=0, worst=None), ALPHA
    ).sight.farthest
    here = PairedDrops(d=d, units=units, rows=units.n, changed=0, worst=None)
    scaled = replace(here, units=replace(units, weights=units.weights * factor))
    bounds = [bounded(case, ALPHA, far).upper for case in (here, scaled)]
    assert bounds[0] == pytest.approx(bounds[1])
    assert bounds[0] >= bounded(here, ALPHA).upper


def test_clusters_of_one_size_are_bounded_by_the_worst_alone() -> None:
    """No cluster can be farther from its share than one that loses all, so that a bounded metric is as it was."""
    rng = np.random.default_rng(0)
    d, units = (rng.random(600) < 0.02) * 1.0, Units(n=600, clusters=np.repeat(np.arange(100), 6))
    far = Farthest(float(d.reshape(100, 6).sum(1).max()), 6.0)
    assert upper_bound(d, units, ALPHA, 1.0, far) == upper_bound(d, units, ALPHA, 1.0)
    assert upper_bound(d, units, ALPHA, 1.0) == pytest.approx(slow_upper_bound(d, units, ALPHA, 1.0))


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


# What is refused


@pytest.mark.parametrize(
    ("clusters", "weights", "says"),
    [
        (np.arange(3), None, r"clusters of 2 units, \[2\], got \[3\]"),
        (np.zeros((2, 1), np.int64), None, r"got \[2, 1\]"),
        (np.array([0.0, 1.0]), None, r"integer clusters, got float64; number them once for all of your data"),
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
    units = Units(n=2)
    with pytest.raises(TaskError, match=r"error rate alpha between 0 and 0\.5"):
        upper_bound(np.zeros(2), units, level, 1.0)
    with pytest.raises(TaskError, match="error rate alpha"):
        lower_bound(np.zeros(2), units, level)
