"""The totals of clusters: the only thing that an estimate, its error and its bound look at.

Invariant: what is resampled is the cluster (a user, a query, a session; each unit by itself without clusters), and every
figure is a function of the clusters' totals alone, so that splitting a cluster's rows differently changes nothing. The
alternative, rows with a correction for their correlation (a design effect), needs a model of that correlation.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from precimap.metrics.units import Floats, Units, check_finite, check_length


@dataclass(frozen=True, slots=True)
class Cluster:
    """sum w d and sum w of one cluster."""

    drop: float
    weight: float


@dataclass(frozen=True, slots=True)
class Farthest:
    """The cluster of a sample that lies farthest above its share: its weighted total less mean * weight, and its weight.

    Both in units of the mean weight of a row, so that samples whose weights are scaled differently can be compared.
    """

    above: float
    weight: float


@dataclass(frozen=True, eq=False)
class Totals:
    """sum w d and sum w of each cluster, float64 [clusters]. The mean is a ratio of sums, sum w d / sum w."""

    drops: Floats
    weights: Floats

    @property
    def count(self) -> int:
        return len(self.drops)

    @cached_property
    def whole(self) -> float:
        """sum w."""
        return float(self.weights.sum())

    @cached_property
    def mean(self) -> float:
        return float(self.drops.sum()) / self.whole

    @cached_property
    def beyond(self) -> Floats:
        """What each cluster's total lies above its share of the mean (below: negative); the linearised values."""
        return self.drops - self.mean * self.weights

    @cached_property
    def error(self) -> float:
        """Standard error of the mean, infinite for one cluster; robust to clusters of unequal weight.

        By linearisation (Cochran 1977, "Sampling Techniques", ch. 6 and 9) with the correction CR2 of Bell and McCaffrey
        2002 ("Bias reduction in standard errors for linear regression with multi-stage samples"): a cluster that holds a
        share h of the weight pulls the mean towards itself, and its deviation counts 1 / (1 - h). For equal weights this
        is C / (C - 1).
        """
        if self.count < 2:
            return math.inf
        free = 1 - self.weights / self.whole
        return math.sqrt(float(np.sum(self.beyond**2 / free))) / self.whole

    @cached_property
    def skewness(self) -> float:
        """Of the sum of the linearised totals: third moment over the third power of its spread; 0 without a spread."""
        length = float(np.linalg.norm(self.beyond))
        if not length or self.count < 2:
            return 0.0
        away = self.beyond / length
        return float(np.sum(away * away * away))  # ** 3 is a power for numpy, and takes twenty times as long

    @cached_property
    def effective(self) -> float:
        """How many clusters of equal weight these are worth, (sum W)^2 / sum W^2 (Kish 1965, "Survey Sampling")."""
        return self.whole**2 / float(self.weights @ self.weights)

    @cached_property
    def typical(self) -> float:
        """The weight of the cluster that a typical unit is in, sum W^2 / sum W."""
        return float(self.weights @ self.weights) / self.whole

    @cached_property
    def freedom(self) -> float:
        """Degrees of freedom of `error` (Bell and McCaffrey 2002, Satterthwaite's, with variances as the weights).

        B = A (D - w w' / S) A with D = diag(w), S = sum w and A = diag(1 - w / S)^-1/2; (tr B)^2 / tr B^2, written out.
        Clusters less one for equal weights, fewer the more unequal they are.
        """
        w, whole = self.weights, self.whole
        inflated = 1 / (1 - w / whole)
        own = inflated * (w - w * w / whole)
        cross = inflated * w * w
        return float(own.sum() ** 2 / (own @ own + (cross.sum() ** 2 - cross @ cross) / whole**2))

    @property
    def mirrored(self) -> "Totals":
        """Of the drops with their signs turned round."""
        return Totals(-self.drops, self.weights)

    def with_one(self, unseen: Cluster) -> "Totals":
        """One cluster more, that nobody has seen."""
        return Totals(np.append(self.drops, unseen.drop), np.append(self.weights, unseen.weight))


def totals_of(d: Floats, units: Units) -> Totals:
    """The totals of `d`, float64 [n]. Raises TaskError when it does not fit `units` or is not finite."""
    check_length("differences", d, units.n)
    check_finite("the difference", d)
    weights = units.known_weights
    return Totals(summed(weights * np.asarray(d, np.float64), units), summed(weights, units))


def summed(values: Floats, units: Units) -> Floats:
    """The sum of `values`, float64 [n], over each cluster, in the order of the clusters' numbers."""
    if units.clusters is None:
        return values
    _, cluster = np.unique(units.clusters, return_inverse=True)
    return np.asarray(np.bincount(cluster, values), np.float64)
