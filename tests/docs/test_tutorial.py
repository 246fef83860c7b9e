"""The tutorial is followed: its files are written, its commands run in order, and what it shows is what comes out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial-ranking.md"
BLOCK = re.compile(r"^```(bash|python|text)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
# Training is not the same to the bit on every machine: what depends on it is compared without its numbers.
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
VERDICT = re.compile(r"\b(?:tolerant|undecided|sensitive) +(?:fp8|base)\b|(?<=Cannot tell).*")
EXACT = "generated impressions"


def shape_of(line: str) -> str:
    """A line without its numbers, verdicts and spacing."""
    return " ".join(NUMBER.sub("#", VERDICT.sub("verdict", line)).replace("± ", "±").split())


def run(command: list[str], folder: Path) -> str:
    """Standard output and error; fails with both when the command does."""
    bin_folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def check_shown(shown: str, output: str) -> None:
    """Every line shown came out, in this order."""
    came = iter(output.splitlines())
    for line in shown.splitlines():
        found = any(line == one if EXACT in line else shape_of(line) == shape_of(one) for one in came)
        assert found, f"the page shows, and the output has not (or not in this order):\n{line}\n---\n{output}"


def test_a_page_that_shows_what_does_not_come_is_found() -> None:
    came = "a 5 tolerant   fp8\nCannot tell: NEEDS 7\n9 generated impressions\n"
    check_shown("a 6 undecided  base\nCannot tell, WHY\n9 generated impressions\n", came)
    for wrong in (
        "b 5 tolerant fp8\n",
        "Certified.\n",
        "8 generated impressions\n",
        "Cannot tell: NEEDS 7\na 5 tolerant fp8\n",
    ):
        with pytest.raises(AssertionError, match="the page shows"):
            check_shown(wrong, came)


def test_the_tutorial_as_written(tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert [kind for kind, _ in blocks].count("bash") == 7
    output, longest = "", 0
    for kind, text in blocks:
        if kind == "text":
            check_shown(text, output)
        elif kind == "bash":
            output = run(["bash", "-e", "-c", text], tmp_path)
            longest = max(longest, *map(len, output.splitlines()))
        elif name := re.match(r"# file: (\S+)\n", text):
            (tmp_path / name[1]).write_text(text)
        else:
            output = run([sys.executable, "-c", text], tmp_path)
    assert longest <= 80
    saved = json.loads((tmp_path / "runs" / "fp8" / "map.json").read_text())
    assert saved["certificate"]["verdict"] == "certified"
    assert saved["certificate"]["n"] == 14_000
    assert saved["certificate"]["upper"] < 0.0005
