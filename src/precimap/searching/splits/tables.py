"""The columns of a table of pyarrow, pandas or polars, as arrays and lists that any other batch might hold.

Invariant: a column is its values in their order: neither how they are stored (chunks, categories, masks, dtypes for what may
be missing) nor a table's row labels. No library is imported: a table is known by the module that its class is from, as in
`content`.
"""

from typing import Any

import numpy as np

_PLAIN = "biufmM"


def table_columns(value: Any) -> list[tuple[Any, Any]] | None:
    """Each column by its name; None for what is no table."""
    if hasattr(value, "column_names") and hasattr(value, "column"):
        return [(name, value.column(name).to_pylist()) for name in value.column_names]
    match _library(value):
        case "polars" if hasattr(value, "iter_columns"):
            return [(column.name, plain_column(column)) for column in value.iter_columns()]
        case "pandas" if hasattr(value, "columns") and hasattr(value, "items"):
            return [(name, plain_column(column)) for name, column in value.items()]
        case _:
            return None


def plain_column(value: Any) -> Any:
    """A column of such a library as an array of numbers or times, or as a list; anything else as it is."""
    library = _library(value)
    if library == "pyarrow" and hasattr(value, "to_pylist") and not hasattr(value, "column_names"):
        return value.to_pylist()
    if library == "polars" and hasattr(value, "null_count") and hasattr(value, "to_list"):
        return value.to_numpy() if value.dtype.is_numeric() and not value.null_count() else value.to_list()
    if library == "pandas" and hasattr(value, "to_numpy") and hasattr(value, "isna") and hasattr(value, "dtype"):
        missing, array = np.asarray(value.isna()), value.to_numpy()
        if array.dtype.kind in _PLAIN:
            return array
        return [None if gone else item for gone, item in zip(missing.tolist(), array.tolist(), strict=True)]
    return value


def _library(value: Any) -> str:
    return type(value).__module__.split(".")[0]
