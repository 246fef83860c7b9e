"""Metrics of clicks: log-loss, normalised entropy, calibration, RMSE and accuracy.

Invariant: scores are logits and are taken in float64, because the drops looked for are in the fourth digit. The drops of
NE and calibration are *relative to the baseline*: that is how their margins are spoken of ("0.05 % NE"), and the entropy
of the labels, which both models share, cancels.

Negatives that were sampled away are corrected for as He et al. 2014 ("Practical lessons from predicting clicks on ads at
Facebook", section 6.3) do: with a share `kept` of them kept, a prediction p of the sampled world is
p / (p + (1 - p) / kept) in the full one, a shift of the logit by log(kept), and each negative stands for 1 / kept of
them. Data in which nothing was sampled away, under a model that was trained on sampled data, need the shift alone: add
log(kept) in the task's forward.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.metric import (
    RELATIVE,
    PairedDrops,
    Smooth,
    Stakes,
    UnitMean,
    check_declared,
    check_paired,
    count_changed,
    of_a_mean,
    refuse_units,
    weighted_mean,
)
from precimap.metrics.units import Floats, Units

# The relative losses of NE that ranking teams speak of. Choices for a user to make, and never a default.
NE_MARGINS = {"0.02%": 0.0002, "0.05%": 0.0005, "0.1%": 0.001}


def clicks(name: str, scores: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Logits [n] and labels [n] (0 or 1, or the probability of 1), both float64. Raises TaskError for anything else."""
    y = torch.as_tensor(labels, device=scores.device).double()
    if scores.dim() != 1 or y.shape != scores.shape:
        raise TaskError(
            f"{name} takes logits [n] and labels [n]; the scores are {list(scores.shape)} and the labels "
            f"{list(y.shape)}. Squeeze or flatten them in the task's forward, or take one head by Head(metric, column)."
        )
    z = scores.double()
    refuse_units(~torch.isfinite(z), "a logit that is not finite; give logits, without a mask or a sigmoid")
    refuse_units(~((y >= 0) & (y <= 1)), f"a label outside [0, 1]; {name} takes 0/1 labels (not -1/+1)")
    return z, y


def log_losses(z: Tensor, y: Tensor) -> Tensor:
    """-y log(s) - (1 - y) log(1 - s) with s = sigmoid(z), as max(z, 0) - z y + log(1 + exp(-|z|)): overflows nowhere."""
    return z.clamp(min=0) - z * y + torch.log1p(torch.exp(-z.abs()))


def platt(z: Floats, p: Floats, weights: Floats) -> tuple[float, float]:
    """Scale and shift of the logits `z` with the least mean log-loss against labels or probabilities `p`; all float64 [n].

    Platt 1999; convex, by a trust-region Newton method. Where `z` does not vary the scale is 1.
    """
    center, spread = float(z.mean()), float(z.std())
    weights = weights / weights.sum()
    design = np.stack(((z - center) / (spread or 1.0), np.ones_like(z)), axis=1)

    def loss(fit: Floats) -> float:
        logit = design @ fit
        return float(weights @ (np.logaddexp(0.0, logit) - p * logit))

    def gradient(fit: Floats) -> Floats:
        slope: Floats = design.T @ (weights * (expit(design @ fit) - p))
        return slope

    def curvature(fit: Floats) -> Floats:
        chance = expit(design @ fit)
        bend: Floats = (design * (weights * chance * (1 - chance))[:, None]).T @ design
        return bend

    start = np.array([spread, center])
    found = minimize(loss, start, jac=gradient, hess=curvature, method="trust-exact", options={"gtol": 1e-10}).x
    scale = float(found[0]) / spread if spread else 1.0
    return scale, float(found[1]) - scale * center


def rarer(positives: Floats, rows: Floats) -> tuple[Floats, str]:
    """How much of each row belongs to the rarer class, and its name. positives: of each row; rows: what it stands for."""
    negatives = rows - positives
    return (positives, "positive") if positives.sum() <= negatives.sum() else (negatives, "negative")


