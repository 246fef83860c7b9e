"""C++ of this package made into a library for this machine, once, at first use.

Invariant: a library is whole or not there, and its name tells what it was made of: source, flags and compiler. One process
builds at a time, the others wait and find it. Whatever fails is said in one sentence, which a target gives as its reason;
nothing else is computed in its stead.

Not taken: `torch.utils.cpp_extension`, which takes torch's headers (half a minute, another library for each torch) and
ninja; wheels with the library inside, which need one build for each platform. `-march=native` neither: a home folder may
be shared by machines that differ, so the flags name what is used, and the caller looks whether this CPU has it.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

from precimap.durable import write_bytes
from precimap.errors import DeployError, SaveError

_LANGUAGE = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off")
_LONGEST = 300  # seconds that a compiler may take


@functools.cache
def library(source: Path, flags: tuple[str, ...]) -> ctypes.CDLL:
    """The library of a C++ file, loaded. Raises DeployError as `built`, and for one that does not load."""
    path = built(source, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DeployError(f"{path}, made of {source.name}, cannot be used ({error})") from error


def built(source: Path, flags: tuple[str, ...], includes: tuple[Path, ...] = ()) -> Path:
    """The library of a C++ file NAME.cpp, its headers NAME*.h beside it and further files that it includes.

    flags: beside those of all; what they lead to, such as another library's headers, has its version in its path or in
    one of them. Raises DeployError with what failed: no compiler, one that fails, no place to keep it.
    """
    command = _compiler()
    own = (source, *sorted(source.parent.glob(f"{source.stem}*.h")), *includes)
    made_of = repr(([path.read_bytes() for path in own], _LANGUAGE, flags, _said_by([*command, "--version"])))
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    path = _folder() / f"{source.stem}-{version('precimap')}-{digest}.so"
    try:
        with open(path.with_suffix(".lock"), "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                write_bytes(path, _compiled([*command, *_LANGUAGE], source, flags))
        return path
    except (OSError, SaveError) as error:
        raise DeployError(f"{path}, made of {source.name}, cannot be used ({error})") from error


def _compiler() -> list[str]:
    """As Inductor takes it: $CXX, or g++."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise DeployError(f"no C++ compiler: expected {command[0]} in PATH; install g++, or set CXX")
    return command


def _compiled(command: list[str], source: Path, flags: tuple[str, ...]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made.so"
        _said_by([*command, str(source), "-o", str(made), *flags])  # libraries to link with come after what needs them
        return made.read_bytes()


def _said_by(command: list[str]) -> str:
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_LONGEST, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeployError(f"the C++ compiler {command[0]} does not run ({error})") from error
    if ended.returncode:
        lines = (
            [line for line in ended.stderr.splitlines() if "error" in line] or ended.stderr.splitlines() or ["nothing"]
        )
        raise DeployError(f"the C++ compiler {command[0]} ended with {ended.returncode} and said: {lines[0].strip()}")
    return ended.stdout


def _folder() -> Path:
    """The user's own, in the cache directory. Raises DeployError for one that somebody else could put code into."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "precimap"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:
        raise DeployError(f"no folder to keep compiled code in ({error}); set XDG_CACHE_HOME to one") from error
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise DeployError(
            f"others can write to {folder}, where compiled code is kept; chmod 700, or set XDG_CACHE_HOME"
        )
    return folder
