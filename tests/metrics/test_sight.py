"""What a sample is too small for, what its bound cannot see, and the worst that users may declare."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from precimap.certificate import BlindSpot
from precimap.errors import TaskError
from precimap.metrics import (
    AUC,
    GAUC,
    NDCG,
    NE,
    RMSE,
    Calibration,
    Custom,
    Head,
    LogLoss,
    Loss,
    Metric,
    PairedDrops,
    Perplexity,
)
from precimap.metrics.paired import Bounded, bounded, paired_drop, upper_bound
from precimap.metrics.sight import LEAST_CLUSTERS, LEAST_RARE, LEAST_UNITS
from precimap.metrics.units import Floats, Units

ALPHA = 0.05


def clicks(n: int, rate: float, seed: int = 0) -> tuple[Floats, Floats, Floats]:
    """Logits, those of a noisy model, and labels of which exactly `rate` are positive."""
    rng = np.random.default_rng(seed)
    z = rng.normal(math.log(rate / (1 - rate)), 1, n)
    y = np.zeros(n)
    y[rng.permutation(n)[: round(rate * n)]] = 1
    return z, z + 0.05 * rng.normal(size=n), y


def judged(metric: Metric, n: int, rate: float, units: Units | None = None, seed: int = 0) -> Bounded:
    return bounded(drops(metric, *clicks(n, rate, seed), Units(n=n) if units is None else units), ALPHA)


def drops(metric: Metric, before: Floats, after: Floats, labels: Floats, units: Units) -> PairedDrops:
    y = torch.from_numpy(labels)
    first, second = (metric.per_unit(torch.from_numpy(s), y, torch.from_numpy(s)).numpy() for s in (before, after))
    return metric.paired(first, second, units)


# Blind spots


def test_ne_of_sixteen_thousand_rows() -> None:
    """The rule of three, and the margin spread over what nobody saw: .001 * .13 nats * 5,340 = .69."""
    z, _, y = clicks(16_000, 0.0125)
    sample = drops(NE(), z, z, y, Units(n=16_000))
    loss = 1 / sample.stakes.scale
    spot = bounded(sample, ALPHA).sight.blind_spot(0.0, 0.001, ALPHA)
    assert spot is not None
    assert spot.one_in == pytest.approx(16_000 / 3, rel=0.003)
    assert spot.rare == "positive"
    assert spot.rare_one_in == pytest.approx(200 / 3, rel=0.01)
    assert (spot.cost, spot.unit) == (pytest.approx(0.001 * loss * spot.one_in), "nats")
    said = str(spot)
    assert "these data cannot show a loss in fewer than 1 unit in 5,300 (1 positive in 67)." in said
    assert f"It breaks the margin only if it costs each of them {spot.cost:.2g} nats." in said


@given(st.integers(30, 10**7), st.floats(0.001, 0.3), st.floats(1e-4, 1), st.floats(-0.5, 0.9))
def test_a_loss_as_the_sentence_says_is_missed_with_probability_alpha_and_breaks_the_margin(
    n: int, alpha: float, margin: float, part: float
) -> None:
    sight = replace(judged(LogLoss(), 1000, 0.3).sight, clusters=n, effective=float(n))
    size = part * margin
    spot = sight.blind_spot(size, margin, alpha)
    assert spot is not None
    assert (1 - 1 / spot.one_in) ** n == pytest.approx(alpha, rel=1e-6)
    assert spot.cost is not None
    assert max(0.0, size) + spot.cost / spot.one_in == pytest.approx(margin)
    assert "nan" not in str(spot)


def test_what_every_unit_loses_at_most_leaves_no_blind_spot() -> None:
    rng = np.random.default_rng(0)
    order = bounded(PairedDrops(d=rng.random(500) * 0.01, units=Units(n=500), rows=500, changed=500, worst=1.0), ALPHA)
    assert order.sight.blind_spot(0.0, 0.02, ALPHA) is None
    assert judged(AUC(), 2000, 0.3).sight.blind_spot(0.0, 0.02, ALPHA) is None
    assert judged(LogLoss(worst=50.0), 2000, 0.3).sight.blind_spot(0.0, 0.02, ALPHA) is None
    assert judged(LogLoss(), 2000, 0.3).sight.blind_spot(0.0, 0.02, ALPHA) is not None


def test_clusters_of_unequal_weight_have_one_also_where_a_unit_s_loss_is_limited() -> None:
    sizes = np.array([1] * 90 + [40] * 10)
    clusters = np.repeat(np.arange(100), sizes)
    n = len(clusters)
    sample = PairedDrops(
        d=np.random.default_rng(0).random(n) * 0.01, units=Units(n=n, clusters=clusters), rows=n, changed=n, worst=1.0
    )
    found = bounded(replace(sample, units=Units(n=n, clusters=clusters)), ALPHA)
    spot = found.sight.blind_spot(0.01, 0.06, ALPHA)
    assert spot is not None
    assert (spot.noun, spot.looked_at, spot.cost) == ("cluster", 100, None)
    assert spot.effective == pytest.approx(n**2 / (sizes**2).sum())
    assert spot.one_in == pytest.approx(100 / 3, rel=0.02), "kinds of clusters are counted, whatever their weight"
    assert spot.weight == pytest.approx(0.05)
    assert "rarer than 1 in 34 may be missing" in str(spot)
    assert "5.00% of the weight" in str(spot)
    assert found.sight.blind_spot(0.0, 1.0, ALPHA) is None, "a margin that no loss can break"


def test_custom_metrics_count_rows_and_not_blocks() -> None:
    own = Custom("own", lambda scores, labels, _: float(np.mean((scores - labels) ** 2)), higher_is_better=False)
    spot = judged(own, 3000, 0.3).sight.blind_spot(0.0, 0.01, ALPHA)
    assert spot is not None
    assert spot.one_in == pytest.approx(1000, rel=0.01)


# Too little


@pytest.mark.parametrize(
    ("metric", "n", "rate", "says"),
    [
        (Loss(), LEAST_UNITS - 1, 0.5, "49 units and a certificate needs at least 50"),
        (AUC(), 3000, (LEAST_RARE - 1) / 3000, "19 positives, and a certificate needs at least 20"),
        (NE(), 3000, 1 - (LEAST_RARE - 1) / 3000, "19 negatives, and"),
        (Calibration(), 3000, (LEAST_RARE - 1) / 3000, "19 positives"),
        (Head(LogLoss(), 0), 3000, (LEAST_RARE - 1) / 3000, "19 positives"),
    ],
    ids=["units", "AUC", "negatives", "calibration", "a head"],
)
def test_what_holds_next_to_nothing_of_what_matters_proves_nothing(
    metric: Metric, n: int, rate: float, says: str
) -> None:
    if isinstance(metric, Head):
        z, other, y = clicks(n, rate)
        found = bounded(drops(metric, z[:, None], other[:, None], y, Units(n=n)), ALPHA)
    else:
        found = judged(metric, n, rate)
    assert found.sight.shortage is not None
    assert says in found.sight.shortage
    assert not found.proves(math.inf)


def test_one_more_of_what_matters_is_enough() -> None:
    assert judged(Loss(), LEAST_UNITS, 0.5).sight.shortage is None
    assert judged(NE(), 3000, LEAST_RARE / 3000).sight.shortage is None
    for count, enough in ((LEAST_CLUSTERS - 1, False), (LEAST_CLUSTERS, True)):
        units = Units(n=10 * count, clusters=np.repeat(np.arange(count), 10))
        assert (judged(Loss(), 10 * count, 0.5, units).sight.shortage is None) is enough
    order = PairedDrops(
        d=np.zeros(LEAST_CLUSTERS), units=Units(n=LEAST_CLUSTERS), rows=LEAST_CLUSTERS, changed=0, worst=1.0
    )
    assert bounded(order, ALPHA).sight.shortage is None, "a metric of order has a limit, and needs no more"


def test_clusters_count_by_what_they_are_worth() -> None:
    """200 clusters of which two hold nearly all rows; 100 units of which ten have nearly all weight."""
    sizes = np.array([1000] * 2 + [1] * 198)
    units = Units(n=int(sizes.sum()), clusters=np.repeat(np.arange(200), sizes))
    said = judged(LogLoss(), units.n, 0.3, units).sight.shortage
    assert said is not None
    assert "200 clusters are worth 2.42 of equal weight, and a certificate needs at least 20" in said
    weights = np.where(np.arange(100) < 10, 1000.0, 1.0)
    said = judged(LogLoss(), 100, 0.3, Units(n=100, weights=weights)).sight.shortage
    assert said is not None
    assert "100 units are worth 10.2" in said


def test_positives_of_one_cluster_are_worth_few() -> None:
    """Forty positives, all of two users."""
    clusters = np.repeat(np.arange(100), 20)
    y = (clusters < 2) * 1.0
    rng = np.random.default_rng(0)
    z = rng.normal(size=2000)
    found = bounded(drops(NE(), z, z + 0.01 * rng.normal(size=2000), y, Units(n=2000, clusters=clusters)), ALPHA)
    assert found.sight.rare == pytest.approx(2)
    assert found.sight.shortage is not None
    assert "positives that are worth 2 independent ones" in found.sight.shortage


def test_groups_are_called_clusters() -> None:
    clusters = np.repeat(np.arange(10), 20)
    said = judged(GAUC(), 200, 0.5, Units(n=200, clusters=clusters)).sight.shortage
    assert said is not None
    assert "10 clusters" in said


# The worst that users declare

LOGITS, OTHER, LABELS = clicks(4000, 0.3, seed=5)


@pytest.mark.parametrize(
    ("metric", "unit_loss"),
    [
        (LogLoss(worst=3.0), 3.0),
        (NE(worst=3.0), 3.0),
        (Calibration(worst=1.0), 1.0),
        (Calibration(kept=0.1, worst=1.0), 10.0),
        (RMSE(worst=400.0), 400.0),
    ],
    ids=["log-loss", "NE", "calibration", "calibration of sampled negatives", "RMSE"],
)
def test_a_declared_worst_is_what_one_more_unit_of_it_does_to_the_metric(metric: Metric, unit_loss: float) -> None:
    """Against the metric itself, with one unit's loss raised by as much as was declared."""
    units = Units(n=len(LABELS))
    z = torch.from_numpy(LOGITS)
    kept = metric.per_unit(z, torch.from_numpy(LABELS), z).numpy()
    worse = kept.copy()
    at = int(LABELS.argmin())  # a negative: it stands for most rows where negatives were sampled
    if worse.ndim > 1:
        worse[at, 0] += unit_loss
    else:
        worse[at] += unit_loss
    change = metric.paired(kept, worse, units)
    expected = paired_drop(change.d, units).estimate * len(LABELS)
    limit = metric.paired(kept, kept, units).worst
    assert limit == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("metric", [LogLoss(), NE(), Calibration(), RMSE(), Loss(), Perplexity()])
