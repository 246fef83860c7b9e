"""AUC and GAUC against scikit-learn, a slow Obuchowski 1997, and the bootstrap."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from precimap.errors import TaskError
from precimap.metrics import AUC, GAUC
from precimap.metrics.auc import placements
from precimap.metrics.paired import bounded, paired_drop
from precimap.metrics.units import Floats, Units

SEEDS = st.integers(0, 10**6)


def ranked(seed: int, n: int = 200, clusters: int = 25) -> tuple[Floats, Floats, Floats, Units]:
    """Coarse scores with many ties of two models, labels, clusters that differ in level, and weights."""
    rng = np.random.default_rng(seed)
    cluster = rng.integers(0, clusters, n)
    level = rng.normal(size=clusters)[cluster]
    y = (rng.random(n) < 1 / (1 + np.exp(-level))).astype(np.float64)
    y[:2] = (0, 1)
    scores = np.round(level + y + rng.normal(size=n), 1)
    other = np.round(scores + 0.3 * rng.normal(size=n), 1)
    return scores, other, y, Units(n=n, clusters=cluster, weights=rng.uniform(0.5, 2, n))


def kept(scores: Floats, labels: Floats) -> Floats:
    return AUC().per_unit(torch.from_numpy(scores), torch.from_numpy(labels), torch.zeros(len(scores))).numpy()


@given(SEEDS)
def test_auc_is_that_of_scikit_learn(seed: int) -> None:
    scores, _, y, units = ranked(seed)
    expected = roc_auc_score(y, scores, sample_weight=units.weights)
    assert AUC().value(kept(scores, y), units) == pytest.approx(expected)


@given(SEEDS)
def test_gauc_is_the_mean_over_clusters_of_scikit_learn_s_auc(seed: int) -> None:
    scores, _, y, units = ranked(seed)
    assert units.clusters is not None
    areas, weights = [], []
    for name in np.unique(units.clusters):
        rows = units.clusters == name
        if 0 < y[rows].sum() < rows.sum():
            areas.append(roc_auc_score(y[rows], scores[rows], sample_weight=units.known_weights[rows]))
            weights.append(units.known_weights[rows].sum())
    assert GAUC().value(kept(scores, y), units) == pytest.approx(np.average(areas, weights=weights))


@given(SEEDS)
def test_placement_values_are_those_of_every_pair(seed: int) -> None:
    scores, _, y, units = ranked(seed, n=60, clusters=4)
    assert units.clusters is not None
    found = placements(scores, y == 1, units.known_weights, units.clusters)
    for at in range(60):
        facing = (units.clusters == units.clusters[at]) & (y != y[at])
        if not facing.any():
            assert np.isnan(found[at])
            continue
        sign = 1 if y[at] == 1 else -1
        right = (sign * (scores[at] - scores[facing]) > 0) + (scores[at] == scores[facing]) / 2
        assert found[at] == pytest.approx(np.average(right, weights=units.known_weights[facing]))


def obuchowski(first: Floats, second: Floats, y: Floats, cluster: Floats) -> tuple[float, float]:
    """Difference of two AUCs and its standard error for clustered rows, written from the paper with loops."""
    sums = {}
    areas = []
    names = np.unique(cluster)
    for number, scores in enumerate((first, second)):
        positive, negative = scores[y == 1], scores[y == 0]
        v10 = [np.mean((x > negative) + (x == negative) / 2) for x in positive]
        v01 = [np.mean((positive > x) + (positive == x) / 2) for x in negative]
        areas.append(float(np.mean(v10)))
        for name in names:
            own10 = np.array(v10)[cluster[y == 1] == name]
            own01 = np.array(v01)[cluster[y == 0] == name]
            sums[number, name] = (own10.sum() - len(own10) * areas[-1], own01.sum() - len(own01) * areas[-1])
    count, ones, zeros = len(names), int(y.sum()), int((1 - y).sum())

    def covariance(a: int, b: int) -> float:
        s10, s01, s11 = (
            sum(sums[a, name][i] * sums[b, name][j] for name in names) for i, j in ((0, 0), (1, 1), (0, 1))
        )
        cross = sum(sums[b, name][0] * sums[a, name][1] for name in names)
        scale = count / (count - 1)
        return scale * (s10 / ones**2 + s01 / zeros**2 + (s11 + cross) / (ones * zeros))

    return areas[0] - areas[1], float(np.sqrt(covariance(0, 0) + covariance(1, 1) - 2 * covariance(0, 1)))


@given(SEEDS)
def test_drop_and_error_of_auc_are_obuchowski_s(seed: int) -> None:
    scores, other, y, units = ranked(seed)
    clusters = np.arange(units.n) % 10  # of one size: her correction for their number knows no others
    assert units.n % 10 == 0
    sample = AUC().paired(kept(scores, y), kept(other, y), Units(n=units.n, clusters=clusters))
    found = paired_drop(sample.d, sample.units)
    drop, error = obuchowski(scores, other, y, clusters)
    assert (found.estimate, found.error) == pytest.approx((drop, error))


def test_rows_of_one_user_are_not_independent() -> None:
    """Whole users lose: taken as independent rows their drop seems far surer than it is."""
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(40), 25)
    y = (rng.random(1000) < 0.4).astype(float)
    scores = y + rng.normal(size=1000)
    other = np.where(rng.random(40)[cluster] < 0.2, -scores, scores)
    before, after = kept(scores, y), kept(other, y)
    clustered, rows = Units(n=1000, clusters=cluster), Units(n=1000)
    errors = [paired_drop(AUC().paired(before, after, units).d, units).error for units in (clustered, rows)]
    assert errors[0] > 1.5 * errors[1]


@given(SEEDS)
def test_weighted_drops_are_exact_and_a_weight_is_a_number_of_copies(seed: int) -> None:
    scores, other, y, units = ranked(seed, n=60)
    copies = np.random.default_rng(seed).integers(1, 4, 60)
    assert units.clusters is not None
    weighted = Units(n=60, clusters=units.clusters, weights=copies.astype(np.float64))
    rows = np.repeat(np.arange(60), copies)
    repeated = Units(n=len(rows), clusters=units.clusters[rows])
    for metric in (AUC(), GAUC()):
        found = bounded(metric.paired(kept(scores, y), kept(other, y), weighted), 0.05)
        again = bounded(metric.paired(kept(scores, y)[rows], kept(other, y)[rows], repeated), 0.05)
        assert found.drop.estimate == pytest.approx(again.drop.estimate, abs=1e-12)
        assert found.drop.error == pytest.approx(again.drop.error)
        expected = metric.value(kept(scores, y), weighted) - metric.value(kept(other, y), weighted)
        assert found.drop.estimate == pytest.approx(expected, abs=1e-12)


def test_scores_are_compared_in_float32() -> None:
    scores, y = np.array([1.0, 1.0 + 1e-12]), np.array([0.0, 1.0])
    assert AUC().value(kept(scores, y), Units(n=2)) == 0.5


def test_too_little_to_tell_has_an_infinite_error_and_no_value() -> None:
    one_class = kept(np.arange(5.0), np.zeros(5))
    clusters = Units(n=5, clusters=np.arange(5))
    for metric in (AUC(), GAUC()):
        found = bounded(metric.paired(one_class, one_class, clusters), 0.05)
        assert found.drop.error == found.upper == np.inf
        with pytest.raises(TaskError, match="both classes"):
            metric.value(one_class, clusters)
    with pytest.raises(TaskError, match=r"GAUC is a mean over clusters; give Task\(clusters=\.\.\.\)"):
        GAUC().value(one_class, Units(n=5))
    with pytest.raises(TaskError, match="a label other than 0 and 1, which AUC has no class for"):
        kept(np.zeros(2), np.array([0.0, 0.5]))
