"""Metrics that are reported beside a gate and should decide nothing.

Invariant: each says something of *two* models that no value of one model says (which pairs turned round, what left the
first k), or takes a repair for granted that nobody ships (a recalibration on the labels). They have the form of any
metric; `value` of one model is what it is against itself.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.click import clicks, log_losses, platt, rarer, ratio_drops
from precimap.metrics.metric import RELATIVE, PairedDrops, Stakes, UnitMean, check_paired, count_changed, refuse_units
from precimap.metrics.units import Floats, Units

MOST_CANDIDATES = 1024  # pairs of them are compared: a million for each unit
_NO_CANDIDATE = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class RecalibratedNE:
    """NE after each model's logits got the scale and the bias that fit the labels best, on the same rows; relative.

    What remains is the loss of order and resolution; what NE shows beyond it is calibration (Bieniek et al. 2024,
    arXiv 2401.16692, separate the two so). The fit is on the rows that are judged, two numbers on thousands of rows.
    """

    name: ClassVar[str] = "recalibrated NE"
    unit: ClassVar[str] = RELATIVE
    higher_is_better: ClassVar[bool] = False
    worst: ClassVar[float | None] = None

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [n, 2]: logit and label. Raises TaskError as `LogLoss`."""
        return torch.stack(clicks(self.name, scores, labels), dim=1)

    def value(self, kept: Floats, units: Units) -> float:
        """The recalibrated mean log-loss over the entropy of the mean label."""
        weights = units.known_weights / units.known_weights.sum()
        rate = float(kept[:, 1] @ weights)
        return float(_recalibrated(kept, units) @ weights) / -float(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """As NE on the recalibrated losses: where the fit is best, moving it changes nothing to first order."""
        check_paired(self.name, baseline, other, 2)
        losses = _recalibrated(baseline, units), _recalibrated(other, units)
        rare, named = rarer(baseline[:, 1], np.ones(units.n))
        stakes = Stakes(unit="nats", rare=rare, named=named)
        drops = ratio_drops(self.name, losses, units, stakes, None)
        return replace(drops, changed=count_changed(baseline, other))


def _recalibrated(kept: Floats, units: Units) -> Floats:
    """The log-loss of each row under the best scale and shift, float64 [n]. Raises TaskError for one class alone."""
    z, y = kept.T
    if (y == y[0]).all():
        raise TaskError("a recalibration needs labels of both classes, got one")
    scale, shift = platt(z, y, units.known_weights)
    return log_losses(torch.from_numpy(scale * z + shift), torch.from_numpy(y)).numpy()


@dataclass(frozen=True)
class OrderFlips(UnitMean):
    """Share of a unit's pairs of candidates that the baseline orders and the other model turns round; ties count one half.

    Scores [units, candidates], compared in float32; -inf says "not a candidate".
    """

    name: ClassVar[str] = "order flips"
    unit: ClassVar[str] = "of all pairs"
    worst: ClassVar[float | None] = 1.0

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units, candidates], the scores. Raises TaskError for another shape, NaN, or over 1,024 candidates."""
        s = _candidates(self.name, scores)
        if s.shape[1] > MOST_CANDIDATES:
            raise TaskError(f"order flips compares all pairs of at most {MOST_CANDIDATES} candidates, got {s.shape[1]}")
        return s.clamp(min=_NO_CANDIDATE).double()

    def value(self, kept: Floats, units: Units) -> float:
        """0: against itself a model turns no pair round."""
        return 0.0

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The share of each unit; 0 where the baseline orders no pair."""
        check_paired(self.name, baseline, other, 2)
        d = np.array([_flipped(*rows) for rows in zip(baseline, other, strict=True)])
        return PairedDrops(d=d, units=units, rows=units.n, changed=count_changed(baseline, other), worst=self.worst)


def _flipped(before: Floats, after: Floats) -> float:
    real = before > float(_NO_CANDIDATE)
    first, second = (np.sign(s[real][:, None] - s[real][None, :]) for s in (before, after))
    ordered = np.abs(first).sum()
    return float(((1 - first * second) / 2 * np.abs(first)).sum() / ordered) if ordered else 0.0


@dataclass(frozen=True)
class TopKOverlap(UnitMean):
    """Share of the baseline's first k candidates that the other model has among its first k; the drop is what left."""

    k: int
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    worst: ClassVar[float | None] = 1.0

    @property
    def name(self) -> str:
        return f"top-{self.k} overlap"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units, k], the numbers of the first k candidates. Raises TaskError for fewer than k candidates."""
        s = _candidates(self.name, scores)
        if not 1 <= self.k <= s.shape[1]:
            raise TaskError(f"expected k from 1 to the {s.shape[1]} candidates, got {self.k}")
        return s.sort(dim=1, descending=True, stable=True).indices[:, : self.k].double()

    def value(self, kept: Floats, units: Units) -> float:
        """1: a model agrees with itself."""
        return 1.0

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """1 - overlap of each unit."""
        check_paired(self.name, baseline, other, 2)
        shared = (baseline[:, :, None] == other[:, None, :]).any(2).mean(1)
        return PairedDrops(d=1 - shared, units=units, rows=units.n, changed=int((shared < 1).sum()), worst=self.worst)


def _candidates(name: str, scores: Tensor) -> Tensor:
    if scores.dim() != 2:
        raise TaskError(f"{name} takes scores [units, candidates]; they came as {list(scores.shape)}.")
    refuse_units(torch.isnan(scores).any(1), "a NaN score")
    return scores.float()
