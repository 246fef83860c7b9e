"""A Task: the model, the data and the metric that its owners live by.

Invariant: scoring a split gives one value per unit, in the order of the split, so that two precision maps can be compared
unit by unit. The user's own functions do the work; precimap never looks into a batch beyond moving it to the model's
device. A trainer-like base class to inherit from was not taken: four functions say the same and need no lifecycle.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from precimap.defaults import LossOfLabels, Scoring, default_forward, default_labels, default_loss
from precimap.errors import TaskError
from precimap.loaders import SHARES, Shares, cut_in_order
from precimap.metrics.guard import Guard, Guards, as_guards
from precimap.metrics.metric import Loss, Metric
from precimap.metrics.named import metric_of
from precimap.metrics.units import Units
from precimap.per_unit import clusters_of, column_of, rows_said, slice_of
from precimap.user_code import called, can_be_written

Batches = Iterable[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Splits:
    """Three disjoint, re-iterable collections of batches (lists, or a DataLoader that does not shuffle).

    calibration: fits scales, its labels are not read. search: chooses. certify: judges the chosen map, once.
    """

    calibration: Batches
    search: Batches
    certify: Batches

    def __repr__(self) -> str:
        said = [f"{name}: {_counted(getattr(self, name))}" for name in SPLITS]
        return f"Splits({', '.join(said)})"


def _counted(batches: Batches) -> str:
    return f"{len(batches)} batches" if isinstance(batches, Sized) else type(batches).__name__


SPLITS = ("calibration", "search", "certify")


@dataclass(frozen=True, slots=True, repr=False)
class Task:
    """What is to be kept, and how it is measured.

    model: in evaluation mode, at its base precision, on its device. metric: the gate, an object of `metrics` or its name,
    such as "NE" or "ndcg@10". forward(model, batch) -> scores, one row per unit, or an output that holds them as `logits` or
    as its only tensor. loss(scores, batch) -> [units], differentiable where possible. `guards` must hold beside it, each
    within its own margin: `{"calibration": 0.005}`, or `Guard`s for other metrics and for slices. `reported` metrics are
    measured and decide nothing. labels(batch) -> what the metric takes. clusters(batch) -> [units] integers: units of
    one user, query or session are resampled together. weights(batch) -> [units] positive sample weights.
    """

    model: nn.Module
    _: KW_ONLY
    splits: Splits
    metric: Metric
    forward: Callable[[Any, Any], Any] = default_forward
    loss: Callable[[Tensor, Any], Tensor] = default_loss
    labels: Callable[[Any], Any] = default_labels
    clusters: Callable[[Any], Any] | None = None
    weights: Callable[[Any], Any] | None = None
    guards: Guards = ()
    reported: tuple[Metric, ...] = ()
    name: str = "task"

    def __post_init__(self) -> None:
        given: dict[str, Any] = {"guards": as_guards(self.guards), "metric": metric_of(self.metric)}
        given["reported"] = tuple(metric_of(one) for one in self.reported)
        if self.loss is default_loss and self.labels is not default_labels:
            given["loss"] = LossOfLabels(self.labels)
        if not isinstance(self.forward, Scoring):
            given["forward"] = Scoring(self.forward)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for metric in (self.metric, *self.reported):
            if not hasattr(metric, "paired"):
                raise TaskError(f"expected metrics such as pm.metrics.AUC() in metric and reported, got {metric!r}")
        names = [metric.name for metric in self.reported]
        if len(set(names)) < len(names):
            raise TaskError(f"expected reported metrics with names of their own, got {', '.join(names)}")
        for name in (self.name, self.metric.name, *names, *(guard.label for guard in self.guarded)):
            if not can_be_written(name):
                raise TaskError(f"expected names that can be written to a file, got {name!r}, which is no Unicode text")

    @classmethod
    def from_loader(
        cls, model: nn.Module, loader: Batches, *, metric: Metric | str, shares: Shares = SHARES, **given: Any
    ) -> "Task":
        """A Task over one loader, whose batches are read once, kept in memory and cut into the three splits, in their order.

        shares: of the batches, for calibration, search and certify. given: further fields of a Task. Raises TaskError for a
        loader that shuffles, for fewer than three batches and for shares that are none.
        """
        parts = cut_in_order(loader, shares)
        return cls(model, splits=Splits(*parts), metric=metric_of(metric), **given)

    def __repr__(self) -> str:
        beside = f", beside it {self.kept_beside}" if self.kept_beside else ""
        return f"Task({self.name}: {type(self.model).__name__}, {self.metric.name}{beside})"

    @property
    def guarded(self) -> tuple[Guard, ...]:
        """The guards, in the order given."""
        return cast(tuple[Guard, ...], self.guards)

    @property
    def kept_beside(self) -> str:
        """The guards and the reported metrics: of them something is kept of every scored unit, beside the gate."""
        guards = [f"guard {guard.label}" for guard in self.guarded]
        return ", ".join([*guards, *(f"reported {metric.name}" for metric in self.reported)])

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        for parameter in self.model.parameters():
            return parameter.device
        return torch.device("cpu")

    @property
    def base_precision(self) -> str:
        """The dtype that most of the model's parameters have, such as `bfloat16`."""
        sizes: dict[str, int] = {}
        for parameter in self.model.parameters():
            name = str(parameter.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + parameter.numel()
        return max(sizes, key=lambda name: sizes[name]) if sizes else "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """What the metric keeps of each unit ([units] or [units, columns]), its loss, and the same of the other metrics.

    reported: by name. guards: by label. slices: bool [units], by the label of a guard that has a slice.
    """

    values: np.ndarray
    losses: np.ndarray
    reported: dict[str, np.ndarray]
    guards: dict[str, np.ndarray]
    slices: dict[str, np.ndarray]
    units: Units

    def of_guard(self, label: str) -> tuple[np.ndarray, Units]:
        """What is kept of a guard's units, and those units: of its slice, if it has one. Raises TaskError for none."""
        rows = self.slices.get(label)
        if rows is None:
            return self.guards[label], self.units
        return self.guards[label][rows], self.units.only(rows)

    def only(self, rows: np.ndarray) -> "Scored":
        """The chosen units. Raises TaskError for none."""
        named = {kind: {name: values[rows] for name, values in getattr(self, kind).items()} for kind in NAMED}
        return replace(self, values=self.values[rows], losses=self.losses[rows], units=self.units.only(rows), **named)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredPart:
    """One batch, scored, as in `Scored`; `clusters` (int64) and `weights` are empty for a task without them."""

    values: np.ndarray
    losses: np.ndarray
    reported: dict[str, np.ndarray]
    guards: dict[str, np.ndarray]
    slices: dict[str, np.ndarray]
    clusters: np.ndarray
    weights: np.ndarray


NAMED = ("reported", "guards", "slices")  # what a scored batch holds by name


def score(task: Task, model: Any, batches: Batches, after_batch: Callable[[int], None] | None = None) -> Scored:
    """Score every unit of `batches` with `model` (the task's own, or one deployed from it).

    after_batch is called with the number of units done so far. Raises TaskError when the user's functions return
    something of another shape, or scores that are not numbers.
    """
    parts: list[ScoredPart] = []
    done = 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            part = score_batch(task, model, to_device(batch, task.device), f"batch {number}")
            parts.append(part)
            done += len(part.values)
            if after_batch is not None:
                after_batch(done)
    return join_parts(task, parts)


def join_parts(task: Task, parts: Sequence[ScoredPart]) -> Scored:
    """The parts of a split, in the order of its batches, as one. Raises TaskError when there is no unit."""
    done = sum(len(part.values) for part in parts)
    if not done:
        raise TaskError("expected at least one unit in the split, got none")
    join = np.concatenate
    clusters = None if task.clusters is None else join([p.clusters for p in parts])
    weights = None if task.weights is None else join([p.weights for p in parts])
    return Scored(
        values=join([p.values for p in parts]),
        losses=join([p.losses for p in parts]),
        reported=_joined([p.reported for p in parts]),
        guards=_joined([p.guards for p in parts]),
        slices=_joined([p.slices for p in parts]),
        units=Units(clusters=clusters, weights=weights, n=done),
    )


def _joined(named: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in named]) for name in named[0]}


