"""Every measurement, written the moment it is made, so that a search that was killed goes on where it stood.

Invariant: what was measured is measured once. A row is committed before the next measurement starts; it survives the
death of the process at any moment, kill -9 included. A loss of power may take the last rows, never the file: waiting
for the disk after each row (synchronous = full) is not worth a measurement that can be made again.

One SQLite file per run directory in write-ahead mode, bound to one premise, with one process at work in it. Reading a
run (`open_journal`) needs this file alone and never disturbs that process. Not taken: a text log, which would need a
parser of its own to ask anything of it, and leaves half a line behind.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from precimap.errors import JournalError
from precimap.packed_arrays import UNREADABLE, packed, unpacked

SCHEMA_VERSION = 3
FILE_NAME = "measurements.sqlite"
LOCK_NAME = "run.lock"

_MADE_AT = "made_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now'))"
_TABLES = (
    "create table premise (key text primary key, value text not null)",
    # value: JSON. names: a JSON list, the names of the arrays in the .npz bytes of `arrays`, in their order.
    f"""create table measurement (number integer primary key, {_MADE_AT}, kind text not null, subject text not null,
        scheme text not null, value text not null, names text not null, arrays blob,
        unique (kind, subject, scheme))""",
    f"""create table conclusion (number integer primary key, {_MADE_AT}, kind text not null, subject text not null,
        value text not null, unique (kind, subject))""",
)
_FAULTS = (sqlite3.Error, UnicodeError, OverflowError)  # of a damaged file the text of an error may be damaged, too
_COLUMNS = "kind, subject, scheme, value, names, arrays, made_at"

# What a person can do, by the second word of SQLite's error name (SQLITE_READONLY_DIRECTORY: READONLY).
_DAMAGED = "the file is damaged: restore it from a backup, or choose another run directory"
_REMEDIES = {
    "FULL": "free space on the disk and give the same command again: what is measured is kept",
    "IOERR": "check the disk and give the same command again: what is measured is kept",
    "READONLY": "get the right to write there, or choose another run directory",
    "CANTOPEN": "get the right to write there, or choose another run directory",
    "PERM": "get the right to write there, or choose another run directory",
    "CORRUPT": _DAMAGED,
    "NOTADB": _DAMAGED,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """One row of a journal. A conclusion has no scheme and no arrays. made_at: UTC, ISO 8601."""

    kind: str
    subject: str
    scheme: str
    value: dict[str, Any]
    arrays: dict[str, np.ndarray]
    made_at: str


class Journal:
    """An open journal; made by `run_journal` and `open_journal`.

    Every method raises JournalError when the file cannot be read or written, saying what to do.
    """

    def __init__(self, connection: sqlite3.Connection, where: str) -> None:
        self._connection = connection
        self._where = where

    def record(
        self,
        kind: str,
        subject: str,
        value: dict[str, Any],
        scheme: str = "",
        arrays: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Commit one measurement: when this returns, it survives the process.

        value: what JSON can hold; floats come back bit for bit, infinities and NaN included, tuples as lists.
        arrays: numbers of any shape and dtype, which come back bit for bit.
        Raises JournalError when (kind, subject, scheme) was measured before: it is to be found, not measured again.
        """
        names, blob = packed(arrays or {}, f"{kind} of {subject}")
        row = (kind, subject, scheme, json.dumps(value), names, blob)
        try:
            self._write(
                "insert into measurement (kind, subject, scheme, value, names, arrays) values (?,?,?,?,?,?)", row
            )
        except sqlite3.IntegrityError as error:
            raise JournalError(
                f"{self._where}: expected a new measurement, got {' '.join((kind, subject, scheme)).strip()} again; "
                "take the one that is there"
            ) from error

    def find(self, kind: str, subject: str, scheme: str = "") -> Measurement | None:
        """The measurement of that name; None when it was not made yet."""
        rows = self._read(
            f"select {_COLUMNS} from measurement where kind = ? and subject = ? and scheme = ?", (kind, subject, scheme)
        )
        return self._measurement(rows[0]) if rows else None

    def measurements(self, kind: str) -> tuple[Measurement, ...]:
        """All measurements of one kind, in the order in which they were made."""
        rows = self._read(f"select {_COLUMNS} from measurement where kind = ? order by number", (kind,))
        return tuple(self._measurement(row) for row in rows)

    def count(self, kind: str) -> int:
        """How many measurements of one kind there are."""
        return int(self._read("select count(*) from measurement where kind = ?", (kind,))[0][0])

    def conclude(self, kind: str, subject: str, value: dict[str, Any]) -> None:
        """Commit a conclusion: what follows from measurements, and is replaced when it is drawn again."""
        row = (kind, subject, json.dumps(value))
        self._write("insert or replace into conclusion (kind, subject, value) values (?, ?, ?)", row)

    def conclusions(self, kind: str) -> tuple[Measurement, ...]:
        """All conclusions of one kind; the one that was drawn last comes last."""
        rows = self._read(
            "select kind, subject, '', value, '[]', null, made_at from conclusion where kind = ? order by number",
            (kind,),
        )
        return tuple(self._measurement(row) for row in rows)

    def premise(self) -> dict[str, str]:
        return dict(self._read("select key, value from premise order by key", ()))

    def _write(self, statement: str, row: tuple[Any, ...]) -> None:
        try:
            self._connection.execute(statement, row)
        except sqlite3.IntegrityError:
            raise
        except (sqlite3.Error, OverflowError) as error:  # Overflow: a blob beyond what SQLite can count
            raise _refusal(self._where, "could not be written", error) from error

    def _read(self, query: str, parameters: tuple[str, ...]) -> list[Any]:
        try:
            return self._connection.execute(query, parameters).fetchall()
        except _FAULTS as error:
            raise _refusal(self._where, "could not be read", error) from error

    def _measurement(self, row: Any) -> Measurement:
        kind, subject, scheme, value, names, blob, made_at = row
        try:
            return Measurement(
                kind=kind,
                subject=subject,
                scheme=scheme,
                value=json.loads(value),
                arrays=unpacked(names, blob),
                made_at=made_at,
            )
        except UNREADABLE as error:
            raise JournalError(f"{self._where}: {kind} of {subject} could not be read ({error}); {_DAMAGED}") from error


