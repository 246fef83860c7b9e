"""The command line's door: help and versions at once, every option explained, and the words it repeats held equal."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import typer.main

import precimap.cli_options as options
from precimap.cli import app
from precimap.metrics import NE_MARGINS
from precimap.runtime.nvidia.target import EXPERIMENTAL
from precimap.searching.allocation.table import BYTES_WORTH
from precimap.searching.question import FORMS, USUAL_EFFORT, bytes_of
from precimap.targets import TARGETS

VERBS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
HEAVY = "torch", "numpy", "scipy"
RUN = """
import sys
from precimap.cli import main
try:
    main()
except SystemExit as end:
    print(sorted({name.partition(".")[0] for name in sys.modules}))
    sys.exit(end.code)
"""


@pytest.mark.parametrize("asked", [("--help",), ("--version",), *((verb, "--help") for verb in VERBS)], ids=" ".join)
def test_help_and_versions_do_not_wait_for_torch(asked: tuple[str, ...]) -> None:
    found = subprocess.run([sys.executable, "-c", RUN, *asked], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    *said, imported = found.stdout.splitlines()
    assert said
    assert "'precimap'" in imported
    assert not [name for name in HEAVY if f"'{name}'" in imported]


def test_the_versions() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "from precimap.cli import main; main()", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    python = ".".join(map(str, sys.version_info[:3]))
    assert found.stdout == f"precimap {version('precimap')} (torch {version('torch')}, Python {python})\n"


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained_in_whole_sentences(verb: str) -> None:
    assert VERBS[verb].help.endswith(".")
    for parameter in VERBS[verb].params:
        assert parameter.help, f"{verb} {parameter.name} has no help"
        assert parameter.help[0].isupper(), parameter.help
        assert parameter.help.endswith("."), parameter.help
        if parameter.param_type_name == "option":
            assert parameter.rich_help_panel in options.PANELS, f"{verb} {parameter.name} is in no panel"


def test_the_panels_of_a_search_come_in_the_order_of_its_questions() -> None:
    panels = [one.rich_help_panel for one in VERBS["search"].params if one.param_type_name == "option"]
    assert panels == sorted(panels, key=options.PANELS.index)
    assert tuple(dict.fromkeys(panels)) == options.PANELS


def test_what_the_options_repeat_is_what_the_modules_say() -> None:
    """These are repeated because their modules import torch."""
    assert tuple(NE_MARGINS) == options.NE_MARGINS
    assert options.EXPERIMENTAL == EXPERIMENTAL
    assert options.BYTES_WORTH == BYTES_WORTH
    assert USUAL_EFFORT.timing_seconds == options.TIMING_SECONDS
    assert USUAL_EFFORT.rounding_draws == options.ROUNDING_DRAWS
    assert bytes_of(options.MEMORY) == USUAL_EFFORT.screen_memory == USUAL_EFFORT.replay_memory
    assert [name.value for name in options.TargetName] == list(TARGETS)
    assert [name.value for name in options.FormName] == list(FORMS)
