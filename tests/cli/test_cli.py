"""The command line as its users meet it: exit codes, one clear message, stdout for results, stderr for the rest."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from precimap.cli import main
from precimap.errors import InputError
from precimap.metrics import NE, NE_MARGINS, Calibration, LogLoss
from precimap.searching.question import margin_of

TASK = """
from helpers.small_tasks import planted_task
def task():
    return planted_task()
def broken():
    return planted_task().nothing
def wrong():
    return 3
def few():
    from dataclasses import replace
    made = planted_task()
    search = [{name: values[:40] for name, values in next(iter(made.splits.search)).items()}]
    return replace(made, splits=replace(made.splits, search=search))
def attending():
    def forward(model, batch):
        x = batch["x"]
        return model(x) * x.unsqueeze(1).matmul(x.unsqueeze(2)).squeeze(2)
    return planted_task(forward=forward)
"""


SEARCH = ("search", "mine.py", "--scheme", "fp8-static", "--margin", "1", "--run", "x")


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def in_a_process(*arguments: str, cwd: Path) -> Ran:
    """Run the command as a shell would."""
    state = {"PRECIMAP_STATE": str(cwd / "state")}  # this may run before the fixture that moves every test's state
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "80", **state}
    found = subprocess.run(
        [sys.executable, "-c", "from precimap.cli import main; main()", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    return Ran(found.returncode, found.stdout, found.stderr)


@pytest.fixture
def precimap(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command in this process, which saves importing torch each time."""

    def run(*arguments: str) -> Ran:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(sys, "argv", ["precimap", *arguments])
        for name in ("mine", "syntax", "imports"):
            sys.modules.pop(name, None)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cli")
    (made / "mine.py").write_text(TASK)
    (made / "syntax.py").write_text("def task(:\n")
    (made / "imports.py").write_text("\nimport nothing_of_this_name\n")
    return made


@pytest.fixture(scope="module")
def searched(folder: Path) -> Ran:
    return in_a_process("search", "mine.py", "--scheme", "fp8", "--margin", "0.2", "--run", "run", cwd=folder)


def test_search_report_certify_and_deploy(folder: Path, searched: Ran, precimap: Callable[..., Ran]) -> None:
    assert searched.returncode == 0, searched.stderr
    assert searched.stdout.startswith("╭─ certified ─")
    told = searched.stderr.index("these data can certify margins from")
    assert told < searched.stderr.index("screen: 0 of"), "what the units can detect is said before the long work"
    assert max(map(len, searched.stdout.splitlines())) <= 80
    again = precimap("report", "run")
    assert (again.returncode, again.stdout) == (0, searched.stdout)
    everything = precimap("report", "run", "--verbose", "--width", "100")
    assert "\nCertified.\n" in everything.stdout
    assert 80 < max(map(len, everything.stdout.splitlines())) <= 100
    assert "drops of whole maps" in everything.stdout
    assert "drops of whole maps" not in again.stdout
    row = json.loads(precimap("report", "run", "--json").stdout)
    assert row["certified"]
    assert row["map"] == json.loads((folder / "run" / "map.json").read_text())
    judged = precimap("certify", "mine.py", "run/map.json", "--margin", "0.3", "--json")
    assert judged.returncode == 0
    assert json.loads(judged.stdout)["certified"]
    deployed = precimap("deploy", "mine.py", "run/map.json", "--output", "fast.safetensors", "--json")
    assert deployed.returncode == 0, deployed.stderr
    assert json.loads(deployed.stdout)["largest_difference"] == 0
    assert (folder / "fast.safetensors").stat().st_size > 1000


def test_a_plan_answers_how_many_rows_a_margin_takes(folder: Path, precimap: Callable[..., Ran]) -> None:
    page = precimap("plan", "mine.py", "--margin", "0.2")
    assert page.returncode == 0, page.stderr
    assert page.stdout.startswith("These splits are large enough for a margin of 0.2.")
    assert max(map(len, page.stdout.splitlines())) <= 80
    row = json.loads(precimap("plan", "mine.py", "--margin", "0.2", "--json").stdout, parse_constant=pytest.fail)
    assert row["possible"]
    assert [one["margin"] for one in row["rows"]] == [0.05, 0.1, 0.2, 0.4, 0.8]
    assert [one["about"] for one in row["rows"]] == sorted((one["about"] for one in row["rows"]), reverse=True)
    few = precimap("plan", "mine.py:few", "--margin", "0.2", "--scheme", "int8")
    assert few.returncode == 1, "no map can pass"
    assert "No map can be certified with these splits. loss: the search split has 40 units" in " ".join(
        few.stdout.split()
    )
    assert not (folder / "run" / "state").exists()


