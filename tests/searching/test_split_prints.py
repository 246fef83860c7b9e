"""A unit is known by what belongs to it, however a batch carries it; splits by their units and by every batch."""

import math
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap import Guard, Splits, Task
from precimap.errors import TaskError
from precimap.metrics import NE, LogLoss, Loss
from precimap.searching.preflight.checks import check_task
from precimap.searching.splits.reads import Reads, WatchedDict
from precimap.searching.splits.rows import of_rows, of_segments
from precimap.searching.splits.split_print import SplitPrint, counted_once, split_print
from precimap.searching.splits.three_splits import fingerprint_splits, unchanging

N = 40


def rows(seed: int, n: int = N) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(n, 6, generator=generator),
        "ids": torch.randint(1, 9, (n, 3), generator=generator),
        "label": torch.rand(n, generator=generator).round(),
        "user": torch.arange(n) // 4 + 1000 * seed,
    }


def cut(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(batch["label"]), size)]


def task_of(*splits: Any, **changes: Any) -> Task:
    """A task over the given splits (calibration, search, certify), the last of them repeated."""
    three = [*splits, *[splits[-1]] * (3 - len(splits))]
    fields: dict[str, Any] = {
        "splits": Splits(*three),
        "forward": lambda model, batch: model(batch["x"])[:, 0] + batch["ids"].sum(1),
        "loss": lambda scores, batch: scores * 0,
        "metric": LogLoss(),
    }
    return Task(nn.Linear(6, 1).eval(), **{**fields, **changes})


READ = Reads(frozenset({("x",), ("ids",)}), frozenset({("label",)}))


def printed(batches: Any, reads: Reads = READ, **changes: Any) -> SplitPrint:
    return split_print(task_of(batches, **changes), "certify", reads)


def known(one: SplitPrint, other: SplitPrint) -> float:
    """The largest share of `one`'s units that `other` holds, in any view of them."""
    return max(float(np.isin(mine, theirs).mean()) for mine in one.views for theirs in other.views)


WHOLE = rows(0)
SAME_DATA: dict[str, Callable[[], list[Any]]] = {
    "another batch size": lambda: cut(WHOLE, 7),
    "one unit a batch": lambda: cut(WHOLE, 1),
    "another order": lambda: cut({k: v.flip(0) for k, v in WHOLE.items()}, 16),
    "one row less": lambda: cut({k: v[1:] for k, v in WHOLE.items()}, 16),
    "a row number": lambda: cut({**WHOLE, "row": torch.arange(N)}, 16),
    "a constant": lambda: cut({**WHOLE, "one": torch.ones(N)}, 16),
    "noise": lambda: cut({**WHOLE, "noise": torch.rand(N, 2)}, 16),
    "a number for the batch": lambda: [{**b, "number": k} for k, b in enumerate(cut(WHOLE, 16))],
    "other clusters": lambda: cut({**WHOLE, "user": torch.arange(N)}, 16),
    "no clusters": lambda: cut({k: v for k, v in WHOLE.items() if k != "user"}, 16),
    "other labels": lambda: cut({**WHOLE, "label": 1 - WHOLE["label"]}, 16),
    "arrays": lambda: cut({k: v.numpy() for k, v in WHOLE.items()}, 16),
    "float64": lambda: cut({**WHOLE, "x": WHOLE["x"].double(), "ids": WHOLE["ids"].int()}, 16),
    "padded ids": lambda: cut({**WHOLE, "ids": nn.functional.pad(WHOLE["ids"], (0, 4))}, 16),
    "ids padded on the left": lambda: cut({**WHOLE, "ids": nn.functional.pad(WHOLE["ids"], (4, 0))}, 16),
    "keys in another order": lambda: cut(dict(reversed(WHOLE.items())), 16),
}


@pytest.mark.parametrize("data", SAME_DATA.values(), ids=SAME_DATA)
def test_the_same_data_are_known_in_every_form(data: Callable[[], list[Any]]) -> None:
    before, after = printed(cut(WHOLE, 16)), printed(data())
    assert known(after, before) == 1
    assert known(printed(cut(rows(1), 16)), before) < 0.01


