"""What one split holds, batch by batch and unit by unit.

Invariant: everything is by content, of what the batches hold and of what the task's own functions say of them; nothing is
scored. A batch has no description: its units are found by `columns`, what the forward and the loss read of it by `reads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from precimap.errors import TaskError
from precimap.fingerprints import of_value
from precimap.searching.splits.axes import unit_axes
from precimap.searching.splits.batch_print import BatchPrint, Columns, ReadBatch, batch_print, seen
from precimap.searching.splits.reads import Reads
from precimap.searching.splits.rows import Prints, finished
from precimap.task import Batches, Task

# A column tells units apart by itself if fewer than this share stand in it twice: what two splits then share is no accident.
REPEATED_ALONE = 0.001
ALL_READ = Reads()


@dataclass(frozen=True, kw_only=True, eq=False)
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
    looked_at = [seen(task, ReadBatch(batch, name, number), reads) for number, batch in enumerate(batches)]
    if not looked_at:
        raise empty_split(name)
    content, axes = tuple(found for found, _ in looked_at), unit_axes([dims for _, dims in looked_at])
    parts = []
    for number, batch in enumerate(batches):
        read = ReadBatch(batch, name, number)
        if number >= len(looked_at) or of_value(batch, read.where) != content[number]:
            raise _changing(name)
        parts.append(batch_print(task, read, content[number], reads, axes))
    if len(parts) < len(looked_at):
        raise _changing(name)
    clusters = [part.clusters for part in parts if part.clusters is not None]
    inputs = _joined([part.inputs for part in parts])
    return SplitPrint(
        name=name,
        whole=of_value(content),
        batches=content,
        said=of_value([part.said for part in parts]),
        inputs=inputs,
        units=finished(inputs + _joined([part.evidence for part in parts])),
        plain=_without_constants(parts, inputs),
        wide=_wide(parts, inputs),
        answers=_joined([part.answers for part in parts]),
        sizes=tuple(len(part.inputs.total) for part in parts),
        clusters=np.unique(np.concatenate(clusters)) if clusters else None,
        untold=any(part.untold for part in parts),
    )


def _joined(parts: Sequence[Columns]) -> Prints:
    """The sum of the columns of each unit: the order of keys and their names make no difference."""
    return np.concatenate([part.total for part in parts])


def _without_constants(parts: Sequence[BatchPrint], inputs: Prints) -> tuple[Prints, ...]:
    """The inputs without what is one value throughout, where there is such: one more key with a constant is no new data."""
    alike = np.zeros(1, np.uint64)
    for path, value in parts[0].inputs.constant.items():
        if value is not None and all(part.inputs.constant.get(path) == value for part in parts):
            alike += value
    return (inputs - alike,) if alike.any() and _differ(inputs) else ()


def _wide(parts: Sequence[BatchPrint], inputs: Prints) -> tuple[Prints, ...]:
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


def _changing(name: str) -> TaskError:
    return TaskError(
        f"the {name} split gives other batches when it is read again; drops are paired unit by unit, "
        "so give a list, or a DataLoader with shuffle=False"
    )


def empty_split(name: str) -> TaskError:
    """What is raised for a split without a batch."""
    return TaskError(f"expected batches in the {name} split, got none (a generator can be read only once: give a list)")
