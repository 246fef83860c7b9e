"""The same units under two models: how large is the drop, how sure is it, and what could it be at most.

Invariant: what is resampled is the cluster (a user, a query, a session; each unit by itself without clusters), and
every figure is a function of the clusters' totals alone, so that splitting a cluster's rows differently changes
nothing. Two models are never compared by their two means: the error of a paired difference is some thirty times
smaller.

`upper_bound` is what certificates rest on. A t bound is not enough for metrics of an order: when only one unit in 200
changes, most samples contain no change at all, and t certifies falsely up to four times out of five. Bootstraps repeat
the sample's blind spot and are worse, betting and Bernstein bounds hold but give up a third to all of the power.
The bound used here does two things to t:

- one pseudo-cluster is added that nobody has seen, as bad as a cluster can be;
- the t quantile is raised for the skewness of the result (never lowered).

For n units of which k lose the worst possible amount this gives the exact binomial bound (Clopper and Pearson 1934), to
a few per cent; for symmetric differences it is t on n + 1 values. It approximates, in closed form and without random
numbers, the bound of Gaffke 2005 ("Three test statistics for a nonparametric one-sided hypothesis on the mean of a
nonnegative variable"): the Bayesian bootstrap of the sample and the worst value.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaincinv, ndtri, stdtrit

from precimap.errors import TaskError
from precimap.metrics.metric import PairedDrops
from precimap.metrics.units import Floats, Units, check_finite, check_length


@dataclass(frozen=True, slots=True)
class Drop:
    """How much worse the metric got: weighted mean over units, in the metric's own units; positive is worse.

    error: cluster-robust standard error, infinite for a single cluster. changed: units whose value differs at all.
    """

    estimate: float
    error: float
    n: int
    clusters: int
    changed: int


def paired_drop(d: Floats, units: Units) -> Drop:
    """The weighted mean of `d` (float64 [n], `PairedDrops.d`) and its standard error.

    The mean is a ratio of totals, sum w d / sum w; its error is by linearisation (Cochran 1977, "Sampling Techniques",
    ch. 6 and 9): z_c = sum over cluster c of w (d - mean), error^2 = C / (C - 1) * sum z_c^2 / (sum w)^2.
    Raises TaskError when `d` does not fit `units` or is not finite.
    """
    totals, weights = _per_cluster(d, units)
    sample = _moments(totals, weights)
    return Drop(sample.mean, sample.error, units.n, len(totals), int(np.count_nonzero(d)))


@dataclass(frozen=True, slots=True)
class Bounded:
    """A drop with its one-sided bounds, each at confidence 1 - alpha, and the largest drop of one unit, `largest`.

    Of a two-sided metric the estimate keeps its sign; lower and upper bound its size, whatever the side.
    """

    drop: Drop
    lower: float
    upper: float
    largest: float
    two_sided: bool = False

    @property
    def size(self) -> Drop:
        """The drop as a loss: without its sign where a change to either side is one."""
        return replace(self.drop, estimate=abs(self.drop.estimate)) if self.two_sided else self.drop


def drop_of(sample: PairedDrops) -> Drop:
    """The drop that a metric's units make, with the sizes of the split that they stand for."""
    return replace(paired_drop(sample.d, sample.units), n=sample.rows, changed=sample.changed)


def bounded(sample: PairedDrops, alpha: float) -> Bounded:
    """What the drops of units say of the drop. Two-sided: the wider of two one-sided bounds (Schuirmann 1987)."""
    d, units = sample.d, sample.units
    lower, upper = lower_bound(d, units, alpha), upper_bound(d, units, alpha, sample.worst)
    if sample.two_sided:
        lower = max(lower, lower_bound(-d, units, alpha))
        upper = max(upper, upper_bound(-d, units, alpha, sample.worst))
    return Bounded(drop_of(sample), lower, upper, float(np.abs(d).max()), sample.two_sided)


def upper_bound(d: Floats, units: Units, alpha: float, worst: float | None) -> float:
    """The largest mean drop that the sample leaves possible, at confidence 1 - `alpha`, one-sided.

    d: float64 [n]. worst: `Metric.worst`. Infinite for fewer than two clusters.

    The pseudo-cluster weighs what the cluster of a typical unit weighs, sum W^2 / sum W: the sample is worth
    (sum W)^2 / sum W^2 equal clusters (Kish 1965, "Survey Sampling"), and one more is added. With the plain mean of the
    weights, bad clusters that are large are certified falsely, up to 42 % in simulation. Every unit in it drops by
    `worst`. Without a `worst` it lies as far above the mean as the farthest cluster seen lies from it, on either side;
    that is an assumption and not a proof: a loss without a limit has no bound without one. It also makes the bound 0
    when nothing changed in any unit; that says "bit for bit the same on n units", and `Drop.changed` == 0 lets a report
    say so. A bounded metric gets about 3 * worst / n there, the rule of three.

    The skewness is the third moment of a sum whose terms have exponential weights, as in the Bayesian bootstrap; the
    quantile is that of a gamma distribution with this skewness (Pearson type III).
    Raises TaskError when `d` does not fit `units`, is not finite or goes beyond `worst`, and for an `alpha` outside
    (0, 0.5).
    """
    _check_alpha(alpha)
    totals, weights = _per_cluster(d, units)
    if worst is not None:
        _check_worst(d, worst)
    if len(totals) < 2:
        return math.inf
    typical = float(weights @ weights / weights.sum())
    mean = float(totals.sum() / weights.sum())
    unseen = mean * typical + float(np.abs(totals - mean * weights).max()) if worst is None else worst * typical
    sample = _moments(np.append(totals, unseen), np.append(weights, typical))
    return sample.mean + sample.error * _quantile(alpha, len(totals) - 1, 2 * sample.skewness)


