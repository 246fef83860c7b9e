"""A metric: what it keeps of each unit, and what two models' keepings say of the drop, unit by unit.

Invariant: a metric never judges. It gives one drop for each unit, whose weighted mean is *exactly* the drop of the metric;
errors and bounds belong to `paired`, which is the same for all metrics. What is no mean of units (a ratio, a root, an
AUC) is linearised: drop + influence of the unit, so that sums over clusters give the right error (Huber and Ronchetti
2009, "Robust Statistics", ch. 1; Cochran 1977, "Sampling Techniques", ch. 6). The alternative, one number per model,
needs about a thousand times the data for the same certainty.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.units import Floats, Units, check_finite

UNIT, CLUSTER = "unit", "cluster"  # what is resampled, as reports call one of them
RELATIVE = "of the baseline's"  # the `unit` of a metric whose drop is a share of the baseline's value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stakes:
    """What one unit can lose, in words a person uses: for what is said of losses that a split may not hold.

    unit, scale: of a unit's own loss, and what the metric drops by where every unit loses 1 of it (NE: nats, and one over
    the mean loss). rare, named: how much of each unit, float64 [units.n], belongs to the rarer class, and what that class
    is called; None where there are no classes. noun: what the metric's units are. within: the weight of each cluster that
    was resampled, where the drops are of larger blocks.
    """

    unit: str = ""
    scale: float = 1.0
    rare: Floats | None = None
    named: str = ""
    noun: str = UNIT
    within: Floats | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairedDrops:
    """The drop of each of `units`, float64 [units.n]; their weighted mean is the drop, positive is worse.

    units: those that the metric knows, which may be fewer than those of the split (GAUC knows groups). rows, changed: units
    of the split, and how many of them differ at all. worst: the largest drop of one of them, None without a limit; limits:
    that of each, float64 [units.n], where they differ by class, as `stakes.rare` says.
    two_sided: a drop in either direction is a loss (calibration); the values keep their sign.
    """

    d: Floats
    units: Units
    rows: int
    changed: int
    worst: float | None
    two_sided: bool = False
    stakes: Stakes = field(default_factory=Stakes)
    limits: Floats | None = None


class Metric(Protocol):
    """What a task is judged by; derive from `UnitMean` for a metric that is a mean over units.

    `worst` is the largest drop that one unit can suffer, in the units of the metric (1.0 where the values lie in
    [0, 1]); None says that no such limit is known, as for a loss: `PairedDrops.worst` may know one for the rows at hand.
    `unit` is what the drop is counted in.
    """

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def worst(self) -> float | None: ...

    @property
    def unit(self) -> str: ...

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """One batch -> what is kept of each unit, float64 [units] or [units, columns]. Called under `torch.no_grad()`.

        `scores`: what the task's forward returned; `labels`: what the task's data holds; `losses`: the task's own loss
        of each unit, [units]. Raises TaskError when they do not fit together or the value is not a number.
        """
        ...

    def value(self, kept: Floats, units: Units) -> float:
        """The metric of one model from what was kept of all units of a split."""
        ...

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The drops of `other` against `baseline`, both kept by `per_unit` on the same `units`. Raises TaskError."""
        ...


class UnitMean(ABC):
    """A metric whose value is the weighted mean of one number per unit; name and `per_unit` are for the derived class."""

    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = False

    @property
    @abstractmethod
    def name(self) -> str:
        """As reports call it."""

    @property
    def worst(self) -> float | None:
        """The largest drop of one unit; None: without a limit."""
        return None

    @abstractmethod
    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units]; see `Metric`."""

    def value(self, kept: Floats, units: Units) -> float:
        """The weighted mean."""
        return weighted_mean(kept, units)

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The difference of each unit, in the direction in which it is worse."""
        check_paired(self.name, baseline, other, 1)
        sign = -1.0 if self.higher_is_better else 1.0
        d = sign * (np.asarray(other, np.float64) - np.asarray(baseline, np.float64))
        stakes = Stakes(unit=self.unit or f"of {self.name}")
        return PairedDrops(
            d=d, units=units, rows=len(d), changed=int(np.count_nonzero(d)), worst=self.worst, stakes=stakes
        )


