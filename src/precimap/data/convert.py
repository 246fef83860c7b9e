"""Columns of a chunk as numpy arrays, and the place of the first value that is none.

Invariant: a value is converted or refused, never replaced: what a missing value becomes is the encoding's to say.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from precimap.data.encoding import Encoding
from precimap.data.files import Chunk
from precimap.errors import DataError

USER_BITS = 52  # clusters pass through float64, which holds whole numbers below 2^53


def labels(chunk: Chunk, column: str) -> NDArray[np.float32]:
    """Float32 [n], all finite."""
    values = _numbers(chunk, column)
    _refuse(chunk, column, ~np.isfinite(values), "a label that is a number")
    return values.astype(np.float32)


def dense_values(
    chunk: Chunk, columns: Sequence[str], transform: Callable[[NDArray[np.float64]], NDArray[Any]] | None
) -> NDArray[np.float32]:
    """Float32 [n, columns] as `transform` gives them, all finite."""
    if transform is None:
        raise DataError(
            "expected Encoding(dense=...) to say how numbers and missing values enter the model, got nothing; "
            "give log_counts or the function of your training"
        )
    raw = np.stack([_numbers(chunk, column) for column in columns], axis=1)
    made = np.asarray(transform(raw))
    if made.shape != raw.shape:
        raise DataError(f"expected Encoding.dense to return the shape {raw.shape}, got {made.shape}")
    values = made.astype(np.float32)
    for number, column in enumerate(columns):
        _refuse(chunk, column, ~np.isfinite(values[:, number]), "a finite number after Encoding.dense")
    return values


def categories(chunk: Chunk, columns: Sequence[str], encoding: Encoding) -> NDArray[np.int64]:
    """Int64 [n, columns], the indices that the encoding gives, 0 or more."""
    return np.stack([_indexed(chunk, column, encoding.index_of(column)) for column in columns], axis=1)


def users(chunk: Chunk, column: str) -> NDArray[np.int64]:
    """Int64 [n]: whole numbers below 2^52 as they are, anything else as the first 52 bits of its BLAKE2b."""

    def number(value: Any) -> int:
        if value is None:
            raise ValueError("every row needs a user")
        text = str(value)
        if text.isdecimal() and str(int(text)) == text and int(text) < 1 << USER_BITS:
            return int(text)
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> (64 - USER_BITS)

    return _indexed(chunk, column, number)


def times(chunk: Chunk, column: str) -> NDArray[np.float64]:
    """Float64 [n]: numbers as they are, timestamps and ISO 8601 texts as seconds since 1970 (UTC without a zone)."""
    import pyarrow as pa

    array = _column(chunk, column)
    values = None if pa.types.is_temporal(array.type) else _cast(array, pa.float64())
    if values is not None:
        found = _float64(values)
    else:
        naive, zoned = pa.timestamp("us"), pa.timestamp("us", tz="UTC")
        stamps = _cast(array, zoned if _cast(array, naive) is None else naive)
        if stamps is None:
            _refuse_first(chunk, column, array, (naive, zoned), "a number or a time such as 2026-03-31T12:00:00")
        found = _float64(stamps.cast(pa.int64())) / 1e6
    _refuse(chunk, column, ~np.isfinite(found), "a time")
    return found


def _column(chunk: Chunk, column: str) -> Any:
    """The plain values of a column; refuses those that hold several values a row."""
    import pyarrow as pa

    array = chunk.table.column(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_nested(array.type):
        raise DataError(f"{chunk.path}, column {column}: expected one value a row, got {array.type}; read it yourself")
    return array


def _numbers(chunk: Chunk, column: str) -> NDArray[np.float64]:
    """Float64 [n], NaN where missing."""
    import pyarrow as pa

    array = _column(chunk, column)
    values = _cast(array, pa.float64())
    if values is None:
        _refuse_first(chunk, column, array, (pa.float64(),), "a number")
    return _float64(values)


def _indexed(chunk: Chunk, column: str, index: Callable[[Any], int]) -> NDArray[np.int64]:
    """Int64 [n]: `index` of each distinct value, then gathered."""
    array = _column(chunk, column)
    if _is_floating(array):
        raise DataError(
            f"{chunk.path}, column {column}: expected texts or integers, got {array.type}, in which 17 is 17.0 and another "
            "value for a hash; store the column as integers"
        )
    coded = array.dictionary_encode(null_encoding="encode")
    places: NDArray[np.int64] = coded.indices.to_numpy(zero_copy_only=False)
    values = coded.dictionary.to_pylist()
    found = np.empty(len(values), dtype=np.int64)
    for number, value in enumerate(values):
        try:
            made = index(value)
        except (ValueError, TypeError) as error:
            row = int(np.flatnonzero(places == number)[0])
            raise DataError(f"{chunk.place(row)}, column {column}: got {value!r}: {error}") from error
        if made < 0:
            row = int(np.flatnonzero(places == number)[0])
            raise DataError(f"{chunk.place(row)}, column {column}: expected an index from 0, got {made} of {value!r}")
        found[number] = made
    gathered: NDArray[np.int64] = found[places]
    return gathered


def _is_floating(array: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_floating(array.type))


def _cast(array: Any, kind: Any) -> Any:
    """The array as another type; None where a value does not fit it."""
    import pyarrow as pa

    # Large integers are rounded to float64, and nanoseconds to microseconds.
    rounding = pa.types.is_integer(array.type) or pa.types.is_temporal(array.type)
    try:
        return array.cast(kind, safe=not rounding)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _float64(array: Any) -> NDArray[np.float64]:
    values: NDArray[np.float64] = array.to_numpy(zero_copy_only=False).astype(np.float64)
    return values


def _refuse_first(chunk: Chunk, column: str, array: Any, kinds: Sequence[Any], expected: str) -> NoReturn:
    """Raise for the first value that becomes none of `kinds`."""
    rows = range(len(array))
    row = next((row for row in rows if all(_cast(array.slice(row, 1), kind) is None for kind in kinds)), 0)
    raise DataError(f"{chunk.place(row)}, column {column}: expected {expected}, got {array[row].as_py()!r}")


def _refuse(chunk: Chunk, column: str, faulty: NDArray[np.bool_], expected: str) -> None:
    if faulty.any():
        row = int(np.flatnonzero(faulty)[0])
        came = chunk.table.column(column)[row].as_py()
        raise DataError(
            f"{chunk.place(row)}, column {column}: expected {expected}, got {'nothing' if came is None else repr(came)}"
        )