UNTRACKED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "tuple": lambda b: tuple(b.values()),
    "tuple with a row number": lambda b: (torch.arange(len(b["x"])), *b.values()),
    "object": lambda b: SimpleNamespace(**b),
    "object with a constant": lambda b: SimpleNamespace(**b, one=torch.ones(len(b["x"]))),
    "nested": lambda b: {"in": {"x": b["x"], "ids": b["ids"]}, "label": b["label"], "user": b["user"]},
    "namedtuple": lambda b: namedtuple("B", b)(*b.values()),
}


@pytest.mark.parametrize("form", UNTRACKED.values(), ids=UNTRACKED)
def test_the_same_data_are_known_where_reads_cannot_be_watched(form: Callable[[dict[str, Tensor]], Any]) -> None:
    def label(batch: Any) -> Any:
        whole = batch if isinstance(batch, dict) else getattr(batch, "__dict__", {})
        if whole:
            return whole["label"]
        return next(v for v in batch if v.dtype == torch.float32 and v.dim() == 1)

    plain = printed(cut(WHOLE, 16), Reads(), labels=lambda b: b["label"])
    other = printed([form(b) for b in cut(WHOLE, 7)], Reads(), labels=label)
    assert other.n == N
    assert known(other, plain) == 1
    assert known(printed([form(b) for b in cut(rows(1), 7)], Reads(), labels=label), plain) < 0.01


def test_a_constant_is_no_new_data_where_no_column_tells_by_itself() -> None:
    """Also the other way round: what is constant in a part of the data stands in the whole with other values."""

    def narrow(n: int, **more: Any) -> SplitPrint:
        batch = SimpleNamespace(x=WHOLE["x"][:n, :3], label=WHOLE["label"][:n], **{k: v[:n] for k, v in more.items()})
        return printed([batch], Reads(), labels=lambda b: b.label)

    plain, day = narrow(N), torch.arange(N) // 10
    assert plain.wide == ()
    assert known(narrow(N, one=torch.ones(N)), plain) == 1
    assert known(plain, narrow(N, one=torch.full((N,), 7))) == 1
    assert known(narrow(10, day=day), narrow(N, day=day)) == 1


def texts(seed: int) -> list[str]:
    return [f"unit {seed} {k}" for k in range(N)]


def lengths(seed: int) -> Tensor:
    return torch.randint(1, 5, (N,), generator=torch.Generator().manual_seed(seed))


def flat(seed: int) -> Tensor:
    return torch.randint(10**6, (int(lengths(seed).sum()),), generator=torch.Generator().manual_seed(seed + 50))


@dataclass
class Ragged:
    """As an older collate function may give it: feature-major lengths of two features."""

    keys: list[str]
    values: Tensor
    lengths: Tensor


def kjt(seed: int) -> Any:
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor")
    return sparse.KeyedJaggedTensor.from_lengths_sync(["a"], flat(seed), lengths(seed))


CONTENT: dict[str, Callable[[int], Any]] = {
    "texts": texts,
    "tuple of texts": lambda seed: tuple(texts(seed)),
    "array of texts": lambda seed: np.array(texts(seed)),
    "array of objects": lambda seed: np.array(texts(seed), dtype=object),
    "array": lambda seed: rows(seed)["x"].numpy(),
    "list of arrays": lambda seed: [np.arange(k % 5 + 1) + 100 * seed for k in range(N)],
    "list of lists": lambda seed: [[seed, k] * (k % 3 + 1) for k in range(N)],
    "list of equal arrays": lambda seed: [r.numpy() for r in rows(seed)["x"]],
    "offsets": lambda seed: {"flat": flat(seed), "offsets": lengths(seed).cumsum(0) - lengths(seed)},
    "all offsets": lambda seed: {"flat": flat(seed), "at": nn.functional.pad(lengths(seed).cumsum(0), (1, 0))},
    "lengths": lambda seed: {"flat": flat(seed).numpy(), "lengths": lengths(seed).numpy()},
    "two features": lambda seed: Ragged(
        ["a", "b"], torch.cat([flat(seed), flat(seed + 9)]), torch.cat([lengths(seed), lengths(seed + 9)])
    ),
    "KeyedJaggedTensor": kjt,
    "sparse": lambda seed: rows(seed)["x"].to_sparse(),
    "dates": lambda seed: (np.arange(N) + 1000 * seed).astype("M8[D]"),
    "records": lambda seed: np.array([(k, k + seed / 7) for k in range(N)], [("a", "i4"), ("b", "f8")]),
    "half": lambda seed: rows(seed)["x"].half(),
}


