"""Units along a later dim beside their lengths: known in other batches and under other padding, and no others for them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap import Splits, Task
from precimap.errors import TaskError
from precimap.metrics import LogLoss, Loss
from precimap.searching.preflight.checks import check_task
from precimap.searching.splits.reads import Reads
from precimap.searching.splits.split_print import SplitPrint, split_print
from precimap.searching.splits.three_splits import fingerprint_splits

READ = Reads(frozenset({("ids",), ("feats",), ("lengths",)}), frozenset({("label",)}))


def units(seed: int, n: int, longest: int = 9) -> list[dict[str, Any]]:
    """Sequences of ids from 1 on, with two floats for each, and a label; no two of them are equal."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(n):
        length = int(rng.integers(1, longest + 1))
        ids = rng.integers(1, 10**6, length)
        feats = rng.normal(size=(length, 2)).astype(np.float32)
        found.append({"ids": ids, "feats": feats, "label": number % 2})
    return found


def time_major(given: list[dict[str, Any]], longer: int = 0, pad: int = 0, array: bool = False) -> dict[str, Any]:
    """One batch: ids [T, B], feats [T, B, 2], lengths [B], label [B]; padded to the longest, and `longer` more."""
    top = max(len(one["ids"]) for one in given) + longer
    ids = np.full((top, len(given)), pad, np.int64)
    feats = np.zeros((top, len(given), 2), np.float32)
    for place, one in enumerate(given):
        ids[: len(one["ids"]), place] = one["ids"]
        feats[: len(one["ids"]), place] = one["feats"]
    lengths, label = np.array([len(one["ids"]) for one in given]), np.array([one["label"] for one in given])
    batch = {"ids": ids, "feats": feats, "lengths": lengths, "label": label.astype(np.float32)}
    return batch if array else {name: torch.from_numpy(value) for name, value in batch.items()}


def cut(given: list[dict[str, Any]], sizes: list[int], **how: Any) -> list[dict[str, Any]]:
    """Batches of these sizes, in turns, until all is cut."""
    found, start, turn = [], 0, 0
    while start < len(given):
        found.append(time_major(given[start : start + sizes[turn % len(sizes)]], **how))
        start, turn = start + sizes[turn % len(sizes)], turn + 1
    return found


def task_of(*splits: Any, **changes: Any) -> Task:
    three = [*splits, *[splits[-1]] * (3 - len(splits))]
    fields: dict[str, Any] = {
        "splits": Splits(*three),
        "forward": lambda model, b: model(b["feats"]).squeeze(-1).sum(0) / b["lengths"] + b["ids"].sum(0) * 1e-7,
        "loss": lambda scores, b: (scores - b["label"]) ** 2,
        "metric": LogLoss(),
        "labels": lambda b: b["label"],
    }
    torch.manual_seed(0)
    return Task(nn.Linear(2, 1).eval(), **{**fields, **changes})


def printed(batches: Any, reads: Reads = READ, **changes: Any) -> SplitPrint:
    return split_print(task_of(batches, **changes), "certify", reads)


def known(one: SplitPrint, other: SplitPrint) -> float:
    return max(float(np.isin(mine, theirs).mean()) for mine in one.views for theirs in other.views)


WHOLE = units(0, 61)
FORMS: dict[str, list[dict[str, Any]]] = {
    "another batch size": cut(WHOLE, [7]),
    "sizes that vary": cut(WHOLE, [3, 9, 5]),
    "some batches as long as wide": cut(WHOLE, [9, 8, 4, 5]),
    "all in one": cut(WHOLE, [61]),
    "one unit a batch": cut(WHOLE, [1]),
    "longer padding": cut(WHOLE, [16], longer=5),
    "another order": cut(WHOLE[::-1], [16]),
    "arrays": cut(WHOLE, [10], array=True),
}


