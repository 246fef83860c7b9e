"""Containers of ragged rows, such as torchrec's KeyedJaggedTensor: values, and how many of them each row has.

Invariant: only what says which values a row holds is taken. Such containers cache offsets and lengths as they are asked
for, so that their attributes are other ones after a forward than before. No library is imported: a container is known by
its methods.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Jagged:
    """values [total, ...]; lengths [keys * rows], the rows of the first key first; weights [total] or None."""

    keys: tuple[str, ...]
    values: Tensor
    lengths: Tensor
    weights: Tensor | None


def jagged(value: Any) -> Jagged | None:
    """The content of a container with methods `values` and `lengths` that give tensors; None for anything else."""
    if isinstance(value, Tensor) or not (callable(_of(value, "values")) and callable(_of(value, "lengths"))):
        return None
    values, lengths = value.values(), value.lengths()
    if not (isinstance(values, Tensor) and isinstance(lengths, Tensor)):
        return None
    keys = value.keys() if callable(_of(value, "keys")) else ("",)
    weights = value.weights_or_none() if callable(_of(value, "weights_or_none")) else None
    return Jagged(tuple(map(str, keys)), values, lengths, weights if isinstance(weights, Tensor) else None)


def _of(value: Any, name: str) -> Any:
    return getattr(type(value), name, None)
