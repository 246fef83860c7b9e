"""Calls into the user's own functions: an error in one says which it was, on what, and at which line of the user's file.

Invariant: what precimap refuses on purpose passes unchanged; everything else that such a function raises, an exit of the
program among it, becomes a TaskError with the cause behind it. Reporting the last line of the traceback instead would name a
line of torch, or of precimap.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from precimap.errors import PrecimapError, TaskError

_OURS = str(Path(__file__).parent)
_DEMOS = str(Path(__file__).parent / "demos")  # tasks like a user's
_LIBRARIES = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["platstdlib"])


@contextmanager
def called(what: str, place: str) -> Iterator[None]:
    """A call of the user's `what` (forward, loss, ...) on `place`, such as `batch 3 of the search split`.

    Raises TaskError for whatever it raises that is not precimap's own.
    """
    try:
        yield
    except PrecimapError:
        raise
    except (Exception, SystemExit) as error:
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise TaskError(f"{what} failed on {place}{users_line(error)}: {said}") from error


def users_line(error: BaseException) -> str:
    """The innermost line of a traceback that is neither precimap's nor a library's, such as ` (mine.py, line 12)`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if _is_the_users(frame.filename):
            return f" ({Path(frame.filename).name}, line {frame.lineno})"
    return ""


def _is_the_users(file: str) -> bool:
    if file.startswith("<") or "site-packages" in file or "dist-packages" in file or file.startswith(_LIBRARIES):
        return False
    return not file.startswith(_OURS) or file.startswith(_DEMOS)


def can_be_written(name: Any) -> bool:
    """Whether a name is a text with an encoding: Python's strings may also hold halves of characters (surrogates)."""
    return isinstance(name, str) and name.encode(errors="ignore").decode() == name
