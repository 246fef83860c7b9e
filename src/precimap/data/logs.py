"""Logs: files of rows, read as one sequence, as the tensors that a model takes.

Invariant: the same rows give the same batches on every pass, however the files are cut into blocks, because drops are
paired unit by unit. Batches are read again from disk on each pass; `load` keeps them where they fit into memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.data.columns import Columns
from precimap.data.convert import categories, dense_values, labels, times, users
from precimap.data.encoding import Encoding
from precimap.data.files import Chunk, chunks
from precimap.errors import DataError

# (stage, done, total), both in bytes.
Progress = Callable[[str, int, int], None]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Scan:
    """What a split needs to know of every row: labels float32, users int64 and times float64, all [rows].

    users: integers as they are, texts by 52 bits of a hash, so that they pass through float64. times: numbers as they
    are, timestamps in seconds since 1970. None for a column that is not named.
    """

    labels: NDArray[np.float32]
    users: NDArray[np.int64] | None
    times: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class Logs:
    """One or several files (TSV, CSV, Parquet; text also gzipped), in the order of their rows, and how to read them."""

    files: Sequence[str | Path]
    columns: Columns
    encoding: Encoding

    def __post_init__(self) -> None:
        if isinstance(self.files, str | Path):
            raise DataError(f"expected a list of files, got {self.files!r}; give [{str(self.files)!r}]")

    def scan(self, progress: Progress | None = None) -> Scan:
        """Labels, users and times of all rows: 20 bytes a row in memory. Raises DataError, MissingExtra."""
        own = self.columns
        light = Columns(label=own.label, user=own.user, time=own.time, header=own.header, missing=own.missing)
        parts = [_converted(chunk, light, self.encoding) for chunk in _chunks(self.files, light, progress)]
        if not parts:
            raise DataError(f"expected rows in {_named(self.files)}, got none")
        whole = _join(parts)
        return Scan(whole["label"], whole.get("user"), whole.get("time"))

    def batches(self, rows: NDArray[np.int64] | None = None, size: int = 4096) -> "LogBatches":
        """A re-iterable of batches that reads from disk on each pass. rows: ascending, None for all."""
        return LogBatches(self, size, rows)

    def load(
        self, rows: NDArray[np.int64] | None = None, size: int = 4096, progress: Progress | None = None
    ) -> list[dict[str, Tensor]]:
        """The same batches in memory: 4 bytes a dense value, 8 a categorical one."""
        return list(LogBatches(self, size, rows).read(progress))


@dataclass(frozen=True, slots=True, eq=False)
class LogBatches:
    """Batches of `size` rows (the last may be smaller), as dicts of tensors [n] or [n, columns]:

    dense float32, categorical int64, label float32, and user int64, time float64 where the columns are named.
    Iterating raises DataError for what cannot be read, with file, line and column; MissingExtra without the `data` extra.
    """

    logs: Logs
    size: int
    rows: NDArray[np.int64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError(f"expected at least one row in a batch, got {self.size}")
        if self.rows is not None and ((np.diff(self.rows) <= 0).any() or (self.rows < 0).any()):
            raise DataError("expected rows in ascending order, each once, from 0; np.unique(rows) makes them so")

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.read()

    def read(self, progress: Progress | None = None) -> Iterator[dict[str, Tensor]]:
        """One pass over the files, up to the last row asked for."""
        logs = self.logs
        chosen = _chosen(_chunks(logs.files, logs.columns, progress), self.rows, logs.files)
        for arrays in _of_size((_converted(chunk, logs.columns, logs.encoding) for chunk in chosen), self.size):
            yield {name: torch.from_numpy(values) for name, values in arrays.items()}
        if progress is not None:  # nothing after the last row is read, so the bar is full
            stage, total = _stage(logs.files)
            progress(stage, total, total)


def _chunks(files: Sequence[str | Path], columns: Columns, progress: Progress | None) -> Iterator[Chunk]:
    paths = [Path(file) for file in files]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent or not paths:
        raise DataError(f"expected files of rows, got {', '.join(absent) or 'none'}" + " (no such file)" * bool(absent))
    sizes = [path.stat().st_size for path in paths]
    stage, total = _stage(files)
    for path, size, before in zip(paths, sizes, accumulate(sizes, initial=0), strict=False):

        def told(done: int, of: int, before: int = before, size: int = size) -> None:
            if progress is not None:
                progress(stage, before + size * done // max(1, of), total)

        yield from chunks(path, columns, told)


def _stage(files: Sequence[str | Path]) -> tuple[str, int]:
    """What a bar calls reading these files, and how many bytes they have."""
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"read {Path(files[0]).name}{more}", sum(Path(file).stat().st_size for file in files)


def _chosen(found: Iterator[Chunk], rows: NDArray[np.int64] | None, files: Sequence[str | Path]) -> Iterator[Chunk]:
    """The chunks with the chosen rows only; stops reading after the last of them."""
    if rows is None:
        yield from found
        return
    taken = before = 0
    for chunk in found:
        after = before + len(chunk.table)
        until = int(np.searchsorted(rows, after))
        if until > taken:
            yield chunk.only(rows[taken:until] - before)
        taken, before = until, after
        if taken == len(rows):
            return
    if taken < len(rows):
        raise DataError(f"expected row {rows[-1]} (counted from 0), got {before} rows in {_named(files)}")


def _converted(chunk: Chunk, columns: Columns, encoding: Encoding) -> Arrays:
    arrays: Arrays = {}
    if columns.dense:
        arrays["dense"] = dense_values(chunk, columns.dense, encoding.dense)
    if columns.categorical:
        arrays["categorical"] = categories(chunk, columns.categorical, encoding)
    arrays["label"] = labels(chunk, columns.label)
    if columns.user is not None:
        arrays["user"] = users(chunk, columns.user)
    if columns.time is not None:
        arrays["time"] = times(chunk, columns.time)
    return arrays


def _of_size(parts: Iterator[Arrays], size: int) -> Iterator[Arrays]:
    """The same rows, cut into pieces of `size`."""
    waiting: list[Arrays] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part["label"])
        if count < size:
            continue
        whole, start = _join(waiting), 0
        for start in range(0, count - size + 1, size):
            yield {name: values[start : start + size].copy() for name, values in whole.items()}
        rest = start + size
        waiting, count = [{name: values[rest:] for name, values in whole.items()}], count - rest
    if count:
        yield _join(waiting)


def _join(parts: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _named(files: Sequence[str | Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
