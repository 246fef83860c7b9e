"""`--version`: what is installed, told without importing any of it."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from precimap.cli_ending import Result, ended
from precimap.report.terminal import lines_of


def _version(package: str) -> str:
    """As installed; the package is not imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_versions(asked: bool) -> None:
    if asked:
        said = f"precimap {_version('precimap')} (torch {_version('torch')}, Python {platform.python_version()})"
        raise typer.Exit(ended(lambda: Result(row={}, page=lines_of([said]), as_json=False)))


VersionOption = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_print_versions,
        is_eager=True,
        help="Print the versions of precimap, torch and Python, and end.",
    ),
]
