"""Data of which no comparison can be made: told by split, batch and row, before alpha is booked, in the user's words."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.small_tasks import batches, forward, loss, planted_task
from precimap import Guard, Splits, Task, search
from precimap.errors import TaskError
from precimap.metrics import AUC, NDCG, NE, Loss
from precimap.searching.certificate.one_map import certify
from precimap.searching.preflight.checks import check_task
from precimap.searching.preflight.in_place import check_tables, written_by
from precimap.searching.preflight.split_checks import check_splits
from precimap.searching.question import Effort
from precimap.task import score

Batch = dict[str, Any]


def with_ids(split: list[Batch]) -> list[Batch]:
    """Each batch with users, weights, ages and clicks; a copy."""
    made = []
    for number, batch in enumerate(split):
        n = len(batch["x"])
        made.append({
            **{key: value.clone() for key, value in batch.items()},
            "user": torch.arange(n) // 5 + 100 * number,
            "weight": torch.ones(n),
            "age": torch.arange(n) % 9,
            "click": (torch.arange(n) % 3 == 0).float(),
        })  # fmt: skip
    return made


def task_of(**changes: Any) -> Task:
    plain = planted_task()
    made = [with_ids(batches(plain.model, 100, seed, size=25)) for seed in (1, 2, 3)]
    return replace(plain, **{"splits": Splits(*made), "metric": NDCG(5), **changes})


def click_task(**changes: Any) -> Task:
    return task_of(
        forward=lambda m, b: m(b["x"])[:, 0],
        loss=lambda s, b: F.binary_cross_entropy_with_logits(s, b["click"], reduction="none"),
        labels=lambda b: b["click"],
        metric=NE(),
        **changes,
    )


def put(split: str, number: int, key: str, rows: Any, value: Any) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        getattr(task.splits, split)[number][key][rows] = value

    return spoil


def keep(split: str, units: int) -> Callable[[Task], None]:
    """The split with so many units of its first batch and nothing else."""

    def spoil(task: Task) -> None:
        data = getattr(task.splits, split)
        data[:] = [{key: value[:units] for key, value in data[0].items()}]

    return spoil


def emptied(split: str, number: int) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        data = getattr(task.splits, split)
        data[number] = {key: value[:0] for key, value in data[number].items()}

    return spoil


def together(split: str) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        for batch in getattr(task.splits, split):
            batch["user"][:] = 7

    return spoil


def only_old(split: str) -> Callable[[Task], None]:
    def spoil(task: Task) -> None:
        for batch in getattr(task.splits, split):
            batch["age"][:] = 60

    return spoil


NAN, INF, AT = float("nan"), float("inf"), slice(3, 5)
PLAIN: dict[str, Any] = {}
CLUSTERED: dict[str, Any] = {"clusters": lambda b: b["user"]}
WEIGHED: dict[str, Any] = {"weights": lambda b: b["weight"]}
GUARDED: dict[str, Any] = {"guards": (Guard(Loss(), 1.0, where=lambda b: b["age"] < 7, name="the young"),)}
SPOILED = {
    "an empty batch": (
        task_of,
        PLAIN,
        emptied,
        (2,),
        r"batch 2 of the {split} split: expected at least one unit, got none",
    ),
    "one unit": (task_of, PLAIN, keep, (1,), r"expected at least 2 units in the {split} split, got 1"),
    "one cluster": (task_of, CLUSTERED, together, (), r"every unit of the {split} split is in one cluster"),
    "a slice of nobody": (
        task_of,
        GUARDED,
        only_old,
        (),
        r"the young needs at least two units .* in the {split} split, it has 0",
    ),
    "NaN inputs": (
        task_of,
        PLAIN,
        put,
        (1, "x", AT, NAN),
        r"batch 1 of the {split} split: forward returned NaN scores for rows 3, 4 \(2 of 25",
    ),
    "NaN weights": (
        task_of,
        WEIGHED,
        put,
        (3, "weight", AT, NAN),
        r"batch 3 of the {split} split: weights is NaN or infinite for rows 3, 4",
    ),
    "one class": (
        click_task,
        PLAIN,
        lambda split: lambda t: [b["click"].fill_(1) for b in getattr(t.splits, split)],
        (),
        r"every label of the {split} split is 1; it needs both classes",
    ),
    "NaN labels": (
        click_task,
        PLAIN,
        put,
        (1, "click", AT, NAN),
        r"batch 1 of the {split} split: expected labels that are numbers, got NaN or infinity in rows 3, 4",
    ),
    "an infinite label": (
        click_task,
        PLAIN,
        put,
        (1, "click", 4, INF),
        r"got NaN or infinity in row 4 \(1 of 25 units\)",
    ),
}


@pytest.mark.parametrize("split", ["search", "certify"])
@pytest.mark.parametrize("case", SPOILED)
def test_what_cannot_be_compared_is_told_before_anything_is_spent(case: str, split: str, tmp_path: Path) -> None:
    make, changes, spoil, where, said = SPOILED[case]
    task = make(**changes)
    spoil(split, *where)(task)
    calls = [0]

    def counted(model: Any, batch: Batch) -> Tensor:
        calls[0] += 1
        scores: Tensor = make().forward(model, batch)
        return scores

    with pytest.raises(TaskError, match=said.format(split=split)):
        search(replace(task, forward=counted), schemes=["fp8"], margin=0.3, ledger=tmp_path, run=tmp_path / "run")
    assert not list(tmp_path.iterdir()), "neither a run nor a ledger"
    assert calls[0] <= 1, "it is told before the long work"


@pytest.mark.parametrize("case", ["an empty batch", "NaN inputs"])
def test_the_calibration_split_is_looked_at_too(case: str) -> None:
    make, changes, spoil, where, said = SPOILED[case]
    task = make(**changes)
    spoil("calibration", *where)(task)
    with pytest.raises(TaskError, match=said.format(split="calibration")):
        check_splits(task)


def test_a_model_that_bears_missing_values_is_not_refused() -> None:
    task = task_of(forward=lambda m, b: m(b["x"].nan_to_num()))
    for split in ("calibration", "search", "certify"):
        getattr(task.splits, split)[1]["x"][3, :5] = NAN
    check_splits(task)


def test_what_only_scores_show_is_told_before_alpha_is_booked(tmp_path: Path) -> None:
    """A batch of the certify split with finite inputs and NaN scores; and the same for a map of one's own."""

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        scores = forward(model, batch)
        return torch.where(batch["x"][:, :1] == 17, NAN, scores)

    task = task_of(forward=failing, metric=Loss())
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 1.0, "effort": Effort(rounding_draws=0)}
    found = search(task, **asked, ledger=tmp_path / "fine")
    assert found.certified
    task.splits.certify[2]["x"][9, 0] = 17.0
    said = r"batch 2 of the certify split: forward returned NaN scores for row 9 \(1 of 25 units\)"
    with pytest.raises(TaskError, match=said):
        search(task, **asked, ledger=tmp_path / "ledger")
    with pytest.raises(TaskError, match=said):
        certify(task, found.map, target=asked_target(), margin=1.0, ledger=tmp_path / "ledger")
    assert not list((tmp_path / "ledger").glob("*")) if (tmp_path / "ledger").exists() else True