@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT)
def test_units_are_told_apart_by_content_and_not_by_labels(content: Callable[[int], Any]) -> None:
    """Labels are equal in both splits; what differs is what the model reads."""
    label = torch.arange(N) % 2
    first, again, other = (
        printed([{"c": content(s), "label": label}], Reads(), labels=lambda b: b["label"]) for s in (1, 1, 2)
    )
    assert first.n == other.n == N
    assert known(again, first) == 1
    assert float(np.isin(other.units, first.units).mean()) <= 0.05


@pytest.mark.parametrize("name", ["list of arrays", "list of lists", "texts", "list of equal arrays", "array of texts"])
def test_rows_of_lists_are_cut_along_units(name: str) -> None:
    whole, label = CONTENT[name](1), torch.arange(N) % 2
    parts = [{"c": whole[i : i + 8], "label": label[i : i + 8]} for i in range(0, N, 8)]
    one, cut_up = (printed(b, Reads(), labels=lambda b: b["label"]) for b in ([{"c": whole, "label": label}], parts))
    assert known(cut_up, one) == 1


@given(st.lists(st.lists(st.integers(-(2**60), 2**60), min_size=1, max_size=5), min_size=1, max_size=8))
def test_a_row_has_one_print_in_every_carrier(listed: list[list[int]]) -> None:
    """Ragged rows end to end, and each row as a matrix of its own: an oracle that shares no loop."""
    ends = np.array([len(row) for row in listed])
    joined = of_segments(np.concatenate([np.array(row, np.int64) for row in listed]), ends)
    plain = {tuple(row) for row in listed}
    assert len(set(joined.tolist())) == len(plain)
    for row, found in zip(listed, joined, strict=True):
        if row[-1] not in (0, -1, -100) and row[0] not in (0, -1, -100) and row[-2:-1] != row[-1:]:
            assert of_rows(np.array([row]))[0] == found
            assert of_rows(np.array([[*row, 0, 0]]))[0] == found


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=30))
def test_equal_prints_are_equal_rows_but_for_padding(listed: list[list[int]]) -> None:
    found = of_rows(np.array(listed))

    def bare(row: list[int]) -> tuple[int, ...]:
        while row and row[-1] == 0:
            row = row[:-1]
        if max(max(r) for r in listed) > 1:
            while row and row[0] == 0:
                row = row[1:]
            while len(row) > 1 and row[-1] == row[-2] and len(row) > 1 and listed:
                row = row[:-1]
        return tuple(row)

    for a, one in zip(listed, found, strict=True):
        for b, other in zip(listed, found, strict=True):
            if a == b:
                assert one == other
            if one == other:
                assert bare(a) == bare(b)


def test_one_hot_rows_and_masks_stay_apart() -> None:
    assert len(set(of_rows(np.eye(6)).tolist())) == 6
    assert len(set(of_rows(np.eye(6, dtype=np.int64)).tolist())) == 6
    masks = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    assert (of_rows(masks) == of_rows(np.pad(masks, ((0, 0), (3, 0))))).all()
    assert (of_rows(masks[:, ::-1]) == of_rows(masks)).all()


# What the three splits share


