"""What one batch of a split holds: its hash, and the columns of its units.

Invariant: as of the split. Units are found by what the task says of them, by what was scored, or by what most of it says.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precimap.errors import InputError, TaskError
from precimap.fingerprints import of_value
from precimap.searching.splits.axes import Dims, along, dims_of, may_be_turned
from precimap.searching.splits.columns import (
    Leaf,
    at,
    columns,
    leaves,
    numbers,
    rows_of,
    size_of,
    tells_much,
    turned,
    units_in,
)
from precimap.searching.splits.reads import Path, Reads
from precimap.searching.splits.rows import Prints, finished
from precimap.searching.splits.tables import plain_column
from precimap.task import Task, labels_of, to_device

COLUMNS_ALONE = 4  # of those that tell units apart, 8 bytes a unit each


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A batch, and where it stands."""

    batch: Any
    split: str
    number: int

    @property
    def where(self) -> str:
        return f"batch {self.number} of the {self.split} split"


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Columns of one batch: their sum, uint64 [units], and of each the one value that it has, None for several."""

    total: Prints
    constant: dict[Any, np.uint64 | None]

    @classmethod
    def of(cls, found: dict[Any, Prints], units: int) -> "Columns":
        constant = {path: prints[0] if (prints == prints[0]).all() else None for path, prints in found.items()}
        return cls(np.sum([np.zeros(units, np.uint64), *found.values()], axis=0, dtype=np.uint64), constant)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchPrint:
    """One batch: its hash, that of what the task says of it, and its columns; untold: no input has a row per unit."""

    content: str
    said: str
    inputs: Columns
    evidence: Columns
    answers: Columns
    wide: dict[Path, Prints]
    clusters: NDArray[np.int64] | None
    untold: bool


def seen(task: Task, read: ReadBatch, reads: Reads) -> tuple[str, Dims]:
    """The hash of a batch, and along which dims its units may lie."""
    content, found, units = of_value(read.batch, read.where), list(leaves(read.batch)), None
    if may_be_turned(found):
        units = _units(read.batch, _own(task, read), reads)
    looked_at = [leaf for leaf in found if reads.is_input(leaf.path) or reads.is_judged(leaf.path)]
    return content, dims_of(looked_at, units)


def batch_print(task: Task, read: ReadBatch, content: str, reads: Reads, axes: Mapping[Path, int]) -> BatchPrint:
    batch, where, own = read.batch, read.where, _own(task, read)
    units = _units(batch, own, reads)
    said = of_value(own, f"what the task says of {where}")
    inputs: dict[Any, Prints] = {}
    evidence: dict[Any, Prints] = {}
    wide: dict[Path, Prints] = {}
    untold = True
    if not units:
        inputs[()] = np.array([int(content, 16)], np.uint64)
    for leaf, prints in columns(_turned(batch, units, reads, own.get("labels"), axes), units) if units else ():
        untold &= prints is None or not reads.is_input(leaf.path)
        if prints is None:
            prints = np.full(units or 1, np.uint64(int(of_value(leaf.value, where), 16)))
        elif tells_much(leaf.value) and len(wide) < COLUMNS_ALONE:
            wide[leaf.path] = finished(prints)
        if reads.is_input(leaf.path):
            inputs[leaf.path] = finished(prints)
        elif reads.is_judged(leaf.path):
            evidence["loss", leaf.path] = finished(prints)
    for place, (kind, told_of_units) in enumerate(sorted(own.items())):
        for path, prints in _rows_of(told_of_units, units):
            evidence[kind, path] = finished(prints + np.uint64(place))
    answers = {key: prints for key, prints in evidence.items() if key[0] in ("loss", "labels")}
    n = units or 1
    return BatchPrint(
        content=content,
        said=said,
        inputs=Columns.of(inputs, n),
        evidence=Columns.of(evidence, n),
        answers=Columns.of(answers, n),
        wide=wide,
        clusters=own.get("clusters"),
        untold=untold,
    )


def _units(batch: Any, own: dict[str, Any], reads: Reads) -> int | None:
    """How many units a batch holds, by what the task says of them, by what was scored, or by what most of it says."""
    count = next((len(own[k]) for k in ("clusters", "weights") if k in own), size_of(own.get("labels")))
    if count is None and reads.counts is not None:
        count = rows_of(at(batch, reads.counts))
    return units_in(list(leaves(batch)), count)


def _turned(batch: Any, units: int, reads: Reads, labels: Any, axes: Mapping[Path, int]) -> list[Leaf]:
    """What the batch holds; turned so that it has a row per unit, where that is so along one of `axes`, and what the forward
    reads where nothing of that has one."""
    found = [
        Leaf(leaf.path, along(leaf.value, axes[leaf.path])) if leaf.path in axes else leaf
        for leaf in leaves(batch, units)
    ]
    inputs = [leaf for leaf in found if reads.is_input(leaf.path) and leaf.value is not labels]
    if any(rows_of(leaf.value) == units for leaf in inputs):
        return found
    read = {id(leaf) for leaf in inputs}
    return [Leaf(leaf.path, turned(leaf.value, units)) if id(leaf) in read else leaf for leaf in found]


def _rows_of(values: Any, units: int | None) -> Iterator[tuple[Path, Prints]]:
    """The columns of labels and the like that have a row per unit."""
    for leaf, prints in columns(list(leaves(values, units)), units) if units and values is not None else ():
        if prints is not None:
            yield leaf.path, prints


def _own(task: Task, read: ReadBatch) -> dict[str, Any]:
    """What the task's own functions say of a batch: labels, clusters, weights, slices; nothing of one for calibration."""
    if read.split == "calibration":
        return {}
    where = read.where
    functions: dict[str, Callable[[Any], Any] | None] = {"clusters": task.clusters, "weights": task.weights}
    functions |= {f"slice of {guard.label}": guard.where for guard in task.guarded}
    here, found = to_device(read.batch, task.device), dict[str, Any]()
    for name, function in functions.items():
        if function is not None:
            found[name] = _told(function, here, name, where)
    labels = _told(lambda given: labels_of(task, given), here, "labels", where)
    return found if labels is None else found | {"labels": labels}


def _told(function: Callable[[Any], Any], batch: Any, name: str, where: str) -> Any:
    try:
        found = plain_column(function(batch))
    except InputError:
        raise
    except Exception as error:
        raise TaskError(f"{name} failed on {where}: {type(error).__name__}: {error}") from error
    if name not in ("clusters", "weights"):
        return found
    if (array := numbers(found)) is None or array.ndim != 1:
        shape = type(found).__name__ if array is None else tuple(array.shape)
        raise TaskError(f"{where}: expected {name} to give one number per unit, got {shape}")
    return array.astype(np.int64) if name == "clusters" else array
