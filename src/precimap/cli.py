"""The command line: parses, calls one verb, prints. Nobody else prints.

stdout is the result (`--json` for machines), stderr is progress and errors. Exit codes: 0 done, 1 the answer is no (not
certified), 2 the input is wrong, 70 an error that precimap did not expect, 74 the result cannot be printed, 130 interrupted.

Invariant: the verbs are in `cli_searching` and `cli_serving`, which import torch inside a verb alone; here is the one
that shows them all, and the entry point.
"""

import sys
from pathlib import Path

import precimap.cli_options as options
import precimap.cli_searching as searching
import precimap.cli_serving as serving
from precimap.cli_app import ERRORS, app, command
from precimap.cli_ending import Result, unexpected
from precimap.report.progress_bar import progress_bar

VERBS = (searching, serving)  # imported for what they add to `app`


@command
def demo(
    out: options.OutOption = None, model: options.ModelOption = None, as_json: options.JsonOption = False
) -> Result:
    """Semantic search over the Python documentation on this machine: two maps, certified, one deployed and timed."""
    from precimap.demos.demo import run_demo, unused_directory

    with progress_bar(ERRORS) as progress:
        result = run_demo(out or unused_directory(Path("precimap-runs/demo")), model, progress)
    return Result(row=result.as_row(), page=result.page(), as_json=as_json)


def main() -> None:
    """The entry point: one clear message and the exit code for whatever goes wrong, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal without a letter shows its number
    try:
        app(prog_name="precimap")
    except Exception as error:  # noqa: BLE001 - of the command line itself: an exit code of 1 would be the answer no
        sys.exit(unexpected(error))