@contextmanager
def run_journal(directory: Path | None, premise: Mapping[str, str]) -> Iterator[Journal]:
    """The journal of the run in `directory`, to be worked in by this process alone.

    None keeps it in memory. A directory without a run gets one, and is made if need be; a run with the same `premise`
    is taken up again. Raises JournalError, which names what changed, for a run with another premise; which names the
    process, for a run that is worked in (in this process, too); and for a directory or file that cannot be used.

    The lock ends with the process, however that ends. A process that it forked and that outlives it keeps the lock.
    """
    with ExitStack() as held:
        if directory is None:
            where, database = "the journal in memory", ":memory:"
        else:
            where = database = str(directory / FILE_NAME)
            held.enter_context(_alone(directory))
        connection = held.enter_context(_connected(where, database, uri=False))
        try:
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = normal")
            if _is_blank(connection):
                _begin(connection, premise)
            _check(connection, where)
        except _FAULTS as error:
            raise _refusal(where, "cannot be used", error) from error
        journal = Journal(connection, where)
        _check_premise(journal.premise(), premise, where)
        yield journal


@contextmanager
def open_journal(directory: Path) -> Iterator[Journal]:
    """The journal of a run, to read; also while a search is at work in it, and from a directory that is read-only.

    Raises JournalError when there is none, or it is damaged or of another schema version.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        raise JournalError(f"expected a run directory with {FILE_NAME}, got {directory}")
    # Where nothing can be written, SQLite refuses write-ahead files unless told that they do not change. Without a log
    # beside it nobody has the file open.
    frozen = not os.access(directory, os.W_OK) and not path.with_name(FILE_NAME + "-wal").exists()
    database = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if frozen else ''}"
    with _connected(str(path), database, uri=True) as connection:
        try:
            if _is_blank(connection):
                raise JournalError(f"{path} holds no run: its search ended before it began; give its command again")
            _check(connection, str(path))
        except _FAULTS as error:
            raise _refusal(str(path), "cannot be read", error) from error
        yield Journal(connection, str(path))


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Makes the directory and holds its lock. The lock file stays: removing it would let two processes in."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)  # less the umask
    except OSError as error:
        raise JournalError(f"{directory} cannot be made a run directory ({error.strerror}); choose another") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
            who = "this process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
            raise JournalError(
                f"{directory}: {who} is working in this run; wait until it has ended, or choose another run directory"
            ) from error
        except OSError as error:
            raise JournalError(
                f"{directory} cannot be locked ({error.strerror}); choose a run directory on a local disk"
            ) from error
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise JournalError(
                f"{directory / LOCK_NAME} could not be written ({error.strerror}); free space on the disk and give the same "
                "command again"
            ) from error
        yield
    finally:
        os.close(lock)


@contextmanager
def _connected(where: str, database: str, *, uri: bool) -> Iterator[sqlite3.Connection]:
    """A connection in which each statement commits itself."""
    try:
        connection = sqlite3.connect(database, uri=uri, isolation_level=None)
    except sqlite3.Error as error:
        raise _refusal(where, "cannot be opened", error) from error
    with closing(connection):
        yield connection


def _is_blank(connection: sqlite3.Connection) -> bool:
    """True for a new file, and for one whose process died before it had written the premise."""
    return not connection.execute("select 1 from sqlite_master limit 1").fetchall()


def _begin(connection: sqlite3.Connection, premise: Mapping[str, str]) -> None:
    """Tables, premise and version in one transaction: all of them or none."""
    connection.execute("begin immediate")
    for table in _TABLES:
        connection.execute(table)
    connection.executemany("insert into premise values (?, ?)", sorted(premise.items()))
    connection.execute(f"pragma user_version = {SCHEMA_VERSION}")
    connection.execute("commit")


def _check(connection: sqlite3.Connection, where: str) -> None:
    """Raises JournalError for another schema version, or for pages that do not fit together."""
    (version,) = connection.execute("pragma user_version").fetchone()
    if version != SCHEMA_VERSION:
        raise JournalError(
            f"{where}: expected journal schema {SCHEMA_VERSION}, got {version or 'an older one'}; "
            "read it with the precimap that wrote it, or choose another run directory"
        )
    (found,) = connection.execute("pragma quick_check(1)").fetchone()
    if found != "ok":
        raise JournalError(f"{where}: {found}; {_DAMAGED}")


def _check_premise(was: Mapping[str, str], given: Mapping[str, str], where: str) -> None:
    changed = [
        f"{key} was {was.get(key, 'not stated')}, is {given.get(key, 'not stated')}"
        for key in sorted({*was, *given})
        if was.get(key) != given.get(key)
    ]
    if changed:
        raise JournalError(
            f"{where} belongs to another premise: {'; '.join(changed)}. Choose another run directory, or give the old "
            "premise to take the run up again"
        )


def _refusal(where: str, what: str, error: Exception) -> JournalError:
    word = str(getattr(error, "sqlite_errorname", "")).removeprefix("SQLITE_").split("_")[0]
    return JournalError(f"{where} {what} ({error}); {_REMEDIES.get(word, 'choose another run directory')}")
