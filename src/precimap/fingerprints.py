"""What a map is bound to: short hashes of weights and data.

Invariant: equal content gives equal fingerprints on every machine; one changed bit changes them. Values are hashed, not
files or object identities, so that a re-downloaded checkpoint is the same model. Sixteen hex digits: enough to tell
maps apart by accident, not meant against an adversary.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from precimap.layers.views import plain_name


@dataclass(frozen=True, slots=True)
class SplitFingerprint:
    """A split's content: `whole` for the premise, `units` to find examples that two splits share."""

    whole: str
    units: frozenset[str]
    batches: int


def of_weights(model: nn.Module) -> str:
    """All parameters and buffers of a model: names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            digest.update(plain_name(name).encode())
            _add_tensor(digest, tensor)
    return digest.hexdigest()[:16]


def of_split(batches: Iterable[Any]) -> SplitFingerprint:
    """All batches of a split, in order, and each unit of them on its own."""
    whole, count = hashlib.sha256(), 0
    units: set[str] = set()
    for batch in batches:
        count += 1
        whole.update(of_value(batch).encode())
        units.update(_units(batch))
    return SplitFingerprint(whole.hexdigest()[:16], frozenset(units), count)


def of_value(value: Any) -> str:
    """Any nesting of tensors, arrays, numbers and strings; other objects by their `repr`, tensors inside them by value."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:16]


def _units(batch: Any) -> Iterator[str]:
    """A fingerprint for each position along dim 0, where all tensors of the batch agree on its size."""
    columns = [leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() and not leaf.is_sparse]
    sizes = {column.shape[0] for column in columns}
    if len(sizes) != 1:
        yield of_value(batch)
        return
    kinds = " ".join(f"{tuple(column.shape[1:])} {column.dtype}" for column in columns).encode()
    parts = [_bytes(column).reshape(len(column), -1) for column in columns if column.numel()]
    for row in np.concatenate(parts, axis=1) if parts else ():
        yield hashlib.sha256(kinds + row.tobytes()).hexdigest()[:16]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in value:
            yield from _leaves(value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, dict):
        for key in value:
            digest.update(f"key {key!r}".encode())
            _add(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif hasattr(value, "__dict__") and not callable(value):
        # Containers of tensors such as torchrec's KeyedJaggedTensor; a bare repr would hold an address.
        digest.update(type(value).__qualname__.encode())
        _add(digest, {key: item for key, item in vars(value).items() if item is not None})
    else:
        digest.update(repr(value).encode())


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():
        digest.update(_bytes(tensor))


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bits of a tensor with at least one element, flat."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
