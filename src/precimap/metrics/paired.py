"""The same units under two models: how large is the drop, how sure is it, and what could it be at most.

Invariant: every figure is a function of the clusters' totals alone (`Totals`). Two models are never compared by their two
means: the error of a paired difference is some thirty times smaller.

`upper_bound` is what certificates rest on. A t bound is not enough for metrics of an order: when only one unit in 200
changes, most samples contain no change at all, and t certifies falsely up to four times out of five. Bootstraps repeat
the sample's blind spot and are worse, betting and Bernstein bounds hold but give up a third to all of the power.
The bound used here does three things to t:

- one cluster is added that nobody has seen: as bad as a cluster can be, and as bad as the worst that was seen anywhere;
- the t quantile is raised for the skewness of the result (never lowered);
- its degrees of freedom are those of clusters of unequal weight.

For n units of which k lose the worst possible amount this gives the exact binomial bound (Clopper and Pearson 1934), to
a few per cent; for symmetric differences it is t on n + 1 values. It approximates, in closed form and without random
numbers, the bound of Gaffke 2005 ("Three test statistics for a nonparametric one-sided hypothesis on the mean of a
nonnegative variable"): the Bayesian bootstrap of the sample and the worst value. What no bound can see, a loss without a
limit that neither split holds, is said in numbers by `blind_spot`.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import gammaincinv, ndtri, stdtrit

from precimap.errors import TaskError
from precimap.metrics.metric import PairedDrops
from precimap.metrics.sight import Sight, sight_of
from precimap.metrics.totals import Cluster, Farthest, Totals, summed, totals_of
from precimap.metrics.units import Floats, Units


@dataclass(frozen=True, slots=True, kw_only=True)
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
    """The weighted mean of `d` (float64 [n], `PairedDrops.d`) and its standard error, `Totals.error`.

    Raises TaskError when `d` does not fit `units` or is not finite.
    """
    return _drop(totals_of(d, units), n=units.n, changed=int(np.count_nonzero(d)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounded:
    """A drop with its one-sided bounds, each at confidence 1 - alpha, and the largest drop of one unit, `largest`.

    Of a two-sided metric the estimate keeps its sign; lower and upper bound its size, whatever the side. sight: what this
    sample could see at all.
    """

    drop: Drop
    lower: float
    upper: float
    largest: float
    sight: Sight
    two_sided: bool = False

    @property
    def size(self) -> Drop:
        """The drop as a loss: without its sign where a change to either side is one."""
        return replace(self.drop, estimate=abs(self.drop.estimate)) if self.two_sided else self.drop

    def proves(self, margin: float) -> bool:
        """Whether the drop is at most `margin` with the bound's confidence, and there are units enough to say so."""
        return self.upper <= margin and self.sight.shortage is None


def drop_of(sample: PairedDrops) -> Drop:
    """The drop that a metric's units make, with the sizes of the split that they stand for."""
    return _drop(totals_of(sample.d, sample.units), n=sample.rows, changed=sample.changed)


def bounded(sample: PairedDrops, alpha: float, seen: Farthest | None = None) -> Bounded:
    """What the drops of units say of the drop. Two-sided: the wider of two one-sided bounds (Schuirmann 1987).

    seen: the farthest cluster of the same comparison on other data (`Bounded.sight.farthest`), for `upper_bound`.
    """
    d = sample.d
    totals = totals_of(d, sample.units)
    sides = [totals, totals.mirrored] if sample.two_sided else [totals]
    if sample.worst is not None:
        _check_worst(np.abs(d) if sample.two_sided else d, sample.worst)
    scale = totals.whole / sample.rows
    elsewhere = None if seen is None else Farthest(seen.above * scale, seen.weight * scale)
    lost = worst_cluster(sample, totals)
    upper = max(_upper(side, alpha, elsewhere, lost) for side in sides)
    lower = max(_lower(side, alpha) for side in sides)
    drop = _drop(totals, n=sample.rows, changed=sample.changed)
    return Bounded(
        drop=drop,
        lower=lower,
        upper=upper,
        largest=float(np.abs(d).max()),
        sight=sight_of(sample, totals),
        two_sided=sample.two_sided,
    )


def worst_cluster(sample: PairedDrops, totals: Totals) -> Cluster | None:
    """A cluster of which all units lose all they can, None where a unit's loss has no limit.

    Of the weight of the cluster that a typical unit is in; where limits differ by class, the cluster that a typical unit of
    the rarer class is in.
    """
    if sample.worst is None:
        return None
    if sample.limits is None or sample.stakes.rare is None:
        return Cluster(sample.worst * totals.typical, totals.typical)
    weights = sample.units.known_weights
    rare = summed(weights * sample.stakes.rare, sample.units)
    share = rare / rare.sum()
    return Cluster(float(share @ summed(weights * sample.limits, sample.units)), float(share @ totals.weights))


