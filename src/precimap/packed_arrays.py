"""Arrays of numbers as the bytes of a row of the journal, bit for bit.

Invariant: nothing is unpickled, and what is read is what was written or an error (each array has a checksum).
"""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from precimap.errors import JournalError

# What reading damaged JSON and .npz bytes raises; memory: for an array that claims to be larger than all there is.
UNREADABLE = (
    *(ValueError, TypeError, LookupError, EOFError, OSError, RuntimeError, SyntaxError, AttributeError, OverflowError),
    *(MemoryError, struct.error, zlib.error, zipfile.BadZipFile),
)


def packed(arrays: Mapping[str, np.ndarray], what: str) -> tuple[str, bytes | None]:
    """The names as JSON, and compressed .npz bytes. Names stay outside: some are no good as members of an .npz."""
    if not arrays:
        return "[]", None
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise JournalError(f"{what}: expected arrays of numbers, got objects in {name}; convert it first")
    file = io.BytesIO()
    np.savez_compressed(file, *arrays.values())
    return json.dumps(list(arrays)), file.getvalue()


def unpacked(names: str, blob: bytes | None) -> dict[str, np.ndarray]:
    """The inverse of `packed`. Raises one of UNREADABLE for what is not its result."""
    if blob is None:
        return {}
    with np.load(io.BytesIO(blob), allow_pickle=False) as archive:
        return {name: archive[f"arr_{number}"] for number, name in enumerate(json.loads(names))}
