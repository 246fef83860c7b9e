"""What else must not break: further metrics with margins of their own, and metrics of a slice or of one head.

Invariant: a certificate with guards is one statement, "the gate and every guard are within their margins", and each is
tested at the full alpha: the whole is false only if one of its parts is (intersection-union test, Berger 1982). So guards
need no correction, and every guard makes the certificate harder to get, never easier.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.metric import Metric, PairedDrops
from precimap.metrics.named import metric_of
from precimap.metrics.units import Floats, Units


@dataclass(frozen=True)
class Guard:
    """A metric that may drop by at most `margin`, in its own units; on a slice only where `where` is given.

    where(batch) -> bool [units]: the units of the slice, such as one country or new users; it needs a `name`.
    Raises TaskError for a margin that is not positive and a slice without a name.
    """

    metric: Metric
    margin: float
    where: Callable[[Any], Any] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        margin: Any = self.margin
        if isinstance(margin, str) or not hasattr(self.metric, "paired"):
            raise TaskError(f"expected Guard(metric, margin as a number), got Guard({self.metric!r}, {margin!r})")
        if not 0 < self.margin < float("inf"):
            raise TaskError(f"expected a margin above zero for the guard {self.metric.name}, got {self.margin}")
        if self.where is not None and not self.name:
            raise TaskError(f"expected a name for the slice that {self.metric.name} guards, such as name='new users'")

    @property
    def label(self) -> str:
        """What reports call it."""
        if self.where is None:
            return self.name or self.metric.name
        return f"{self.metric.name} on {self.name}"


Guards = Mapping[str, float] | Sequence[Guard]


def as_guards(given: Guards) -> tuple[Guard, ...]:
    """Guards as they are, or from `{"calibration": 0.005}`, by the names of `metrics.named`.

    Raises TaskError for unknown names and equal ones.
    """
    if isinstance(given, Mapping):
        found = tuple(Guard(metric_of(name), margin) for name, margin in given.items())
    else:
        found = tuple(given)
        wrong: list[Any] = [guard for guard in found if type(guard) is not Guard]
        if wrong:
            raise TaskError(f"expected guards as Guard(metric, margin), got {wrong[0]!r}")
    labels = [guard.label for guard in found]
    if len(set(labels)) < len(labels):
        raise TaskError(f"expected guards with names of their own, got {', '.join(labels)}")
    return found


@dataclass(frozen=True)
class Head:
    """A metric on one column of the scores and of the labels, for models with several heads.

    Scores [units, heads]; labels [units, heads], or [units] where all heads share them. The losses stay the task's own.
    """

    metric: Metric
    column: int

    @property
    def name(self) -> str:
        return f"{self.metric.name} of head {self.column}"

    @property
    def unit(self) -> str:
        return self.metric.unit

    @property
    def higher_is_better(self) -> bool:
        return self.metric.higher_is_better

    @property
    def worst(self) -> float | None:
        return self.metric.worst

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """As the metric. Raises TaskError for scores without that column."""
        y = torch.as_tensor(labels, device=scores.device)
        if scores.dim() != 2 or not 0 <= self.column < scores.shape[1]:
            raise TaskError(f"{self.name} takes scores [units, heads] with that head; they are {list(scores.shape)}")
        if y.dim() == 2 and y.shape != scores.shape:
            raise TaskError(f"{self.name}: expected labels like the scores {list(scores.shape)}, got {list(y.shape)}")
        return self.metric.per_unit(scores[:, self.column], y[:, self.column] if y.dim() == 2 else y, losses)

    def value(self, kept: Floats, units: Units) -> float:
        """As the metric."""
        return self.metric.value(kept, units)

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """As the metric."""
        return self.metric.paired(baseline, other, units)