def test_a_device_is_timed_and_a_search_plans_with_it(folder: Path, precimap: Callable[..., Ran]) -> None:
    timed = precimap("bench-device", "mine.py", "--batch-sizes", "64,1024", "--output", "device.json")
    assert timed.returncode == 0, timed.stderr
    assert max(map(len, timed.stdout.splitlines())) <= 80
    assert "batch 64, 1024; saved device.json" in " ".join(timed.stdout.split())
    profile = json.loads((folder / "device.json").read_text())
    assert (profile["target"], profile["batch_sizes"], len(profile["rows"])) == ("cpu-int8", [64, 1024], 8)
    scheme = "int8-static-u7"
    assert scheme in profile["schemes"]
    for row in profile["rows"]:
        if row["low"]:  # a planted gain, so that the answer does not hang on this machine
            row["low"][scheme]["ratio"] = {"median": 0.5, "lower": 0.4, "upper": 0.6, "n": 15}
    (folder / "device.json").write_text(json.dumps(profile))
    asked = ("search", "mine.py", "--scheme", scheme, "--margin", "0.2", "--profile", "device.json", "--json")
    found = precimap(*asked, "--batch-sizes", "256", "--run", "planned")
    assert found.returncode == 0, found.stderr
    assert "interpolated between measured batch sizes" in " ".join(found.stderr.split())
    assert json.loads(found.stdout)["latency"]["batch_sizes"] == [256]
    outside = precimap(*asked, "--batch-sizes", "4096", "--run", "outside")
    assert outside.returncode == 2
    assert "not at 4,096" in outside.stderr
    assert not (folder / "outside").exists()


def test_no_is_exit_code_1(precimap: Callable[..., Ran]) -> None:
    found = precimap("search", "mine.py", "--scheme", "fp8", "--margin", "1e-7", "--run", "no", "--json")
    assert found.returncode == 1
    assert json.loads(found.stdout)["certified"] is False


def test_layers_accounts_for_all_parameters(precimap: Callable[..., Ran]) -> None:
    found = precimap("layers", "mine.py")
    assert found.returncode == 0
    assert "19,696 parameters, all accounted for" in found.stdout
    assert "dead: dead.weight" in found.stdout


def test_layers_names_the_products_without_a_weight(precimap: Callable[..., Ran]) -> None:
    found = precimap("layers", "mine.py:attending", "--json")
    assert found.returncode == 0, found.stderr
    row = {"op": "matmul", "left": [125, 1, 64], "right": [125, 64, 1], "calls": 1, "flops": 2 * 125 * 64}
    assert json.loads(found.stdout)["products"] == [row]
    assert "matmul 125x1x64 125x64x1     1 16,000" in precimap("layers", "mine.py:attending").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("layers", "nowhere.py"), "does not exist"),
        (("layers", "syntax.py"), "line 1"),
        (("layers", "imports.py"), "line 2"),
        (("layers", "mine.py:broken"), "failed (line 6)"),
        (("layers", "mine.py:wrong"), "got int"),
        (("layers", "mine.py:absent"), "functions there: task, broken, wrong"),
        (("layers", "no.such.module:task"), "does not import"),
        ((*SEARCH, "--batch-sizes", "64;1"), "such as 64,1024"),
        ((*SEARCH, "--batch-sizes", "64"), "emulated counts FLOPs"),
        ((*SEARCH, "--profile", "mine.py"), "not a hardware profile"),
        (("bench-device", "mine.py", "--target", "emulated", "--output", "x"), "emulated has none"),
        (("search", "mine.py", "--scheme", "fp3", "--margin", "1", "--run", "x"), "fp8-static"),
        (("search", "mine.py", "--scheme", "fp8", "--margin", "0", "--run", "x"), "above zero"),
        (
            ("search", "mine.py", "--scheme", "fp8-static", "--margin", "1", "--run", "x", "--input-range", "max"),
            "percentile",
        ),
        ((*SEARCH, "--input-range", "rows:float32"), "an input takes amax"),
        ((*SEARCH, "--bytes-worth", "-1"), "0 or more; got -1.0"),
        ((*SEARCH, "--bytes-worth", "1", "--rule", "threshold"), "--bytes-worth with the knapsack"),
        ((*SEARCH, "--margin", "0.05%"), "expected a margin in units of loss, got 0.05%; per cent are for"),
        ((*SEARCH, "--margin", "five"), "got 'five'"),
        (("report", "nowhere"), "run directory"),
        (("certify", "mine.py", "mine.py", "--margin", "1"), "expected a precision map"),
    ],
)
def test_wrong_input_is_exit_code_2_with_one_message(
    arguments: tuple[str, ...], message: str, folder: Path, precimap: Callable[..., Ran]
) -> None:
    found = precimap(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert message in " ".join(found.stderr.split())
    assert not (folder / "x").exists()


def test_a_missing_option_is_exit_code_2(precimap: Callable[..., Ran]) -> None:
    assert precimap("search", "mine.py").returncode == 2


def test_the_shell_can_complete(precimap: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_PRECIMAP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "precimap se")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert precimap().stdout.split() == ["search"]


def test_a_percentage_is_a_share_of_the_baseline_s_metric() -> None:
    assert {name: margin_of(name, NE()) for name in NE_MARGINS} == pytest.approx(NE_MARGINS)
    assert margin_of("0.05%", Calibration()) == pytest.approx(0.0005)
    assert margin_of("0.0005", LogLoss()) == 0.0005
    with pytest.raises(InputError, match=r"expected a margin in nats, got 0\.05%"):
        margin_of("0.05%", LogLoss())
