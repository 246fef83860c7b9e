"""Speed as a ratio, measured interleaved in one run.

Invariant: a time never stands alone. Rounds run every candidate once, in turn, so that a machine that slows down slows all
of them; a ratio is taken within each round and reported as the median with its spread over rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster than the other one: median over rounds, and the quartiles."""

    median: float
    lower_quartile: float
    upper_quartile: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each candidate in each round."""

    seconds: dict[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Seconds of one call, the median over rounds."""
        return statistics.median(self.seconds[name])

    def speedup(self, name: str, over: str) -> Ratio:
        """How many times faster `name` is than `over`, from the ratios within each round."""
        ratios = [slow / fast for fast, slow in zip(self.seconds[name], self.seconds[over], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        return Ratio(middle, low, high, len(ratios))


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> Timings:
    """Call each candidate once to warm it up, then `rounds` times in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
    return Timings({name: tuple(values) for name, values in seconds.items()})
