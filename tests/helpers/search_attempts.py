"""One search, given again and again: as a process that may be killed, and what two runs of it must have in common.

As a script this is the host of the processes. It pays for the imports once and forks each attempt; every forward and
every question to the journal is a line in the attempt's log, so that what was executed can be held against what was
committed. A fresh interpreter for each attempt, the alternative, costs seconds of imports.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from helpers.small_tasks import INPUTS, Planted, loss
from precimap import PrecisionMap, SearchResult, Splits, Task, search
from precimap.journal import Journal, open_journal
from precimap.layers import code_products
from precimap.metrics import Loss
from precimap.searching.question import Effort

MARGIN = 0.2
STAGES = ("calibration", "baseline", "floor", "screen", "probe", "rates", "joint", "certify", "draw")
CONCLUSIONS = ("preflight", "inventory", "floor", "evidence", "chain", "certificates", "summary")
EFFORT = Effort(screen_units=100, audit_units=50, check_units=100)
SLOW = 0.004  # seconds a forward takes at least: a kill then lands inside one more often than not


def task_of(seen: Callable[[int], None] = lambda _: None, units: int = 200) -> Task:
    """The planted task in batches of 25. `seen` is told the place of each batch that goes forward: 100 * split + number."""
    model = Planted().eval()

    def split(number: int, count: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(count, INPUTS, generator=generator)
        with torch.no_grad():
            scores = model(x)
        labels = (scores + torch.randn(scores.shape, generator=generator)).argmax(1)
        place = 100 * number + torch.arange(count) // 25
        whole = {"x": x, "labels": labels, "place": place}
        return [{key: values[i : i + 25] for key, values in whole.items()} for i in range(0, count, 25)]

    def forward(called: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen(int(batch["place"][0]))
        scores: Tensor = called(batch["x"])
        return scores

    splits = Splits(split(1, 100), split(2, units), split(3, units))
    return Task(model, splits=splits, forward=forward, loss=loss, metric=Loss(), name="killed")


def searched(task: Task, folder: Path, **changes: Any) -> SearchResult:
    """The one command of this file.

    Its products of codes have the same bits in every process: whatever threads the tests' own has, no other multiplies.
    """
    asked: dict[str, Any] = {"schemes": ["fp8-tensor", "int8-static"], "margin": MARGIN, "effort": EFFORT}
    with mock.patch.object(code_products, "_alone", return_value=True):
        return search(task, **{**asked, "run": folder / "run", "ledger": folder / "ledger", **changes})


def attempt(folder: Path, dies_at: str) -> None:
    """One search, its log in `folder`. It kills itself when it is about to write a line that starts with `dies_at`."""
    log = os.open(folder / f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(*words: object) -> None:
        line = "\t".join(map(str, words))
        if dies_at and line.startswith(dies_at):
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(log, f"{line}\n".encode())

    find, record = Journal.find, Journal.record

    def found(self: Journal, kind: str, subject: str, scheme: str = "") -> Any:
        row = find(self, kind, subject, scheme)
        if row is None:
            say("missing", kind, subject, scheme)
        return row

    def recorded(self: Journal, kind: str, subject: str, value: Any, scheme: str = "", arrays: Any = None) -> None:
        say("commits", kind, subject, scheme)
        record(self, kind, subject, value, scheme, arrays)
        say("committed", kind, subject, scheme)

    def seen(place: int) -> None:
        say("forward", place)
        time.sleep(SLOW)

    for name, wrapped in (("find", found), ("record", recorded)):
        setattr(Journal, name, wrapped)
    searched(task_of(seen), folder)


def host() -> None:
    """For each line `folder TAB dies_at`: fork an attempt, print its pid, and its status when it has ended."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, dies_at = line.rstrip("\n").split("\t", 1)
        child = os.fork()
        if not child:
            try:
                attempt(Path(folder), dies_at)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Attempt:
    """A search at work in another process."""

    pid: int
    folder: Path
    answers: Iterator[str]

    def lines(self) -> list[list[str]]:
        """Its log so far."""
        log = self.folder / f"log-{self.pid}"
        return [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []

    def ended(self) -> int:
        """Wait for its end: 0, or minus the signal that killed it."""
        return int(next(self.answers))

    def has_committed(self, count: int) -> bool:
        """Wait until it has committed `count` measurements. False when it has written its map before."""
        while not (self.folder / "run" / "map.json").exists():
            lines = self.lines()
            if lines and sum(line[0] == "committed" for line in lines) >= count:
                return True
            time.sleep(0.002)
        return False


def measured(folder: Path) -> dict[tuple[str, str, str], tuple[Any, ...]]:
    """Every measurement of a run, to the bit; how long it took is left out."""
    with open_journal(folder / "run") as journal:
        return {
            (row.kind, row.subject, row.scheme): (
                json.dumps({key: value for key, value in row.value.items() if key != "seconds"}),
                *((name, array.dtype.str, array.shape, array.tobytes()) for name, array in row.arrays.items()),
            )
            for kind in STAGES
            for row in journal.measurements(kind)
        }


def concluded(folder: Path) -> dict[str, Any]:
    """Every conclusion of a run. None of them holds a time."""
    with open_journal(folder / "run") as journal:
        rows = {kind: journal.conclusions(kind) for kind in CONCLUSIONS}
    assert all(len(row) == 1 for row in rows.values())
    return {kind: row[0].value for kind, row in rows.items()}


def charged(folder: Path) -> list[dict[str, Any]]:
    """What the certify split has judged, without the time."""
    (file,) = (folder / "ledger").glob("*.alpha.json")
    return [{k: v for k, v in row.items() if k != "first"} for row in json.loads(file.read_text())["judged"]]


def assert_same_answer(folder: Path, expected: Path) -> None:
    one, other = (PrecisionMap.load(place / "run" / "map.json") for place in (folder, expected))
    assert one.model_dump() == other.model_dump()
    assert one.fingerprint == other.fingerprint
    assert concluded(folder) == concluded(expected)


if __name__ == "__main__":
    host()
