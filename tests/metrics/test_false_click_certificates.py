"""The promise for metrics that are no mean of units: NE, calibration, AUC, GAUC, and a function of the user's own.

Populations are real: NCF-MLP in FP8 on MovieLens users (22 rows of each: the held-out film and 21 others), and the same with
the two models exchanged. The margin is the true drop of the population (below 0 where it is an improvement, which the
bound has to keep just as well), so that every certificate is a false one: at most
alpha of the samples may give one, within three binomial standard errors of the simulation. Planted faults are found: rows
taken as independent, and a two-sided metric bounded on one side only.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from helpers.real_models import ncf_in_fp8
from precimap.metrics import AUC, GAUC, NE, Calibration, Custom, Metric, PairedDrops, RecalibratedNE
from precimap.metrics.paired import bounded, paired_drop, upper_bound
from precimap.metrics.units import Floats, Units

ALPHA = 0.05
DRAWS = 600
ALLOWED = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / DRAWS)  # 0.077
ROWS = 22
Bound = Callable[[PairedDrops], float]


@cache
def of_users(metric: Metric) -> tuple[Floats, Floats]:
    """What the metric keeps of each user's rows under both models, [users, rows, columns]."""
    label = torch.zeros(ROWS)
    label[0] = 1
    kept = []
    for scores in ncf_in_fp8():
        rows = scores[:, :ROWS].reshape(-1)
        values = metric.per_unit(rows, label.repeat(len(scores)), torch.zeros(len(rows))).numpy()
        kept.append(values.reshape(len(scores), ROWS, -1))
    return kept[0], kept[1]


def true_drop(metric: Metric, baseline: Floats, other: Floats) -> float:
    sample = drops(metric, baseline, other, np.arange(len(baseline)))
    found = paired_drop(sample.d, sample.units).estimate
    return abs(found) if sample.two_sided else found


def drops(metric: Metric, baseline: Floats, other: Floats, users: NDArray[np.int64]) -> PairedDrops:
    units = Units(n=len(users) * ROWS, clusters=np.repeat(np.arange(len(users)), ROWS))
    flat = [kept[users].reshape(units.n, -1) for kept in (baseline, other)]
    return metric.paired(*flat, units)


def false_certificates(metric: Metric, baseline: Floats, other: Floats, users: int, bound: Bound) -> float:
    margin, rng = true_drop(metric, baseline, other), np.random.default_rng(users)
    draws = (drops(metric, baseline, other, rng.integers(0, len(baseline), users)) for _ in range(DRAWS))
    return float(np.mean([bound(sample) <= margin for sample in draws]))


def shipped(sample: PairedDrops) -> float:
    return bounded(sample, ALPHA).upper


METRICS = (NE(), Calibration(), AUC(), GAUC(), RecalibratedNE())


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
@pytest.mark.parametrize("swapped", [False, True], ids=["quantised", "exchanged"])
@pytest.mark.parametrize("users", [100, 400])
def test_certificates_are_false_in_at_most_alpha_of_the_samples(metric: Metric, swapped: bool, users: int) -> None:
    baseline, other = of_users(metric)[:: -1 if swapped else 1]
    assert false_certificates(metric, baseline, other, users, shipped) <= ALLOWED


def test_a_function_of_the_user_s_own_keeps_the_promise_too() -> None:
    own = Custom("own", lambda scores, labels, _: float(np.mean(scores * (labels - 0.1))), False, blocks=40)
    baseline, other = of_users(own)
    assert false_certificates(own, baseline, other, 100, shipped) <= ALLOWED


def test_bounding_one_side_of_a_calibration_is_found() -> None:
    """The model predicts less than before: a bound of the upper side alone says nothing of that."""

    def one_sided(sample: PairedDrops) -> float:
        sign = -np.sign(drift)  # the side on which the drop is not
        return upper_bound(sign * sample.d, sample.units, ALPHA, None)

    metric = Calibration()
    baseline, other = of_users(metric)
    whole = drops(metric, baseline, other, np.arange(len(baseline)))
    drift = paired_drop(whole.d, whole.units).estimate
    assert false_certificates(metric, baseline, other, 100, one_sided) > 0.9


def test_rows_of_a_user_taken_as_independent_are_found() -> None:
    """Users whose scores are worthless in the other model: rows as units certify AUC falsely."""
    rng = np.random.default_rng(0)
    y = np.tile(np.r_[np.ones(5), np.zeros(5)], (2000, 1))
    before = y + rng.normal(size=y.shape)
    after = np.where(rng.random((2000, 1)) < 0.2, -before, before)
    metric = AUC()
    margin = roc_auc_score(y.reshape(-1), before.reshape(-1)) - roc_auc_score(y.reshape(-1), after.reshape(-1))
    found = {"clusters": 0, "rows": 0}
    for _ in range(DRAWS):
        users = rng.integers(0, 2000, 100)
        kept = [np.stack((s[users].reshape(-1), y[users].reshape(-1)), axis=1) for s in (before, after)]
        for name, clusters in (("clusters", np.repeat(np.arange(100), 10)), ("rows", None)):
            sample = metric.paired(*kept, Units(n=1000, clusters=clusters))
            found[name] += shipped(sample) <= margin
    assert found["clusters"] / DRAWS <= ALLOWED
    assert found["rows"] / DRAWS > 0.09
