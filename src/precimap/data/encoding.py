"""What belongs to the model: how a raw value becomes the number that the model was trained on.

Invariant: nothing here has a default; a model sees the table sizes, hashes and transforms of its own training or it is
another model. A framework of feature transforms was not taken: one function for a matrix and one for a value say it all,
and a training pipeline has them already.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from precimap.errors import DataError

# A value as the file has it, None where it is missing -> a row of the embedding table.
Index = Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Encoding:
    """The model's own view of the columns.

    dense: float64 [n, columns], NaN where missing -> the same shape, all finite. categorical: a value (text or integer,
    None where missing) -> an index from 0, one function for all columns or one for each by name. It is called once for
    each distinct value of a few thousand rows; a ValueError from it is reported with file, line and column.
    """

    dense: Callable[[NDArray[np.float64]], NDArray[Any]] | None = None
    categorical: Index | Mapping[str, Index] | None = None

    def index_of(self, column: str) -> Index:
        """The function of a categorical column. Raises DataError where there is none."""
        found = self.categorical.get(column) if isinstance(self.categorical, Mapping) else self.categorical
        if found is None:
            raise DataError(
                f"expected Encoding(categorical=...) to say how column {column} becomes an index, got nothing for it; "
                "give hex_modulo(size), hashed(size), vocabulary(values) or the function of your training"
            )
        return found


def log_counts(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """log(1 + x) of counts; what is negative or missing counts as 0.

    Source: facebookresearch/dlrm, data_utils.py (negative and missing to 0) and dlrm_data_pytorch.py (log(x + 1)).
    """
    made: NDArray[np.float32] = np.log1p(np.where(values > 0, values, 0.0)).astype(np.float32)
    return made


def hex_modulo(size: int) -> Index:
    """Hexadecimal text -> its value modulo `size`; missing -> 0. As facebookresearch/dlrm with --max-ind-range."""

    def index(value: str | None) -> int:
        return 0 if value is None else int(value, 16) % _positive(size)

    return index


def hashed(size: int) -> Index:
    """Any text or integer -> 1 + CRC-32 of its UTF-8 text modulo `size - 1`; missing -> 0. The same on every machine."""

    def index(value: object) -> int:
        return 0 if value is None else 1 + zlib.crc32(str(value).encode()) % _positive(size - 1)

    return index


def vocabulary(values: Iterable[object]) -> Index:
    """The place of a value in `values`, from 1; missing or not in it -> 0. The table needs one row more than values."""
    places = {value: place for place, value in enumerate(values, start=1)}
    return lambda value: places.get(value, 0)


def _positive(size: int) -> int:
    if size < 1:
        raise DataError(f"expected room for at least one value in the table, got {size}")
    return size