def test_shared_units_are_said_and_above_one_percent_refused() -> None:
    search, certify = rows(1, 400), rows(2, 400)

    def mixed(count: int) -> list[dict[str, Tensor]]:
        return cut({k: torch.cat([search[k][:count], certify[k][count:]]) for k in search}, 64)

    found = fingerprint_splits(task_of([rows(0)], cut(search, 64), mixed(0)), READ)
    assert found.notes == ()
    few = fingerprint_splits(task_of([rows(0)], cut(search, 64), mixed(4)), READ)
    assert any("1 % (4) of the certify split's 400 units are also in the search split" in note for note in few.notes)
    for count, share in ((5, "1.25 %"), (196, "49 %"), (400, "100 %")):
        with pytest.raises(
            TaskError, match=f"{share} .* of the certify split's 400 units are also in the search split"
        ):
            fingerprint_splits(task_of([rows(0)], cut(search, 64), mixed(count)), READ)
    numbered = cut({**{k: torch.cat([b[k] for b in mixed(196)]) for k in search}, "row": torch.arange(400)}, 64)
    with pytest.raises(TaskError, match="49 %"):  # a row number does not hide it
        fingerprint_splits(task_of([rows(0)], cut({**search, "row": torch.arange(400) + 9000}, 64), numbered), READ)


def test_equal_rows_of_other_clusters_are_other_events() -> None:
    """A log with few features repeats rows by nature; the task may tell which event each is."""
    few = {"x": torch.ones(N, 6), "ids": torch.randint(0, 2, (N, 3)), "label": torch.zeros(N)}
    one, other = ({**few, "event": torch.arange(N) + start} for start in (0, 1000))
    with pytest.raises(TaskError, match=r"100 % .* tell them apart"):
        fingerprint_splits(task_of([rows(0)], [one], [other]), READ)
    told = task_of([rows(0)], [one], [other], clusters=lambda batch: batch["event"])
    assert fingerprint_splits(told, READ).certify.repeated == 0


def test_shared_clusters_and_calibration_data_are_said() -> None:
    search, certify = rows(1), {**rows(2), "user": rows(1)["user"] + 5}
    found = fingerprint_splits(
        task_of([rows(2)], cut(search, 8), cut(certify, 8), clusters=lambda batch: batch["user"]), READ
    )
    assert any("5 of the certify split's 10 clusters have ids that are in the search split" in n for n in found.notes)
    assert any("100 % (40) of the certify split's 40 units are also in the calibration split" in n for n in found.notes)


def test_units_that_stand_twice_are_one_cluster() -> None:
    once, search = cut(rows(2), 8), cut(rows(1), 8)
    found = fingerprint_splits(task_of([rows(0)], search, once * 3), READ)
    assert (found.certify.n, found.certify.repeated) == (3 * N, 2 * N)
    assert any(
        "66.7 % (80) of the certify split's 120 units have stood in it before (40 different" in n for n in found.notes
    )
    counted = counted_once(found.certify, (8,) * 15)
    assert counted is not None
    assert counted[0].tolist() == list(range(N)), "whole copies are left out"
    assert len(np.unique(counted[1])) == N
    assert counted_once(fingerprint_splits(task_of([rows(0)], search, once), READ).certify, (8,) * 5) is None
    # A batch whose columns do not tell its units is known as a whole.
    odd = counted_once(found.certify, (3,) * 15)
    assert odd is not None
    assert odd[0].tolist() == list(range(15))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_what_is_left_of_copies_is_as_often_there_as_in_one_of_them(units: list[int], copies: int) -> None:
    """Against counting by hand: relative frequencies stay, and nothing that is left is a copy of the whole."""
    whole = {name: values[units * copies] for name, values in rows(3, 6).items()}
    known = printed([whole])
    found = counted_once(known, (len(units) * copies,))
    if found is None:
        assert len(set(units)) == len(units) * copies
        return
    left, ids = found
    before, after = Counter(units * copies), Counter((units * copies)[row] for row in left)
    assert math.gcd(*after.values()) == 1
    assert {unit: count * len(left) for unit, count in before.items()} == {
        unit: count * len(units) * copies for unit, count in after.items()
    }
    assert len(set(ids.tolist())) == len(after)


