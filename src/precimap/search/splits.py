"""What the three splits hold: their content batch by batch, their units, what they share, what stands in them twice.

Invariant: a split is known by content alone, read twice before anything is measured; from then on every batch is compared
with what was read (`unchanging`), so that every score of a run is of the same data. Two prints of a unit are kept. `inputs`
is of what the forward reads and tells known data, whatever batches they come in and whatever stands beside; `units` is of the
inputs, what the loss reads, the labels, the cluster and the weight, all that makes a unit's evidence, and tells one unit from
another.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precimap.errors import InputError, TaskError
from precimap.fingerprints import of_value
from precimap.search.reads import Path, Reads
from precimap.search.row_prints import Prints, finished
from precimap.search.unit_columns import columns, leaves, numbers, size_of, tells_much, units_in
from precimap.task import Batches, Splits, Task, labels_of, to_device

SHARED_UNITS_ALLOWED = 0.01
# A column tells units apart by itself if fewer than this share stand in it twice: what two splits then share is no accident.
REPEATED_ALONE = 0.001
COLUMNS_ALONE = 4  # of them, 8 bytes a unit each
ALL_READ = Reads()
NAMES = ("calibration", "search", "certify")


@dataclass(frozen=True, eq=False)
class SplitPrint:
    """The content of a split.

    name, whole: which split, and the hash of its batches in order. batches: the hash of each. said: of what the task's own
    functions say of it: labels, clusters, weights, slices. inputs, units: uint64, one for each unit in the order of the
    split. alone: the same of single columns that tell nearly all units apart. sizes: units of each batch. clusters: the
    different ids, int64, or None.
    """

    name: str
    whole: str
    batches: tuple[str, ...]
    said: str
    inputs: Prints
    units: Prints
    alone: tuple[Prints, ...]
    sizes: tuple[int, ...]
    clusters: NDArray[np.int64] | None

    @property
    def n(self) -> int:
        return len(self.units)

    @property
    def views(self) -> tuple[Prints, ...]:
        """By which the data are known again, whatever stands beside."""
        return (self.inputs, *self.alone)

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


@dataclass(frozen=True, eq=False)
class SplitPrints:
    """The three splits, and what is to be said of them."""

    calibration: SplitPrint
    search: SplitPrint
    certify: SplitPrint
    notes: tuple[str, ...] = ()


def fingerprint_splits(task: Task, reads: Reads = ALL_READ) -> SplitPrints:
    """Hash the splits. reads: what forward and loss read of a batch.

    Raises TaskError for an empty or changing split, for content that cannot be hashed, and where more than
    SHARED_UNITS_ALLOWED of the certify split's units are in the search split.
    """
    found = {name: _fingerprint(task, name, reads) for name in NAMES}
    search, certify = found["search"], found["certify"]
    shared = shared_of(certify, search)
    if search.whole == certify.whole or shared > SHARED_UNITS_ALLOWED:
        raise TaskError(
            f"{_share(shared, certify.n)} of the certify split's {certify.n:,} units are also in the search split; a "
            f"certificate needs data that chose nothing, and more than {SHARED_UNITS_ALLOWED:.0%} is refused. Split by user, "
            "query or time. Units are known by what the forward reads, their label, cluster and weight: where equal rows "
            "are different events, let Task(clusters=...) tell them apart"
        )
    return SplitPrints(**found, notes=_notes(task, found))


def first_of(task: Task) -> Any:
    """The first search batch, as it is given. Raises TaskError where there is none."""
    for batch in task.splits.search:
        return batch
    raise _empty("search")


def unchanging(task: Task, prints: SplitPrints) -> Task:
    """The task, whose splits raise TaskError as soon as they give another batch than the one that was hashed."""
    watched = {name: WatchedBatches(getattr(task.splits, name), getattr(prints, name)) for name in NAMES}
    return replace(task, splits=Splits(**watched))


@dataclass(frozen=True, slots=True, eq=False)
class WatchedBatches:
    """A split's batches, each compared with what it was when the run began."""

    batches: Batches
    known: SplitPrint

    def __iter__(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(self.batches):
            where = f"batch {number} of the {self.known.name} split"
            if number >= len(self.known.batches) or of_value(batch, where) != self.known.batches[number]:
                raise TaskError(
                    f"{where} is another one than when this run began; every map is compared with the baseline on the same "
                    "data. Is it shuffled, augmented, drawn anew, or written by the forward? Give a list, or a loader "
                    "that gives the same batches on every pass"
                )
            yield batch
        if number + 1 < len(self.known.batches):
            raise TaskError(
                f"the {self.known.name} split gives {number + 1} batches now and gave {len(self.known.batches)} when this "
                "run began; give a list, or a loader that gives the same batches on every pass"
            )


def shared_of(one: SplitPrint, other: SplitPrint) -> float:
    """The share of `one`'s units that are in `other`: by all their evidence, or by a column that tells units apart."""
    pairs = [(one.units, other.distinct), *((mine, theirs) for mine in one.alone for theirs in other.alone)]
    return max(float(np.isin(mine, theirs).mean()) for mine, theirs in pairs)


def same_units(known: SplitPrint, sizes: tuple[int, ...]) -> NDArray[np.int64] | None:
    """An id for each unit of a split, equal for units that are one; None where all are different.

    sizes: units of each batch as they were scored. Where a batch turned out to hold another number of units than its
    columns told, its units are known by the batch and their place in it.
    """
    if not known.repeated:
        return None
    if sizes == known.sizes:
        return known.units.view(np.int64)
    parts, start = [], 0
    for number, (size, told) in enumerate(zip(sizes, known.sizes, strict=True)):
        batch = np.uint64(int(known.batches[number], 16))
        own = finished(np.arange(size, dtype=np.uint64) + batch)
        parts.append(known.units[start : start + told] if size == told else own)
        start += told
    ids = np.concatenate(parts).view(np.int64)
    return ids if len(np.unique(ids)) < len(ids) else None


def _fingerprint(task: Task, name: str, reads: Reads) -> SplitPrint:
    batches: Batches = getattr(task.splits, name)
    parts = [_batch(task, batch, name, number, reads) for number, batch in enumerate(batches)]
    if not parts:
        raise _empty(name)
    again = tuple(of_value(b, f"batch {number} of the {name} split") for number, b in enumerate(batches))
    content = tuple(part.content for part in parts)
    if again != content:
        raise TaskError(
            f"the {name} split gives other batches when it is read again; drops are paired unit by unit, "
            "so give a list, or a DataLoader with shuffle=False"
        )
    clusters = [part.clusters for part in parts if part.clusters is not None]
    inputs = _joined([part.inputs for part in parts])
    return SplitPrint(
        name,
        of_value(content),
        content,
        of_value([part.said for part in parts]),
        inputs,
        finished(inputs + _joined([part.evidence for part in parts])),
        _alone([part.wide for part in parts], inputs),
        tuple(len(part.inputs.total) for part in parts),
        np.unique(np.concatenate(clusters)) if clusters else None,
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
    """One batch: its hash, that of what the task says of it, and its columns."""

    content: str
    said: str
    inputs: _Columns
    evidence: _Columns
    wide: dict[Path, Prints]
    clusters: NDArray[np.int64] | None


def _batch(task: Task, batch: Any, name: str, number: int, reads: Reads) -> _Batch:
    where = f"batch {number} of the {name} split"
    content = of_value(batch, where)
    own = {} if name == "calibration" else _own(task, batch, where)  # whose labels are not read
    told = next((len(own[k]) for k in ("clusters", "weights") if k in own), None)
    units = units_in(list(leaves(batch)), size_of(own.get("labels")) if told is None else told)
    said = of_value(own, f"what the task says of {where}")
    inputs: dict[Any, Prints] = {}
    evidence: dict[Any, Prints] = {}
    wide: dict[Path, Prints] = {}
    if not units:
        inputs[()] = np.array([int(content, 16)], np.uint64)
    for leaf, prints in columns(list(leaves(batch, units)), units) if units else ():
        if prints is None:
            prints = np.full(units, np.uint64(int(of_value(leaf.value, where), 16)))
        elif tells_much(leaf.value) and len(wide) < COLUMNS_ALONE:
            wide[leaf.path] = finished(prints)
        if reads.is_input(leaf.path):
            inputs[leaf.path] = finished(prints)
        elif reads.is_judged(leaf.path):
            evidence["loss", leaf.path] = finished(prints)
    for kind in ("labels", "clusters", "weights"):
        for path, prints in _rows_of(own.get(kind), units):
            evidence[kind, path] = finished(prints + np.uint64(len(kind)))
    n = units or 1
    return _Batch(content, said, _Columns.of(inputs, n), _Columns.of(evidence, n), wide, own.get("clusters"))


def _rows_of(values: Any, units: int | None) -> Iterator[tuple[Path, Prints]]:
    """The columns of labels and the like that have a row per unit."""
    for leaf, prints in columns(list(leaves(values, units)), units) if units and values is not None else ():
        if prints is not None:
            yield leaf.path, prints


def _joined(parts: Sequence[_Columns]) -> Prints:
    """The sum of the columns of each unit, but for those that hold one value throughout.

    What is the same for all units tells none apart: one more key with a constant makes no data new. Sums, so that the
    order of keys and their names make no difference.
    """
    total = np.concatenate([part.total for part in parts])
    first = parts[0].constant
    alike = [path for path, value in first.items() if value is not None and all(p.constant.get(path) == value for p in parts)]
    left = total - np.sum([np.uint64(0), *(first[path] for path in alike)], dtype=np.uint64)
    return total if len(alike) == len(first) else left


def _alone(parts: Sequence[dict[Path, Prints]], inputs: Prints) -> tuple[Prints, ...]:
    """The columns that every batch has and that tell nearly all units apart, but for one that is all there is."""
    found = []
    for path in parts[0]:
        if all(path in part for part in parts):
            column = np.concatenate([part[path] for part in parts])
            if len(column) > 1 and len(np.unique(column)) >= (1 - REPEATED_ALONE) * len(column):
                found.append(column)
    return tuple(column for column in found if not np.array_equal(column, inputs))


def _own(task: Task, batch: Any, where: str) -> dict[str, Any]:
    """What the task's own functions say of a batch: labels, clusters, weights and the slices of guards."""
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
        found = function(batch)
    except InputError:
        raise
    except Exception as error:
        raise TaskError(f"{name} failed on {where}: {type(error).__name__}: {error}") from error
    array = numbers(found)
    if name not in ("clusters", "weights"):
        return found
    if array is None or array.ndim != 1:
        shape = type(found).__name__ if array is None else tuple(array.shape)
        raise TaskError(f"{where}: expected {name} to give one number per unit, got {shape}")
    return array.astype(np.int64) if name == "clusters" else array


def _empty(name: str) -> TaskError:
    return TaskError(f"expected batches in the {name} split, got none (a generator can be read only once: give a list)")


def _notes(task: Task, found: dict[str, SplitPrint]) -> tuple[str, ...]:
    """What is shared and repeated, in numbers; () where nothing is."""
    notes = []
    search, certify = found["search"], found["certify"]
    for one, other in ((certify, search), (certify, found["calibration"]), (search, found["calibration"])):
        # Of calibration only the inputs are known.
        shared = shared_of(one, other) if other is search else float(np.isin(one.inputs, other.inputs).mean())
        if shared:
            notes.append(
                f"{_share(shared, one.n)} of the {one.name} split's {one.n:,} units are also in the {other.name} split; "
                "splits should share none"
            )
    if search.clusters is not None and certify.clusters is not None:
        both = np.intersect1d(search.clusters, certify.clusters)
        if len(both):
            notes.append(
                f"{len(both):,} of the certify split's {len(certify.clusters):,} clusters have ids that are in the search "
                "split, too; the same users on both sides make a certificate less independent of the choice than it says. "
                "Split by user where you can"
            )
    for split in (search, certify):
        if split.repeated:
            counted = "; the certify split counts equal units as one cluster" if task.clusters is None else ""
            notes.append(
                f"{_share(split.repeated / split.n, split.n)} of the {split.name} split's {split.n:,} units stand in it more "
                f"than once ({len(split.distinct):,} different ones): a loader that repeats, or padding?{counted}"
            )
    return tuple(notes)


def _share(share: float, n: int) -> str:
    """A share of n units, with the number of them."""
    return f"{100 * share:.3g} % ({round(share * n):,})"
