"""Click metrics against scikit-learn and slow oracles, their errors against the bootstrap, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, root_mean_squared_error

from precimap.errors import TaskError
from precimap.metrics import NE, RMSE, Accuracy, Calibration, LogLoss, Metric, Perplexity
from precimap.metrics.paired import bounded, paired_drop
from precimap.metrics.units import Floats, Units

SEEDS = st.integers(0, 10**6)


def clicks(seed: int, n: int = 400, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Units]:
    """Logits of a model, of a slightly different one, labels, and clusters with weights."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, n)
    other = z + noise * rng.normal(size=n) + 0.03
    y = (rng.random(n) < 1 / (1 + np.exp(-z))).astype(np.float64)
    y[:2] = (0, 1)
    units = Units(n=n, clusters=rng.integers(0, n // 4, n), weights=rng.uniform(0.5, 2, n))
    return torch.from_numpy(z), torch.from_numpy(other), torch.from_numpy(y), units


def kept(metric: Metric, scores: torch.Tensor, labels: torch.Tensor) -> Floats:
    return metric.per_unit(scores, labels, torch.zeros(len(scores))).numpy()


def loss(z: torch.Tensor, y: torch.Tensor, weights: Floats) -> float:
    return float(log_loss(y.numpy(), torch.sigmoid(z).numpy(), sample_weight=weights))


@given(SEEDS)
def test_values_are_those_of_scikit_learn(seed: int) -> None:
    z, _, y, units = clicks(seed)
    weights = units.known_weights
    rate = float(y.numpy() @ weights / weights.sum())
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    p = torch.sigmoid(z).numpy()
    assert LogLoss().value(kept(LogLoss(), z, y), units) == pytest.approx(loss(z, y, weights))
    assert NE().value(kept(NE(), z, y), units) == pytest.approx(loss(z, y, weights) / entropy)
    assert Calibration().value(kept(Calibration(), z, y), units) == pytest.approx((p @ weights) / (y.numpy() @ weights))
    expected = root_mean_squared_error(y.numpy(), z.numpy(), sample_weight=weights)
    assert RMSE().value(kept(RMSE(), z, y), units) == pytest.approx(expected)
    expected = accuracy_score(y.numpy(), z.numpy() > 0, sample_weight=weights)
    assert Accuracy().value(kept(Accuracy(), z, y), units) == pytest.approx(expected)
    nats = z.abs()
    expected = math.exp(float(nats.numpy() @ weights / weights.sum()))
    values = Perplexity().per_unit(z, None, nats).numpy()
    assert Perplexity().value(values, units) == pytest.approx(expected)


RATIOS = (NE(), NE(kept=0.1), Calibration(), Calibration(kept=0.2))
OTHERS = (RMSE(), LogLoss())


@given(SEEDS, st.sampled_from(RATIOS + OTHERS))
def test_the_mean_of_the_units_is_exactly_the_drop(seed: int, metric: Metric) -> None:
    z, other, y, units = clicks(seed)
    before, after = kept(metric, z, y), kept(metric, other, y)
    sample = metric.paired(before, after, units)
    values = metric.value(after, units), metric.value(before, units)
    expected = values[0] / values[1] - 1 if metric in RATIOS else values[0] - values[1]
    assert paired_drop(sample.d, sample.units).estimate == pytest.approx(expected, abs=1e-12)
    assert sample.rows == sample.changed == 400


@pytest.mark.parametrize(
    "metric", [*RATIOS, *OTHERS], ids=lambda metric: f"{metric.name} {getattr(metric, 'kept', '')}"
)
def test_errors_are_those_of_the_cluster_bootstrap(metric: Metric) -> None:
    z, other, y, units = clicks(5, n=2000)
    before, after = kept(metric, z, y), kept(metric, other, y)
    sample = metric.paired(before, after, units)
    assert units.clusters is not None
    rng, names = np.random.default_rng(0), np.unique(units.clusters)
    rows_of = [np.flatnonzero(units.clusters == name) for name in names]
    drops = []
    for _ in range(400):
        rows = np.concatenate([rows_of[at] for at in rng.integers(0, len(names), len(names))])
        values = [metric.value(part[rows], units.only(rows)) for part in (after, before)]
        drops.append(values[0] / values[1] - 1 if metric in RATIOS else values[0] - values[1])
    assert paired_drop(sample.d, units).error == pytest.approx(np.std(drops), rel=0.15)  # its own error is 3.5 %


def test_the_entropy_cancels_in_the_drop_of_ne_and_the_labels_in_that_of_calibration() -> None:
    z, other, y, units = clicks(3)
    ne = paired_drop(NE().paired(kept(NE(), z, y), kept(NE(), other, y), units).d, units).estimate
    weights = units.known_weights
    assert ne == pytest.approx(loss(other, y, weights) / loss(z, y, weights) - 1)
    first = Calibration().paired(kept(Calibration(), z, y), kept(Calibration(), other, y), units).d
    flipped = Calibration().paired(kept(Calibration(), z, 1 - y), kept(Calibration(), other, 1 - y), units).d
    assert np.allclose(first, flipped)


def test_sampled_negatives_are_corrected_for_as_if_none_had_been_sampled_away() -> None:
    """A calibrated model, trained where a tenth of the negatives were kept, judged on such rows: calibrated again."""
    rng = np.random.default_rng(0)
    z = rng.normal(-3, 1, 400_000)
    y = rng.random(len(z)) < 1 / (1 + np.exp(-z))
    share = 0.1
    stays = y | (rng.random(len(z)) < share)
    sampled, labels = torch.from_numpy(z - math.log(share))[stays], torch.from_numpy(y.astype(float))[stays]
    full, sample = Units(n=len(z)), Units(n=int(stays.sum()))
    everything = torch.from_numpy(z), torch.from_numpy(y.astype(float))
    for metric, corrected in ((Calibration(), Calibration(kept=share)), (NE(), NE(kept=share))):
        expected = metric.value(kept(metric, *everything), full)
        assert corrected.value(kept(corrected, sampled, labels), sample) == pytest.approx(expected, rel=0.01)
    naive = Calibration().value(kept(Calibration(), sampled, labels), sample)
    assert abs(naive - 1) < 0.02  # on the sampled rows it is calibrated as it stands ...
    wrong = NE().value(kept(NE(), sampled, labels), sample)
    assert abs(wrong / NE().value(kept(NE(), *everything), full) - 1) > 0.03  # ... but its NE is that of another world


@settings(max_examples=30)
@given(SEEDS, st.sampled_from((0.02, -0.02)))
def test_calibration_is_bounded_to_both_sides(seed: int, shift: float) -> None:
    z, _, y, units = clicks(seed, n=2000)
    before, after = kept(Calibration(), z, y), kept(Calibration(), z + shift, y)
    found = bounded(Calibration().paired(before, after, units), 0.05)
    assert math.copysign(1, found.drop.estimate) == math.copysign(1, shift)
    assert found.size.estimate == abs(found.drop.estimate)
    assert abs(found.drop.estimate) < found.upper < 0.05
    assert 0 < found.lower < abs(found.drop.estimate)


def test_a_tie_counts_against_accuracy() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    assert kept(Accuracy(), scores, torch.tensor([0, 1, 1])).tolist() == [0, 1, 0]
    assert kept(Accuracy(), torch.tensor([0.0, 0.1, -0.1, 0.0]), torch.tensor([1, 1, 0, 0])).tolist() == [0, 1, 1, 0]


def test_what_does_not_fit_is_refused() -> None:
    z, y = torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])
    with pytest.raises(TaskError, match=r"NE takes logits \[n\] and labels \[n\]; the scores are \[3, 1\]"):
        NE().per_unit(z[:, None], y, z)
    with pytest.raises(TaskError, match=r"1 of 3 units .*a label outside \[0, 1\]; calibration takes 0/1"):
        Calibration().per_unit(z, torch.tensor([0.0, -1.0, 1.0]), z)
    with pytest.raises(TaskError, match="share of kept negatives above 0, at most 1, got 0"):
        NE(kept=0)
    with pytest.raises(TaskError, match=r"RMSE takes scores \[n\]"):
        RMSE().per_unit(torch.zeros(3, 2), y, z)
    with pytest.raises(TaskError, match=r"label outside 0\.\.1"):
        Accuracy().per_unit(torch.zeros(3, 2), torch.tensor([0, 1, 2]), z)
    with pytest.raises(TaskError, match="NE of the baseline is 0"):
        NE().paired(np.zeros((3, 3)), np.zeros((3, 3)), Units(n=3))
