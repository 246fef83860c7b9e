"""Batches of other libraries are known by content: tables of pandas, polars and pyarrow, torchrec's jagged tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from precimap import Splits, Task
from precimap.errors import TaskError
from precimap.fingerprints import of_value
from precimap.metrics import LogLoss
from precimap.searching.preflight.checks import check_task
from precimap.searching.splits.reads import Reads
from precimap.searching.splits.split_print import SplitPrint, split_print
from precimap.searching.splits.three_splits import fingerprint_splits

N = 40
Columns = dict[str, Any]


def columns(seed: int = 0, n: int = N) -> Columns:
    rng = np.random.default_rng(seed)
    found = {"x": rng.normal(size=n), "id": rng.integers(0, 10**6, n), "text": [f"unit {seed} {k}" for k in range(n)]}
    return {**found, "label": (np.arange(n) % 2).astype(float)}


def cut(whole: Columns, size: int) -> list[Columns]:
    return [{name: values[i : i + size] for name, values in whole.items()} for i in range(0, len(whole["label"]), size)]


def changed(whole: Columns) -> Columns:
    ids = whole["id"].copy()
    ids[7] += 1
    return {**whole, "id": ids}


def pandas(given: Columns) -> Any:
    return pytest.importorskip("pandas").DataFrame(given)


def polars(given: Columns) -> Any:
    return pytest.importorskip("polars").DataFrame(given)


def arrow(given: Columns) -> Any:
    return pytest.importorskip("pyarrow").table(given)


def with_row_labels(given: Columns) -> Any:
    frame = pandas(given)
    return frame.set_index(frame["id"].astype(str) + "r")


def jagged(given: Columns, weights: bool = False) -> Any:
    """Two features of each unit, of 1 to 3 ids each."""
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor")
    lengths = [k % 3 + 1 for _ in range(2) for k in given["id"].tolist()]
    ids = [k + place for key in range(2) for k in (given["id"] + key).tolist() for place in range((k - key) % 3 + 1)]
    of = torch.arange(len(ids)) % 7 / 7 if weights else None
    return sparse.KeyedJaggedTensor(["f", "g"], torch.tensor(ids), weights=of, lengths=torch.tensor(lengths))


FORMS: dict[str, Callable[[Columns], Any]] = {
    "pandas": pandas,
    "pandas with row labels": with_row_labels,
    "pandas categories": lambda c: pandas(c).astype({"text": "category"}),
    "pandas that may be missing": lambda c: pandas(c).convert_dtypes(),
    "pandas over arrow": lambda c: (pytest.importorskip("pyarrow"), pandas(c).convert_dtypes(dtype_backend="pyarrow"))[
        1
    ],
    "polars": polars,
    "polars categories": lambda c: polars(c).cast({"text": pytest.importorskip("polars").Categorical}),
    "polars lists": lambda c: polars({**c, "list": [[k] * (k % 3 + 1) for k in c["id"].tolist()]}),
    "arrow": arrow,
    "pandas in a dict": lambda c: {"in": pandas(c).drop(columns="label"), "label": torch.tensor(c["label"])},
    "polars in a dict": lambda c: {"in": polars(c).drop("label"), "label": torch.tensor(c["label"])},
    "columns of pandas": lambda c: {k: pandas(c)[k] for k in ("id", "text", "label")},
    "columns of polars": lambda c: {k: polars(c)[k] for k in ("id", "text", "label")},
    "jagged": lambda c: {"in": jagged(c), "label": torch.tensor(c["label"])},
}


def task_of(*splits: Any, **changes: Any) -> Task:
    three = [*splits, *[splits[-1]] * (3 - len(splits))]
    fields: dict[str, Any] = {
        "splits": Splits(*three),
        "forward": lambda model, batch: model(batch["x"]),
        "loss": lambda scores, batch: scores,
        "metric": LogLoss(),
        "labels": lambda batch: batch["label"],
    }
    return Task(nn.Linear(2, 1).eval(), **{**fields, **changes})


def printed(form: Callable[[Columns], Any], whole: Columns, size: int, **changes: Any) -> SplitPrint:
    return split_print(task_of([form(part) for part in cut(whole, size)], **changes), "certify", Reads())


def known(one: SplitPrint, other: SplitPrint) -> float:
    return max(float(np.isin(mine, theirs).mean()) for mine in one.views for theirs in other.views)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_equal_content_in_other_objects_is_one_and_a_changed_value_is_not(form: Callable[[Columns], Any]) -> None:
    assert of_value(form(columns())) == of_value(form(columns()))
    assert of_value(form(columns())) != of_value(form(changed(columns())))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_units_are_known_in_other_batches_and_by_each_value(form: Callable[[Columns], Any]) -> None:
    before, after = printed(form, columns(), 16), printed(form, columns(), 7)
    assert (before.n, after.n, len(after.distinct)) == (N, N, N)
    assert not after.untold
    assert set(before.units.tolist()) == set(after.units.tolist())
    assert known(printed(form, columns(1), 7), before) == 0
    other = printed(form, changed(columns()), 7)
    assert len(set(other.units.tolist()) - set(before.units.tolist())) == 1


@pytest.mark.parametrize("form", [pandas, polars, arrow])
def test_a_table_is_known_as_the_columns_it_holds(form: Callable[[Columns], Any]) -> None:
    plain = printed(dict, columns(), 16)
    assert set(printed(form, columns(), 7).inputs.tolist()) == set(plain.inputs.tolist())


@pytest.mark.parametrize("form", [pandas, polars, arrow, lambda c: pandas(c).convert_dtypes()])
def test_what_is_missing_is_content(form: Callable[[Columns], Any]) -> None:
    """In its place, in a column of numbers and in one of texts."""

    def holed(given: Columns, rest: int = 0) -> Any:
        gone = [k % 2 == rest for k in given["id"].tolist()]
        left = {k: [None if no else v for no, v in zip(gone, list(given[k]), strict=True)] for k in ("id", "text")}
        return form({**given, **left})

    whole = printed(holed, columns(), 16)
    assert set(whole.units.tolist()) == set(printed(holed, columns(), 7).units.tolist())
    assert len(whole.distinct) == N
    other = printed(lambda c: holed(c, 1), columns(), 7)
    assert not set(whole.units.tolist()) & set(other.units.tolist())


def test_what_the_task_says_may_be_a_column() -> None:
    for form in (pandas, polars):
        plain = printed(
            dict, columns(), 16, clusters=lambda b: torch.as_tensor(b["id"]), weights=lambda b: b["label"] + 1
        )
        found = printed(form, columns(), 7, clusters=lambda b: b["id"], weights=lambda b: b["label"] + 1)
        assert set(found.units.tolist()) == set(plain.units.tolist())
        assert found.clusters is not None
        assert plain.clusters is not None
        assert found.clusters.tolist() == plain.clusters.tolist()


def test_how_a_jagged_tensor_is_held_is_no_content() -> None:
    """Lengths or offsets, and what it works out when it is asked; its weights and its keys are content."""
    plain, asked = jagged(columns()), jagged(columns())
    asked.offsets(), asked.length_per_key(), asked.offset_per_key(), asked.to_dict()
    by_offsets = type(plain)(plain.keys(), plain.values(), offsets=plain.offsets())
    assert of_value(plain) == of_value(asked) == of_value(by_offsets)
    others = [jagged(columns(), weights=True), type(plain)(["f", "h"], plain.values(), lengths=plain.lengths())]
    assert len({of_value(one) for one in (plain, *others)}) == 3
    parts = plain.split([1, 1])
    joined = type(plain).concat(parts)
    assert of_value(joined) == of_value(plain)


class Pooled(nn.Module):
    """A ranking model over jagged features, by torchrec's own collection."""

    def __init__(self) -> None:
        super().__init__()
        modules = pytest.importorskip("torchrec.modules.embedding_modules")
        config = pytest.importorskip("torchrec.modules.embedding_configs").EmbeddingBagConfig
        torch.manual_seed(0)
        tables = [
            config(name=name, embedding_dim=8, num_embeddings=100_000, feature_names=[name]) for name in ("f", "g")
        ]
        self.bags = modules.EmbeddingBagCollection(tables)
        self.last = nn.Linear(16, 1)

    def forward(self, given: Any) -> Tensor:
        logits: Tensor = self.last(self.bags(given).values()).squeeze(1)
        return logits


