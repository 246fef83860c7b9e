"""What one split holds, batch by batch and unit by unit.

Invariant: everything is by content, of what the batches hold and of what the task's own functions say of them; nothing is
scored. A batch has no description: its units are found by `columns`, what the forward and the loss read of it by `reads`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precimap.errors import InputError, TaskError
from precimap.fingerprints import of_value
from precimap.searching.splits.axes import Dims, along, dims_of, may_be_turned, unit_axes
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
from precimap.task import Batches, Task, labels_of, to_device

# A column tells units apart by itself if fewer than this share stand in it twice: what two splits then share is no accident.
REPEATED_ALONE = 0.001
COLUMNS_ALONE = 4  # of them, 8 bytes a unit each
ALL_READ = Reads()


@dataclass(frozen=True, eq=False)
class SplitPrint:
    """The content of a split.

    name, whole: which split, and the hash of its batches in order. batches: the hash of each. said: of what the task's own
    functions say of it: labels, clusters, weights, slices. inputs, units: uint64, one for each unit in the order of the
    split. plain, wide: further prints by which the data are known again: the inputs without what is constant, where
    something is; columns that tell nearly all units apart by themselves. answers: of the label and what the loss reads.
    sizes: units of each batch. clusters: the different ids, int64, or None. untold: in some batch no input has a row per
    unit, so that units are known batch by batch only.
    """

    name: str
    whole: str
    batches: tuple[str, ...]
    said: str
    inputs: Prints
    units: Prints
    plain: tuple[Prints, ...]
    wide: tuple[Prints, ...]
    answers: Prints
    sizes: tuple[int, ...]
    clusters: NDArray[np.int64] | None
    untold: bool

    @property
    def n(self) -> int:
        return len(self.units)

    @property
    def views(self) -> tuple[Prints, ...]:
        """By which the data are known again, whatever stands beside."""
        return (self.inputs, *self.plain, *self.wide)

    @property
    def judged_views(self) -> tuple[Prints, ...]:
        """By which units that have judged are known again: the same inputs with other labels judge something else."""
        return tuple(finished(view + self.answers) for view in self.views)

    @cached_property
    def distinct(self) -> Prints:
        """The different units, in the order of their prints."""
        return np.unique(self.units)

    @cached_property
    def evidence(self) -> str:
        """The hash of the different units and how often each stands there, of the others; batches and order do not enter."""
        distinct, counts = np.unique(self.units, return_counts=True)
        return of_value([distinct, counts // max(1, np.gcd.reduce(counts))])

    @property
    def repeated(self) -> int:
        """Units that have stood in the split before, all they have that is evidence being equal."""
        return self.n - len(self.distinct)


def counted_once(known: SplitPrint, sizes: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The rows of a split that count, and an id for each of them, equal for units that are one; None where all differ.

    A split that is some copies of another one counts as that one: its later copies are left out, which changes no mean.
    What still stands there more often than the rest stays, with the id of its unit: a log may repeat rows by nature.

    sizes: units of each batch as they were scored. Where a batch turned out to hold another number of units than its
    columns told, its units are known by the batch and their place in it.
    """
    if not known.repeated:
        return None
    parts, start = [], 0
    for number, (size, told) in enumerate(zip(sizes, known.sizes, strict=True)):
        batch = np.uint64(int(known.batches[number], 16))
        own = finished(np.arange(size, dtype=np.uint64) + batch)
        parts.append(known.units[start : start + told] if size == told else own)
        start += told
    units = np.concatenate(parts)
    _, unit, counts = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(unit, kind="stable")
    copy = np.empty(len(units), np.int64)  # which of its copies a row is, from 0
    copy[order] = np.arange(len(units)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.flatnonzero(copy < (counts // np.gcd.reduce(counts))[unit])
    return rows, units.view(np.int64)[rows]


def split_print(task: Task, name: str, reads: Reads) -> SplitPrint:
    """Read a split twice. Raises TaskError for an empty or changing one, and for content that cannot be hashed."""
    batches: Batches = getattr(task.splits, name)
    seen = [_seen(task, batch, name, number, reads) for number, batch in enumerate(batches)]
    if not seen:
        raise empty_split(name)
    content, axes = tuple(found for found, _ in seen), unit_axes([dims for _, dims in seen])
    parts = []
    for number, batch in enumerate(batches):
        if number >= len(seen) or of_value(batch, f"batch {number} of the {name} split") != content[number]:
            raise _changing(name)
        parts.append(_batch(task, batch, name, number, reads, content[number], axes))
    if len(parts) < len(seen):
        raise _changing(name)
    clusters = [part.clusters for part in parts if part.clusters is not None]
    inputs = _joined([part.inputs for part in parts])
    return SplitPrint(
        name,
        of_value(content),
        content,
        of_value([part.said for part in parts]),
        inputs,
        finished(inputs + _joined([part.evidence for part in parts])),
        _without_constants(parts, inputs),
        _wide(parts, inputs),
        _joined([part.answers for part in parts]),
        tuple(len(part.inputs.total) for part in parts),
        np.unique(np.concatenate(clusters)) if clusters else None,
        any(part.untold for part in parts),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """Columns of one batch: their sum, uint64 [units], and of each the one value that it has, None for several."""

    total: Prints
    constant: dict[Any, np.uint64 | None]

    @classmethod
    def of(cls, found: dict[Any, Prints], units: int) -> "_Columns":
        constant = {path: prints[0] if (prints == prints[0]).all() else None for path, prints in found.items()}
        return cls(np.sum([np.zeros(units, np.uint64), *found.values()], axis=0, dtype=np.uint64), constant)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """One batch: its hash, that of what the task says of it, and its columns; untold: no input has a row per unit."""

    content: str
    said: str
    inputs: _Columns
    evidence: _Columns
    answers: _Columns
    wide: dict[Path, Prints]
    clusters: NDArray[np.int64] | None
    untold: bool


def _seen(task: Task, batch: Any, name: str, number: int, reads: Reads) -> tuple[str, Dims]:
    """The hash of a batch, and along which dims its units may lie."""
    where = f"batch {number} of the {name} split"
    content, found, units = of_value(batch, where), list(leaves(batch)), None
    if may_be_turned(found):
        units = _units(batch, _own(task, batch, name, where), reads)
    read = [leaf for leaf in found if reads.is_input(leaf.path) or reads.is_judged(leaf.path)]
    return content, dims_of(read, units)


def _units(batch: Any, own: dict[str, Any], reads: Reads) -> int | None:
    """How many units a batch holds, by what the task says of them, by what was scored, or by what most of it says."""
    count = next((len(own[k]) for k in ("clusters", "weights") if k in own), size_of(own.get("labels")))
    if count is None and reads.counts is not None:
        count = rows_of(at(batch, reads.counts))
    return units_in(list(leaves(batch)), count)


def _batch(
    task: Task, batch: Any, name: str, number: int, reads: Reads, content: str, axes: Mapping[Path, int]
) -> _Batch:
    where = f"batch {number} of the {name} split"
    own = _own(task, batch, name, where)
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
    told = _Columns.of(inputs, n), _Columns.of(evidence, n), _Columns.of(answers, n)
    return _Batch(content, said, *told, wide, own.get("clusters"), untold)


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


def _joined(parts: Sequence[_Columns]) -> Prints:
    """The sum of the columns of each unit: the order of keys and their names make no difference."""
    return np.concatenate([part.total for part in parts])


def _without_constants(parts: Sequence[_Batch], inputs: Prints) -> tuple[Prints, ...]:
    """The inputs without what is one value throughout, where there is such: one more key with a constant is no new data."""
    alike = np.zeros(1, np.uint64)
    for path, value in parts[0].inputs.constant.items():
        if value is not None and all(part.inputs.constant.get(path) == value for part in parts):
            alike += value
    return (inputs - alike,) if alike.any() and _differ(inputs) else ()


def _wide(parts: Sequence[_Batch], inputs: Prints) -> tuple[Prints, ...]:
    """The columns that tell nearly all units apart by themselves; none where that is all there is."""
    found = []
    for path in parts[0].wide:
        if all(path in part.wide for part in parts):
            column = np.concatenate([part.wide[path] for part in parts])
            if len(np.unique(column)) >= (1 - REPEATED_ALONE) * len(column) and not np.array_equal(column, inputs):
                found.append(column)
    return tuple(column for column in found if _differ(column))


def _differ(prints: Prints) -> bool:
    return bool((prints != prints[0]).any())


def _own(task: Task, batch: Any, name: str, where: str) -> dict[str, Any]:
    """What the task's own functions say of a batch: labels, clusters, weights, slices; nothing of one for calibration."""
    if name == "calibration":
        return {}
    functions: dict[str, Callable[[Any], Any] | None] = {"clusters": task.clusters, "weights": task.weights}
    functions |= {f"slice of {guard.label}": guard.where for guard in task.guarded}
    here, found = to_device(batch, task.device), dict[str, Any]()
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


def _changing(name: str) -> TaskError:
    return TaskError(
        f"the {name} split gives other batches when it is read again; drops are paired unit by unit, "
        "so give a list, or a DataLoader with shuffle=False"
    )


def empty_split(name: str) -> TaskError:
    """What is raised for a split without a batch."""
    return TaskError(f"expected batches in the {name} split, got none (a generator can be read only once: give a list)")
