"""A user's own function, and the metrics that are only reported, against what they stand for."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from precimap.errors import TaskError
from precimap.metrics import AUC, Custom, OrderFlips, RecalibratedNE, TopKOverlap
from precimap.metrics.paired import bounded, paired_drop
from precimap.metrics.units import Floats, Units

SEEDS = st.integers(0, 10**6)


def rows(seed: int, n: int = 3000) -> tuple[Floats, Floats, Floats, Units]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n)
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)
    return z, z + 0.5 * rng.normal(size=n), y, Units(n=n, clusters=rng.integers(0, n // 5, n))


def kept(metric: Custom | RecalibratedNE | AUC, scores: Floats, labels: Floats) -> Floats:
    return metric.per_unit(torch.from_numpy(scores), torch.from_numpy(labels), torch.zeros(len(labels))).numpy()


OWN = Custom("own AUC", lambda scores, labels, _: float(roc_auc_score(labels, scores)), higher_is_better=True)


def test_a_function_of_the_user_s_own_gets_the_drop_and_error_that_the_metric_itself_has() -> None:
    z, other, y, units = rows(0)
    own = bounded(OWN.paired(kept(OWN, z, y), kept(OWN, other, y), units), 0.05)
    ours = bounded(AUC().paired(kept(AUC(), z, y), kept(AUC(), other, y), units), 0.05)
    assert own.drop.estimate == pytest.approx(ours.drop.estimate, abs=1e-6)
    assert own.drop.error == pytest.approx(ours.drop.error, rel=0.25)  # from 100 blocks: 7 % of error each
    assert own.drop.n == 3000
    assert OWN.value(kept(OWN, z, y), units) == pytest.approx(roc_auc_score(y, z), abs=1e-6)


def test_a_function_gets_scores_labels_and_groups_as_they_were() -> None:
    seen = []

    def function(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
        seen.append((scores.dtype, scores.shape, labels.shape, groups.tolist()))
        return float(scores.sum())

    metric = Custom("own", function, higher_is_better=False, blocks=10)
    scores, labels = torch.rand(30, 4), torch.rand(30, 2)
    values = metric.per_unit(scores, labels, torch.zeros(30)).numpy()
    metric.value(values, Units(n=30, clusters=np.arange(30) // 3))
    assert seen == [(np.float32, (30, 4), (30, 2), (np.arange(30) // 3).tolist())]


def test_what_a_function_cannot_do_is_said() -> None:
    z, other, y, units = rows(1, n=60)
    with pytest.raises(TaskError, match="without weights"):
        OWN.value(kept(OWN, z, y), Units(n=60, weights=np.ones(60)))
    broken = Custom("broken", lambda *_: math.nan, higher_is_better=True)
    with pytest.raises(TaskError, match="broken returned nan on 60 of 60 rows"):
        broken.value(kept(broken, z, y), units)
    few = OWN.paired(kept(OWN, z, y), kept(OWN, other, y), Units(n=60, clusters=np.arange(60) % 5))
    assert paired_drop(few.d, few.units).error == np.inf, "five clusters tell nothing, and end nothing"
    with pytest.raises(TaskError, match="at least 10 blocks"):
        Custom("own", lambda *_: 0.0, higher_is_better=True, blocks=5)


@settings(max_examples=20)
@given(SEEDS)
def test_recalibrated_ne_is_scikit_learn_s_refit(seed: int) -> None:
    z, _, y, units = rows(seed, n=500)
    fit = LogisticRegression(C=1e10, tol=1e-10).fit(z[:, None], y)
    rate = y.mean()
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    expected = log_loss(y, fit.predict_proba(z[:, None])[:, 1]) / entropy
    assert RecalibratedNE().value(kept(RecalibratedNE(), 3 * z + 2, y), units) == pytest.approx(expected, rel=1e-6)


def test_recalibration_forgives_scale_and_bias_and_nothing_else() -> None:
    z, other, y, units = rows(2)
    metric = RecalibratedNE()
    moved = metric.paired(kept(metric, z, y), kept(metric, 0.7 * z + 0.4, y), units)
    assert abs(paired_drop(moved.d, units).estimate) < 1e-9
    noisy = bounded(metric.paired(kept(metric, z, y), kept(metric, other, y), units), 0.05)
    assert noisy.drop.estimate > 2 * noisy.drop.error > 0


@given(SEEDS)
def test_order_flips_are_kendall_s_discordant_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    before, after = rng.permutation(12).astype(float), rng.permutation(12).astype(float)
    metric = OrderFlips()
    scores = [metric.per_unit(torch.from_numpy(s)[None], None, torch.zeros(1)).numpy() for s in (before, after)]
    found = metric.paired(*scores, Units(n=1)).d[0]
    assert found == pytest.approx((1 - kendalltau(before, after).statistic) / 2)


def test_a_new_tie_is_half_a_flip_and_padding_is_no_candidate() -> None:
    before = torch.tensor([[2.0, 1.0, -torch.inf], [1.0, 1.0, 0.0]])
    after = torch.tensor([[1.0, 1.0, -torch.inf], [5.0, 1.0, 0.0]])
    scores = [OrderFlips().per_unit(s, None, torch.zeros(2)).numpy() for s in (before, after)]
    assert OrderFlips().paired(*scores, Units(n=2)).d.tolist() == [0.5, 0.0]


def test_overlap_counts_what_left_the_first_k() -> None:
    metric = TopKOverlap(2)
    before, after = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([[2.0, 3.0, 1.0], [1.0, 2.0, 3.0]])
    scores = [metric.per_unit(s, None, torch.zeros(2)).numpy() for s in (before, after)]
    sample = metric.paired(*scores, Units(n=2))
    assert sample.d.tolist() == [0.0, 0.5]
    assert sample.changed == 1
    with pytest.raises(TaskError, match="k from 1 to the 3 candidates, got 4"):
        TopKOverlap(4).per_unit(before, None, torch.zeros(2))
