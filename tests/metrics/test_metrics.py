"""Metrics per unit, against scikit-learn and against slow oracles that spell the definitions out."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics import MRR, NDCG, LogLoss, Loss, Metric, Recall, Units

NO_LOSSES = torch.empty(0)
RANKING: list[tuple[type[NDCG] | type[MRR] | type[Recall], str]] = [
    (NDCG, "nDCG@3"),
    (MRR, "MRR@3"),
    (Recall, "recall@3"),
]


# The definitions, one unit at a time, in plain Python.


def pessimistic(scores: Sequence[float], relevance: Sequence[float]) -> list[float]:
    """Relevances in rank order: best score first, less relevant first among equals, non-candidates left out."""
    candidates = [(s, r) for s, r in zip(scores, relevance, strict=True) if s != -math.inf]
    return [r for _, r in sorted(candidates, key=lambda pair: (-pair[0], pair[1]))]


def slow_ndcg(scores: Sequence[float], relevance: Sequence[float], k: int) -> float:
    order = pessimistic(scores, relevance)

    def dcg(gains: Sequence[float]) -> float:
        return sum((2**r - 1) / math.log2(rank + 1) for rank, r in enumerate(gains[:k], start=1))

    return dcg(order) / dcg(sorted(order, reverse=True))


def slow_mrr(scores: Sequence[float], relevance: Sequence[float], k: int) -> float:
    # Binary, so that grades do not decide ties.
    for rank, r in enumerate(pessimistic(scores, [float(r > 0) for r in relevance])[:k], start=1):
        if r > 0:
            return 1 / rank
    return 0.0


def slow_recall(scores: Sequence[float], relevance: Sequence[float], k: int) -> float:
    order = pessimistic(scores, [float(r > 0) for r in relevance])
    return sum(order[:k]) / sum(order)


Oracle = Callable[[Sequence[float], Sequence[float], int], float]
PAIRS: list[tuple[type[NDCG] | type[MRR] | type[Recall], Oracle]] = [
    (NDCG, slow_ndcg),
    (MRR, slow_mrr),
    (Recall, slow_recall),
]


@st.composite
def graded_units(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]]]:
    """A few units over a handful of distinct scores, so that ties are the rule."""
    candidates = draw(st.integers(1, 8))
    score = st.sampled_from([-math.inf, -2.5, -1.0, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 7.0, math.inf])
    scores, relevances = [], []
    for _ in range(draw(st.integers(1, 4))):
        row = draw(st.lists(score, min_size=candidates, max_size=candidates))
        grades = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0]), min_size=candidates, max_size=candidates))
        best = draw(st.integers(0, candidates - 1))
        row[best], grades[best] = draw(score.filter(lambda s: s != -math.inf)), 1.0
        scores.append([float(np.float32(s)) for s in row])
        relevances.append(grades)
    return scores, relevances


@pytest.mark.parametrize(("metric", "oracle"), PAIRS, ids=["ndcg", "mrr", "recall"])
@given(units=graded_units(), k=st.integers(1, 10))
def test_graded_relevances_agree_with_the_definition(
    metric: type[NDCG] | type[MRR] | type[Recall],
    oracle: Oracle,
    units: tuple[list[list[float]], list[list[float]]],
    k: int,
) -> None:
    scores, relevances = units
    expected = [oracle(s, r, k) for s, r in zip(scores, relevances, strict=True)]
    value = metric(k).per_unit(torch.tensor(scores), torch.tensor(relevances), NO_LOSSES)
    assert value.dtype == torch.float64
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("metric", "oracle"), PAIRS, ids=["ndcg", "mrr", "recall"])
@given(units=graded_units(), k=st.integers(1, 10))
def test_an_index_is_the_one_relevant_candidate(
    metric: type[NDCG] | type[MRR] | type[Recall],
    oracle: Oracle,
    units: tuple[list[list[float]], list[list[float]]],
    k: int,
) -> None:
    scores = torch.tensor(units[0])
    index = (scores != -torch.inf).int().argmax(dim=1)
    one_hot = torch.nn.functional.one_hot(index, scores.shape[1])
    value = metric(k).per_unit(scores, index, NO_LOSSES)
    expected = [oracle(s, r, k) for s, r in zip(units[0], one_hot.tolist(), strict=True)]
    np.testing.assert_allclose(value.numpy(), expected, rtol=1e-12)


def test_values_of_a_worked_example() -> None:
    # Ranks: candidate 2 first, then 0 (tied with the relevant 3, so before it), then 3, then 1.
    scores, label = torch.tensor([[0.5, 0.1, 0.9, 0.5]]), torch.tensor([3])
    assert NDCG(10).per_unit(scores, label, NO_LOSSES).item() == pytest.approx(0.5)  # 1 / log2(3 + 1)
    assert MRR(10).per_unit(scores, label, NO_LOSSES).item() == pytest.approx(1 / 3)
    assert MRR(2).per_unit(scores, label, NO_LOSSES).item() == 0
    assert Recall(2).per_unit(scores, label, NO_LOSSES).item() == 0
    assert Recall(3).per_unit(scores, label, NO_LOSSES).item() == 1
    grades = torch.tensor([[3, 0, 0, 2]])
    # 7 / log2(4) + 3 / log2(3), the more relevant of the two tied last; ideal 7 / log2(2) + 3 / log2(3).
    expected = (7 / 2 + 3 / math.log2(3)) / (7 + 3 / math.log2(3))
    assert NDCG(4).per_unit(scores, grades, NO_LOSSES).item() == pytest.approx(expected)


def test_ndcg_agrees_with_scikit_learn_without_ties() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    scores = generator.permuted(np.tile(np.arange(50, dtype=np.float64), (40, 1)), axis=1)
    grades = generator.integers(0, 4, scores.shape)
    for k in (1, 5, 10, 50):
        value = NDCG(k).per_unit(torch.from_numpy(scores), torch.from_numpy(grades), NO_LOSSES)
        expected = sklearn_metrics.ndcg_score(2.0**grades - 1, scores, k=k, ignore_ties=True)
        assert value.mean().item() == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_a_tie_never_counts_for_the_model(seed: int, k: int) -> None:
    """Rounding scores to few values can gain nothing that some tie-free order of the rounded scores would not give."""
    generator = torch.Generator().manual_seed(seed)
    rounded = torch.randint(0, 3, (6, 12), generator=generator).float()
    label = torch.randint(0, 12, (6,), generator=generator)
    broken = rounded + torch.rand(rounded.shape, generator=generator) / 4
    for metric in (NDCG(k), MRR(k), Recall(k)):
        tied, untied = (metric.per_unit(s, label, NO_LOSSES) for s in (rounded, broken))
        assert (tied <= untied).all()


def test_scores_are_compared_in_float32() -> None:
    """A float64 difference that float32 cannot hold is a tie; bfloat16 scores keep the ties they have."""
    close = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert Recall(1).per_unit(close, torch.tensor([1]), NO_LOSSES).item() == 0
    distinct = torch.tensor([[1.0, 1.001]])
    assert Recall(1).per_unit(distinct, torch.tensor([1]), NO_LOSSES).item() == 1
    assert Recall(1).per_unit(distinct.bfloat16(), torch.tensor([1]), NO_LOSSES).item() == 0


def test_minus_infinity_is_not_a_candidate() -> None:
    scores = torch.tensor([[2.0, 1.0, 3.0, 0.0]])
    padded = torch.cat([scores, torch.full((1, 5), -torch.inf)], dim=1)
    grades = torch.tensor([[1, 2, 0, 0]])
    labels = torch.cat([grades, torch.tensor([[3, 3, 0, 0, 0]])], dim=1)  # of non-candidates: not read
    for metric in (NDCG(10), MRR(10), Recall(2)):
        assert torch.equal(metric.per_unit(padded, labels, NO_LOSSES), metric.per_unit(scores, grades, NO_LOSSES)), (
            metric
        )


def test_scores_beyond_float32_are_still_candidates() -> None:
    scores = torch.tensor([[1.0, -1e300]], dtype=torch.float64)
    assert MRR(2).per_unit(scores, torch.tensor([1]), NO_LOSSES).item() == 0.5


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        (torch.zeros(2, 3), torch.tensor([[0, 1, 0], [0, 0, 0]]), r"number 1\) have no relevant candidate"),
        (torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), r"number 0\) have no relevant candidate"),
        (torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), torch.tensor([0, 0]), r"number 1\) have a NaN score"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"number 1\) have an index outside 0\.\.2"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), r"number 0\) have an index outside"),
        (torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 0.0]]), r"number 0\) have a relevance that is not >= 0"),
        (torch.zeros(1, 3), torch.tensor([[1.0, torch.nan, 0.0]]), r"number 0\) have a relevance"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), r"takes integer labels \[units\]"),
        (torch.zeros(2, 3), torch.tensor([True, False]), r"takes integer labels \[units\]"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"the labels are torch\.float32 \[2, 4\]"),
        (torch.zeros(3), torch.tensor(1), r"scores \[units, candidates\]; they came as \[3\]"),
    ],
)
@pytest.mark.parametrize("metric", [NDCG(2), MRR(2), Recall(2)], ids=lambda metric: metric.name)
def test_what_has_no_order_is_refused(metric: Metric, scores: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        metric.per_unit(scores, labels, NO_LOSSES)


def test_relevances_that_overflow_the_gain_are_refused() -> None:
    with pytest.raises(TaskError, match="overflows; give grades"):
        NDCG(2).per_unit(torch.zeros(1, 2), torch.tensor([[2000.0, 0.0]]), NO_LOSSES)


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "10"])
@pytest.mark.parametrize("metric", [NDCG, MRR, Recall])
def test_k_is_a_whole_number_of_at_least_one(metric: Callable[[object], Metric], k: object) -> None:
    with pytest.raises(TaskError, match=r"takes a whole number k >= 1; got"):
        metric(k)


@pytest.mark.parametrize(("metric", "name"), RANKING)
def test_what_an_order_metric_says_of_itself(metric: type[NDCG] | type[MRR] | type[Recall], name: str) -> None:
    assert (metric(3).name, metric(3).higher_is_better, metric(3).worst) == (name, True, 1.0)
    assert metric(3) == metric(3) != metric(4)
    with pytest.raises(FrozenInstanceError):
        metric(3).k = 4  # type: ignore[misc]


def test_what_a_loss_says_of_itself() -> None:
    assert (Loss().name, Loss().higher_is_better, Loss().worst) == ("loss", False, None)
    assert (LogLoss().name, LogLoss().higher_is_better, LogLoss().worst) == ("log-loss", False, None)


def test_order_metrics_are_fast_enough_to_be_called_per_batch() -> None:
    """A 1000 x 3000 batch, against a plain sort on the same machine: a slow machine does not fail the test."""
    scores = torch.rand(1000, 3000)
    labels = torch.randint(0, 3000, (1000,))

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    sort = seconds(lambda: scores.argsort(dim=1, descending=True, stable=True))
    for metric in (NDCG(10), MRR(10), Recall(10)):
        assert seconds(lambda metric=metric: metric.per_unit(scores, labels, NO_LOSSES)) < 3 * sort, metric  # type: ignore[misc]


# Losses


def test_loss_is_the_tasks_own() -> None:
    losses = torch.tensor([0.5, 1.25])
    value = Loss().per_unit(torch.zeros(2, 7), None, losses)
    assert value.dtype == torch.float64
    assert value.tolist() == [0.5, 1.25]


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (torch.tensor(0.5), r"one number per unit, \[units\]; it came as \[\]"),
        (torch.zeros(2, 3), r"it came as \[2, 3\]"),
        (torch.tensor([0.0, torch.nan]), r"number 1\) have a loss that is not finite"),
        (torch.tensor([torch.inf, 0.0]), r"number 0\) have a loss that is not finite"),
    ],
)
def test_a_loss_that_is_none_is_refused(losses: Tensor, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        Loss().per_unit(torch.zeros(2), None, losses)


def test_log_loss_agrees_with_scikit_learn() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(0, 4, 500), generator.integers(0, 2, 500)
    kept = LogLoss().per_unit(torch.from_numpy(logits), torch.from_numpy(labels), NO_LOSSES)
    expected = sklearn_metrics.log_loss(labels, 1 / (1 + np.exp(-logits)))
    assert kept[:, 1].tolist() == labels.tolist()
    assert LogLoss().value(kept.numpy(), Units(n=500)) == pytest.approx(expected, rel=1e-12)


@given(st.floats(-30, 30), st.floats(0, 1))
def test_log_loss_is_the_cross_entropy_in_high_precision(logit: float, label: float) -> None:
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        s = 1 / (1 + mpmath.exp(-mpmath.mpf(logit)))
        expected = float(-label * mpmath.log(s) - (1 - mpmath.mpf(label)) * mpmath.log(1 - s))
    scores = torch.tensor([logit], dtype=torch.float64)
    value = LogLoss().per_unit(scores, torch.tensor([label], dtype=torch.float64), NO_LOSSES)[0, 0].item()
    assert value == pytest.approx(expected, rel=1e-11, abs=1e-14)


def test_log_loss_overflows_nowhere() -> None:
    value = LogLoss().per_unit(torch.tensor([3e4, -3e4, 3e4, -1e38]), torch.tensor([1, 0, 0, 1]), NO_LOSSES)
    assert value[:, 0].tolist() == pytest.approx([0, 0, 3e4, 1e38], rel=1e-6)


def test_log_loss_keeps_small_differences_of_bfloat16_logits() -> None:
    """The value is computed in float64, whatever the logits come in."""
    logits = torch.tensor([10.0, 10.0625]).bfloat16()
    value = LogLoss().per_unit(logits, torch.tensor([1, 1]), NO_LOSSES)
    assert value.dtype == torch.float64
    assert value[:, 0].tolist() == pytest.approx([math.log1p(math.exp(-10)), math.log1p(math.exp(-10.0625))], rel=1e-12)


@pytest.mark.parametrize(
    ("scores", "labels", "says"),
    [
        (torch.zeros(2, 1), torch.zeros(2), r"the scores are \[2, 1\] and the labels \[2\]"),
        (torch.zeros(2), torch.zeros(3), r"the scores are \[2\] and the labels \[3\]"),
        (torch.tensor([0.0, torch.inf]), torch.zeros(2), r"number 1\) have a logit that is not finite"),
        (torch.tensor([torch.nan, 0.0]), torch.zeros(2), r"number 0\) have a logit that is not finite"),
        (torch.zeros(2), torch.tensor([-1, 1]), r"number 0\) have a label outside \[0, 1\].*not -1/\+1"),
        (torch.zeros(2), torch.tensor([0.0, torch.nan]), r"number 1\) have a label outside"),
    ],
)
def test_what_has_no_log_loss_is_refused(scores: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        LogLoss().per_unit(scores, labels, NO_LOSSES)


def test_a_refusal_counts_all_and_names_the_first_units() -> None:
    with pytest.raises(TaskError, match=r"^7 of 9 units of this batch \(number 2, 3, 4, 5, 6, \.\.\.\) have"):
        Loss().per_unit(torch.zeros(9), None, torch.tensor([0.0] * 2 + [torch.nan] * 7))