@pytest.mark.parametrize("metric", [LogLoss(), Loss()])
def test_another_label_is_another_unit(metric: Any) -> None:
    """Also where only the loss reads it."""
    twice = {k: torch.cat([v, v]) for k, v in WHOLE.items()}
    twice["label"][N:] = 1 - twice["label"][N:]
    assert printed([twice], metric=metric, labels=lambda b: b["label"]).repeated == 0
    assert printed([WHOLE] * 2, metric=metric, labels=lambda b: b["label"]).repeated == N


def test_what_the_task_says_of_a_batch_is_known() -> None:
    guards = (Guard(NE(), 0.1, where=lambda b: b["x"][:, 0] > 0, name="s"),)
    fields: dict[str, Any] = {"labels": lambda b: b["label"], "clusters": lambda b: b["user"], "guards": guards}
    fields["weights"] = lambda b: 1 + b["label"]
    said = printed(cut(WHOLE, 8), **fields).said
    assert said == printed(cut(WHOLE, 8), **fields).said
    for name, other in {
        "labels": lambda b: 1 - b["label"],
        "clusters": lambda b: b["user"] // 2,
        "weights": lambda b: 1 + 9 * b["label"],
        "guards": (Guard(NE(), 0.1, where=lambda b: b["x"][:, 0] > 1, name="s"),),
    }.items():
        assert printed(cut(WHOLE, 8), **{**fields, name: other}).said != said, name


def test_a_function_of_the_task_that_fails_is_named_with_its_batch() -> None:
    def clusters(batch: Any) -> Any:
        if batch["label"].sum() >= 0 and len(batch["x"]) == 4:
            raise KeyError("region")
        return batch["user"]

    with pytest.raises(TaskError, match="clusters failed on batch 4 of the certify split: KeyError: 'region'"):
        printed(cut(WHOLE, 9), clusters=clusters)


# Data that change


class Drifting:
    """Gives other data from pass `since` on."""

    def __init__(self, batches: list[Any], since: int, change: Callable[[list[Any]], list[Any]]) -> None:
        self.batches, self.since, self.change, self.passes = batches, since, change, 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(self.batches if self.passes < self.since else self.change(self.batches))


