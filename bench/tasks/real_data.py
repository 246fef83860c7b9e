"""Where the real data of the benchmarks lie.

Invariant: what is missing raises FileNotFoundError with the file's name; nothing is replaced by made-up data. The data
lie beside the checkout and are no part of the project.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helpers.real_models import DATA

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
