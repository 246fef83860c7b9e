"""Every batch of every split, looked at before the long work: data that cannot be compared is named in the user's words.

Invariant: costs reading, and no forward but for batches that hold NaN or infinity: those are scored at once, since only the
model can tell whether it bears a missing value. What only scores show is told before alpha is booked, by `check_baseline`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precimap.errors import TaskError
from precimap.layers.emulation import quantized
from precimap.metrics.auc import AUC, GAUC
from precimap.metrics.click import NE, LogLoss
from precimap.per_unit import rows_said
from precimap.task import SPLITS, Task, given_beside, labels_of, score_batch, to_device
from precimap.user_code import called


def check_splits(task: Task) -> None:
    """Raises TaskError, which names split, batch and row, for data that cannot be judged: an empty batch, labels that are
    NaN, one unit, one cluster, one class, a slice of nothing, scores that are NaN."""
    for split in SPLITS:
        found = _Given()
        for number, batch in enumerate(getattr(task.splits, split)):
            place = f"batch {number} of the {split} split"
            _look(task, batch, place, None if split == "calibration" else found)
            if not all(torch.isfinite(values).all() for values in _floats(batch)):
                with torch.no_grad(), quantized(task.model, {}):
                    score_batch(task, task.model, to_device(batch, task.device), place)
        found.check(task, split)


@dataclass(slots=True)
class _Given:
    """What a split gives beside its inputs, a part for each batch."""

    units: int = 0
    labels: list[Tensor] = field(default_factory=list)
    beside: list[dict[str, Any]] = field(default_factory=list)

    def check(self, task: Task, split: str) -> None:
        """Raises TaskError where no two units or clusters, or not both classes, are there."""
        if self.units == 1:
            raise TaskError(f"expected at least 2 units in the {split} split, got 1: a spread needs two")
        if not self.beside:
            return
        clusters = np.concatenate([part["clusters"] for part in self.beside])
        if task.clusters is not None:
            check_clusters(clusters, split)
        for label in self.beside[0]["slices"]:
            rows = np.concatenate([part["slices"][label] for part in self.beside])
            check_slice(rows, clusters if task.clusters is not None else None, label, split)
        # Whole-number labels are classes under log-loss; elsewhere they may index the one relevant candidate.
        of_classes = isinstance(task.metric, LogLoss | NE | AUC | GAUC)
        if self.labels and all(label.dim() == 1 and (of_classes or label.is_floating_point()) for label in self.labels):
            joined = torch.cat(self.labels)
            if bool((joined == joined[0]).all()):
                raise TaskError(f"every label of the {split} split is {float(joined[0]):g}; it needs both classes")


def check_clusters(clusters: np.ndarray, split: str) -> None:
    """Raises TaskError for a single one."""
    if (clusters == clusters[0]).all():
        raise TaskError(f"every unit of the {split} split is in one cluster; the spread of a drop needs at least two")


def check_slice(rows: np.ndarray, clusters: np.ndarray | None, label: str, split: str) -> None:
    """Raises TaskError for a slice of fewer than two units, or clusters. rows: bool [units]."""
    count = len(np.unique((np.arange(len(rows)) if clusters is None else clusters)[rows]))
    if count < 2:
        raise TaskError(
            f"the slice of the guard {label} needs at least two units (or clusters) in the {split} split, it has "
            f"{int(rows.sum())} of {len(rows)} units, in {count} clusters"
        )


def _look(task: Task, batch: Any, place: str, into: _Given | None) -> None:
    """Check one batch, and keep what a whole split is checked by; of the calibration split no label is read."""
    rows = {len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() and _is_plain(leaf)}
    if rows == {0}:
        raise TaskError(f"{place}: expected at least one unit, got none; leave empty batches out")
    if into is None:
        return
    with called("labels", place):
        labels = labels_of(task, batch)
    if not isinstance(labels, Tensor | np.ndarray) or not labels.ndim:
        # Labels in a form of the metric's own, or none: what is wrong with them shows when they are scored.
        counts = _counts(task, batch, place)
        if len(counts) == 1:
            (count,) = counts
            into.units += count
            into.beside.append(given_beside(task, batch, count, place))
        return
    labels = torch.as_tensor(labels).detach().cpu()
    if not len(labels):
        raise TaskError(f"{place}: expected at least one unit, got no label; leave empty batches out")
    if labels.is_floating_point() and not torch.isfinite(labels).all():
        broken = ~torch.isfinite(labels).reshape(len(labels), -1).all(1)
        raise TaskError(f"{place}: expected labels that are numbers, got NaN or infinity in {rows_said(broken)}")
    into.labels.append(labels)
    if _counts(task, batch, place) <= {len(labels)}:  # elsewhere what a unit is shows when it is scored
        into.units += len(labels)
        into.beside.append(given_beside(task, batch, len(labels), place))


def _counts(task: Task, batch: Any, place: str) -> set[int]:
    """How many units the task's own functions speak of."""
    given = {"clusters": task.clusters, "weights": task.weights}
    given |= {f"where of the guard {guard.label}": guard.where for guard in task.guarded}
    counts = set()
    for what, function in given.items():
        if function is not None:
            with called(what, place):
                values = function(batch)
            counts.add(len(values) if hasattr(values, "__len__") else 0)
    return counts


def _floats(batch: Any) -> Iterator[Tensor]:
    found = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return (leaf if _is_plain(leaf) else leaf.values() for leaf in found if leaf.layout != torch.sparse_coo)


def _is_plain(tensor: Tensor) -> bool:
    """Neither nested nor sparse: what has a length, and values that can be asked one by one."""
    return tensor.layout == torch.strided and not tensor.is_nested
