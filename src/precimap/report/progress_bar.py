"""Progress on stderr: one bar for each stage, with the time it has taken and the time it will still take.

Where stderr is no terminal (a log file, CI) a bar would be noise: there, each stage gets a line when it starts and, if it
is long, one every half minute. Stages of a search are counted in steps, the reading of files in bytes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from precimap.report.terminal import Terminal, lines_of
from precimap.searching.progress import Progress

SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress_bar(console: Console) -> Iterator[Progress]:
    """A Progress function that draws; a stage appears with its first call. The time left is that of the stage."""
    with _bars(console, MofNCompleteColumn(), str) as progress:
        yield progress


@contextmanager
def reading_bar(console: Console | None = None) -> Iterator[Progress]:
    """The same for `done` and `total` in bytes, on stderr if no console is given."""
    with _bars(console or Terminal(stderr=True), DownloadColumn(), decimal) as progress:
        yield progress


@contextmanager
def _bars(console: Console, counter: ProgressColumn, said: Callable[[int], str]) -> Iterator[Progress]:
    if not console.is_terminal:
        yield _lines(console, said)
        return
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(bar_width=20),
        counter,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        stages: dict[str, TaskID] = {}
        last: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in stages:
                stages[stage] = bars.add_task(stage, total=total)
            elif done < last[stage]:  # the same work again, such as another pass over a file
                bars.reset(stages[stage], total=total)
            last[stage] = done
            bars.update(stages[stage], completed=done, total=total)

        yield advance


def _lines(console: Console, said: Callable[[int], str]) -> Progress:
    started: dict[str, float] = {}
    last: dict[str, int] = {}
    last_line = float("-inf")

    def advance(stage: str, done: int, total: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        new = done < last.get(stage, done + 1)  # not seen, or the same work again
        begun = started[stage] = now if new else started[stage]
        last[stage] = done
        if new or now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            left = f", about {(now - begun) * (total - done) / done:.0f} s left" if done and now > begun else ""
            console.print(lines_of([f"{stage}: {said(done)} of {said(total)}{left}"]))

    return advance