def asked_target() -> Any:
    from precimap import EMULATED

    return EMULATED


def _raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


OWN = {
    "forward": {"forward": _raises(IndexError("index 7 is out of range"))},
    "loss": {"loss": _raises(RuntimeError("shapes do not fit"))},
    "labels": {"labels": _raises(KeyError("label")), "metric": NDCG(5)},
    "clusters": {"clusters": _raises(ValueError("no user"))},
    "weights": {"weights": _raises(ZeroDivisionError("division by zero"))},
    "where of the guard loss on some": {"guards": (Guard(Loss(), 1.0, where=_raises(KeyError("age")), name="some"),)},
}


@pytest.mark.parametrize("what", OWN)
def test_the_user_s_own_function_and_line_are_named(what: str) -> None:
    """Not the line of torch, or of precimap, in which the traceback ends."""
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text == "        raise error")
    said = rf"{what} failed on .*batch .*\(test_split_checks\.py, line {line}\): [A-Z]\w+Error: "
    task = task_of(**{"metric": Loss(), **OWN[what]})
    with pytest.raises(TaskError, match=said) as told:
        score(task, task.model, task.splits.search)
    assert told.value.__cause__ is not None
    with pytest.raises(TaskError, match=f"{what} failed on "):
        search(task, schemes=["fp8"], margin=1.0)


def test_the_line_of_a_failure_inside_torch_is_the_user_s() -> None:
    task = task_of(forward=lambda m, b: F.linear(b["x"][:, :3], m.first.weight))  # the line that is named
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# the line that" in text)
    with pytest.raises(
        TaskError, match=rf"forward failed on batch 0 \(test_split_checks\.py, line {line}\): RuntimeError"
    ):
        score(task, task.model, task.splits.search)


def test_a_program_that_is_ended_by_a_task_is_an_error_of_the_task() -> None:
    task = task_of(forward=_raises(SystemExit(1)))
    with pytest.raises(TaskError, match=r"forward failed on batch 0 .*SystemExit: 1"):
        score(task, task.model, task.splits.search)


# --- writing where one reads --------------------------------------------------------------------------------------


