"""What is resampled: units, their clusters and their weights.

Invariant: whatever looks at many units at once gets them as one `Units`, checked when it was made.
"""

from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from precimap.errors import TaskError

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """What is resampled: `n` units, the cluster of each and the weight of each.

    clusters: integers [n], equal within a cluster; None: every unit is its own. weights: positive, finite [n]; None: 1.
    Raises TaskError when they are of another length, of another type, or when there is no unit.
    """

    _: KW_ONLY
    n: int
    clusters: NDArray[np.int64] | None = None
    weights: Floats | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise TaskError(f"expected at least one unit, got {self.n}; the split is empty")
        if self.clusters is not None:
            check_length("clusters", self.clusters, self.n)
            if self.clusters.dtype.kind not in "iu":
                raise TaskError(
                    f"expected integer clusters, got {self.clusters.dtype}; "
                    "number them once for all of your data, not batch by batch, so that a user has one number everywhere"
                )
        if self.weights is not None:
            check_length("weights", self.weights, self.n)
            faulty = np.flatnonzero(~(np.isfinite(self.weights) & (self.weights > 0)))
            if faulty.size:
                raise TaskError(
                    f"expected positive, finite weights, got {self.weights[faulty[0]]} for unit {faulty[0]} "
                    f"({faulty.size} such units); leave units that do not count out of the split"
                )

    @property
    def known_weights(self) -> Floats:
        """float64 [n], 1 for units without a weight of their own."""
        return np.ones(self.n) if self.weights is None else np.asarray(self.weights, np.float64)

    def only(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> "Units":
        """The chosen units. Raises TaskError when none is chosen."""
        chosen = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        return Units(
            n=len(chosen),
            clusters=None if self.clusters is None else self.clusters[chosen],
            weights=None if self.weights is None else self.weights[chosen],
        )


def check_length(what: str, values: NDArray[np.generic], n: int) -> None:
    """Raises TaskError unless `values` is [n]."""
    if values.shape != (n,):
        raise TaskError(f"expected {what} of {n} units, [{n}], got {list(values.shape)}")


def check_finite(what: str, values: Floats) -> None:
    """Raises TaskError that names the first unit whose value is NaN or infinite."""
    faulty = np.flatnonzero(~np.isfinite(values))
    if faulty.size:
        raise TaskError(
            f"expected finite values, got {values[faulty[0]]} as {what} for unit {faulty[0]} ({faulty.size} such units)"
        )