@dataclass(frozen=True)
class Loss(UnitMean):
    """The task's own loss of each unit, as it is; `name` is what reports call it.

    worst: the most that a unit's loss can rise by, if you know one (a clipped loss has one); it makes the bound a proof
    also against losses that no unit of the certify split suffers.
    """

    name: str = "loss"
    worst: float | None = None

    def __post_init__(self) -> None:
        check_declared(self.name, self.worst)

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """`losses` float [units] -> float64 [units]; raises TaskError for another shape or a non-finite loss."""
        if losses.dim() != 1:
            raise TaskError(
                f"the loss must be one number per unit, [units]; it came as {list(losses.shape)}. "
                "Reduce it over everything but the units (reduction='none', then a mean over the other dimensions)."
            )
        refuse_units(~torch.isfinite(losses), "a loss that is not finite; look at its scores and its label")
        return losses.double()


@dataclass(frozen=True)
class Perplexity(Loss):
    """exp of the mean loss in nats; `Task(weights=...)` gives the tokens of each unit, and the loss is their mean.

    worst: the most that a unit's loss can rise by, in nats.
    """

    name: str = "perplexity"

    def value(self, kept: Floats, units: Units) -> float:
        """exp(weighted mean)."""
        return float(np.exp(weighted_mean(kept, units)))

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """The derivative of exp at a mean m is exp(m)."""
        return of_a_mean(self, Smooth(np.exp, np.exp, "nats"), baseline, other, units)


@dataclass(frozen=True, slots=True)
class Smooth:
    """A growing function of a mean, its derivative, and the unit of the values that the mean is of."""

    function: Callable[[float], float]
    derivative: Callable[[float], float]
    unit: str


def of_a_mean(metric: Metric, of: Smooth, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
    """The drops of a smooth function of a mean, such as a root; lower is better.

    The metric's `worst` is the most that one of the values can rise by.
    """
    check_paired(metric.name, baseline, other, 1)
    before, after = weighted_mean(baseline, units), weighted_mean(other, units)
    drop = of.function(after) - of.function(before)
    slope = of.derivative(after)
    influence = slope * (other - after) - of.derivative(before) * (baseline - before)
    d = drop + influence
    # The largest drop of a unit like one of these: its value after is at most its value before plus the worst.
    limit = None if metric.worst is None else float((d + slope * (baseline + metric.worst - other)).max())
    return PairedDrops(
        d=d,
        units=units,
        rows=units.n,
        changed=count_changed(baseline, other),
        worst=limit,
        stakes=Stakes(unit=of.unit, scale=slope),
    )


def weighted_mean(values: Floats, units: Units) -> float:
    """sum w x / sum w."""
    weights = units.known_weights
    return float(values @ weights / weights.sum())


def untold(units: Units, worst: float | None) -> PairedDrops:
    """What units say that cannot tell a drop at all: one value without a spread, so that its error is infinite."""
    return PairedDrops(d=np.zeros(1), units=Units(n=1), rows=units.n, changed=0, worst=worst)


def check_declared(name: str, worst: float | None) -> None:
    """Raises TaskError for a worst drop of a unit that is none."""
    if worst is not None and not 0 < worst < float("inf"):
        raise TaskError(
            f"expected worst of {name}, the most that a unit's loss can rise by, above zero and finite, got {worst}; "
            "leave it out if you know none"
        )


def check_paired(name: str, baseline: Floats, other: Floats, dims: int) -> None:
    """Raises TaskError when two keepings are not of the same units, not of `dims` dims, or not finite."""
    if baseline.shape != other.shape or baseline.ndim != dims:
        raise TaskError(
            f"expected {name} of the same units under both models, got {list(baseline.shape)} values of the "
            f"baseline and {list(other.shape)} of the other; score both on the same split, in the same order"
        )
    for model, values in (("baseline", baseline), ("other model", other)):
        for column in values.reshape(len(values), -1).T:
            check_finite(f"{name} of the {model}", column)


def count_changed(baseline: Floats, other: Floats) -> int:
    """Units of which anything that is kept differs."""
    differs: NDArray[np.bool_] = (baseline != other).reshape(len(baseline), -1).any(1)
    return int(differs.sum())


def refuse_units(faulty: Tensor, what: str) -> None:
    """Raise TaskError naming the first units for which `faulty` (bool [units]) holds."""
    if faulty.any():
        found = faulty.nonzero().flatten().tolist()
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise TaskError(f"{len(found)} of {len(faulty)} units of this batch (number {shown}) have {what}.")