def test_it_makes_the_bound_that_of_a_limited_metric(metric: Metric) -> None:
    declared = replace(metric, worst=100.0)  # type: ignore[type-var]
    before, after = (np.abs(s) for s in (LOGITS, OTHER)) if isinstance(metric, Loss) else (LOGITS, OTHER)
    units = Units(n=len(LABELS))
    free, limited = (drops(m, before, after, LABELS, units) for m in (metric, declared))
    assert (free.d == limited.d).all()
    assert free.worst is None
    assert limited.worst is not None
    assert bounded(limited, ALPHA).upper == pytest.approx(upper_bound(limited.d, units, ALPHA, limited.worst))
    assert bounded(limited, ALPHA).upper > bounded(free, ALPHA).upper


def test_a_unit_that_loses_more_than_was_declared_is_named() -> None:
    after = OTHER.copy()
    after[17] = -30.0 if LABELS[17] else 30.0
    sample = drops(LogLoss(worst=5.0), LOGITS, after, LABELS, Units(n=len(LABELS)))
    with pytest.raises(TaskError, match=r"worst, 5\.0, got .* for unit 17; the metric must declare a larger `worst`"):
        bounded(sample, ALPHA)
    for wrong in (0.0, -1.0, math.inf, math.nan):
        for metric in (Loss, LogLoss, NE, Calibration, RMSE, Perplexity):
            with pytest.raises(TaskError, match="the most that a unit's loss can rise by, above zero and finite"):
                metric(worst=wrong)
    with pytest.raises(TaskError, match="above zero and finite"):
        Custom("own", lambda *_: 0.0, False, worst=-1.0)


