"""A user's batch, cut into parts or grown, without a description of it: its units are found as the rows of its tensors.

Invariant: what has one row per unit is changed, everything else stays as it is; a batch in which nothing has is not
touched. Whether what comes out is a batch, only the user's forward can tell. The alternative, a `collate` that users
give, would be one more function to write for what their loaders do already.
"""

import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def cut(batch: Any, units: int, count: int) -> list[Any] | None:
    """The batch in `count` parts of nearly equal size, in order; None where nothing in it has one row per unit."""
    edges = [units * part // count for part in range(count + 1)]
    pieces = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
    parts = [along_units(batch, units, operator.itemgetter(piece)) for piece in pieces]
    return None if any(part is None for part in parts) else parts


def along_units(batch: Any, units: int, change: Callable[[Any], Any]) -> Any:
    """The batch with `change` made to everything that has one row per unit; None where nothing has.

    Tensors whose first dim is `units` and lists of `units` texts are given to `change`; mappings, tuples and lists are
    made anew, all else stays as it is.
    """
    found = False

    def visit(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_nested and value.dim() and value.shape[0] == units:
                found = True
                return change(value)
            return value
        if isinstance(value, Mapping):
            return {key: visit(item) for key, item in value.items()}
        if isinstance(value, list) and len(value) == units and all(isinstance(item, str) for item in value):
            found = True
            return change(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(visit(item) for item in value))
        if isinstance(value, tuple | list):
            return type(value)(visit(item) for item in value)
        return value

    changed = visit(batch)
    return changed if found else None


def resized(batch: Any, units: int, size: int) -> Any:
    """A batch of `size` units out of one of `units`: its first ones, or all of them in turns; None as in `cut`."""
    rows = torch.arange(size) % units

    def chosen(value: Any) -> Any:
        return value[rows.to(value.device)] if isinstance(value, Tensor) else [value[row] for row in rows.tolist()]

    return batch if size == units else along_units(batch, units, chosen)
