"""A metric is one number per unit, and the metrics that are losses.

Invariant: a metric never aggregates. Means, errors and bounds belong to `paired`, which needs the value of every unit
under both models; a metric that returned a mean would throw the pairing away. The alternative, one aggregate number
per model, needs about a thousand times the data for the same certainty.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from precimap.errors import TaskError


class Metric(Protocol):
    """What a task is judged by; any object with these members will do.

    `worst` is the largest drop that one unit can suffer, in the units of the metric (1.0 where the values lie in
    [0, 1]); None says that no such limit exists, as for a loss.
    """

    @property
    def name(self) -> str: ...

    @property
    def higher_is_better(self) -> bool: ...

    @property
    def worst(self) -> float | None: ...

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """One batch -> float64 [units]. Called under `torch.no_grad()`.

        `scores`: what the task's forward returned; `labels`: what the task's data holds; `losses`: the task's own loss
        of each unit, [units]. Raises TaskError when they do not fit together or the value is not a number.
        """
        ...


@dataclass(frozen=True)
class Loss:
    """The task's own loss of each unit, as it is; `name` is what reports call it."""

    name: str = "loss"
    higher_is_better: ClassVar[bool] = False
    worst: ClassVar[float | None] = None

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
class LogLoss:
    """Binary log-loss (cross-entropy in nats) of logits.

    -y log(s) - (1 - y) log(1 - s) with s = sigmoid(z), as max(z, 0) - z y + log(1 + exp(-|z|)), which overflows
    nowhere; in float64, because the drops looked for are in the fourth digit.
    """

    name: ClassVar[str] = "log-loss"
    higher_is_better: ClassVar[bool] = False
    worst: ClassVar[float | None] = None

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """`scores`: logits [n]; `labels`: [n], 0 or 1, or the probability of 1 -> float64 [n].

        Raises TaskError when the shapes differ, a logit is not finite, or a label lies outside [0, 1].
        """
        y = torch.as_tensor(labels, device=scores.device).double()
        if scores.dim() != 1 or y.shape != scores.shape:
            raise TaskError(
                f"log-loss takes logits [n] and labels [n]; the scores are {list(scores.shape)} and the labels "
                f"{list(y.shape)}. Squeeze or flatten them in the task's forward."
            )
        z = scores.double()
        refuse_units(~torch.isfinite(z), "a logit that is not finite; give logits, without a mask or a sigmoid")
        refuse_units(~((y >= 0) & (y <= 1)), "a label outside [0, 1]; log-loss takes 0/1 labels (not -1/+1)")
        return z.clamp(min=0) - z * y + torch.log1p(torch.exp(-z.abs()))


def refuse_units(faulty: Tensor, what: str) -> None:
    """Raise TaskError naming the first units for which `faulty` (bool [units]) holds."""
    if faulty.any():
        found = faulty.nonzero().flatten().tolist()
        shown = ", ".join(map(str, found[:5])) + (", ..." if len(found) > 5 else "")
        raise TaskError(f"{len(found)} of {len(faulty)} units of this batch (number {shown}) have {what}.")
