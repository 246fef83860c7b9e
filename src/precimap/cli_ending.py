"""How a command ends: its result on stdout, or one message on stderr; and an exit code that means one thing.

Invariant: 1 says that the answer is no, and nothing else ends with it: neither an error of the task's own code, nor one of
precimap's, nor a stdout that is full or closed. While a command works, stdout is stderr, also for code below Python, so that
a task that prints does not break the JSON; only what a command returns is written to the real one.
"""

import ctypes
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any, ParamSpec

from rich.console import RenderableType

from precimap.durable import write_text
from precimap.errors import PrecimapError
from precimap.report.terminal import Terminal, shown

DONE, NO, WRONG_INPUT, INTERNAL, NOT_WRITTEN, INTERRUPTED = 0, 1, 2, 70, 74, 130  # 70 and 74 as in sysexits.h
Asked = ParamSpec("Asked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a command found: `row` for machines, `page` for people, the exit code, and how wide the page is; None: as the
    terminal, or as $COLUMNS, or 80."""

    row: dict[str, Any]
    page: RenderableType
    as_json: bool
    code: int = DONE
    width: int | None = None


def ended(command: Callable[[], Result]) -> int:
    """Run a command, print its result, and return the exit code."""
    if sys.stdout is None:
        return told("cannot print the result: stdout is closed", NOT_WRITTEN)
    try:
        with _stdout_for_results_only():
            result = command()
    except PrecimapError as error:
        return told(f"{type(error).__name__}: {error}", WRONG_INPUT)
    except KeyboardInterrupt as interrupt:
        return told(str(interrupt) or "Interrupted.", INTERRUPTED)
    except SystemExit as error:
        return told(
            f"the task's code ended the program (exit {error.code}); let it raise an error instead", WRONG_INPUT
        )
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is not the answer no
        return unexpected(error)
    try:
        _print(result)
    except (OSError, ValueError) as error:  # ValueError: the task's code closed stdout
        _forget_stdout()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return told(f"cannot print the result: {why}", NOT_WRITTEN)
    return result.code


def taken_up_again(command: Callable[Asked, Result]) -> Callable[Asked, Result]:
    """A command with a run directory, `run`: an interrupt says that it holds what was measured, and how to go on."""

    @functools.wraps(command)
    def kept(*args: Asked.args, **kwargs: Asked.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Interrupted. Nothing that was measured is lost: it is kept in {kwargs['run']}, and the same "
                "command goes on where it stopped."
            ) from None

    return kept


def unexpected(error: BaseException) -> int:
    """Say that this is no answer, in one line, and where its traceback is; returns the exit code."""
    said = f"{type(error).__name__}: {error}".rstrip(": ")
    return told(f"an error that precimap did not expect, {said}; {_kept(error)}", INTERNAL)


def told(message: str, code: int) -> int:
    """Print one message on stderr and return the exit code. Lines after the first are indented: none looks like ours."""
    first, *others = message.splitlines() or [""]
    with suppress(OSError, ValueError):
        Terminal(stderr=True, soft_wrap=True).print("\n  ".join(shown(line) for line in (first, *others)), style="red")
    return code


def _kept(error: BaseException) -> str:
    """Write the traceback down and say where."""
    text = "".join(traceback.format_exception(error))
    try:
        from precimap.searching.question import state_directory

        path = state_directory() / "last-error.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except Exception:  # noqa: BLE001 - then it is shown, whatever kept it from being written
        return f"its traceback:\n{text}"
    return f"its traceback is in {path}"


def _print(result: Result) -> None:
    if result.as_json:
        sys.stdout.write(json.dumps(result.row, default=str) + "\n")
    else:
        Terminal(width=result.width).print(result.page)
    sys.stdout.flush()


def _forget_stdout() -> None:
    """So that Python does not try to write the rest once more when it ends, and fail with a code of its own."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextmanager
def _stdout_for_results_only() -> Iterator[None]:
    """What is printed inside the block, by Python or by code below it, goes to stderr."""
    with redirect_stdout(sys.stderr):
        kept = _moved()
        try:
            yield
        finally:
            if kept is not None:
                ctypes.CDLL(None).fflush(None)  # what C has buffered for stdout belongs to stderr, too
                os.dup2(kept, 1)
                os.close(kept)


def _moved() -> int | None:
    """Make the process's own stdout its stderr; a copy of what it was, or None where stdout is not the process's own."""
    try:
        if sys.__stdout__ is None or sys.__stdout__.fileno() != 1:
            return None
        sys.__stdout__.flush()
        kept = os.dup(1)
        os.dup2(2, 1)
    except (OSError, ValueError):
        return None
    return kept