CHANGES: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "noise": (
        lambda b: [*b[:2], {**b[2], "x": b[2]["x"] + 1e-6}, *b[3:]],
        "batch 2 of the search split is another one",
    ),
    "order": (lambda b: b[::-1], "batch 0 of the search split is another one"),
    "less": (lambda b: b[:-1], "gives 4 batches now and gave 5"),
    "more": (lambda b: [*b, b[0]], "batch 5 of the search split is another one"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("since", [2, 3, 5])
def test_a_split_that_changes_is_refused_by_batch(name: str, since: int) -> None:
    change, message = CHANGES[name]
    split = Drifting(cut(rows(1), 8), since, change)
    task = task_of([rows(0)], split, cut(rows(2), 8))
    if since == 2:
        with pytest.raises(TaskError, match="the search split gives other batches when it is read again"):
            fingerprint_splits(task, READ)
        return
    watched = unchanging(task, fingerprint_splits(task, READ))
    for _ in range(since - 3):
        assert len(list(watched.splits.search)) == 5
    with pytest.raises(TaskError, match=message):
        list(watched.splits.search)


def test_a_forward_that_writes_its_batch_is_noticed() -> None:
    batches = cut(rows(1), 8)
    task = task_of([rows(0)], batches, cut(rows(2), 8))
    watched = unchanging(task, fingerprint_splits(task, READ))
    for batch in watched.splits.search:
        batch["x"].add_(1e-7 + batch["x"].abs().max())
    with pytest.raises(TaskError, match="batch 0 of the search split is another one"):
        next(iter(watched.splits.search))


@pytest.mark.parametrize("name", ["calibration", "search", "certify"])
def test_an_empty_split_is_named(name: str) -> None:
    task = task_of([rows(0)], [rows(1)], [rows(2)])
    with pytest.raises(TaskError, match=f"expected batches in the {name} split, got none"):
        fingerprint_splits(changed(task, splits=changed(task.splits, **{name: []})), READ)


# Which keys are read

READERS: dict[str, tuple[Callable[[Any], Any], set[tuple[str, ...]]]] = {
    "item": (lambda b: b["x"], {("x",)}),
    "get": (lambda b: b.get("x"), {("x",)}),
    "unpacked": (lambda b: (lambda **k: k["x"])(**b), {("x",), ("row",)}),
    "dict": (lambda b: dict(b)["x"], {("x",), ("row",)}),
    "dict in dict": (lambda b: dict(b)["in"]["z"], {("x",), ("row",), ("in", "z")}),
    "items": (lambda b: [v for _, v in b.items()], {("x",), ("row",), ("in", "y"), ("in", "z")}),
    "nested": (lambda b: b["in"]["y"], {("in", "y")}),
    "all of a nested one": (lambda b: [*b["in"].values()], {("in", "y"), ("in", "z")}),
    "only names": (lambda b: [k for k in b if k != "row"] and "x" in b, set()),
    "merged": (lambda b: {**b["in"]}["y"], {("in", "y"), ("in", "z")}),
    "chosen": (lambda b: {k: b[k] for k in b if k == "x"}, {("x",)}),
    "popped": (lambda b: b.pop("x"), {("x",)}),
}


@pytest.mark.parametrize(("read", "expected"), READERS.values(), ids=READERS)
def test_reads_are_noted(read: Callable[[Any], Any], expected: set[tuple[str, ...]]) -> None:
    seen: set[tuple[Any, ...]] = set()
    plain = {"x": 1, "row": 2, "in": {"y": 3, "z": 4}}
    assert read(WatchedDict(plain, seen)) == read({**plain, "in": dict(plain["in"])})  # type: ignore[call-overload]
    assert seen == expected


def test_the_first_batch_tells_what_forward_and_loss_read() -> None:
    task = task_of([rows(0)], [rows(1)], labels=lambda b: b["label"], loss=lambda s, b: (s - b["label"]) ** 2)
    assert changed(check_task(task).reads, counts=None) == READ

    def exact(model: Any, batch: Any) -> Any:
        if type(batch) is not dict:
            raise TypeError("expected a dict")
        return model(batch["x"])[:, 0]

    assert check_task(changed(task, forward=exact)).reads.forward is None


def layout(batch: dict[str, Tensor], form: str) -> Any:
    """The same units, carried otherwise."""
    x, label = batch["x"], batch["label"]
    if form == "records":
        return [{"x": row, "label": one} for row, one in zip(x, label, strict=True)]
    carried = {"features first": x.t(), "end to end": x.reshape(-1), "two views": torch.stack((x, x))}
    beside = {"items": torch.arange(30.0).reshape(10, 3), "bias": torch.arange(10.0), "pop": torch.ones(10)}
    return {"x": carried[form], "label": label} if form in carried else {"x": x, "label": label, **beside}


@pytest.mark.parametrize("form", ["records", "features first", "end to end", "two views", "shared candidates"])
def test_units_are_the_same_in_other_batches_whatever_carries_them(form: str) -> None:
    def labels(batch: Any) -> Tensor:
        return torch.stack([row["label"] for row in batch]) if form == "records" else batch["label"]

    whole = {"x": torch.randn(128, 6, generator=torch.Generator().manual_seed(0)), "label": torch.arange(128) % 3}
    reads = Reads() if form == "records" else Reads(frozenset({("x",), ("items",)}), frozenset({("label",)}))
    one, other = (
        printed([layout(batch, form) for batch in cut(whole, size)], reads, labels=labels) for size in (16, 40)
    )
    assert known(other, one) == 1.0
    assert len(one.distinct) == 128
    assert not one.untold


def test_where_nothing_has_a_row_per_unit_it_is_said() -> None:
    texts = [{"x": f"a whole batch, {number}", "label": torch.arange(8)} for number in range(3)]
    assert printed(texts, Reads(frozenset({("x",)}), frozenset({("label",)})), labels=lambda b: b["label"]).untold