@pytest.mark.parametrize("reads", [READ, Reads()], ids=["watched", "all read"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_same_units_are_known_in_every_form(form: list[dict[str, Any]], reads: Reads) -> None:
    before, after = printed(cut(WHOLE, [16]), reads), printed(form, reads)
    assert (before.n, after.n) == (61, 61)
    assert not after.untold
    assert len(after.distinct) == 61
    assert known(after, before) == known(before, after) == 1
    assert set(after.units.tolist()) == set(before.units.tolist()), "with all their evidence"
    assert known(printed(cut(units(1, 61), [7]), reads), before) == 0


def test_one_changed_value_is_one_new_unit() -> None:
    before = printed(cut(WHOLE, [16]))
    for name, at in (("ids", 2), ("feats", 2)):
        changed = [dict(one) for one in WHOLE]
        changed[30] = {**changed[30], name: changed[30][name].copy()}
        changed[30][name][min(at, len(changed[30][name]) - 1)] += 1
        after = printed(cut(changed, [7]))
        assert len(set(after.units.tolist()) - set(before.units.tolist())) == 1


def test_what_only_the_loss_reads_is_turned_too() -> None:
    """Targets [T, B]: evidence of a unit, whatever stands beside it in a batch."""
    reads = Reads(frozenset({("ids",), ("lengths",)}), frozenset({("feats",)}), ("lengths",))
    one, other = (printed(cut(WHOLE, sizes), reads, metric=Loss(), labels=None) for sizes in ([16], [5, 8]))
    assert set(one.units.tolist()) == set(other.units.tolist())


@given(
    st.integers(2, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 4),
    st.sampled_from([0, -1, -100]),
)
def test_any_two_cuts_of_the_same_units_are_the_same_units(
    n: int, first: list[int], second: list[int], longer: int, pad: int
) -> None:
    """Unless a cut leaves open which dim is which: every batch as long as it is wide, or as its lengths together."""
    whole = units(n, n)
    one, other = cut(whole, first, pad=pad), cut(whole, second, longer=longer)
    for batches in (one, other):
        square = all(len(b["ids"]) == len(b["label"]) for b in batches)
        end_to_end = all(len(b["ids"]) == int(b["lengths"].sum()) for b in batches)
        if square or (end_to_end and any(len(b["label"]) > 1 for b in batches)):
            return
    prints = [printed(batches) for batches in (one, other)]
    assert set(prints[0].units.tolist()) == set(prints[1].units.tolist())
    assert len(prints[0].distinct) == n


def test_a_batch_of_one_unit_tells_that_rows_do_not_lie_end_to_end() -> None:
    """Two units of 8 and 1 padded to 9 could be nine rows; one of 9 padded to 10 could not."""
    whole = units(3, 3)
    assert [len(one["ids"]) for one in whole] == [8, 1, 9]
    before, after = printed(cut(whole, [1])), printed(cut(whole, [2], longer=1))
    assert set(before.units.tolist()) == set(after.units.tolist())


@given(st.integers(13, 20), st.integers(1, 12), st.lists(st.integers(2, 12), min_size=1, max_size=3))
def test_shared_tables_and_rows_in_front_stay_what_they_were(rows: int, width: int, sizes: list[int]) -> None:
    """Candidates that all units share, and [B, T], whatever sizes meet."""
    generator = torch.Generator().manual_seed(rows)
    x, table = torch.randn(60, width, generator=generator), torch.randn(rows, 6, generator=generator)
    reads = Reads(frozenset({("x",), ("table",)}), frozenset())

    def batches(given: list[int]) -> list[dict[str, Tensor]]:
        ends = np.cumsum([given[k % len(given)] for k in range(60)])
        parts = np.split(np.arange(60), ends[ends < 60])
        return [{"x": x[part], "table": table, "label": torch.arange(60)[part] % 2 * 1.0} for part in parts]

    one, other = printed(batches(sizes), reads), printed(batches([60]), reads)
    assert known(one, other) == 1
    assert len(one.distinct) == 60


def test_packed_rows_beside_their_lengths_stay_packed() -> None:
    """[total, D] where D is the size of every batch."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 40)
    values, ends = rng.normal(size=(int(lengths.sum()), 8)).astype(np.float32), np.cumsum(lengths)

    def batches(size: int) -> list[dict[str, Tensor]]:
        found = []
        for start in range(0, 40, size):
            part = lengths[start : start + size]
            rows = values[ends[start] - lengths[start] : ends[start + len(part) - 1]]
            found.append(
                {"x": torch.from_numpy(rows), "lengths": torch.from_numpy(part), "label": torch.ones(len(part))}
            )
        return found

    reads = Reads(frozenset({("x",), ("lengths",)}), frozenset())
    one, other = printed(batches(8), reads), printed(batches(20), reads)
    assert known(one, other) == 1
    assert len(one.distinct) == 40


def test_a_whole_task_finds_them() -> None:
    """As in a search: reads are watched, and a certify split that is the search split in other batches is refused."""
    task = task_of(cut(units(2, 30), [8]), cut(WHOLE, [9, 9, 7]), cut(units(3, 40), [8]), metric=Loss(), labels=None)
    first = check_task(task)
    assert len(task.splits.search[0]["ids"]) == 9, "as long as wide"  # type: ignore[index]
    assert first.reads.counts in {("lengths",), ("label",)}
    found = fingerprint_splits(task, first.reads)
    assert (found.search.n, found.certify.n) == (61, 40)
    assert not found.notes
    same = task_of(cut(units(2, 30), [8]), cut(WHOLE, [9, 9, 7]), cut(WHOLE, [5]), metric=Loss(), labels=None)
    with pytest.raises(TaskError, match=r"100 % .* are also in the search split"):
        fingerprint_splits(same, check_task(same).reads)


def test_units_that_influence_each_other_are_refused_in_square_batches_too() -> None:
    """By the later dim as by dim 0: a mean over the batch, and in-batch negatives beside a square table of labels."""
    mixed = {
        "time-major": lambda m, b: m(b["feats"]).squeeze(-1).sum(0) + b["ids"].sum(0).float().mean(),
        "in front": lambda m, b: (b["x"] @ b["x"].T).logsumexp(1),
    }
    for name, forward in mixed.items():
        batches = cut(WHOLE, [9])
        for batch in batches:
            batch |= {"x": torch.randn(len(batch["label"]), 4), "pairs": torch.eye(len(batch["label"]))}
        task = task_of(batches, forward=forward, metric=Loss(), labels=None)
        assert len(batches[0]["ids"]) == 9, name
        with pytest.raises(TaskError, match="units must not influence each other"):
            check_task(task)
