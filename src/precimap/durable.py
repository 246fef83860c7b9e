"""Writing a file so that a crash or a full disk leaves either the old file or the new one, never half of one.

Invariant: the name always points at a complete file, and when `write_text` has returned, the new one is on the disk.
Write aside in the same folder, fsync, rename over the name, fsync the folder. Writing in place and keeping a backup was
not taken: a reader could meet the half-written file.

The file aside is locked while it is written (POSIX `flock`, which ends with its process, however that ends): one that
nobody holds is what a killed process left, and the next write into the folder removes it. A name with the process's
number was not taken: numbers come again, and mean nothing on another machine that shares the folder.
"""

import contextlib
import fcntl
import os
import secrets
import stat
from pathlib import Path

from precimap.errors import SaveError

_ASIDE = ".precimap-*.tmp"


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; line ends as given. Raises SaveError as `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`. The folder must exist; a symbolic link is followed; the mode of an old file is kept.

    Raises SaveError when the disk is full, the folder is missing or not writable, ...: what was at `path` is then
    still there, and nothing else is left behind.
    """
    target = Path(os.path.realpath(path))
    aside = target.parent / _ASIDE.replace("*", secrets.token_hex(8))
    try:
        _remove_abandoned(target.parent)
        _write_over(aside, target, data)
    except OSError as error:
        _remove(aside)
        kept = "the old file is still there, unchanged" if os.path.exists(target) else "no file was made"
        raise SaveError(f"cannot write {path}: {error.strerror or error}; {kept}") from error
    except BaseException:  # an interrupt must not leave the temporary file, either
        _remove(aside)
        raise
    try:
        _sync_folder(target.parent)
    except OSError as error:
        raise SaveError(
            f"wrote {path}, but its folder cannot be synced ({error.strerror or error}): "
            "after a power failure the old file may be back; check the disk"
        ) from error


def _write_over(aside: Path, target: Path, data: bytes) -> None:
    with os.fdopen(_locked(aside), "wb") as file:
        handle = file.fileno()
        with contextlib.suppress(FileNotFoundError):
            os.fchmod(handle, stat.S_IMODE(target.stat().st_mode))
        file.write(data)
        file.flush()
        os.fsync(handle)
        os.replace(aside, target)  # while it is locked: a file aside that nobody holds is taken for abandoned


def _locked(aside: Path) -> int:
    """A new file at `aside`, locked. Between its making and its locking another process may take it for abandoned."""
    while True:
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # less the umask, as open() would
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for abandoned, either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def _remove_abandoned(folder: Path) -> None:
    """What killed processes left in the folder; what another process writes just now is locked, and stays."""
    with contextlib.suppress(OSError):  # a folder that cannot be listed may still be written to
        for aside in list(folder.glob(_ASIDE)):
            with contextlib.suppress(OSError):  # gone meanwhile, locked, or not ours to remove
                _remove_if_free(aside)


def _remove_if_free(aside: Path) -> None:
    handle = os.open(aside, os.O_WRONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside.unlink()
    finally:
        os.close(handle)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(aside: Path) -> None:
    with contextlib.suppress(OSError):
        aside.unlink()
