"""What a batch holds of each of its units: columns, found without a description of the batch.

Invariant: a column says what belongs to the unit and not how the batch carries it. A tensor, an array and a list of equal
numbers are one column; so are a text in a list and in an array, the ids of a unit in a jagged container, and a row that is
padded to another length. What has no row per unit belongs to all units of the batch.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.fingerprints import of_value
from precimap.jagged import Jagged, jagged
from precimap.searching.splits.rows import Prints, finished, of_rows, of_segments, of_texts
from precimap.searching.splits.tables import plain_column, table_columns

Path = tuple[Any, ...]
WIDE = 4
_SCALARS = (str, bytes, bool, int, float, type(None))


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """One thing in a batch, and the keys that lead to it."""

    path: Path
    value: Any


def leaves(batch: Any, units: int | None = None, path: Path = ()) -> Iterator[Leaf]:
    """Everything in the batch that is no container of other things. units: how many it holds, where that is known."""
    if isinstance(batch, Tensor | np.ndarray | np.generic) or jagged(batch) is not None:
        yield Leaf(path, batch)
    elif (table := table_columns(batch)) is not None:
        for name, column in table:
            yield Leaf((*path, name), column)
    elif (column := plain_column(batch)) is not batch:
        yield Leaf(path, column)
    else:
        parts = _parts(batch, units)
        if parts is None:
            yield Leaf(path, batch)
        for name, part in parts or ():
            yield from leaves(part, units, (*path, name))


def _parts(value: Any, units: int | None) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds, by key, place or attribute; None for what is none."""
    if isinstance(value, Mapping):
        return [(key, value[key]) for key in value]
    if isinstance(value, tuple | list):
        return None if _is_column(value, units) else enumerate(value)
    if isinstance(value, type) or callable(value) or type(value).__module__ == "builtins":
        return None
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    found = {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})
    return found.items() if found else None


def _names(slots: Any) -> Iterable[str]:
    return (slots,) if isinstance(slots, str) else slots


def _is_column(items: tuple[Any, ...] | list[Any], units: int | None) -> bool:
    """Texts or numbers, one per unit; or rows of their own lengths, as a list of arrays is, which no collating made."""
    if not items or hasattr(items, "_fields"):
        return False
    if all(isinstance(item, _SCALARS) for item in items):
        return True
    if not all(isinstance(item, Tensor | np.ndarray | list | tuple) for item in items):
        return units is not None and len(items) == units
    sizes = {size_of(item) for item in items}
    return len(sizes) > 1 if units is None else len(items) == units and sizes != {units}


def size_of(value: Any) -> int | None:
    """How many rows a leaf has; None for one without a first dim."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.shape[0]) if value.ndim else None
    if isinstance(value, list | tuple):
        return len(value)
    return None


def tells_much(value: Any) -> bool:
    """Whether a column may tell units apart by itself: texts, or more than a few numbers a unit. A row number does not."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "USOT":
        return True
    if isinstance(value, Tensor) and value.is_nested:
        return True
    if isinstance(value, Tensor | np.ndarray):
        return math.prod(value.shape[1:]) >= WIDE
    if isinstance(value, list | tuple):
        return not all(isinstance(item, bool | int | float) for item in value)
    return jagged(value) is not None


def units_in(found: list[Leaf], told: int | None) -> int | None:
    """How many units the batch holds: as `told`, else what most leaves say.

    None where nothing has a row per unit, or two numbers of rows are equally common.
    """
    if told is not None:
        return told
    sizes: dict[int, int] = {}
    for leaf in found:
        size = rows_of(leaf.value)
        if size is not None:
            sizes[size] = sizes.get(size, 0) + 1
    common = [size for size, count in sizes.items() if count == max(sizes.values())]
    return common[0] if len(common) == 1 else None


def counted_by(batch: Any, units: int) -> Path | None:
    """The path of something with a row for each of the `units` that a batch was scored as; None where nothing has.

    Of several, one of the fewest dims: the first of more may be a length of time that is as long by accident.
    """
    found = [leaf for leaf in leaves(batch, units) if rows_of(leaf.value) == units]
    return min(found, key=lambda leaf: getattr(leaf.value, "ndim", 1)).path if found else None


def at(batch: Any, path: Path) -> Any:
    """What lies at a path that `leaves` gave for another batch; None where nothing does."""
    return next((leaf.value for leaf in leaves(batch) if leaf.path == path), batch if path == () else None)


def rows_of(value: Any) -> int | None:
    """How many units a leaf has rows for; None for one without a first dim."""
    parts = jagged(value)
    return size_of(value) if parts is None else parts.lengths.numel() // max(1, len(parts.keys))


