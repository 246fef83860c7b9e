"""Along which dim of a tensor the units of a batch lie, told by all batches of a split: [T, B] is B units as much as [B, T].

Invariant: a later dim is that of the units only if its size is their number in every batch, dim 0's is not, and neither of
these says otherwise: the same content in every batch (candidates that all units share), or lengths that cut dim 0 up exactly
in every batch, one of several units among them (rows that lie end to end). One batch alone cannot tell [B, T] from [T, B]
where T is B; several of other sizes can.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from precimap.fingerprints import of_value
from precimap.searching.splits.columns import Leaf, Path, leaves, lies_end_to_end, rows_of


@dataclass(frozen=True, slots=True)
class Dims:
    """One batch of `units`. axes: of each array with several dims, those of the size `units`; packed: those whose dim 0 some
    lengths cut up; content: the hash of each with a later dim of that size."""

    units: int
    axes: dict[Path, frozenset[int]]
    packed: frozenset[Path]
    content: dict[Path, str]


def may_be_turned(found: Sequence[Leaf]) -> bool:
    """Whether some array has a later dim as long as another thing has rows: else its units need not be counted."""
    rows = {rows_of(leaf.value) for leaf in found}
    return any(rows & {*leaf.value.shape[1:]} for leaf in found if _has_dims(leaf.value))


def dims_of(found: Sequence[Leaf], units: int | None) -> Dims:
    """units: None where they are not known, or where nothing `may_be_turned`."""
    arrays = [leaf for leaf in found if _has_dims(leaf.value)]
    axes = {leaf.path: frozenset(k for k, size in enumerate(leaf.value.shape) if size == units) for leaf in arrays}
    later = [leaf for leaf in arrays if axes[leaf.path] - {0}]
    return Dims(
        units or 0,
        axes,
        frozenset(leaf.path for leaf in later if lies_end_to_end(found, leaf, units or 1)),
        {leaf.path: of_value(leaf.value) for leaf in later},
    )


def unit_axes(seen: Sequence[Dims]) -> dict[Path, int]:
    """The later dim along which units lie in every batch, of each array that has one."""
    found = {}
    for path in {path for dims in seen for path in dims.content}:
        having = [dims for dims in seen if path in dims.axes]
        common = frozenset.intersection(*(dims.axes[path] for dims in having))
        shared = len(having) > 1 and len({dims.content.get(path) for dims in having}) == 1
        packed = any(dims.units > 1 for dims in having) and all(path in dims.packed for dims in having)
        if common and 0 not in common and not shared and not packed:
            found[path] = min(common)
    return found


def is_square(batch: Any, units: int) -> bool:
    """Whether an array of the batch is as long as its units in dim 0 and in a later one: it is open which is theirs."""
    arrays = (leaf.value for leaf in leaves(batch, units) if _has_dims(leaf.value))
    return any(array.shape[0] == units and units in array.shape[1:] for array in arrays)


def along(value: Any, axis: int) -> Any:
    """The array with a row for each unit."""
    return value.movedim(axis, 0) if isinstance(value, Tensor) else np.moveaxis(value, axis, 0)


def _has_dims(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_nested and value.layout == torch.strided and value.dim() > 1
    return isinstance(value, np.ndarray) and value.ndim > 1 and value.dtype.kind in "biufcmM"
