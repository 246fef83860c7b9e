"""The JSON text of a map's file: its digest, and the refusal of keys that stand twice. Torch-free."""

import hashlib
import json
from typing import Any

from precimap.errors import MapError


def digest_of(row: dict[str, Any]) -> str:
    """SHA-256 of a map's content, whatever its white space and the order of its keys: numbers as Python reads them back."""
    text = json.dumps(row, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict. Raises MapError where a key stands twice."""
    row = dict(pairs)
    if len(row) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise MapError(f"the key {twice!r} stands twice; a map names each layer once")
    return row