def turned(value: Any, units: int) -> Any:
    """A tensor or an array whose units lie along a later dim, or end to end, with a row for each of them."""
    if not isinstance(value, Tensor | np.ndarray) or not value.ndim or (isinstance(value, Tensor) and value.is_nested):
        return value
    shape = tuple(value.shape)
    if units in shape[1:]:
        axis = shape.index(units, 1)
        return value.movedim(axis, 0) if isinstance(value, Tensor) else np.moveaxis(value, axis, 0)
    if shape[0] > units and shape[0] % units == 0:
        return value.reshape(units, shape[0] // units, *shape[1:])
    return value


def columns(found: list[Leaf], units: int) -> list[tuple[Leaf, Prints | None]]:
    """The print of each unit in each leaf, uint64 [units]; None for a leaf that has no row per unit."""
    told, flat = [], []
    for leaf in found:
        prints = _prints(leaf.value, units)
        told.append((leaf, prints))
        if prints is None and isinstance(leaf.value, Tensor | np.ndarray) and leaf.value.ndim:
            flat.append(leaf)
    segments = _segments(found, flat, units)
    return [(leaf, segments.get(id(leaf), prints)) for leaf, prints in told]


def _prints(value: Any, units: int) -> Prints | None:
    if (parts := jagged(value)) is not None:
        return _of_jagged(parts, units)
    if size_of(value) != units:
        return None
    if isinstance(value, Tensor):
        if value.is_nested:
            return of_each(value.unbind())
        return _of_sparse(value, units) if value.layout != torch.strided else of_rows(numbers(value))
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufcmM":
        return of_rows(value)
    if isinstance(value, np.ndarray) and value.dtype.names is not None:
        fields = [_prints(np.ascontiguousarray(value[name]), units) for name in value.dtype.names]
        return _sum([field for field in fields if field is not None])
    return of_each(value.reshape(units, -1).tolist() if isinstance(value, np.ndarray) and value.ndim > 1 else value)


def of_each(items: Any) -> Prints:
    """The print of each item of a column that is no array of numbers: texts, numbers, or rows of their own lengths."""
    listed = items.tolist() if isinstance(items, np.ndarray) else list(items)
    if all(isinstance(item, str | bytes) for item in listed):
        return of_texts(listed)
    if all(isinstance(item, bool | int | float) for item in listed):
        return of_rows(np.asarray(listed))
    rows = [numbers(item) for item in listed]
    if any(row is None or row.dtype.kind not in "biuf" for row in rows):
        return np.array([int(of_value(item, "a unit of the batch"), 16) for item in listed], np.uint64)
    flat = [np.reshape(row, -1) for row in rows if row is not None]
    return of_segments(np.concatenate(flat), np.array([len(row) for row in flat], np.int64))


def numbers(value: Any) -> Any:
    """A tensor, an array or a list of numbers as an array; None for anything else."""
    if isinstance(value, Tensor):
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        if plain.is_quantized:
            plain = plain.dequantize()
        return (plain.float() if plain.dtype.is_floating_point and plain.dtype != torch.float64 else plain).numpy()
    if isinstance(value, list | tuple) and all(isinstance(item, bool | int | float) for item in value):
        return np.asarray(value) if value else np.zeros(0, np.int64)
    return value if isinstance(value, np.ndarray) else None


def _of_jagged(parts: Jagged, units: int) -> Prints | None:
    """The values of a unit under each key, each key's on its own."""
    lengths = numbers(parts.lengths).reshape(-1)
    if len(lengths) != max(1, len(parts.keys)) * units:
        return None
    found = [of_segments(numbers(x), lengths) for x in (parts.values, parts.weights) if x is not None]
    return _of_keys(_sum(found), units)


def _of_keys(prints: Prints, units: int) -> Prints:
    """[keys * units], the units of the first key first -> [units]; the same ids under another key are others."""
    each = prints.reshape(-1, units)
    if len(each) == 1:
        return prints
    return _sum([finished(row + np.uint64(number)) for number, row in enumerate(each)])


def _of_sparse(tensor: Tensor, units: int) -> Prints:
    known = tensor.detach().cpu().to_sparse().coalesce()
    rows, values = known.indices().numpy(), numbers(known.values())
    lengths = np.bincount(rows[0], minlength=units)
    return _sum([of_segments(part, lengths) for part in (*rows[1:], values)])


def _segments(found: list[Leaf], flat: list[Leaf], units: int) -> dict[int, Prints]:
    """The units of leaves that lie end to end, where another leaf tells their lengths or offsets and fits exactly."""
    prints: dict[int, Prints] = {}
    told = [(leaf, lengths) for leaf in found for lengths in _lengths(leaf.value, units)]
    for leaf in flat:
        total = size_of(leaf.value)
        fitting = [(by, lengths) for by, lengths in told if by is not leaf and lengths(total) is not None]
        if fitting:
            by, lengths = fitting[0]
            prints[id(leaf)] = _of_keys(of_segments(numbers(leaf.value), lengths(total)), units)
            prints[id(by)] = np.zeros(units, np.uint64)  # offsets say where units lie, not what they are
    return prints


def lies_end_to_end(found: Sequence[Leaf], flat: Leaf, units: int) -> bool:
    """Whether another leaf holds lengths or offsets of the units that fit the rows of `flat` exactly."""
    told = [lengths for leaf in found if leaf is not flat for lengths in _lengths(leaf.value, units)]
    return any(lengths(size_of(flat.value)) is not None for lengths in told)


def _lengths(value: Any, units: int) -> list[Any]:
    """Functions of a total that give int64 [keys * units] lengths summing to it, or None: of lengths, or of offsets."""
    if not isinstance(value, Tensor | np.ndarray) or value.ndim != 1 or len(value) % units > 1 or len(value) < units:
        return []
    ends = numbers(value)
    if ends.dtype.kind not in "iu":
        return []

    def as_lengths(total: int) -> NDArray[np.int64] | None:
        return ends if len(ends) % units == 0 and ends.min() >= 0 and int(ends.sum()) == total else None

    def as_offsets(total: int) -> NDArray[np.int64] | None:
        whole = np.append(ends, total) if len(ends) % units == 0 else ends
        steps: NDArray[np.int64] = np.diff(whole)
        return steps if whole[0] == 0 and whole[-1] == total and (steps >= 0).all() else None

    return [as_lengths, as_offsets]


def _sum(parts: Sequence[Prints]) -> Prints:
    total: Prints = np.sum([*parts], axis=0, dtype=np.uint64)
    return total
