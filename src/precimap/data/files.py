"""Files of rows as a stream of small tables, by pyarrow.

Invariant: memory is bounded by the size of a block, not of the file, and a value that cannot be read is reported with
file, line and column. Text is read as text and converted here, because Arrow's own conversion names neither. A pandas
reader was not taken: it holds chunks as Python objects, and knows no Parquet without pyarrow.
"""

import csv as standard_csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precimap.data.columns import Columns
from precimap.errors import DataError, MissingExtra

# Told (bytes read, bytes in all). Of a compressed file these are bytes on disk.
Told = Callable[[int, int], None]

BLOCK_BYTES = 1 << 20
PARQUET_ROWS = 8192
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Some rows of one file: a pyarrow.RecordBatch, and where its rows are in the file: `line` or `row` numbers."""

    path: Path
    table: Any
    counted: str
    numbers: NDArray[np.int64]

    def place(self, row: int) -> str:
        """Where the chunk's row of this number is, in words."""
        return f"{self.path}, {self.counted} {self.numbers[row]}"

    def only(self, rows: NDArray[np.int64]) -> "Chunk":
        """The chunk with some of its rows."""
        return Chunk(self.path, self.table.take(_arrow().array(rows)), self.counted, self.numbers[rows])


def chunks(path: Path, columns: Columns, told: Told) -> Iterator[Chunk]:
    """All rows of a file in order, with the columns needed.

    `.parquet` and `.pq` are Parquet; `.csv` is separated by commas and may quote; any other name is separated by tabs
    and quotes nothing; text may be gzipped (`.gz`). Raises MissingExtra without the `data` extra, DataError for a file
    that is not there, is cut short, or does not have the columns.
    """
    _arrow()
    if not path.is_file():
        raise DataError(f"expected a file of rows, got {path}, which does not exist")
    yield from _parquet(path, columns, told) if path.suffix in PARQUET else _text(path, columns, told)


def _arrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra("reading logs needs pyarrow: pip install 'precimap[data]'") from error
    return pyarrow


def _text(path: Path, columns: Columns, told: Told) -> Iterator[Chunk]:
    """Cut into blocks of whole lines here: Arrow's own streaming reads many blocks ahead, so that a bar would lie."""
    comma = path.name.removesuffix(".gz").endswith(".csv")
    size = path.stat().st_size
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else nullcontext(raw) as lines:
            names, line = columns.header, 1
            if names is None:
                names, line = _header(path, lines.readline(), comma), 2
            _check_names(path, names, columns.needed)
            file = _Lines(path, names, comma)
            while block := lines.read(BLOCK_BYTES):
                table = _parsed(file, block + lines.readline(), line, columns)
                yield Chunk(path, table, "line", np.arange(line, line + len(table)))
                line += len(table)
                told(raw.tell(), size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read to its end: {error}") from error


def _header(path: Path, line: bytes, comma: bool) -> tuple[str, ...]:
    names = line.decode("utf-8-sig", errors="replace").rstrip("\r\n")
    if not names:
        raise DataError(f"{path}: expected the names of the columns in the first line, got an empty line")
    if "\r" in names:
        raise DataError(f"{path}: expected lines that end with \\n, got \\r alone (of old Macs); convert the file")
    try:
        return tuple(next(standard_csv.reader([names])) if comma else names.split("\t"))
    except standard_csv.Error as error:
        raise DataError(f"{path}: the names of the columns in the first line cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _Lines:
    """A file of lines, the names of its columns, and whether commas part them."""

    path: Path
    names: Sequence[str]
    comma: bool


def _parsed(file: _Lines, block: bytes, line: int, columns: Columns) -> Any:
    """A block of lines, the first with this number, as a RecordBatch of texts."""
    path, names, comma = file.path, file.names, file.comma
    import pyarrow as pa
    from pyarrow import csv

    wrong: list[Any] = []

    def refuse(row: Any) -> str:
        wrong.append(row)
        return "error"

    try:
        table = csv.read_csv(
            pa.BufferReader(block),
            # One block, one thread: Arrow then counts lines.
            csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
            csv.ParseOptions(
                delimiter="," if comma else "\t",
                quote_char='"' if comma else False,
                ignore_empty_lines=False,
                invalid_row_handler=refuse,
            ),
            csv.ConvertOptions(
                include_columns=list(columns.needed),
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=True,
                null_values=list(columns.missing),
            ),
        )
    except pa.ArrowInvalid as error:
        if not wrong:
            raise DataError(f"{path}, from line {line} on, cannot be read: {error}") from error
        row = wrong[0]
        raise DataError(
            f"{path}, line {line + row.number - 1}: expected {row.expected_columns} fields, got {row.actual_columns}: "
            f"{row.text:.60}"
        ) from error
    return table.combine_chunks().to_batches()[0]


def _check_names(path: Path, names: Sequence[str], needed: Sequence[str]) -> None:
    lacking = [name for name in needed if name not in names]
    if lacking:
        found = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise DataError(
            f"{path}: expected the columns {', '.join(lacking)}, got {found}; "
            "for a text file without a header give Columns(header=...)"
        )


def _parquet(path: Path, columns: Columns, told: Told) -> Iterator[Chunk]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # A buffer makes Arrow stream the pages of a row group, which may be larger than memory.
        with parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False) as file:
            _check_names(path, file.schema_arrow.names, columns.needed)
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            # Bytes of the columns that are read; within a row group they are taken to be spread evenly.
            sizes = [_compressed(group, columns.needed) for group in groups]
            row, before, total = 1, 0, sum(sizes)
            for number, (group, size) in enumerate(zip(groups, sizes, strict=True)):
                start = row
                for table in file.iter_batches(PARQUET_ROWS, row_groups=[number], columns=list(columns.needed)):
                    yield Chunk(path, table, "row", np.arange(row, row + len(table)))
                    row += len(table)
                    told(before + size * (row - start) // group.num_rows, total)
                before += size
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}") from error


def _compressed(group: Any, needed: Sequence[str]) -> int:
    own = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_compressed_size for column in own if column.path_in_schema.split(".")[0] in needed)
