"""The guide to serving is followed: its files are written, its commands run, and what it shows is what comes out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    package, program = tmp_path / "served" / "model.pt2", tmp_path / "serve_package"
    the_program_computes_as_python(program, package, tmp_path)


def the_program_computes_as_python(program: Path, package: Path, folder: Path) -> None:
    """Bit for bit, on other calls than those of the page; what it cannot read it says."""
    generator = torch.Generator().manual_seed(7)
    calls = [
        [torch.randn(size, 24, generator=generator), torch.randint(500, (size, 4), generator=generator)]
        for size in (2, 31)
    ]
    torch.save(calls, folder / "calls.pt")
    subprocess.run([program, package, folder / "calls.pt", folder / "scores.pt"], check=True)
    model = torch._inductor.aoti_load_package(str(package))
    for (numbers, ids), (scores,) in zip(calls, torch.load(folder / "scores.pt"), strict=True):
        assert scores.equal(model(numbers, ids=ids))
        assert len(scores.unique()) > 1
    wrong = [program, "none.pt2", folder / "calls.pt", folder / "x.pt"]
    with pytest.raises(subprocess.CalledProcessError) as raised:
        subprocess.run(wrong, check=True, capture_output=True, text=True)
    assert "file open failed" in raised.value.stderr
