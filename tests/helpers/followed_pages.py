"""A page of the documentation, followed: blocks of commands, files and what they show."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
