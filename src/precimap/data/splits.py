"""Which rows calibrate, which choose, which certify: by time, or at random by cluster. Two functions, one shape.

By time is what we recommend: a map is chosen on yesterday and serves tomorrow, so the newest rows should judge it. A
split at random hides drift. Invariant: parts are disjoint, and with clusters no cluster is in two parts; what that costs
is counted, never silent. Rows are numbers in arrays: 100 million of them need no Python objects.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from precimap.errors import InputError

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Rows int64 [size] of each part, ascending, in the order of the sizes asked for; unpacks as a tuple.

    dropped: rows that had to be left out so that no cluster is in two parts.
    """

    rows: tuple[Rows, ...]
    dropped: int

    def __iter__(self) -> Iterator[Rows]:
        return iter(self.rows)


def split_by_time(
    times: NDArray[np.generic], sizes: Sequence[int], clusters: NDArray[np.generic] | None = None
) -> Parts:
    """The newest rows, cut into parts of these sizes, oldest part first: (calibration, search, certify).

    times: [rows], anything that sorts (`np.arange(n)` for a log in order of time); equal times keep the order of the
    rows. Rows older than all parts are in none: train on them. clusters: [rows], such as users. A cluster whose rows
    straddle a boundary stays in its newest part and its older rows are dropped, so that the last part is all of the newest
    traffic, as it will be served; the older parts then reach further back. Where nearly everybody comes back, so that
    too little is left, hold users back instead: `np.intersect1d` of a split by time and one by cluster.
    Raises InputError when the rows do not suffice.
    """
    if times.dtype.kind == "f" and np.isnan(times).any():
        raise InputError(f"expected a time for every row, got {int(np.isnan(times).sum())} that are NaN")
    order = np.argsort(times, kind="stable")
    _check(sizes, len(order), clusters)
    free = np.ones(len(order), dtype=bool)  # by position in `order`
    parts: list[Rows] = []
    end = len(order)
    for size in reversed(sizes):
        left = np.flatnonzero(free[:end])
        if len(left) < size:
            raise InputError(_too_few(sizes, len(order), clusters is not None))
        chosen = left[len(left) - size :]
        parts.append(np.sort(order[chosen]).astype(np.int64))
        end = int(chosen[0]) if size else end
        if clusters is not None:
            free[:end] &= ~np.isin(clusters[order[:end]], clusters[order[chosen]])
    used = sum(sizes)
    return Parts(tuple(reversed(parts)), len(order) - end - used)


def split_by_cluster(clusters: NDArray[np.generic], sizes: Sequence[int]) -> Parts:
    """Whole clusters at random, until each part has its size; the same on every call.

    clusters: [rows]; `np.arange(n)` where every row stands for itself. A cluster that would overfill its part is cut, and
    what is cut off is dropped. Raises InputError when the rows do not suffice.
    """
    _check(sizes, len(clusters), clusters)
    names, cluster = np.unique(clusters, return_inverse=True)
    shuffled = np.random.default_rng(0).permutation(len(names))[::-1]
    turn = np.empty(len(names), dtype=np.int64)
    turn[shuffled] = np.arange(len(names))
    order = np.argsort(turn[cluster], kind="stable")
    ends = np.cumsum(np.bincount(cluster, minlength=len(names))[shuffled])
    parts: list[Rows] = []
    start = 0
    for size in sizes:
        if start + size > len(order):
            raise InputError(_too_few(sizes, len(order), clusters=True))
        parts.append(np.sort(order[start : start + size]).astype(np.int64))
        start = int(ends[np.searchsorted(ends, start + size)]) if size else start
    return Parts(tuple(parts), start - sum(sizes))


def _check(sizes: Sequence[int], rows: int, clusters: NDArray[np.generic] | None) -> None:
    if not sizes or min(sizes) < 0:
        raise InputError(f"expected sizes of parts, 0 or more rows each, got {tuple(sizes)}")
    if clusters is not None and clusters.shape != (rows,):
        raise InputError(f"expected one cluster for each of {rows} rows, got the shape {clusters.shape}")


def _too_few(sizes: Sequence[int], rows: int, clusters: bool) -> str:
    apart = "; no cluster may be in two parts, which leaves too few" if clusters else ""
    return f"expected splits of {tuple(sizes)} units, got data with {rows}{apart}; ask for fewer"