@dataclass(frozen=True)
class LogLoss(UnitMean):
    """Binary log-loss (cross-entropy in nats) of logits. worst: the most that a row's can rise by, if you know one."""

    worst: float | None = None
    name: ClassVar[str] = "log-loss"
    unit: ClassVar[str] = "nats"

    def __post_init__(self) -> None:
        check_declared(self.name, self.worst)

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """`scores`: logits [n]; `labels`: [n], 0 or 1, or the probability of 1 -> float64 [n, 2]: log-loss and label.

        Raises TaskError when the shapes differ, a logit is not finite, or a label lies outside [0, 1].
        """
        z, y = clicks(self.name, scores, labels)
        return torch.stack((log_losses(z, y), y), dim=1)

    def value(self, kept: Floats, units: Units) -> float:
        """The weighted mean of the log-losses."""
        return weighted_mean(kept[:, 0], units)

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The difference of each row."""
        check_paired(self.name, baseline, other, 2)
        rare, named = rarer(baseline[:, 1], np.ones(units.n))
        stakes = Stakes(unit=self.unit, rare=rare, named=named)
        d = other[:, 0] - baseline[:, 0]
        return PairedDrops(
            d=d, units=units, rows=units.n, changed=int(np.count_nonzero(d)), worst=self.worst, stakes=stakes
        )


@dataclass(frozen=True)
class _Sampled:
    """What NE and calibration share.

    kept: the share of the negatives that was kept, in (0, 1]. worst: the most that a row's log-loss in nats (NE), or its
    prediction (calibration, where 1.0 is always true), can change by, if you know one.
    """

    kept: float = 1.0
    worst: float | None = None
    higher_is_better: ClassVar[bool] = False
    unit: ClassVar[str] = RELATIVE
    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if not 0 < self.kept <= 1:
            raise TaskError(f"expected a share of kept negatives above 0, at most 1, got {self.kept}")
        check_declared(self.name, self.worst)

    def corrected(self, name: str, scores: Tensor, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits and labels of the full world, and how many of its rows each row stands for."""
        z, y = clicks(name, scores, labels)
        return z + math.log(self.kept), y, y + (1 - y) / self.kept


@dataclass(frozen=True)
class NE(_Sampled):
    """Normalised entropy (He et al. 2014): mean log-loss over the entropy of the mean label. Its drop is relative.

    drop = NE / NE of the baseline - 1, so a margin of 0.0005 is "0.05 % NE". Equals the relative drop of the log-loss.
    """

    name: ClassVar[str] = "NE"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """Logits [n], labels [n] -> float64 [n, 3]: weighted log-loss, weighted label, weight. Raises as `LogLoss`."""
        z, y, weight = self.corrected(self.name, scores, labels)
        return torch.stack((weight * log_losses(z, y), weight * y, weight), dim=1)

    def value(self, kept: Floats, units: Units) -> float:
        """Mean log-loss over entropy, infinite when all labels are the same."""
        loss, label, weight = (weighted_mean(column, units) for column in kept.T)
        rate = label / weight
        entropy = -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)
        return loss / weight / entropy if entropy > 0 else math.inf

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The ratio of the two mean losses - 1, linearised. Raises TaskError for a baseline without any loss."""
        check_paired(self.name, baseline, other, 2)
        rare, named = rarer(baseline[:, 1], baseline[:, 2])
        stakes = Stakes(unit="nats", rare=rare, named=named)
        most = None if self.worst is None else self.worst * baseline[:, 2]
        drops = ratio_drops(self.name, (baseline[:, 0], other[:, 0]), units, stakes, most)
        return replace(drops, changed=count_changed(baseline, other))


@dataclass(frozen=True)
class Calibration(_Sampled):
    """Mean prediction over mean label. A drop is a change of the ratio to either side, relative to the baseline's.

    drop = mean prediction / mean prediction of the baseline - 1, which the labels, shared by both, leave alone. Two-sided:
    its bound is that of two one-sided tests (Schuirmann 1987), so that 0.005 means "within half a per cent, both ways".
    """

    name: ClassVar[str] = "calibration"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """Logits [n], labels [n] -> float64 [n, 2]: weighted prediction, weighted label. Raises as `LogLoss`."""
        z, y, weight = self.corrected(self.name, scores, labels)
        return torch.stack((weight * torch.sigmoid(z), weight * y), dim=1)

    def value(self, kept: Floats, units: Units) -> float:
        """Mean prediction / mean label, infinite without a positive label."""
        prediction, label = (weighted_mean(column, units) for column in kept.T)
        return prediction / label if label > 0 else math.inf

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The ratio of the two mean predictions - 1, linearised, with its sign."""
        check_paired(self.name, baseline, other, 2)
        stakes = Stakes(unit="of its prediction", scale=1.0, rare=baseline[:, 1], named="positive")
        # A negative stands for 1 / kept rows of the full world.
        most = None if self.worst is None else np.full(units.n, self.worst / self.kept)
        drops = ratio_drops(self.name, (baseline[:, 0], other[:, 0]), units, stakes, most)
        return replace(drops, changed=count_changed(baseline, other), two_sided=True)


