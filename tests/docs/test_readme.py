"""The README is run: its Python, and the commands and files it names."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from precimap.cli import app
from precimap.numerics.schemes import SCHEMES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "map.json").is_file()
    result, fast = names["result"], names["fast"]
    assert result.certified  # type: ignore[attr-defined]
    assert fast(next(iter(names["task"].splits.search))[0]).shape == (200, 32)  # type: ignore[operator, attr-defined]
    assert names["second"].certified  # type: ignore[attr-defined]


def test_the_commands_exist_with_the_options_named() -> None:
    lines = re.findall(r"^precimap +(\w+) +(.*?)(?: +#.*)?$", README, flags=re.MULTILINE)
    assert {command for command, _ in lines} == {"plan", "layers", "search", "certify", "deploy", "export", "report"}
    for command, arguments in lines:
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"--[a-z-]+", arguments):
            assert option in shown, f"{command} has no {option}"


def test_the_scheme_table_is_complete() -> None:
    named = set(re.findall(r"`((?:fp8|fp16|bf16|int[48])[a-z0-9-]*)`", README))
    assert set(SCHEMES) <= named


def test_the_files_it_links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        if not link.startswith("http"):
            assert (ROOT / link).exists(), link


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE)) <= targets