def test_ndcg_and_custom_take_their_worst_as_it_is() -> None:
    assert NDCG(10).worst == 1.0
    mean = Custom("mean", lambda scores, labels, _: float(np.mean(labels)), higher_is_better=True, worst=1.0)
    kept = mean.per_unit(torch.from_numpy(LOGITS), torch.from_numpy(LABELS), torch.from_numpy(LOGITS)).numpy()
    sample = mean.paired(kept, kept, Units(n=len(LABELS)))
    assert sample.worst == 1.0
    assert bounded(sample, ALPHA).upper == pytest.approx(3 / 100, rel=0.03), "one of 100 blocks"


def test_a_blind_spot_reads_well_with_one_positive_class_and_without() -> None:
    spot = BlindSpot(
        noun="unit",
        looked_at=100,
        effective=100.0,
        one_in=34.2,
        rare="",
        rare_one_in=None,
        cost=None,
        unit="",
        weight=None,
    )
    assert str(spot) == "Blind spot: these data cannot show a loss in fewer than 1 unit in 34."


# Functions of the user's own


def mean_loss(scores: Floats, labels: Floats, _: Floats) -> float:
    return float(np.mean((scores - labels) ** 2))


def test_custom_metrics_count_clusters_by_what_they_are_worth() -> None:
    """One cluster of 101 holds half of the rows: blocks of equal number hide it."""
    clusters = np.concatenate([np.zeros(1000, np.int64), np.repeat(np.arange(1, 101), 10)])
    found = judged(Custom("own", mean_loss, higher_is_better=False), 2000, 0.3, Units(n=2000, clusters=clusters))
    assert found.sight.effective == pytest.approx(2000**2 / (1000**2 + 100 * 10**2))
    assert found.sight.shortage is not None
    assert "101 clusters are worth 3.96 of equal weight" in found.sight.shortage


def test_a_custom_metric_does_not_depend_on_the_order_of_rows() -> None:
    own = Custom("own", mean_loss, higher_is_better=False, blocks=40)
    z, other, y = clicks(1500, 0.3)
    order = np.random.default_rng(0).permutation(1500)
    first = bounded(drops(own, z, other, y, Units(n=1500)), ALPHA)
    second = bounded(drops(own, z[order], other[order], y[order], Units(n=1500)), ALPHA)
    assert (second.drop.estimate, second.upper) == pytest.approx((first.drop.estimate, first.upper))


def test_a_few_clusters_tell_a_custom_metric_nothing() -> None:
    """The first batch of rows sorted by user holds one."""
    found = judged(Custom("own", mean_loss, False), 100, 0.3, Units(n=100, clusters=np.zeros(100, np.int64)))
    assert found.drop.error == math.inf
    assert found.upper == math.inf
