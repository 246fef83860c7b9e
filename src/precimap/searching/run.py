"""One run of a search: its task, its journal, how it tells its progress, and when it has to stop looking.

Invariant: every score is in the journal before it is used, keyed by what was scored and by the number of its batch, so
that a run that was killed scores no batch twice when it is taken up again. A batch is the smallest piece: splitting one
would change bits.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from precimap.journal import Journal, Measurement
from precimap.layers.target import EMULATED
from precimap.searching.progress import Progress
from precimap.task import NAMED, SPLITS, Batches, Scored, ScoredPart, Task, join_parts, score_batch, to_device


@dataclass(frozen=True, slots=True)
class Run:
    """What every step of one search works with. `ends_at`: time.monotonic() after which no new look is begun, or None."""

    task: Task
    journal: Journal
    progress: Progress
    ends_at: float | None = None

    @property
    def out_of_time(self) -> bool:
        return self.ends_at is not None and time.monotonic() >= self.ends_at


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A split scored batch by batch; `whole` and `only` join batches to one `Scored`."""

    task: Task
    each: tuple[ScoredPart, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(part.values) for part in self.each)

    def scattered(self, units: int, among: Sequence[int] | None = None) -> tuple[int, ...]:
        """Numbers of batches (of all, or `among` these) as `scattered` gives them, of at least two clusters where there are.

        A batch may hold one user, and the spread of one cluster tells nothing.
        """
        numbers = range(len(self.each)) if among is None else among
        sizes = [self.sizes[number] for number in numbers]
        while True:
            chosen = tuple(numbers[place] for place in scattered(sizes, units))
            ids = {int(cluster) for number in chosen for cluster in np.unique(self.each[number].clusters)}
            if self.task.clusters is None or len(ids) > 1 or len(chosen) == len(numbers):
                return chosen
            units = sum(self.sizes[number] for number in chosen) + 1

    def only(self, numbers: Sequence[int]) -> Scored:
        """The batches of these numbers, in the order of the split."""
        return join_parts(self.task, [self.each[number] for number in sorted(numbers)])

    @property
    def whole(self) -> Scored:
        return join_parts(self.task, self.each)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pass:
    """A split under one model, to be scored. kind, of: how the journal knows it.

    numbers: of the batches to score, None for all; the journal knows a batch by its number in the split, so that another
    selection takes none for another. running: gives the model while its block lasts; not entered when every batch is known.
    check is given it after each batch, before anything is written down. after_batch is told how many batches are done.
    """

    kind: str
    of: str
    batches: Batches
    running: Callable[[], AbstractContextManager[Any]]
    numbers: Sequence[int] | None = None
    after_batch: Callable[[int], None] = lambda _: None
    check: Callable[[Any], None] = lambda _: None


def scored(run: Run, asked: Pass) -> Parts:
    """Score a split batch by batch, from the journal where it holds a batch already.

    Raises TaskError as `precimap.task.score`.
    """
    parts = []
    with ExitStack() as stack, torch.no_grad():
        model: Any = None
        for number, batch in enumerate(asked.batches):
            if asked.numbers is not None and number not in asked.numbers:
                continue
            subject = batch_subject(asked.of, number)
            found = run.journal.find(asked.kind, subject)
            if found is None:
                model = stack.enter_context(asked.running()) if model is None else model
                started = time.perf_counter()
                place = f"batch {number} of the {split_of(run.task, asked.batches)} split"
                part = score_batch(run.task, model, to_device(batch, run.task.device), place)
                asked.check(model)
                record_part(run.journal, (asked.kind, subject), part, time.perf_counter() - started)
            else:
                part = part_of(found)
            parts.append(part)
            asked.after_batch(len(parts))
    return Parts(run.task, tuple(parts))


def scored_baseline(run: Run) -> Parts:
    """The search split under the model as given."""
    split, model = run.task.splits.search, run.task.model
    return scored(run, Pass(kind="baseline", of="search", batches=split, running=lambda: EMULATED.running(model, {})))


def split_of(task: Task, batches: Batches) -> str:
    """What a split is called."""
    return next((name for name in SPLITS if getattr(task.splits, name) is batches), "given")


def scattered(sizes: Sequence[int], units: int) -> tuple[int, ...]:
    """Numbers of batches that hold at least `units` units together, spread over the split: batches may be sorted.

    In the order of the fractions of the golden ratio, which leaves no large gap at any length.
    """
    order = sorted(range(len(sizes)), key=lambda number: (number + 1) * 0.6180339887498949 % 1)
    chosen: list[int] = []
    for number in order:
        if sum(sizes[done] for done in chosen) >= units:
            break
        chosen.append(number)
    return tuple(sorted(chosen))


def batch_subject(subject: str, number: int) -> str:
    """How the journal names one batch of what is scored."""
    return f"{subject} @{number}"


def record_part(journal: Journal, key: tuple[str, str], part: ScoredPart, seconds: float, scheme: str = "") -> None:
    """Write one scored batch down under (kind, subject); `part_of` reads it back to the bit."""
    arrays = {name: getattr(part, name) for name in ("values", "losses", "clusters", "weights")}
    arrays |= {f"{kind}/{name}": values for kind in NAMED for name, values in getattr(part, kind).items()}
    journal.record(*key, {"seconds": round(seconds, 4), "units": len(part.values)}, scheme, arrays)


def part_of(measurement: Measurement) -> ScoredPart:
    """The scored batch that `record_part` wrote."""
    arrays = measurement.arrays
    reported, guards, slices = (
        {name.removeprefix(f"{kind}/"): values for name, values in arrays.items() if name.startswith(f"{kind}/")}
        for kind in NAMED
    )
    return ScoredPart(
        values=arrays["values"],
        losses=arrays["losses"],
        reported=reported,
        guards=guards,
        slices=slices,
        clusters=arrays["clusters"],
        weights=arrays["weights"],
    )
