"""What a Task takes for granted unless it is told otherwise: how a batch is called, where its labels and scores are, and
which loss they have.

Invariant: a default fits or refuses with what to give instead; none guesses between two readings. Not taken: a table of
model classes, which would know last year's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from precimap.errors import TaskError

_LABELS = ("labels", "label")


def default_labels(batch: Any) -> Any:
    """`batch["labels"]` or `batch["label"]` of a mapping, the last item of a tuple or list."""
    if isinstance(batch, Mapping):
        for key in _LABELS:
            if key in batch:
                return batch[key]
        raise TaskError(
            f"expected a batch with 'labels' or 'label', got the keys {', '.join(map(str, batch))}; "
            "give Task(labels=...) a function of the batch"
        )
    if isinstance(batch, tuple | list) and batch:
        return batch[-1]
    raise TaskError(
        f"cannot find the labels in a {type(batch).__name__}; give Task(labels=...) a function of the batch"
    )


def default_forward(model: Any, batch: Any) -> Any:
    """`model(**batch)` of a mapping, `model(*batch)` of a tuple or list, both without the labels; else `model(batch)`.

    Scores [units, 1] are returned as [units], as the metrics of clicks take them.
    """
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key not in _LABELS})
    else:
        output = model(*batch[:-1]) if isinstance(batch, tuple | list) else model(batch)
    scores = scores_in(output)
    return scores.flatten() if isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[1] == 1 else scores


def default_loss(scores: Tensor, batch: Any) -> Tensor:
    """float32 [units], of `default_labels`: cross-entropy of logits [units] or [units, 1] with labels from 0 to 1, and of
    logits [units, classes] with a class for each unit.

    Raises TaskError for other shapes: give Task(loss=...).
    """
    return loss_of(scores, default_labels(batch))


def loss_of(scores: Tensor, labels: Any) -> Tensor:
    """As `default_loss`, of labels that are there."""
    y = torch.as_tensor(labels, device=scores.device)
    units = len(scores)
    if scores.shape in ((units,), (units, 1)) and y.shape in ((units,), (units, 1)):
        clicks = y.reshape(units).float()
        if bool(((clicks < 0) | (clicks > 1)).any()):
            low, high = float(clicks.min()), float(clicks.max())
            raise TaskError(
                f"the default loss of one score for each unit is that of clicks, with labels from 0 to 1; got {low:g} to "
                f"{high:g}. Give Task(loss=...)"
            )
        return F.binary_cross_entropy_with_logits(scores.reshape(units).float(), clicks, reduction="none")
    if scores.dim() == 2 and y.shape == (units,) and not y.is_floating_point():
        return F.cross_entropy(scores.float(), y.long(), reduction="none")
    raise TaskError(
        f"there is no default loss for scores {list(scores.shape)} with labels {list(y.shape)}, {y.dtype}; give "
        "Task(loss=...) a function of scores and batch that returns one value per unit"
    )


@dataclass(frozen=True, slots=True)
class LossOfLabels:
    """As `default_loss`, of the labels that a task's own function finds in a batch."""

    labels: Callable[[Any], Any]

    def __call__(self, scores: Tensor, batch: Any) -> Tensor:
        return loss_of(scores, self.labels(batch))


@dataclass(frozen=True, slots=True)
class Scoring:
    """The user's forward, which may return scores in an output of a library: its `logits`, or its only tensor."""

    forward: Callable[[Any, Any], Any]

    def __call__(self, model: Any, batch: Any) -> Any:
        return scores_in(self.forward(model, batch))


def scores_in(output: Any) -> Any:
    """The `logits` of a mapping or a named output, or the only tensor of a mapping, tuple or list; else what was given."""
    if isinstance(output, Tensor):
        return output
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(output, Mapping | tuple | list):
        tensors = [
            value for value in (output.values() if isinstance(output, Mapping) else output) if isinstance(value, Tensor)
        ]
        if len(tensors) == 1:
            return tensors[0]
    return output