def labels_of(task: Task, batch: Any) -> Any:
    """The labels of a batch; None for a task whose metrics are all losses, which read none."""
    metrics = (task.metric, *task.reported, *(guard.metric for guard in task.guarded))
    if all(isinstance(metric, Loss) for metric in metrics):
        return None
    labels = task.labels(batch)
    if isinstance(labels, list | tuple) and labels and isinstance(labels[0], float):
        return torch.tensor(labels, dtype=torch.float64)  # whatever the default dtype is
    if labels is None:
        raise TaskError(f"{task.metric.name} reads labels, and Task(labels=...) returned None for this batch")
    return labels


def score_batch(task: Task, model: Any, batch: Any, place: str) -> ScoredPart:
    """Score one batch, already on the model's device; `place` is how messages call it. Raises TaskError as `score`."""
    with called("forward", place):
        scores = task.forward(model, batch)
    return judge_scores(task, scores, batch, place)


def judge_scores(task: Task, scores: Any, batch: Any, place: str) -> ScoredPart:
    """The loss and the metrics of scores that a forward returned for a batch, or that were predicted for it."""
    units = units_of(scores, place)
    with called("loss", place):
        losses: Any = task.loss(scores, batch)
    if not isinstance(losses, Tensor) or losses.shape != (units,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise TaskError(f"{place}: expected loss to return one value per unit, [{units}], got {shape}")
    with called("labels", place):
        labels = labels_of(task, batch)

    def kept(metric: Metric) -> np.ndarray:
        with called(f"the metric {metric.name}", place):
            found = metric.per_unit(scores, labels, losses)
        return column_of(found, units, metric.name, place, columns=True)

    return ScoredPart(
        values=kept(task.metric),
        losses=column_of(losses, units, "loss", place),
        reported={metric.name: kept(metric) for metric in task.reported},
        guards={guard.label: kept(guard.metric) for guard in task.guarded},
        **given_beside(task, batch, units, place),
    )


def units_of(scores: Any, place: str) -> int:
    """How many units forward scored. Raises TaskError for anything but one row of numbers for each, at least one."""
    if not isinstance(scores, Tensor) or scores.dim() == 0:
        raise TaskError(f"{place}: expected forward to return a tensor with one row per unit, got {scores!r:.60}")
    if not len(scores):
        raise TaskError(f"{place}: expected at least one unit, got none; leave empty batches out")
    broken = torch.isnan(scores).reshape(len(scores), -1).any(1)
    if broken.any():
        raise TaskError(
            f"{place}: forward returned NaN scores for {rows_said(broken)}; the model or these units are broken"
        )
    return len(scores)


def given_beside(task: Task, batch: Any, units: int, place: str) -> dict[str, Any]:
    """slices, clusters and weights of a batch, as in `ScoredPart`: what the task says of units without a look at scores."""
    found: dict[str, Any] = {"slices": {}, "clusters": np.zeros(0), "weights": np.zeros(0)}
    for guard in task.guarded:
        if guard.where is not None:
            with called(f"where of the guard {guard.label}", place):
                found["slices"][guard.label] = slice_of(guard.where(batch), units, guard.label, place)
    if task.clusters is not None:
        with called("clusters", place):
            found["clusters"] = clusters_of(task.clusters(batch), units, place)
    if task.weights is not None:
        with called("weights", place):
            found["weights"] = column_of(task.weights(batch), units, "weights", place)
    return found


def first_batch(task: Task, batches: Batches) -> Any:
    """The first batch of a split, on the model's device."""
    for batch in batches:
        return to_device(batch, task.device)
    raise TaskError("expected batches in the split, got none (a generator can be read only once: give a list)")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it on `device`; objects with a `to` of their own are asked."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(to_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch
