"""Speed as a ratio, measured interleaved in one run.

Invariant: a time never stands alone. Cases are timed in turns and not one after the other, because on a shared machine the
load changes within a run; a ratio is taken inside each turn and its median reported, so that a slow turn slows both
sides of it.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Case = TypeVar("Case", bound=Hashable)

FEWEST, MOST = 15, 200  # turns of `turns_within`


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of `n` measurements, in the unit of the measurements."""

    median: float
    lower: float
    upper: float
    n: int

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} [{self.lower:{spec}}, {self.upper:{spec}}]"


def interleaved(
    cases: Mapping[Case, Callable[[], object]],
    turns: int,
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[Case, list[float]]:
    """Seconds by `clock` of each case in each turn; every turn starts with another case.

    A case runs once untimed just before it is timed, so that it finds caches and allocator as it leaves them itself and
    not as its neighbour did. `time.process_time` suits what runs on one thread: other work does not lengthen it.
    """
    names = list(cases)
    seconds: dict[Case, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            cases[name]()
            _wait_for(device)
            start = clock()
            cases[name]()
            _wait_for(device)
            seconds[name].append(clock() - start)
    return seconds


def turns_within(
    seconds: float,
    cases: Mapping[str, Callable[[], object]],
    clock: Callable[[], float] = time.perf_counter,
    device: torch.device | None = None,
) -> dict[str, list[float]]:
    """As `interleaved`, in as many turns as fit into about `seconds` of a wall clock: `FEWEST` to `MOST`."""
    start = time.perf_counter()
    interleaved(cases, 1, device=device)
    each = time.perf_counter() - start
    return interleaved(cases, min(MOST, max(FEWEST, int(seconds / each))), clock, device)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    lower, median, upper = (float(value) for value in np.percentile(np.asarray(values), (25, 50, 75)))
    return Spread(median, lower, upper, len(values))


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times longer `slow` took, taken within each turn."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
