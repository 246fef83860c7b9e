"""The journal and other processes: one at work at a time, and what a killed one leaves behind."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import precimap.journal
from precimap.errors import JournalError
from precimap.journal import open_journal, run_journal

PREMISE = {"weights": "1"}

# The journal without the rest of the package, which imports torch: a process then starts in a moment, not in seconds.
ALONE = f"""
import sys, types
sys.modules["precimap"] = package = types.ModuleType("precimap")
package.__path__ = [{str(Path(precimap.journal.__file__).parent)!r}]
"""


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", ALONE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = """
import sys
from pathlib import Path
from precimap.journal import run_journal
with run_journal(Path(sys.argv[1]), {"weights": "1"}) as journal:
    journal.record("probe", "first", {"drop": 1.0})
    print("working", flush=True)
    sys.stdin.readline()
    journal.record("probe", "second", {"drop": 2.0})
    print("still", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        assert first.stdout.readline() == "working\n"
        message = f"process {first.pid} is working in this run"
        with pytest.raises(JournalError, match=message), run_journal(tmp_path, PREMISE):
            pass
        with pytest.raises(JournalError, match=message), run_journal(tmp_path, {"weights": "2"}):
            pass
        with open_journal(tmp_path) as reader:  # reading is free, and sees each row as soon as it is there
            assert [m.subject for m in reader.measurements("probe")] == ["first"]
            first.stdin.write("\n")
            first.stdin.flush()
            assert first.stdout.readline() == "still\n"
            assert [m.subject for m in reader.measurements("probe")] == ["first", "second"]
        first.kill()
    with run_journal(tmp_path, PREMISE) as journal:
        assert len(journal.measurements("probe")) == 2


RECORD = """
import sys, numpy as np
from pathlib import Path
from precimap.journal import run_journal
with run_journal(Path(sys.argv[1]), {"weights": "1"}) as journal:
    done = len(journal.measurements("probe"))
    print("has", done, flush=True)
    for number in range(done, 100000):
        rows = np.random.default_rng(number).standard_normal(number % 7 * 400)
        journal.record("probe", f"layer {number}", {"number": number}, "fp8", {"rows": rows})
        print("row", number, flush=True)
"""


def test_kill_9_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    """Each process is killed after a number of reported measurements, none or a few: whatever the machine is busy with."""
    chance, told = random.Random(20), 0
    for kill in range(24):
        with python(RECORD, tmp_path) as process:
            assert process.stdout is not None
            lines = []
            if not kill % 4:  # during its start, wherever that is by then
                time.sleep(chance.uniform(0, 0.4))
            else:
                lines = [process.stdout.readline() for _ in range(1 + chance.randint(0, 5))]
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.read().splitlines()
        assert process.returncode == -signal.SIGKILL
        reported = [int(line.split()[1]) for line in lines if line.startswith("row") and line.split()[1:]]
        assert all(number >= told for number in reported), "measured again"
        told = max(told, *(number + 1 for number in reported), 0)
        with run_journal(tmp_path, PREMISE) as journal:
            rows = journal.measurements("probe")
        assert [m.value["number"] for m in rows] == list(range(len(rows)))
        assert len(rows) >= told
        last = rows[-1:]
        assert all(m.arrays["rows"].shape == (m.value["number"] % 7 * 400,) for m in last)
        told = len(rows)
    assert told > 24, "the kills came before anything was measured"
    for row in rows:
        expected = np.random.default_rng(row.value["number"]).standard_normal(row.value["number"] % 7 * 400)
        assert row.arrays["rows"].tobytes() == expected.tobytes()


LIMITED = """
import resource, sys
from pathlib import Path
from precimap.errors import JournalError
from precimap.journal import run_journal
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    with run_journal(Path(sys.argv[1]), {"weights": "1"}):
        print("got in")
except JournalError as error:
    print(error)
"""


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A process that may write no byte: as on a full disk, without the right to mount one."""
    with python(LIMITED, tmp_path) as process:
        said = process.communicate()[0]
    assert said.startswith(f"{tmp_path / 'run.lock'} could not be written (File too large); free space")
    with run_journal(tmp_path, PREMISE):
        pass


HALFWAY = """
import os, signal, sys
from pathlib import Path
import precimap.journal as module
module._TABLES = (*module._TABLES[: int(sys.argv[2])], "select die()")
def connected(*arguments, connect=module.sqlite3.connect, **named):
    connection = connect(*arguments, **named)
    connection.create_function("die", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
    return connection
module.sqlite3.connect = connected
with module.run_journal(Path(sys.argv[1]), {"weights": "1"}):
    print("too late")
"""


@pytest.mark.parametrize("tables", [0, 1, 3])
def test_an_interrupted_creation_is_a_new_run(tmp_path: Path, tables: int) -> None:
    with python(HALFWAY, tmp_path, tables) as process:
        assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(JournalError, match="holds no run"), open_journal(tmp_path):
        pass
    with run_journal(tmp_path, PREMISE) as journal:
        assert journal.premise() == PREMISE
        journal.record("probe", "a", {})
