"""The application of the command line, and how a function becomes one of its verbs.

Invariant: a verb returns its result, and what prints it and chooses the exit code is one place (`cli_ending`).
"""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from precimap.cli_ending import Result, ended
from precimap.cli_version import VersionOption
from precimap.report.terminal import Terminal

app = typer.Typer(
    help="Choose the layers of a model that run in FP8 or INT8 while your metric stays within a margin; prove it; deploy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
ERRORS = Terminal(stderr=True)
Asked = ParamSpec("Asked")


def command(function: Callable[Asked, Result]) -> Callable[Asked, None]:
    """A verb of the command line: what it returns is printed, and it ends with the exit code of that."""

    @app.command()
    @functools.wraps(function)
    def verb(*args: Asked.args, **kwargs: Asked.kwargs) -> None:
        raise typer.Exit(ended(lambda: function(*args, **kwargs)))

    return verb


@app.callback()
def before_the_verb(versions: VersionOption = False) -> None:
    """What may stand before the verb; each option there ends the program by itself."""