def lower_bound(d: Floats, units: Units, alpha: float) -> float:
    """The smallest mean drop that the sample leaves possible, at confidence 1 - `alpha`: a plain cluster t bound.

    A layer whose lower bound lies above a cutoff is sensitive. No pseudo-cluster: to call a harmless layer sensitive
    costs speed, not quality. Minus infinity for fewer than two clusters. Raises TaskError as `upper_bound`.
    """
    _check_alpha(alpha)
    drop = paired_drop(d, units)
    if drop.clusters < 2:
        return -math.inf
    return drop.estimate - drop.error * float(stdtrit(drop.clusters - 1, 1 - alpha))


def units_needed(drop: Drop, margin: float, alpha: float, power: float = 0.8, worst: float | None = None) -> int | None:
    """About how many units certify, with probability `power`, a true drop equal to the estimate.

    More units are taken to come in clusters like those of `drop`, of equal weight. worst: `Metric.worst`, or for a loss
    the largest deviation seen; None leaves the pseudo-cluster out. The skewness is taken to be that of losses of
    `worst`, so that the answer errs upwards. None when no number would do: the estimate is at or above the margin (or
    so close below that it takes more than 2**53 clusters), or a single cluster says nothing about the spread.
    Raises TaskError for an `alpha` or `power` out of range.
    """
    _check_alpha(alpha)
    _check_power(power)
    if drop.estimate >= margin or not math.isfinite(drop.error):
        return None
    spread = drop.error * math.sqrt(drop.clusters)  # standard deviation of one cluster's share
    beyond = float(ndtri(power))

    def certifies(clusters: int) -> bool:
        unseen = 0.0 if worst is None else worst / (clusters + 1)
        error = math.hypot(spread / math.sqrt(clusters), unseen)
        skewness = 2 * unseen / error if error else 0.0
        reach = error * _quantile(alpha, clusters - 1, skewness) + beyond * spread / math.sqrt(clusters)
        return drop.estimate + unseen + reach <= margin

    enough = 2
    while not certifies(enough):
        enough *= 2
        if enough > 2**53:
            return None
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        too_few, enough = (too_few, middle) if certifies(middle) else (middle, enough)
    return math.ceil(enough * drop.n / drop.clusters)


def detectable_drop(sd_per_unit: float, n: int, alpha: float, power: float = 0.8) -> float:
    """The smallest mean drop that `n` independent units tell from none with probability `power`: (t + z) sd / sqrt(n).

    As well the smallest margin at which a true drop of 0 would be certified, but for the pseudo-cluster. With clusters
    give `error * sqrt(n)` of a `Drop` as `sd_per_unit`. Infinite for n < 2. Raises TaskError for an `alpha`, `power` or
    `sd_per_unit` out of range.
    """
    _check_alpha(alpha)
    _check_power(power)
    if not (math.isfinite(sd_per_unit) and sd_per_unit >= 0):
        raise TaskError(f"expected a standard deviation >= 0, got {sd_per_unit}")
    if n < 2:
        return math.inf
    return float(stdtrit(n - 1, 1 - alpha) + ndtri(power)) * sd_per_unit / math.sqrt(n)


@dataclass(frozen=True, slots=True)
class _Moments:
    mean: float
    error: float
    skewness: float  # of the sum of the linearised totals: third moment over error^3


def _moments(totals: Floats, weights: Floats) -> _Moments:
    whole = float(weights.sum())
    mean = float(totals.sum()) / whole
    count = len(totals)
    if count < 2:
        return _Moments(mean, math.inf, 0.0)
    z = totals - mean * weights
    length = float(np.linalg.norm(z))
    error = math.sqrt(count / (count - 1)) * length / whole
    return _Moments(mean, error, float(np.sum((z / length) ** 3)) if length else 0.0)


def _quantile(alpha: float, freedom: int, skewness: float) -> float:
    """t at 1 - alpha, plus what a gamma distribution of that skewness has there above the normal; never below t."""
    t = float(stdtrit(freedom, 1 - alpha))
    if skewness < 1e-3:  # the difference is then below 1e-3 standard errors, and the gamma's shape above 4e6
        return t
    shape = 4 / skewness**2
    gamma = float(gammaincinv(shape, 1 - alpha) - shape) / math.sqrt(shape)
    return t + max(0.0, gamma - float(ndtri(1 - alpha)))


def _per_cluster(d: Floats, units: Units) -> tuple[Floats, Floats]:
    """sum w d and sum w of each cluster, float64 [clusters]."""
    check_length("differences", d, units.n)
    check_finite("the difference", d)
    weights = np.ones(units.n) if units.weights is None else np.asarray(units.weights, np.float64)
    totals = weights * np.asarray(d, np.float64)
    if units.clusters is None:
        return totals, weights
    _, cluster = np.unique(units.clusters, return_inverse=True)
    sums = [np.asarray(np.bincount(cluster, values), np.float64) for values in (totals, weights)]
    return sums[0], sums[1]


def _check_worst(d: Floats, worst: float) -> None:
    if not (math.isfinite(worst) and worst > 0):
        raise TaskError(f"expected a positive, finite worst drop of a unit, or None for no limit, got {worst}")
    if d.max() > worst * (1 + 1e-9):
        raise TaskError(
            f"expected no unit to drop by more than the metric's worst, {worst}, got {d.max()} for unit {d.argmax()}; "
            "the metric must declare a larger `worst`, or None"
        )


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 0.5:
        raise TaskError(f"expected an error rate alpha between 0 and 0.5, got {alpha}; 0.05 is usual")


def _check_power(power: float) -> None:
    if not 0 < power < 1:
        raise TaskError(f"expected a power between 0 and 1, got {power}; 0.8 is usual")
