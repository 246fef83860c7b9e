"""AUC and GAUC: how often a positive stands above a negative, in all rows or within groups.

Invariant: scores are compared in float32 and a tie counts one half, as in the Mann-Whitney statistic: AUC speaks of pairs
drawn at random, not of an order that is shown. Errors come from placement values: of a positive, the share of negatives
below it; of a negative, the share of positives above it. Summed within clusters they give the cluster-robust error
(Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data"). DeLong's form takes every row to be independent,
which rows of one user are not.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.click import rarer
from precimap.metrics.metric import CLUSTER, PairedDrops, Stakes, check_paired, count_changed, refuse_units, untold
from precimap.metrics.units import Floats, Units


def placements(scores: Floats, positive: NDArray[np.bool_], weights: Floats, groups: NDArray[np.int64]) -> Floats:
    """The placement value of each row within its group, float64 [n]; NaN in a group with rows of one class only.

    Weighted: the share of the other class's weight that a row stands on the right side of. groups: 0, 1, ... [n].
    """
    order = np.lexsort((scores, groups))
    s, g = scores[order], groups[order]
    run = np.cumsum(np.r_[True, (s[1:] != s[:-1]) | (g[1:] != g[:-1])]) - 1  # rows of one group with one score
    of_group = g[np.r_[True, run[1:] != run[:-1]]]
    shares: list[Floats] = []
    for of_class in (~positive, positive):  # what stands below, of either class
        weight = (weights * of_class)[order]
        there = np.bincount(run, weight)
        whole = np.bincount(g, weight, minlength=int(groups.max()) + 1)
        below = np.cumsum(there) - there
        first = np.r_[True, of_group[1:] != of_group[:-1]]
        start = np.zeros(len(whole))
        start[of_group[first]] = below[first]
        with np.errstate(invalid="ignore", divide="ignore"):
            shares.append((below - start[of_group] + there / 2) / whole[of_group])
    found = np.empty(len(scores))
    found[order] = np.where(positive[order], shares[0][run], 1 - shares[1][run])
    return found


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve of scores [n] and labels 0/1 [n], of all rows together; ties count one half.

    It has a worst loss, though which depends on the rows: a row can fall from the right side of all of the other class to
    the wrong side, which costs sum w / sum w of its own class (`PairedDrops.limits`). So a bound of AUC is at least about
    3 / (rows of the rarer class).
    """

    name: ClassVar[str] = "AUC"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    worst: ClassVar[float | None] = None

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [n, 2]: the score, rounded to float32, and the label. Raises TaskError for other shapes or labels."""
        return _ranked(self.name, scores, labels)

    def value(self, kept: Floats, units: Units) -> float:
        """The AUC. Raises TaskError when one of the two classes is missing."""
        area, _ = self._area(kept, units)
        return area

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """Placement values as influences: (V - AUC) * sum w / sum w of the row's own class.

        A few rows may be of one class: a drop that they cannot tell has an infinite error.
        """
        check_paired(self.name, baseline, other, 2)
        if (baseline[:, 1] == baseline[0, 1]).all():
            return untold(units, self.worst)
        (before, influence), (after, influence_after) = self._area(baseline, units), self._area(other, units)
        drop = before - after
        d = drop + influence - influence_after
        positive, weights = baseline[:, 1] == 1, units.known_weights
        own, whole = float(weights @ positive), float(weights.sum())
        limits = whole / np.where(positive, own, whole - own)
        # The influences are counted from each model's own area, which moved by the drop.
        limits += max(0.0, -drop) * (limits - 1)
        rare, named = rarer(positive.astype(np.float64), np.ones(units.n))
        stakes = Stakes(unit="of its placement", rare=rare, named=named)
        changed = count_changed(baseline, other)
        return PairedDrops(
            d=d, units=units, rows=units.n, changed=changed, worst=float(limits.max()), stakes=stakes, limits=limits
        )

    def _area(self, kept: Floats, units: Units) -> tuple[float, Floats]:
        positive, weights = kept[:, 1] == 1, units.known_weights
        if positive.all() or not positive.any():
            raise TaskError(f"{self.name} needs rows of both classes, got {len(kept)} of one; give it more data")
        value = placements(kept[:, 0], positive, weights, np.zeros(len(kept), np.int64))
        own = weights * positive
        area = float(value @ own / own.sum())
        of_class = np.where(positive, own.sum(), weights.sum() - own.sum())
        return area, (value - area) * weights.sum() / of_class


@dataclass(frozen=True)
class GAUC:
    """Mean AUC within the task's clusters (users, sessions), each weighing as many as its rows; ties count one half.

    Zhu et al. 2017 ("Optimized cost per click in Taobao display advertising") weigh users by impressions, as here. A
    cluster with rows of one class only has no AUC and is left out.
    """

    name: ClassVar[str] = "GAUC"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    worst: ClassVar[float | None] = 1.0

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [n, 2]: the score, rounded to float32, and the label. Raises TaskError for other shapes or labels."""
        return _ranked(self.name, scores, labels)

    def value(self, kept: Floats, units: Units) -> float:
        """The weighted mean over clusters with both classes. Raises TaskError without clusters, or without such a one."""
        areas, weights = self._areas(kept, units)
        if not len(areas):
            raise TaskError("GAUC needs a cluster with rows of both classes, got none; give it more data")
        return float(areas @ weights / weights.sum())

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """One drop for each cluster that has both classes; an infinite error where none has."""
        check_paired(self.name, baseline, other, 2)
        (before, weights), (after, _) = self._areas(baseline, units), self._areas(other, units)
        if not len(before):
            return untold(units, self.worst)
        groups = Units(n=len(before), weights=weights)
        stakes = Stakes(unit="of its AUC", noun=CLUSTER)
        return PairedDrops(
            d=before - after,
            units=groups,
            rows=units.n,
            changed=count_changed(baseline, other),
            worst=self.worst,
            stakes=stakes,
        )

    def _areas(self, kept: Floats, units: Units) -> tuple[Floats, Floats]:
        if units.clusters is None:
            raise TaskError("GAUC is a mean over clusters; give Task(clusters=...) the user or the session of each row")
        _, group = np.unique(units.clusters, return_inverse=True)
        positive, weights = kept[:, 1] == 1, units.known_weights
        value = placements(kept[:, 0], positive, weights, group)
        with np.errstate(invalid="ignore"):
            areas = np.bincount(group, np.where(positive, weights * np.nan_to_num(value), 0.0)) / np.bincount(
                group, weights * positive
            )
        whole, own = np.bincount(group, weights), np.bincount(group, positive.astype(np.float64))
        both = (own > 0) & (own < np.bincount(group))
        return areas[both], np.asarray(whole[both], np.float64)


def _ranked(name: str, scores: Tensor, labels: Any) -> Tensor:
    y, s = torch.as_tensor(labels, device=scores.device), scores.float()
    if s.dim() != 1 or y.shape != s.shape:
        raise TaskError(
            f"{name} takes scores [n] and labels [n]; the scores are {list(s.shape)} and the labels {list(y.shape)}. "
            "Flatten them in the task's forward, or take one head by Head(metric, column)."
        )
    refuse_units(~torch.isfinite(s), "a score that is not finite")
    refuse_units((y != 0) & (y != 1), f"a label other than 0 and 1, which {name} has no class for")
    return torch.stack((s.double(), y.double()), dim=1)
