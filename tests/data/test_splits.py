"""Splits by time and by cluster: parts that are disjoint, of the sizes asked for, and honest about what they drop."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.data import split_by_cluster, split_by_time
from precimap.errors import InputError

CLUSTERS = st.lists(st.integers(0, 6), min_size=1, max_size=60)
SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=3)


def by_cluster_slowly(clusters: list[int], sizes: Sequence[int]) -> list[list[int]] | None:
    """One cluster after the other in the shuffled order; None when they do not suffice."""
    names = sorted(set(clusters))
    waiting = [names[number] for number in np.random.default_rng(0).permutation(len(names))]
    parts = []
    for size in sizes:
        part: list[int] = []
        while len(part) < size and waiting:
            name = waiting.pop()
            part += [row for row, own in enumerate(clusters) if own == name]
        if len(part) < size:
            return None
        parts.append(sorted(part[:size]))
    return parts


def by_time_slowly(times: list[int], sizes: Sequence[int], clusters: list[int] | None) -> list[list[int]] | None:
    """From the newest row backwards, one row after the other."""
    waiting = sorted(range(len(times)), key=lambda row: (times[row], row))
    gone: set[int] = set()
    parts: list[list[int]] = []
    for size in reversed(sizes):
        part: list[int] = []
        while len(part) < size and waiting:
            row = waiting.pop()
            if clusters is None or clusters[row] not in gone:
                part.append(row)
        if len(part) < size:
            return None
        gone |= set() if clusters is None else {clusters[row] for row in part}
        parts.insert(0, sorted(part))
    return parts


@given(CLUSTERS, SIZES)
def test_by_cluster_as_one_cluster_after_the_other(clusters: list[int], sizes: list[int]) -> None:
    expected = by_cluster_slowly(clusters, sizes)
    if expected is None:
        with pytest.raises(InputError, match="ask for fewer"):
            split_by_cluster(np.array(clusters), sizes)
        return
    parts = split_by_cluster(np.array(clusters), sizes)
    assert [part.tolist() for part in parts] == expected
    assert [len(part) for part in parts] == sizes
    touched = {clusters[row] for part in expected for row in part}
    assert parts.dropped == sum(own in touched for own in clusters) - sum(sizes)


@given(st.data(), CLUSTERS, SIZES, st.booleans())
def test_by_time_as_one_row_after_the_other(
    data: st.DataObject, clusters: list[int], sizes: list[int], use: bool
) -> None:
    times = data.draw(st.lists(st.integers(0, 9), min_size=len(clusters), max_size=len(clusters)))
    own = np.array(clusters) if use else None
    expected = by_time_slowly(times, sizes, clusters if use else None)
    if expected is None:
        with pytest.raises(InputError, match="ask for fewer"):
            split_by_time(np.array(times), sizes, own)
        return
    parts = split_by_time(np.array(times), sizes, own)
    assert [part.tolist() for part in parts] == expected
    taken = [np.array(times)[part] for part in parts if len(part)]
    assert all(older.max() <= newer.min() for older, newer in pairwise(taken))
    assert parts.dropped == 0 or use


def test_a_straddling_user_stays_in_the_newest_part() -> None:
    users = np.array([7, 1, 2, 7, 3, 7])  # in order of time; user 7 comes back
    calibration, search, certify = parts = split_by_time(np.arange(6), (1, 1, 2), clusters=users)
    assert (calibration.tolist(), search.tolist(), certify.tolist()) == ([1], [2], [4, 5])
    assert parts.dropped == 1  # row 3; row 0 is older than all parts
    with pytest.raises(InputError, match="no cluster may be in two parts"):
        split_by_time(np.arange(6), (2, 1, 2), clusters=users)


def test_users_held_back_and_time_together() -> None:
    """What the docstring advises where nearly everybody comes back."""
    users, times = np.arange(1000) % 10, np.arange(1000)
    by_user, by_time = split_by_cluster(users, (300, 300, 400)), split_by_time(times, (200, 300, 500))
    parts = [np.intersect1d(a, b) for a, b in zip(by_user, by_time, strict=True)]
    assert [len(part) for part in parts] == [60, 90, 200]
    assert len({user for part in parts for user in set(users[part])}) == sum(len(set(users[part])) for part in parts)


def test_dates_sort_and_a_missing_time_is_refused() -> None:
    days = np.array(["2026-03-03", "2026-03-01", "2026-03-02"], dtype="datetime64[D]")
    assert [part.tolist() for part in split_by_time(days, (1, 2))] == [[1], [0, 2]]
    with pytest.raises(InputError, match="1 that are NaN"):
        split_by_time(np.array([1.0, np.nan]), (1,))
    with pytest.raises(InputError, match="one cluster for each of 3 rows"):
        split_by_time(days, (1,), clusters=np.arange(2))


def test_many_rows_need_no_objects() -> None:
    """Two million rows of a quarter of a million users, in well under what Python objects would take."""
    rows = 2_000_000
    users = np.random.default_rng(1).integers(0, rows // 8, rows)
    for parts in (
        split_by_time(np.arange(rows), (1000, 10_000, 100_000), users),
        split_by_cluster(users, (1000, 10_000, 100_000)),
    ):
        named = [np.unique(users[part]) for part in parts]
        assert len(np.unique(np.concatenate(named))) == sum(map(len, named))
        assert [len(part) for part in parts] == [1000, 10_000, 100_000]
