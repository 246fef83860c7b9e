"""The parts of a bench that runs once, on a machine rented by the minute: each for so long, and no part stops another.

Invariant: every part leaves a row, with what it measured, with why it failed, or with why it was not begun; one that takes
too long is stopped where it stands. A process for each part was not taken: every one would start CUDA and compile anew.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType

import torch._dynamo

from precimap.runtime.timing import ratio, spread

Row = dict[str, object]
LONGEST_REASON = 500
AGAIN = 5.0  # seconds until a part that swallowed its end is told again


class OutOfTime(BaseException):
    """Not an Exception: what catches those, a compiler or a loop over forms, would go on."""


@dataclass(frozen=True, slots=True)
class Part:
    """limit: seconds after which it is stopped, at the latest."""

    name: str
    limit: float
    measure: Callable[[], Row]


def in_turn(parts: Sequence[Part], budget: float) -> Iterator[Row]:
    """A row for each part, as it comes. budget: seconds for all of them, of which the last part has what is left."""
    started = time.monotonic()
    for part in parts:
        before = time.monotonic()
        left = budget - (before - started)
        if left <= 0:
            yield {"part": part.name, "skipped": f"not begun within {budget:g} seconds"}
            continue
        torch._dynamo.reset()
        limit = min(part.limit, left)
        try:
            with stopped_after(limit):
                row = part.measure()
        except OutOfTime:
            row = {"failed": f"stopped after {limit:.3g} seconds"}
        except Exception as error:  # noqa: BLE001 - one part is not all
            row = {"failed": f"{type(error).__name__}: {str(error)[:LONGEST_REASON]}"}
        yield {"part": part.name, **row, "seconds_taken": round(time.monotonic() - before, 1)}


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block once it took so long; of the main thread alone, which is where signals arrive."""
    assert threading.current_thread() is threading.main_thread()

    def stop(_: int, __: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(seconds: Mapping[str, Sequence[float]], base: Callable[[str], str]) -> Row:
    """Microseconds of each case, and how many times as fast as its base it is."""
    times = {name: asdict(spread([1e6 * value for value in values])) for name, values in seconds.items()}
    speed = {name: asdict(ratio(seconds[base(name)], values)) for name, values in seconds.items() if base(name) != name}
    return {"microseconds": times, "times_as_fast": speed}
