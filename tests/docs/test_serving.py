"""The guide to serving is followed: its files are written, its commands run, and what it shows is what comes out."""

import re
import shutil
import sys
from pathlib import Path

from helpers.followed_pages import BLOCK, check_shown, run
from precimap.runtime.x86.target import int8_scheme

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "serving.md"


def test_the_guide_as_written(tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    shutil.copy(ROOT / "docs" / "serving" / "serve_package.cpp", tmp_path)
    output = ""
    for kind, text in blocks:
        if kind == "text":
            check_shown(text.replace("int8-static", int8_scheme()), output)
        elif kind == "bash":
            output = run(["bash", "-e", "-c", text.replace("int8-static", int8_scheme())], tmp_path)
        elif name := re.match(r"# file: (\S+)\n", text):
            (tmp_path / name[1]).write_text(text)
        else:
            output = run([sys.executable, "-c", text], tmp_path)
