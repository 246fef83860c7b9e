"""Options in a YAML file: as if they were typed, and written into every run."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from precimap.cli import app
from precimap.precision_map import PrecisionMap
from precimap.report.run_record import SAVED

TASK = """
from helpers.small_tasks import planted_task

def task():
    return planted_task()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRECIMAP_STATE", str(tmp_path / "state"))
    return tmp_path


def run(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["search", *arguments])
    return found.exit_code, " ".join(found.output.split())


TYPED = "mine.py --margin 0.2 --scheme fp8 --scheme fp8-tensor --rounding-draws 0 --run runs/one".split()


def test_a_run_s_own_file_asks_its_question_again(place: Path) -> None:
    assert run(*TYPED)[0] == 0
    saved = place / "runs" / "one" / SAVED
    assert yaml.safe_load(saved.read_text()) == {
        "task": "mine.py",
        "margin": "0.2",
        "schemes": ["fp8", "fp8-tensor"],
        "rounding-draws": 0,
        "run": "runs/one",
    }
    first = PrecisionMap.load(place / "runs" / "one" / "map.json")
    (place / "asked.yaml").write_text(saved.read_text())
    assert run("--config", "asked.yaml")[0] == 0
    assert PrecisionMap.load(place / "runs" / "one" / "map.json") == first
    assert yaml.safe_load(saved.read_text())["margin"] == "0.2", "what came from a file is written, too"


def test_what_is_typed_wins(place: Path) -> None:
    (place / "asked.yaml").write_text("margin: 0.1\nscheme: [fp8]\nrounding-draws: 0\nrun: runs/file\nrealign: false\n")
    assert run("mine.py", "--config", "asked.yaml", "--run", "runs/typed", "--margin", "0.2")[0] == 0
    assert not (place / "runs" / "file").exists()
    found = PrecisionMap.load(place / "runs" / "typed" / "map.json")
    assert found.certificate is not None
    assert found.certificate.margin == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margn: 0.2", "search has no option 'margn'; it has task, margin,"),
        ("as-json: true", "search has no option 'as-json'"),
        ("config: other.yaml", "search has no option 'config'"),
        ("- margin", "to hold options such as 'margin: 0.1%', a line each"),
        ("", "to hold options such as"),
        ("margin: [", "cannot be read as YAML"),
        ("rule: best\nmargin: 0.2\nscheme: fp8\nrun: r", "'best' is not one of"),
        ("margin: much\nscheme: [fp8]\nrun: r", "expected"),
    ],
)
def test_other_files_are_refused(place: Path, text: str, message: str) -> None:
    (place / "asked.yaml").write_text(text)
    code, output = run("mine.py", "--config", "asked.yaml")
    assert code == 2
    assert message in " ".join(output.replace("│", " ").split())
    assert not (place / "r").exists()


def test_a_file_that_is_missing_is_named(place: Path) -> None:
    code, output = run("mine.py", "--config", "none.yaml")
    assert code == 2
    assert "none.yaml cannot be read as YAML" in " ".join(output.replace("│", " ").split())