def ratio_drops(
    name: str, values: tuple[Floats, Floats], units: Units, stakes: Stakes, most: Floats | None
) -> PairedDrops:
    """sum w other / sum w baseline - 1, linearised (Cochran 1977, ch. 6): R - 1 + (other - R baseline) / mean.

    values: of the baseline and of the other model. R: the ratio; mean: of the baseline. most: what each of `other` may at
    most lie above `baseline`, None without a limit. Units count as changed by these values alone.
    """
    baseline, other = values
    mean = weighted_mean(baseline, units)
    if mean <= 0:
        raise TaskError(f"{name} of the baseline is {mean:g}; a drop relative to it is not defined")
    ratio = weighted_mean(other, units) / mean
    d = ratio - 1 + (other - ratio * baseline) / mean
    worst = None if most is None else ratio - 1 + float(((1 - ratio) * baseline + most).max()) / mean
    return PairedDrops(
        d=d,
        units=units,
        rows=units.n,
        changed=count_changed(baseline, other),
        worst=worst,
        stakes=replace(stakes, scale=1 / mean),
    )


@dataclass(frozen=True)
class RMSE:
    """Root of the mean squared difference of scores [n] and labels [n], both as they are (not logits).

    worst: the most that a row's squared difference can rise by, if you know one.
    """

    worst: float | None = None
    name: ClassVar[str] = "RMSE"
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_declared(self.name, self.worst)

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [n], the squared differences. Raises TaskError when the shapes differ or a value is not finite."""
        y = torch.as_tensor(labels, device=scores.device).double()
        if scores.dim() != 1 or y.shape != scores.shape:
            raise TaskError(f"RMSE takes scores [n] and labels [n]; got {list(scores.shape)} and {list(y.shape)}.")
        squares = (scores.double() - y).square()
        refuse_units(~torch.isfinite(squares), "a score or a label that is not finite")
        return squares

    def value(self, kept: Floats, units: Units) -> float:
        """The root of the weighted mean."""
        return math.sqrt(weighted_mean(kept, units))

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The derivative of a root at m is 1 / (2 root m); without any error there is no influence either."""

        def slope(mean: float) -> float:
            return 0.5 / math.sqrt(mean) if mean > 0 else 0.0

        return of_a_mean(self, Smooth(math.sqrt, slope, "in squared difference"), baseline, other, units)


@dataclass(frozen=True)
class Accuracy(UnitMean):
    """Share of units whose label has the highest score; of two classes, whose logit is on the label's side of 0.

    A tie counts against the model: low precision makes ties.
    """

    name: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    worst: ClassVar[float | None] = 1.0

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """Logits [n] with labels 0/1, or scores [n, classes] with class numbers [n]; compared in float32 -> 0 or 1."""
        y, s = torch.as_tensor(labels, device=scores.device), scores.float()
        refuse_units(torch.isnan(s.reshape(len(s), -1)).any(1), "a NaN score")
        if s.dim() == 1 and y.shape == s.shape:
            refuse_units((y != 0) & (y != 1), "a label other than 0 and 1")
            return torch.where(y == 1, s > 0, s < 0).double()
        if s.dim() != 2 or y.shape != s.shape[:1] or y.is_floating_point():
            raise TaskError(
                "accuracy takes logits [n] with labels 0/1 [n], or scores [n, classes] with integer labels [n]; got "
                f"{list(s.shape)} and {y.dtype} {list(y.shape)}."
            )
        refuse_units((y < 0) | (y >= s.shape[1]), f"a label outside 0..{s.shape[1] - 1}")
        own = s.gather(1, y.long().unsqueeze(1))
        return ((s >= own).sum(1) == 1).double()