def upper_bound(d: Floats, units: Units, alpha: float, worst: float | None, elsewhere: Farthest | None = None) -> float:
    """The largest mean drop that the sample leaves possible, at confidence 1 - `alpha`, one-sided.

    d: float64 [n]. worst: the largest drop of one unit, None without a limit. elsewhere: the cluster that lay farthest
    above its share on other data, in the weights of these. Infinite for fewer than two clusters.

    The cluster that nobody has seen is, whichever gives the larger bound:

    - with a `worst`: one in which every unit drops by `worst`. It weighs what the cluster of a typical unit weighs,
      sum W^2 / sum W: the sample is worth (sum W)^2 / sum W^2 equal clusters, and one more is added. Where the worst
      depends on the class of a unit (AUC), it is the cluster of a typical unit of the rarer class;
    - one as far from its share as the farthest that was seen, here or elsewhere, and as heavy. Without a `worst` the
      farthest here counts on either side. Large clusters that lose more than small ones would be certified falsely
      without it, also where a `worst` is known: that of a unit bounds no cluster of unknown size.

    The second is an assumption and not a proof: a loss without a limit has no bound without one. It also makes the bound
    0 when nothing changed in any unit; that says "bit for bit the same on n units", and `Drop.changed` == 0 lets a report
    say so. A bounded metric gets about 3 * worst / n there, the rule of three.

    The skewness is the third moment of a sum whose terms have exponential weights, as in the Bayesian bootstrap; the
    quantile is that of a gamma distribution with this skewness (Pearson type III).
    Raises TaskError when `d` does not fit `units`, is not finite or goes beyond `worst`, and for an `alpha` outside
    (0, 0.5).
    """
    totals = totals_of(d, units)
    lost = None if worst is None else Cluster(worst * totals.typical, totals.typical)
    if worst is not None:
        _check_worst(d, worst)
    return _upper(totals, alpha, elsewhere, lost)


def _upper(totals: Totals, alpha: float, elsewhere: Farthest | None, lost: Cluster | None) -> float:
    """lost: the cluster that loses all it can, None without a limit."""
    check_alpha(alpha)
    if totals.count < 2:
        return math.inf
    # Each by itself: of two clusters the one that lies farther may weigh more, and then the other bounds higher.
    far = [_farthest(totals, either_side=lost is None), *(() if elsewhere is None else (elsewhere,))]
    unseen = [Cluster(totals.mean * one.weight + one.above, one.weight) for one in far]
    return max(bound_with(totals, alpha, cluster) for cluster in (*unseen, *(() if lost is None else (lost,))))


def lower_bound(d: Floats, units: Units, alpha: float) -> float:
    """The smallest mean drop that the sample leaves possible, at confidence 1 - `alpha`: a plain cluster t bound.

    A layer whose lower bound lies above a cutoff is sensitive. No pseudo-cluster: to call a harmless layer sensitive
    costs speed, not quality. Minus infinity for fewer than two clusters. Raises TaskError as `upper_bound`.
    """
    return _lower(totals_of(d, units), alpha)


def _lower(totals: Totals, alpha: float) -> float:
    check_alpha(alpha)
    if totals.count < 2:
        return -math.inf
    return totals.mean - totals.error * float(stdtrit(totals.freedom, 1 - alpha))


def _drop(totals: Totals, *, n: int, changed: int) -> Drop:
    return Drop(estimate=totals.mean, error=totals.error, n=n, clusters=totals.count, changed=changed)


def quantile(alpha: float, freedom: float, skewness: float) -> float:
    """t at 1 - alpha, plus what a gamma distribution of that skewness has there above the normal; never below t."""
    t = float(stdtrit(freedom, 1 - alpha))
    if skewness < 1e-3:  # the difference is then below 1e-3 standard errors, and the gamma's shape above 4e6
        return t
    shape = 4 / skewness**2
    gamma = float(gammaincinv(shape, 1 - alpha) - shape) / math.sqrt(shape)
    return t + max(0.0, gamma - float(ndtri(1 - alpha)))


def bound_with(totals: Totals, alpha: float, unseen: Cluster) -> float:
    """The bound of the clusters and of one more."""
    sample = totals.with_one(unseen)
    return sample.mean + sample.error * quantile(alpha, totals.freedom, 2 * sample.skewness)


def _farthest(totals: Totals, *, either_side: bool) -> Farthest:
    """The cluster farthest above its share, in its own weights; with `either_side` also one below counts, turned round."""
    distance = np.abs(totals.beyond) if either_side else totals.beyond
    at = int(distance.argmax())
    return Farthest(float(distance[at]), float(totals.weights[at]))


def _check_worst(d: Floats, worst: float) -> None:
    if not (math.isfinite(worst) and worst > 0):
        raise TaskError(f"expected a positive, finite worst drop of a unit, or None for no limit, got {worst}")
    if d.max() > worst * (1 + 1e-9):
        raise TaskError(
            f"expected no unit to drop by more than the metric's worst, {worst}, got {d.max()} for unit {d.argmax()}; "
            "the metric must declare a larger `worst`, or None"
        )


def check_alpha(alpha: float) -> None:
    """Raises TaskError for an error rate out of range."""
    if not 0 < alpha < 0.5:
        raise TaskError(f"expected an error rate alpha between 0 and 0.5, got {alpha}; 0.05 is usual")
