"""What the three splits hold: their content batch by batch, their units, what they share, what stands in them twice.

Invariant: a split is known by content alone, read twice before anything is measured; from then on every batch is compared
with what was read (`unchanging`), so that every score of a run is of the same data. Two prints of a unit are kept.
`inputs` is of what the forward reads and tells known data, whatever batches they come in and whatever stands beside;
`units` is of the inputs, what the loss reads, the label, the cluster, the weight and the slices, all that makes a unit's
evidence, and tells one unit from another.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from precimap.errors import TaskError
from precimap.fingerprints import of_value
from precimap.searching.splits.reads import Reads
from precimap.searching.splits.split_print import ALL_READ, SplitPrint, empty_split, split_print
from precimap.task import Batches, Splits, Task

SHARED_UNITS_ALLOWED = 0.01
NAMES = ("calibration", "search", "certify")


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
    found = {name: split_print(task, name, reads) for name in NAMES}
    search, certify = found["search"], found["certify"]
    shared = shared_of(certify, search)
    if search.whole == certify.whole or shared > SHARED_UNITS_ALLOWED:
        raise TaskError(
            f"{_share(shared, certify.n)} of the certify split's {certify.n:,} units are also in the search split; a "
            f"certificate needs data that chose nothing, and more than {SHARED_UNITS_ALLOWED:.0%} is refused. Split by "
            "user, query or time. Units are known by what the forward reads, their label, cluster and weight: where equal "
            "rows are different events, let Task(clusters=...) tell them apart"
        )
    return SplitPrints(**found, notes=_notes(task, found))


def first_of(task: Task) -> Any:
    """The first search batch, as it is given. Raises TaskError where there is none."""
    for batch in task.splits.search:
        return batch
    raise empty_split("search")


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
    pairs = [(one.units, other.distinct), *((mine, theirs) for mine in one.wide for theirs in other.wide)]
    return max(float(np.isin(mine, theirs).mean()) for mine, theirs in pairs)


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
            counted = (
                "; equal units count as one cluster, whole copies of the split once" if task.clusters is None else ""
            )
            notes.append(
                f"{_share(split.repeated / split.n, split.n)} of the {split.name} split's {split.n:,} units have stood in "
                f"it before ({len(split.distinct):,} different ones): a loader that repeats, or padding?{counted}"
            )
    untold = [split.name for split in (search, certify) if split.untold]
    if untold:
        notes.append(
            f"no input of the {' and the '.join(untold)} split has a row per unit, so units are known batch by batch only: "
            "cut into other batches, the same data look like new. Do not certify on what was seen in other batches"
        )
    return tuple(notes)


def _share(share: float, n: int) -> str:
    """A share of n units, with the number of them."""
    return f"{100 * share:.3g} % ({round(share * n):,})"