def test_a_task_over_jagged_tensors_knows_its_units() -> None:
    """Reads are watched on a real model; the same units in other batches are refused as certify split, others are not."""

    def batches(seed: int, size: int) -> list[dict[str, Any]]:
        parts = cut({**columns(seed, 64), "id": columns(seed, 64)["id"] % 90_000}, size)
        return [
            {"in": jagged(part), "label": torch.tensor(part["label"]), "row": torch.arange(len(part["label"]))}
            for part in parts
        ]

    def task(certify: list[dict[str, Any]]) -> Task:
        three = Splits(batches(1, 16), batches(2, 16), certify)
        model = Pooled().eval()
        loss: Any = lambda s, b: nn.functional.binary_cross_entropy_with_logits(s, b["label"].float(), reduction="none")  # noqa: E731
        return Task(
            model,
            splits=three,
            forward=lambda m, b: m(b["in"]),
            loss=loss,
            metric=LogLoss(),
            labels=lambda b: b["label"],
        )

    fresh = task(batches(3, 8))
    first = check_task(fresh)
    assert first.reads.forward == {("in",)}
    assert fingerprint_splits(fresh, first.reads).certify.n == 64
    same = task(batches(2, 8))
    with pytest.raises(TaskError, match=r"100 % .* are also in the search split"):
        fingerprint_splits(same, check_task(same).reads)
