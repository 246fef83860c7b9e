"""The fingerprint by which ledgers and maps of older releases know a split: the hash of its batches in order.

Invariant: to the letter what those releases computed, faults included (arrays by their shortened `repr`), so that what a
split has given away under its old name is not forgotten. Nothing new is named so.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from precimap.content import raw_bytes


def older_print(batches: Iterable[Any]) -> str:
    """Sixteen hex digits."""
    whole = hashlib.sha256()
    for batch in batches:
        digest = hashlib.sha256()
        _add(digest, batch)
        whole.update(digest.hexdigest()[:16].encode())
    return whole.hexdigest()[:16]


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        if value.numel():
            digest.update(raw_bytes(value))
    elif isinstance(value, dict):
        for key in value:
            digest.update(f"key {key!r}".encode())
            _add(digest, value[key])
    elif isinstance(value, tuple | list):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _add(digest, item)
    elif hasattr(value, "__dict__") and not callable(value):
        digest.update(type(value).__qualname__.encode())
        _add(digest, {key: item for key, item in vars(value).items() if item is not None})
    else:
        digest.update(repr(value).encode())
