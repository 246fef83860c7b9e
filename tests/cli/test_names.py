"""Names that are markup, control characters or other people's lines: every command shows them, and none obeys them."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.small_tasks import planted_task
from precimap import CPU_INT8
from precimap.cli import main
from precimap.errors import ModelError, TaskError
from precimap.report.terminal import shown
from precimap.searching.preflight.checks import check_weights

NAMES = ("[red]", "[/]", "\x1b[2J", "a\nCertified", "\u202egnp", "\x07", "[link=http://x]", ":smile:")
TASK = f"""
import torch
from torch import nn
import precimap as pm
NAMES = {NAMES!r}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(64, 64))
        self.last = nn.Linear(64, 8)
    def forward(self, x):
        for name in NAMES:
            x = x + getattr(self, name)(x).relu()
        return self.last(x)
torch.manual_seed(0)
model = Net().eval()
def data(seed, n):
    x = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return [{{"x": x[i:i + 50], "labels": model(x[i:i + 50]).detach().argmax(1)}} for i in range(0, n, 50)]
def task():
    return pm.Task(
        model, splits=pm.Splits(data(1, 50), data(2, 200), data(3, 1000)), forward=lambda m, b: m(b["x"]),
        loss=lambda s, b: nn.functional.cross_entropy(s, b["labels"], reduction="none"), metric=pm.metrics.Loss(),
        guards=[pm.Guard(pm.metrics.Loss(), 9.0, where=lambda b: b["x"][:, 0] > 0, name="[/] \\x1b[31m\\n")],
        name="[/red]\\x1b]0;x\\x07",
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("names")
    (made / "named.py").write_text(TASK)
    return made


@pytest.fixture
def precimap(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a command; what it prints is printable whatever the names, or it is JSON."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["precimap", *arguments])
        sys.modules.pop("named", None)
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        for line in (captured.out + captured.err).split("\n"):
            assert line.isprintable()
        return int(stop.value.code or 0), captured.out if not stop.value.code else captured.out + captured.err

    return run


def test_every_command_shows_them_and_obeys_none(precimap: Callable[..., tuple[int, str]], folder: Path) -> None:
    code, out = precimap("layers", "named.py")
    assert code == 0
    assert all(shown(name) in out for name in NAMES)
    assert [layer["name"] for layer in json.loads(precimap("layers", "named.py", "--json")[1])["layers"]] == [
        *(f"{name}.weight" for name in NAMES), "last.weight"
    ]  # fmt: skip
    asked = ("named.py", "--scheme", "fp8", "--margin", "1", "--run", "[red]run", "--rounding-draws", "0")
    code, out = precimap("search", *asked)
    assert code == 0
    assert out.startswith("╭─ certified ─")
    assert "\nCertified" not in out, "a name with a line end is no line of ours"
    assert all(shown(name) in out for name in NAMES)
    assert precimap("report", "[red]run") == (0, out)
    assert json.loads(precimap("report", "[red]run", "--json")[1])["certified"]
    assert precimap("certify", "named.py", "[red]run/map.json", "--margin", "2", "--alpha-budget", "0.2")[0] == 0
    code, out = precimap("deploy", "named.py", "[red]run/map.json", "--output", "[red]fast.safetensors")
    assert code == 0
    assert "saved [red]fast.safetensors" in out
    assert "NOT CERTIFIED" not in out


def test_deploy_says_when_a_map_is_not_certified(precimap: Callable[..., tuple[int, str]], folder: Path) -> None:
    asked = ("named.py", "--scheme", "fp8", "--margin", "1", "--run", "mine", "--rounding-draws", "0")
    assert precimap("search", *asked)[0] == 0
    row = json.loads((folder / "mine" / "map.json").read_text())
    row.update(certificate=None, digest=None)
    (folder / "own.json").write_text(json.dumps(row))
    code, out = precimap("deploy", "named.py", "own.json", "--output", "fast.safetensors")
    assert code == 0
    assert out.splitlines()[-1] == "NOT CERTIFIED: it has no certificate"
    said = json.loads(precimap("deploy", "named.py", "own.json", "--output", "fast.safetensors", "--json")[1])
    assert said["not_certified"] == "it has no certificate"


def test_errors_and_device_times_show_them_too(precimap: Callable[..., tuple[int, str]], folder: Path) -> None:
    for path in (name for name in NAMES if ":" not in name):  # which parts a file from its function
        code, out = precimap("layers", f"{path}.py")
        assert code == 2
        assert shown(path) in out.replace("\n  ", "\\n")
    code, out = precimap("bench-device", "named.py", "--output", "[red]there.json", "--batch-sizes", "8")
    if CPU_INT8.timer is not None and code == 0:
        assert "saved [red]there.json" in " ".join(out.split())


def test_names_that_no_file_can_hold_are_refused() -> None:
    with pytest.raises(TaskError, match=r"got 'half \\ud800', which is no Unicode text"):
        planted_task(name="half \ud800")
    task = planted_task()
    task.model.add_module("half \ud800", torch.nn.Linear(2, 2))
    with pytest.raises(ModelError, match=r"got 'half \\ud800\.weight', which is no Unicode text"):
        check_weights(task)