class Looking(nn.Module):
    def __init__(self, norm: float | None, factor: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(50, 16, max_norm=norm)
        self.last = nn.Linear(16, 16)
        self.register_buffer("count", torch.zeros(()))
        with torch.no_grad():
            self.table.weight.mul_(factor)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.last(self.table(ids))
        return scores


def looking_task(model: nn.Module, **changes: Any) -> Task:
    def split(seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        ids, labels = (torch.randint(0, n, (40,), generator=generator) for n in (50, 16))
        return [{"ids": ids, "x": torch.randn(40, 16, generator=generator), "labels": labels}]

    fields: dict[str, Any] = {"forward": lambda m, b: m(b["ids"]), "loss": loss, "metric": Loss()}
    return Task(model, splits=Splits(split(1), split(2), split(3)), **{**fields, **changes})


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("bag", [False, True])
def test_a_table_that_rewrites_its_rows_is_named(factor: float, bag: bool) -> None:
    model = Looking(2.0, factor).eval()
    if bag:
        model.table = nn.EmbeddingBag(50, 16, max_norm=2.0, _weight=model.table.weight.detach().clone())
        model.forward = MethodType(lambda self, ids: self.last(self.table(ids[:, None])), model)
    task = looking_task(model)
    before = model.table.weight.detach().clone()
    if factor == 1.0:
        with pytest.raises(TaskError, match=r"the table table has max_norm=2 and rows beyond it.*renorm_\(2, 0, 2\)"):
            check_task(task)
        assert torch.equal(model.table.weight, before), "the look at it changed nothing"
        with torch.no_grad():  # as the message says
            model.table.weight.renorm_(2, 0, 2)
        model.table.max_norm = None
    assert check_task(task).notes == ()


def in_place_functional(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model.last(F.embedding(batch["ids"], model.table.weight, max_norm=1.3))
    return scores


def centred(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model.last(batch["x"].sub_(batch["x"].mean() - 1))
    return scores


def counting(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model(batch["ids"]) * (1 + model.count.add_(1))
    return scores


def drawing(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model(batch["ids"]) + torch.rand(())
    return scores


IN_PLACE = {
    "a batch": (centred, r"other losses; .*changes in place what it is given: the batch's \['x'\]\. Work on copies"),
    "a buffer": (
        counting,
        r"forward writes count of the model: .* Keep counters and caches out of parameters and buffers",
    ),
    "nothing": (drawing, "other losses; switch off dropout and sampling, and fix the seed in forward"),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_what_a_forward_writes_to_is_named(case: str) -> None:
    forward, said = IN_PLACE[case]
    with pytest.raises(TaskError, match=said):
        check_task(looking_task(Looking(None).eval(), forward=forward))


def test_a_table_that_is_shortened_by_a_function_is_seen_by_its_count() -> None:
    task = looking_task(Looking(None).eval(), forward=in_place_functional)
    said = written_by(task, task.splits.search[0])
    assert said is not None
    assert "the parameter table.weight" in said
    check_tables(task.model)


def test_clusters_given_as_numpy_and_labels_as_lists_are_taken() -> None:
    task = task_of(clusters=lambda b: b["user"].numpy(), labels=lambda b: b["labels"].tolist(), metric=NDCG(5))
    check_splits(task)
    assert len(score(task, task.model, task.splits.search).values) == 100
    auc = click_task(clusters=lambda b: np.asarray(b["user"]))
    check_splits(replace(auc, metric=AUC()))


def test_labels_that_are_not_one_for_each_unit_are_no_fault() -> None:
    """A label for each candidate, two a unit: clusters, weights and slices count units all the same."""
    task = task_of(
        labels=lambda b: b["labels"].repeat_interleave(2),
        metric=Loss(),
        reported=(),
        clusters=lambda b: b["user"],
        weights=lambda b: b["weight"],
    )
    for metric in (Loss(), NDCG(5)):
        check_splits(replace(task, metric=metric))


@pytest.mark.parametrize(
    "effort", [Effort(rounding_draws=2), Effort(rounding_draws=0, screen_units=2, audit_units=2, check_units=2)]
)
@pytest.mark.parametrize("metric", [Loss(), NDCG(5)], ids=lambda metric: metric.name)
def test_a_batch_for_each_user_is_no_single_cluster(effort: Effort, metric: Any, tmp_path: Path) -> None:
    """A few batches stand for the split in the screen, the audit, the floor and the draws: one alone has no spread."""
    task = task_of(clusters=lambda b: b["user"], metric=metric)
    for split in (task.splits.search, task.splits.certify):
        whole = {name: torch.cat([batch[name] for batch in split]) for name in split[0]}
        size = len(whole["user"]) // 25
        split[:] = [{name: v[i * size : (i + 1) * size] for name, v in whole.items()} for i in range(25)]
        for number, batch in enumerate(split):
            batch["user"][:] = number
    found = search(task, schemes=["fp8-tensor"], margin=5.0, effort=effort, ledger=tmp_path)
    assert found.certified
    assert all(
        row.clusters > 1 for d in found.map.layers.values() for row in (*d.evidence.values(), *d.predicted.values())
    )
