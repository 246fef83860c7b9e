"""The folder that an export makes: all of it, or none.

Invariant: the name that was asked for is either as it was or a whole export. Files are written into a folder beside it,
which takes the name at the end. That folder is locked for as long as it is written (`flock`, which ends with its
process), so that the next export to the same name removes what a killed one left. Writing into the folder itself and
removing what is there on a failure was not taken: a killed process removes nothing.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from precimap.errors import SaveError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which is at `output` when the block has ended.

    Raises SaveError where there is something already, before the block, and where anything could not be written.
    """
    target = Path(os.path.realpath(output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        what = "a folder with files in it" if target.is_dir() else "a file"
        raise SaveError(
            f"{output}: expected a name that is free, or an empty folder; there is {what}, which is left alone"
        )
    aside = target.parent / f".{target.name}.precimap-{secrets.token_hex(8)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        aside.mkdir()
        with _locked(aside):
            yield aside
            _synced(aside)
            os.replace(aside, target)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SaveError(f"cannot write {output}: {why}; no folder was made") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: then nobody takes it for abandoned, either
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(target: Path) -> None:
    """What killed processes left of this name; what another one writes just now is locked, and stays."""
    for aside in target.parent.glob(f".{target.name}.precimap-*"):
        with contextlib.suppress(OSError):
            handle = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(aside)
            finally:
                os.close(handle)


def _synced(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
