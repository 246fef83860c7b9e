"""How a command ends: each exit code means one thing, stdout holds the result alone, and names do nothing to a terminal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.text import Text

from precimap.cli import app
from precimap.cli_ending import Result, ended
from precimap.errors import AlphaSpent, JournalError, MissingExtra, TaskError
from precimap.report.run_record import RunRecord, read_run
from precimap.report.terminal import Rows, Terminal, lines_of, shown

TASK = """
import ctypes, os, sys, time
print("at import")
from helpers.small_tasks import planted_task, forward as plain
libc = ctypes.CDLL(None)
def task():
    print("in task()")
    os.write(1, b"written to the file below\\n")
    def forward(model, batch):
        print("in forward")
        libc.puts(b"printed by C")
        return plain(model, batch)
    return planted_task(forward=forward)
def leaving():
    sys.exit(1)
def waiting():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
def slow():
    def forward(model, batch):
        until = time.monotonic() + 5
        while os.path.exists("run/measurements.sqlite") and not os.path.exists("go") and time.monotonic() < until:
            time.sleep(0.01)
        return plain(model, batch)
    return planted_task(forward=forward)
def broken():
    task = planted_task()
    def forward(model, batch):
        raise MemoryError("planted")
    return planted_task(forward=forward)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ending")
    (made / "mine.py").write_text(TASK)
    return made


def started(*arguments: str, cwd: Path, out: int) -> "subprocess.Popen[str]":
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", "from precimap.cli import main; main()", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "80"}, stdout=out, stderr=subprocess.PIPE, text=True,
        # A job in the background of a shell ignores interrupts, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def test_a_task_that_prints_does_not_break_the_json(folder: Path) -> None:
    with started("layers", "mine.py", "--json", cwd=folder, out=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert [layer["name"] for layer in json.loads(out)["layers"]]
    for said in ("at import", "in task()", "written to the file below", "in forward", "printed by C"):
        assert said in err


def test_a_full_stdout_is_no_answer(folder: Path) -> None:
    with open("/dev/full", "wb") as full, started("layers", "mine.py", cwd=folder, out=full.fileno()) as process:
        err = process.communicate()[1]
    assert process.returncode == 74
    assert err.splitlines()[-1] == "cannot print the result: No space left on device"


def test_a_reader_that_has_left_is_no_answer(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with started("layers", "mine.py", cwd=folder, out=writing) as process:
        os.close(writing)
        err = process.communicate()[1]
    assert process.returncode == 74
    assert err.splitlines()[-1] == "cannot print the result: Broken pipe"


def test_an_interrupt_is_told(folder: Path) -> None:
    with started("layers", "mine.py:waiting", cwd=folder, out=subprocess.PIPE) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "ready\n":
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in err


def test_an_interrupted_search_says_that_nothing_is_lost_and_goes_on(folder: Path) -> None:
    """Interrupted after its first measurement, when every further one takes five seconds."""
    asked = ("search", "mine.py:slow", "--scheme", "fp8", "--margin", "0.2", "--rounding-draws", "0", "--run", "run")
    with started(*asked, cwd=folder, out=subprocess.PIPE) as process:
        measured = first_measured(folder / "run", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert err.splitlines()[-1] == (
        "Interrupted. Nothing that was measured is lost: it is kept in run, and the same command goes on where it stopped."
    )
    (folder / "go").touch()
    with started(*asked, "--json", cwd=folder, out=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["certified"]
    after = read_run(folder / "run").batches
    assert all(after[stage] >= batches for stage, batches in measured.batches.items())


def first_measured(run: Path, process: "subprocess.Popen[str]") -> RunRecord:
    """The run as soon as it holds a measurement."""
    while process.poll() is None:
        try:
            found = read_run(run)
            if any(found.batches.values()):
                return found
        except JournalError:
            pass  # there is none yet
        time.sleep(0.05)
    raise AssertionError(f"the search ended: {process.communicate()[1]}")


def failing(error: BaseException) -> Callable[[], Result]:
    def command() -> Result:
        raise error

    return command


def test_each_failure_has_the_code_that_it_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECIMAP_STATE", str(tmp_path))
    assert ended(failing(TaskError("the split [/] is\x1b[31m red\ncertified: nothing"))) == 2
    assert capsys.readouterr().err == "TaskError: the split [/] is\\x1b[31m red\n  certified: nothing\n"
    assert ended(failing(AlphaSpent("all"))) == 2
    assert ended(failing(MissingExtra("pip install 'precimap[onnx]'"))) == 2  # an ImportError of any other kind is ours
    assert issubclass(MissingExtra, ImportError)
    assert ended(failing(SystemExit(1))) == 2
    assert ended(failing(KeyboardInterrupt())) == 130
    capsys.readouterr()
    for error in (RuntimeError("planted"), MemoryError(), AssertionError("planted"), app_exit()):
        assert ended(failing(error)) == 70
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert type(error).__name__ in said
        assert said.rstrip("\n").endswith(f"its traceback is in {tmp_path / 'last-error.txt'}")
        assert f"{type(error).__name__}" in (tmp_path / "last-error.txt").read_text().splitlines()[-1]


def app_exit() -> Exception:
    """What click raises for an exit code, raised by code of a task."""
    import typer

    return typer.Exit(1)


def test_a_stdout_that_is_not_there_is_told_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert ended(failing(AssertionError("worked"))) == 74


def test_every_command_ends_that_way(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [command.callback.__name__ for command in app.registered_commands if command.callback is not None]
    assert set(names) >= {"layers", "search", "certify", "deploy", "report", "bench_device", "demo"}
    assert all(command.callback.__wrapped__.__annotations__["return"] is Result for command in app.registered_commands)


NASTY = (
    "[red]",
    "[/]",
    "[link=file:///]",
    ":smile:",
    "\x1b[2J",
    "\x1b]0;title\x07",
    "a\nCERTIFIED",
    "\r",
    "\x9b31m",
    "\u202egnp",
    "\ud800",
)


@given(st.text(st.characters() | st.sampled_from("[]/:\x1b\x07\n\r\u202e\u2028")))
def test_what_is_shown_is_one_line_of_printable_characters(text: str) -> None:
    said = shown(text)
    assert said.isprintable()
    assert shown(said) == said
    if text.isprintable():
        assert said == text


@pytest.mark.parametrize("name", NASTY)
def test_names_do_nothing_to_a_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a cell, a title and a line; and past all of these."""
    table = Rows(title=name)
    table.add_column("heading")
    table.add_row(name)
    page = Group(table, lines_of([f"note: {name}"], "red"), Text(f"raw {name}"), f"raw {name}")
    console = Terminal(width=200)
    console.print(page)
    console.print(f"raw {name}")
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    plain = shown(name)
    assert plain in (line.strip() for line in lines)
    assert f"note: {plain}" in (line.strip() for line in lines)
    assert sum(plain.split("\\n")[0] in line for line in lines) >= 2
