"""Every measurement, written the moment it is made.

Invariant: a row is committed before the next measurement starts, so that a killed run leaves all it has measured behind.
One SQLite file per run directory in write-ahead mode; it is bound to a premise and refuses another. Reading a run again
(`precimap report`) needs this file alone. A text log would need a parser of its own to ask anything of it.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precimap.errors import JournalError

SCHEMA_VERSION = 1
FILE_NAME = "measurements.sqlite"

_TABLES = """
create table if not exists premise (key text primary key, value text not null);
create table if not exists measurement (
    number integer primary key,
    made_at text not null default (strftime('%Y-%m-%dT%H:%M:%fZ', 'now')),
    kind text not null,        -- preflight, inventory, floor, probe, joint, certificate, deployment, summary
    subject text not null,     -- a layer's name, a map's fingerprint, ...
    scheme text not null,
    value text not null        -- JSON
);
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row of a journal."""

    kind: str
    subject: str
    scheme: str
    value: dict[str, Any]
    made_at: str


class Journal:
    """An open journal; use `open_journal`."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    def record(self, kind: str, subject: str, value: dict[str, Any], scheme: str = "") -> None:
        """Commit one measurement. Raises JournalError when it cannot be written."""
        try:
            with self._connection:
                self._connection.execute(
                    "insert into measurement (kind, subject, scheme, value) values (?, ?, ?, ?)",
                    (kind, subject, scheme, json.dumps(value)),
                )
        except sqlite3.Error as error:
            raise JournalError(
                f"{self.path}: a measurement could not be written ({error}); free space or rights"
            ) from error

    def measurements(self, kind: str) -> tuple[Measurement, ...]:
        """All rows of one kind, in the order in which they were made."""
        rows = self._connection.execute(
            "select kind, subject, scheme, value, made_at from measurement where kind = ? order by number", (kind,)
        )
        return tuple(Measurement(k, subject, scheme, json.loads(value), at) for k, subject, scheme, value, at in rows)

    def premise(self) -> dict[str, str]:
        return dict(self._connection.execute("select key, value from premise order by key"))


@contextmanager
def new_journal(directory: Path, premise: dict[str, str]) -> Iterator[Journal]:
    """A journal for a new run in `directory`, which is made. Raises JournalError if a run is there already."""
    path = directory / FILE_NAME
    if path.exists():
        raise JournalError(f"{directory} holds a run already; choose another directory or remove it")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(f"{directory} cannot be made ({error.strerror}); choose another run directory") from error
    with _connected(path) as connection:
        connection.executescript(_TABLES)
        with connection:
            rows = {"journal schema": str(SCHEMA_VERSION), **premise}
            connection.executemany("insert into premise values (?, ?)", sorted(rows.items()))
        yield Journal(connection, path)


@contextmanager
def open_journal(directory: Path) -> Iterator[Journal]:
    """The journal of a finished or interrupted run, to read. Raises JournalError if there is none or it is damaged."""
    path = directory / FILE_NAME
    if not path.is_file():
        raise JournalError(f"expected a run directory with {FILE_NAME}, got {directory}")
    with _connected(path) as connection:
        journal = Journal(connection, path)
        version = journal.premise().get("journal schema")
        if version != str(SCHEMA_VERSION):
            raise JournalError(f"{path}: expected journal schema {SCHEMA_VERSION}, got {version}")
        yield journal


@contextmanager
def _connected(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(path)
    except sqlite3.Error as error:
        raise JournalError(f"{path} cannot be opened ({error})") from error
    try:
        connection.execute("pragma journal_mode = wal")
        yield connection
    except sqlite3.DatabaseError as error:
        raise JournalError(f"{path} is not a readable journal ({error})") from error
    finally:
        connection.close()
