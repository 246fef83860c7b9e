"""How many units a question takes, and what a number of units can answer: planning, before and after a certificate.

Invariant: what is planned is the bound that certifies (`paired.upper_bound`), with its unseen cluster: a plan by a t test
alone promises margins that nothing can ever certify.
"""

import math
from dataclasses import replace

import numpy as np
from scipy.special import ndtri

from precimap.errors import TaskError
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import Drop, check_alpha, quantile, worst_cluster
from precimap.metrics.totals import Cluster, Totals, totals_of
from precimap.metrics.units import Floats

_DRAWS = 200
_SEED = 0


def smallest_margin(pilot: PairedDrops, clusters: int, alpha: float, power: float = 0.8) -> float:
    """The smallest margin that a map without any drop is certified at with probability `power`, by simulation.

    pilot: drops of a few units under the noisiest map there is; they are taken to have no mean. clusters: of the split
    that is to certify, each drawn from those of the pilot. A bounded metric gets its worst cluster, another the farthest
    of the pilot: a larger sample holds farther ones, so that this errs downwards there. Infinite where the pilot holds
    fewer than two clusters, or the split does. Raises TaskError for an `alpha` or `power` out of range.

    Draws are counts of the pilot's clusters (a multinomial), so that the size of the split costs nothing.
    """
    check_alpha(alpha)
    check_power(power)
    totals = totals_of(pilot.d, pilot.units)
    if totals.count < 2 or clusters < 2:
        return math.inf
    counts = np.random.default_rng(_SEED).multinomial(clusters, np.full(totals.count, 1 / totals.count), size=_DRAWS)
    unseen = _unseen(pilot, totals)
    bounds = _bounds(totals.beyond, totals.weights, counts.astype(np.float64), unseen, alpha)
    return float(np.quantile(bounds, power))


def units_for(pilot: PairedDrops, margin: float, alpha: float) -> int | None:
    """About how many units certify a map without a drop at a margin, with 80 % power, if it is as noisy as the pilot.

    By the formula of `units_needed`; None where no number would do, or where the pilot holds fewer than two clusters.
    """
    totals = totals_of(pilot.d, pilot.units)
    if totals.count < 2:
        return None
    noise = Drop(estimate=0.0, error=totals.error, n=pilot.rows, clusters=totals.count, changed=pilot.changed)
    return units_needed(noise, margin, alpha, worst=_unseen(pilot, totals).drop * totals.count / totals.whole or None)


def _unseen(pilot: PairedDrops, totals: Totals) -> Cluster:
    """The cluster that nobody has seen, beyond a mean of 0: the worst there can be, or the farthest of the pilot."""
    at = int(np.abs(totals.beyond).argmax())
    return worst_cluster(pilot, totals) or Cluster(float(abs(totals.beyond[at])), float(totals.weights[at]))


def _bounds(z: Floats, weights: Floats, counts: Floats, unseen: Cluster, alpha: float) -> list[float]:
    """`paired.bound_with` of samples that hold each cluster as often as a row of `counts`, [samples, clusters], says."""
    z, weights = np.append(z, unseen.drop), np.append(weights, unseen.weight)
    counts = np.column_stack((counts, np.ones(len(counts))))
    whole = counts @ weights
    mean = counts @ z / whole
    beyond = z - mean[:, None] * weights
    squares = (counts * beyond**2).sum(1)
    error = np.sqrt((counts * beyond**2 / (1 - weights / whole[:, None])).sum(1)) / whole
    cubes = (counts * beyond**3).sum(1)
    skewness = np.divide(cubes, squares**1.5, out=np.zeros(len(counts)), where=squares > 0)
    freedom = float(counts[0].sum()) - 2
    return [float(m + e * quantile(alpha, freedom, 2 * s)) for m, e, s in zip(mean, error, skewness, strict=True)]


def least_margin(nothing: PairedDrops, clusters: int, alpha: float) -> float:
    """The margin below which no map can be certified, not even one that changes nothing: about 3 * worst / clusters.

    nothing: a model against itself, whose clusters are typical. 0 for a metric without a limit; infinite for fewer than two
    clusters. Raises TaskError for an `alpha` out of range.
    """
    check_alpha(alpha)
    totals = totals_of(nothing.d, nothing.units)
    lost = worst_cluster(nothing, totals)
    if clusters < 2:
        return math.inf
    if lost is None:
        return 0.0
    weight = np.array([totals.whole / totals.count])
    return _bounds(np.zeros(1), weight, np.array([[float(clusters)]]), lost, alpha)[0]


def units_needed(drop: Drop, margin: float, alpha: float, power: float = 0.8, worst: float | None = None) -> int | None:
    """About how many units certify, with probability `power`, a true drop equal to the estimate.

    More units are taken to come in clusters like those of `drop`, of equal weight. worst: `Metric.worst`, or for a loss
    the largest deviation seen; None leaves the pseudo-cluster out. The skewness is taken to be that of losses of
    `worst`, so that the answer errs upwards. None when no number would do: the estimate is at or above the margin (or
    so close below that it takes more than 2**53 clusters), or a single cluster says nothing about the spread.
    Raises TaskError for an `alpha` or `power` out of range.
    """
    check_alpha(alpha)
    check_power(power)
    if drop.estimate >= margin or not math.isfinite(drop.error):
        return None
    spread = drop.error * math.sqrt(drop.clusters)  # standard deviation of one cluster's share
    beyond = float(ndtri(power))

    def certifies(clusters: int) -> bool:
        unseen = 0.0 if worst is None else worst / (clusters + 1)
        error = math.hypot(spread / math.sqrt(clusters), unseen)
        skewness = 2 * unseen / error if error else 0.0
        reach = error * quantile(alpha, clusters - 1, skewness) + beyond * spread / math.sqrt(clusters)
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


def needed_range(drop: Drop, margin: float, alpha: float, worst: float | None) -> tuple[int, int | None] | None:
    """`units_needed` as far as the estimate is known: for a drop one standard error below it and one above.

    The larger is None where no number would do for that; None where none would do for the estimate itself.
    """
    middle = units_needed(drop, margin, alpha, worst=worst)
    if middle is None:
        return None
    lucky = replace(drop, estimate=max(drop.estimate - drop.error, min(0.0, drop.estimate)))
    unlucky = replace(drop, estimate=drop.estimate + drop.error)
    fewest = units_needed(lucky, margin, alpha, worst=worst)
    return (middle if fewest is None else fewest), units_needed(unlucky, margin, alpha, worst=worst)


def check_power(power: float) -> None:
    """Raises TaskError for a power that is no probability."""
    if not 0 < power < 1:
        raise TaskError(f"expected a power between 0 and 1, got {power}; 0.8 is usual")
