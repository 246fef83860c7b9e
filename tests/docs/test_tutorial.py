"""The tutorial is followed: its files are written, its commands run in order, and what it shows is what comes out."""

import json
import re
import sys
from pathlib import Path

import pytest

from helpers.followed_pages import BLOCK, check_shown, run

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial-ranking.md"


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
