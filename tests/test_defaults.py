"""A Task in five lines: from a loader, with names for metrics, and the outputs that libraries return."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

import precimap as pm
from precimap.defaults import default_forward, loss_of, scores_in
from precimap.errors import TaskError
from precimap.loaders import cut_in_order
from precimap.metrics import NDCG, NE, Accuracy, HitRate, Loss, Metric
from precimap.metrics.named import NAMES, metric_of
from precimap.searching.question import Effort
from precimap.task import Task, score

X = torch.randn(240, 8, generator=torch.Generator().manual_seed(0))
CLICKS = (X[:, 0] > 0).float()


def loader(**changes: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, CLICKS), **{"batch_size": 20, **changes})


def ranker() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)).eval()


# --- metrics by name ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_has_the_name_that_it_prints(name: str) -> None:
    found = metric_of(name.replace("@K", "@7"))
    assert found.name.lower() == name.replace("@K", "@7").lower()
    assert metric_of(found.name) == metric_of(found.name.upper()) == found
    assert metric_of(found) is found


@pytest.mark.parametrize("name", ["", "ndcg", "ndcg@", "ndcg@0", "ndcg@-1", "ne@3", "accuracy ", "NDCG@ten", "ndcg@²"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(TaskError):
        metric_of(name)


def test_a_task_takes_names() -> None:
    task = Task.from_loader(ranker(), loader(), metric="ne", guards={"AUC": 0.01})
    assert task.metric == NE()
    assert [guard.metric.name for guard in task.guarded] == ["AUC"]
    assert Task(ranker(), splits=task.splits, metric="ndcg@10").metric == NDCG(10)  # type: ignore[arg-type]
    assert metric_of("hit rate@3") == HitRate(3)


# --- one loader ---------------------------------------------------------------------------------------------------


@given(st.integers(3, 60), st.tuples(*[st.floats(0.01, 1)] * 3))
def test_a_loader_is_cut_in_its_order_and_nothing_is_lost(count: int, shares: tuple[float, float, float]) -> None:
    parts = cut_in_order(range(count), shares)
    assert [number for part in parts for number in part] == list(range(count))
    assert all(parts)
    if count >= 30:
        wanted = [share / sum(shares) * count for share in shares]
        assert all(abs(len(part) - max(1, share)) <= 2 for part, share in zip(parts, wanted, strict=True))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: (loader(shuffle=True), (1.0, 1.0, 1.0)), "got one that shuffles; make it with shuffle=False"),
        (lambda: (loader(batch_size=120), (1.0, 1.0, 1.0)), "at least 3 batches, one for each split, got 2"),
        (lambda: (loader(), (0.0, 1.0, 1.0)), "three shares above zero"),
        (lambda: (loader(), (1.0, 1.0, float("nan"))), "three shares above zero"),
    ],
)
def test_what_makes_no_three_splits_is_refused(made: Callable[[], Any], message: str) -> None:
    given_loader, shares = made()
    with pytest.raises(TaskError, match=message):
        Task.from_loader(ranker(), given_loader, metric="ne", shares=shares)


def test_a_plain_model_is_searched_in_five_lines(tmp_path: Any) -> None:
    task = pm.Task.from_loader(ranker(), loader(), metric="log-loss")
    result = pm.search(task, schemes="fp8", margin=0.05, effort=Effort(rounding_draws=0), ledger=tmp_path)
    assert result.preflight is not None
    whole = score(task, task.model, task.splits.certify)
    expected = F.binary_cross_entropy_with_logits(task.model(X[-120:])[:, 0], CLICKS[-120:], reduction="none")
    assert torch.allclose(torch.from_numpy(whole.losses).float(), expected, atol=1e-6)


def test_a_hugging_face_model_needs_no_forward() -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = BertForSequenceClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 50, (90, 6), generator=generator), torch.randint(0, 3, (90,), generator=generator)
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]
    task = Task.from_loader(model, DataLoader(rows, batch_size=10), metric="accuracy")  # type: ignore[arg-type]
    found = score(task, model, task.splits.search)
    with torch.no_grad():
        logits = model(input_ids=ids[10:50], attention_mask=torch.ones_like(ids[10:50])).logits
    assert torch.allclose(
        torch.from_numpy(found.losses).float(), F.cross_entropy(logits, labels[10:50], reduction="none"), atol=1e-5
    )
    assert task.metric == Accuracy()


# --- calls, outputs and losses ------------------------------------------------------------------------------------


def test_a_batch_is_called_by_its_kind() -> None:
    def seen(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return args, kwargs

    assert default_forward(seen, {"a": 1, "labels": 2, "b": 3}) == ((), {"a": 1, "b": 3})
    assert default_forward(seen, (1, 2, 3)) == default_forward(seen, [1, 2, 3]) == ((1, 2), {})
    assert default_forward(seen, 7) == ((7,), {})


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


S, T = torch.ones(2, 3), torch.zeros(2)


@pytest.mark.parametrize(
    ("output", "is_scores"),
    [
        (Output(T, S), True),
        ({"loss": T, "logits": S}, True),
        ({"scores": S, "name": "x"}, True),
        ((S,), True),
        ([S, None], True),
        ((S, T), False),
        ({"a": S, "b": T}, False),
        ({}, False),
        (None, False),
        (3.0, False),
    ],
)
def test_scores_are_found_where_there_is_one_reading(output: Any, is_scores: bool) -> None:
    assert (scores_in(output) is S) == is_scores


def test_an_output_with_two_readings_is_refused() -> None:
    task = Task.from_loader(ranker(), loader(), metric="ne", forward=lambda model, batch: (model(batch[0]), batch[0]))
    with pytest.raises(TaskError, match="expected forward to return a tensor with one row per unit"):
        score(task, task.model, task.splits.search)


@pytest.mark.parametrize("shape", [(20,), (20, 1)])
def test_the_loss_of_clicks_and_of_classes(shape: tuple[int, ...]) -> None:
    logits, clicks = torch.randn(shape), torch.rand(20)
    expected = F.binary_cross_entropy_with_logits(logits.reshape(20), clicks, reduction="none")
    assert torch.equal(loss_of(logits, clicks), expected)
    assert torch.equal(loss_of(logits, clicks.tolist()), expected)
    assert torch.equal(loss_of(logits.bfloat16(), clicks[:, None]).shape and loss_of(logits, clicks[:, None]), expected)
    scores, classes = torch.randn(20, 4), torch.randint(0, 4, (20,))
    assert torch.equal(loss_of(scores, classes), F.cross_entropy(scores, classes, reduction="none"))


@pytest.mark.parametrize(
    ("scores", "labels"), [((20, 4), torch.rand(20, 4)), ((20, 4), torch.rand(20)), ((20,), torch.rand(19))]
)
def test_a_loss_that_does_not_go_without_saying_is_refused(scores: tuple[int, ...], labels: Tensor) -> None:
    with pytest.raises(TaskError, match=r"there is no default loss for scores .* give Task\(loss="):
        loss_of(torch.zeros(scores), labels)


@pytest.mark.parametrize("labels", [[1.0, 5.0], [-1.0, 1.0], [0, 2]])
def test_ratings_are_no_clicks(labels: list[float]) -> None:
    with pytest.raises(TaskError, match=r"with labels from 0 to 1; got .* Give Task\(loss="):
        loss_of(torch.zeros(2), labels)


def test_the_default_loss_reads_the_task_s_own_labels() -> None:
    task = Task.from_loader(
        ranker(), [{"x": X[i : i + 20], "y": CLICKS[i : i + 20]} for i in range(0, 240, 20)], metric=Loss(),
        labels=lambda batch: batch["y"], forward=lambda model, batch: model(batch["x"]),
    )  # fmt: skip
    found = score(task, task.model, task.splits.search)
    assert found.losses.mean() > 0
    metric: Metric = task.metric
    assert metric.value(found.values, found.units) == pytest.approx(float(found.losses.mean()))
