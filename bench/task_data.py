"""Where the real data of the benchmarks lie, and how rows are split.

Invariant: what is missing raises FileNotFoundError with the file's name; nothing is replaced by made-up data. The data
lie beside the checkout and are no part of the project.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from precimap.errors import InputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from real_models import DATA

Rows = NDArray[np.int64]


def read(name: str) -> bytes:
    """The contents of a data file. Raises FileNotFoundError."""
    return present(name).read_bytes()


def present(name: str) -> Path:
    """The path of a data file. Raises FileNotFoundError."""
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"expected the data of a benchmark at {path}, found none")
    return path


def split_by_cluster(cluster: Rows, sizes: Sequence[int]) -> list[Rows]:
    """Rows int64 [size] for each size, in their old order, no cluster in two of them; the same on every call.

    cluster: [rows]. Clusters come in a shuffled order; one that would overfill its part is cut, and what is cut off is
    in no part. Raises InputError when the rows do not suffice.
    """
    names = np.unique(cluster)
    waiting = list(np.random.default_rng(0).permutation(names))
    order = np.argsort(cluster, kind="stable")
    starts = np.searchsorted(cluster[order], names)
    rows_of = dict(zip(names.tolist(), np.split(order, starts[1:]), strict=True))
    parts = []
    for size in sizes:
        part: list[int] = []
        while len(part) < size and waiting:
            part.extend(rows_of[int(waiting.pop())].tolist())
        if len(part) < size:
            raise InputError(f"expected splits of {tuple(sizes)} units, got data with {len(cluster)}; ask for fewer")
        parts.append(np.sort(np.array(part[:size], dtype=np.int64)))
    return parts
