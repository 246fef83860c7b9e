"""A user's batch, cut into parts or grown, without a description of it: its units are found as the rows of its tensors.

Invariant: what has one row per unit is changed, and what lies end to end for all units (ids of a jagged feature, tokens of
packed texts) where a column of offsets or lengths says whose is what; everything else stays as it is. A batch in which
nothing has a row per unit is not touched, nor one whose columns can be read in two ways. Whether what comes out is a batch,
only the user's forward can tell. The alternative, a `collate` that users give, would be one more function to write for what
their loaders do already.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, slots=True)
class _Jagged:
    """A column of bounds. lengths: int64 [units], of the pieces that lie end to end. ends: it has the last end, too."""

    lengths: Tensor
    offsets: bool
    ends: bool

    @property
    def total(self) -> int:
        return int(self.lengths.sum())

    def of(self, rows: Tensor, like: Tensor) -> Tensor:
        """The column for these units."""
        lengths = self.lengths[rows]
        if not self.offsets:
            return lengths.to(like)
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return (bounds if self.ends else bounds[:-1]).to(like)


def cut(batch: Any, units: int, count: int) -> list[Any] | None:
    """The batch in `count` parts of nearly equal size, in order; None where nothing in it has one row per unit."""
    edges = [units * part // count for part in range(count + 1)]
    parts = [chosen(batch, units, torch.arange(start, stop)) for start, stop in itertools.pairwise(edges)]
    return None if any(part is None for part in parts) else parts


def resized(batch: Any, units: int, size: int, first: int = 0) -> Any:
    """A batch of `size` units out of one of `units`: those from `first` on, in turns where more are asked for; None as in
    `cut`."""
    if size == units and not first:
        return batch
    return chosen(batch, units, (torch.arange(size) + first) % units)


def chosen(batch: Any, units: int, rows: Tensor) -> Any:
    """The batch of these of its units, rows: int64 [n]; None where nothing has a row per unit, or not to be told whose."""
    columns = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and _plain(leaf)]
    read = {id(column): found for column in columns if (found := _bounds(column, units, columns))}
    if any(len(found) > 1 for found in read.values()):
        return None
    bounds = {column: found[0] for column, found in read.items()}
    by_total: dict[int, Tensor] = {}
    for jagged in bounds.values():
        if jagged.total == units and not bool((jagged.lengths == 1).all()):
            return None
        if not torch.equal(by_total.setdefault(jagged.total, jagged.lengths), jagged.lengths):
            return None
    places = {total: _places(lengths, rows) for total, lengths in by_total.items() if total != units}

    def of_units(value: Any) -> Any:
        if id(value) in bounds:
            return bounds[id(value)].of(rows, value)
        if isinstance(value, Tensor):
            return value[rows.to(value.device)]
        return [value[row] for row in rows.tolist()]

    def end_to_end(value: Tensor) -> Tensor | None:
        if id(value) in bounds:
            return bounds[id(value)].of(rows, value)
        if not _plain(value) or value.shape[0] not in places:
            return None
        return value[places[value.shape[0]].to(value.device)]

    return along_units(batch, units, of_units, end_to_end)


def _plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested and value.dim() > 0


def _bounds(column: Tensor, units: int, columns: list[Tensor]) -> list[_Jagged]:
    """What the column may say of others: offsets, with or without the last end, or lengths."""
    if column.dim() != 1 or column.dtype not in (torch.int32, torch.int64) or len(column) not in (units, units + 1):
        return []
    values, sizes = column.to("cpu", torch.int64), {len(other) for other in columns if other is not column}
    rising = bool((values.diff() >= 0).all()) and int(values[0]) == 0
    if len(values) == units + 1:
        return [_Jagged(values.diff(), True, True)] if rising and int(values[-1]) in sizes else []
    found = []
    if bool((values >= 0).all()) and int(values.sum()) in sizes - {units}:
        found.append(_Jagged(values, False, False))
    behind = sorted(size for size in sizes - {units, units + 1} if size >= int(values[-1]))
    if rising and units > 1 and len(behind) == 1:
        found.append(_Jagged(torch.cat([values, torch.tensor(behind)]).diff(), True, False))
    return found


def _places(lengths: Tensor, rows: Tensor) -> Tensor:
    """Where the pieces of these units lie, one after the other, int64."""
    starts = lengths.cumsum(0) - lengths
    pieces = [torch.arange(int(starts[row]), int(starts[row] + lengths[row])) for row in rows.tolist()]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *pieces])


def along_units(
    batch: Any, units: int, change: Callable[[Any], Any], otherwise: Callable[[Tensor], Tensor | None] = lambda _: None
) -> Any:
    """The batch with `change` made to everything that has one row per unit; None where nothing has.

    Tensors whose first dim is `units` and lists of `units` texts are given to `change`, other tensors to `otherwise`, which
    may leave them; mappings, tuples and lists are made anew, all else stays as it is.
    """
    found = False

    def visit(value: Any) -> Any:
        nonlocal found
        if isinstance(value, Tensor):
            if _plain(value) and value.shape[0] == units:
                found = True
                return change(value)
            other = otherwise(value)
            return value if other is None else other
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
