"""A write either happens as a whole or not at all, and when it does it is on the disk."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import precimap.durable
from precimap.durable import write_bytes, write_text
from precimap.errors import JournalError, SaveError
from precimap.journal import LOCK_NAME, run_journal
from precimap.searching.certificate.ledger import AskedSplit, Ledger

# The package without what imports torch: a process then starts in a moment, not in seconds.
ALONE = f"""
import sys, types
sys.modules["precimap"] = package = types.ModuleType("precimap")
package.__path__ = [{str(Path(precimap.durable.__file__).parent)!r}]
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def failing(kind: int) -> Callable[..., Any]:
    def call(*args: object, **kwargs: object) -> None:
        raise OSError(kind, os.strerror(kind))

    return call


def test_writes_what_was_given(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    write_text(path, "größer\r\n")
    assert path.read_bytes() == "größer\r\n".encode()
    write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["map.json"]


def test_the_longest_name_a_folder_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_text(path, "x")
    assert path.read_text() == "x"


def test_a_new_file_follows_the_umask_and_an_old_one_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    old = os.umask(0o027)
    try:
        write_text(path, "new")
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o604)
        write_text(path, "newer")
        assert path.stat().st_mode & 0o777 == 0o604
    finally:
        os.umask(old)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "latest.json"
    real.write_text("old")
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink()
    assert real.read_text() == "new"


def test_the_file_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the whole content, rename, fsync of the folder: in another order a crash can leave an empty file."""
    path = tmp_path / "map.json"
    path.write_text("old")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(handle: int) -> None:
        what = Path(os.readlink(f"/proc/self/fd/{handle}"))
        steps.append("folder" if what == tmp_path else f"{what.read_text()} beside {path.read_text()}")
        fsync(handle)

    def seen_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_text(path, "new")
    assert steps == ["new beside old", "rename", "folder"]


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, kind: int) -> None:
    path = tmp_path / "map.json"
    path.write_text("old")
    monkeypatch.setattr(os, step, failing(kind))
    expected = rf"cannot write .*map\.json: {os.strerror(kind)}; the old file is still there, unchanged"
    with pytest.raises(SaveError, match=expected):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["map.json"]


def test_a_failure_of_a_new_file_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(SaveError, match="No space left on device; no file was made"):
        write_text(tmp_path / "map.json", "new")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "map.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["map.json"]


def test_a_folder_that_cannot_be_synced_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new file has the name by then, so the message must not claim that the old one is there."""
    path, fsync = tmp_path / "map.json", os.fsync
    path.write_text("old")

    def fsync_files_only(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")) == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync_files_only)
    with pytest.raises(SaveError, match=r"wrote .*map\.json, but its folder cannot be synced"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "new"


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"nowhere/map\.json: No such file or directory; no file was made"):
        write_text(tmp_path / "nowhere" / "map.json", "new")


KILLED = """
import os, signal, sys
from pathlib import Path
import precimap.durable as module
module.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
module.write_text(Path(sys.argv[1]), "never")
"""

WRITING = """
import sys
from pathlib import Path
import precimap.durable as module
def waiting(source, target, replace=module.os.replace):
    print(source, flush=True)
    sys.stdin.readline()
    replace(source, target)
module.os.replace = waiting
module.write_text(Path(sys.argv[1]), "at last")
"""


def process(code: str, path: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", ALONE + code, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_killed_processes_left_is_gone_after_the_next_write(tmp_path: Path) -> None:
    for number in range(3):
        with process(KILLED, tmp_path / f"{number}.json") as killed:
            killed.communicate()
        assert killed.returncode == -signal.SIGKILL
        assert [name[:10] for name in names(tmp_path)] == [".precimap-"], "what the one before left is gone"
    (tmp_path / ".precimap-of-the-user.txt").write_text("stays")
    write_text(tmp_path / "map.json", "new")
    assert names(tmp_path) == [".precimap-of-the-user.txt", "map.json"]


def test_what_another_process_writes_just_now_is_left_alone(tmp_path: Path) -> None:
    with process(WRITING, tmp_path / "other.json") as other:
        assert other.stdin is not None
        assert other.stdout is not None
        aside = Path(other.stdout.readline().rstrip("\n"))
        write_text(tmp_path / "map.json", "new")
        assert names(tmp_path) == sorted([aside.name, "map.json"])
        other.stdin.write("\n")
        other.stdin.flush()
    assert other.returncode == 0
    assert names(tmp_path) == ["map.json", "other.json"]
    assert (tmp_path / "other.json").read_text() == "at last"


def test_a_file_that_was_taken_for_abandoned_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, taken = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not taken:
            taken.extend(tmp_path.glob(".precimap-*.tmp"))
            taken[0].unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    write_text(tmp_path / "map.json", "new")
    assert len(taken) == 1
    assert names(tmp_path) == ["map.json"]
    assert (tmp_path / "map.json").read_text() == "new"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; needs the right to mount one."""
    mount, umount = shutil.which("mount"), shutil.which("umount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("only root can mount a small file system")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system here: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run([umount, str(disk)], check=True)


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    path = small_disk / "map.json"
    write_text(path, "old")
    with pytest.raises(SaveError, match="No space left on device; the old file is still there"):
        write_bytes(path, bytes(1 << 20))
    assert path.read_text() == "old"
    assert names(small_disk) == ["map.json"]
    write_text(path, "and there is room again")
    assert path.read_text() == "and there is room again"


def test_a_disk_without_a_byte_free_is_an_error_of_our_own(small_disk: Path) -> None:
    """The lock of a run and the one of a ledger are files, too."""
    for folder in ("run", "ledger"):
        (small_disk / folder).mkdir()
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with (
        pytest.raises(JournalError, match=rf"{LOCK_NAME} could not be written \(No space left on device\); free space"),
        run_journal(small_disk / "run", {}),
    ):
        pass
    split = AskedSplit("split", (np.arange(100, dtype=np.uint64),), lambda: "")
    with pytest.raises(SaveError, match="No space left on device"):
        Ledger.open(small_disk / "ledger", split, 0.05).spend("chain", 0.05, "what it is")
    assert not list((small_disk / "ledger").glob("*.json"))
    (small_disk / "filler").unlink()
    assert Ledger.open(small_disk / "ledger", split, 0.05).spend("chain", 0.05, "what it is") == 0.05
