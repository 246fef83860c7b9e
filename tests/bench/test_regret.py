"""The benchmark of regret: its oracle against brute force, its mean, and what it calls false."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import regret
from precimap.layers.discover import discover
from precimap.metrics.paired import upper_bound
from precimap.metrics.units import Units
from precimap.numerics.schemes import scheme
from regret import Residual, Row, best_gain, claims_of, mean_regret, task_of, trained

ROW = Row("calibrated", 0, 0.1, 0, gain=0.4, best=0.5, reachable=0.6, drop=0.05, looks=2, sent=3)


def test_the_oracle_is_the_most_gain_that_passes() -> None:
    rng = np.random.default_rng(0)
    gains = rng.permutation(np.linspace(0.1, 1, 12))
    d = (0.2 * gains[:, None] + rng.normal(0, 0.3, (12, 200))).astype(np.float32)
    for margin in (0.0, 0.1, 0.15, 0.2, 0.4):
        bounds = [upper_bound(row.astype(np.float64), Units(n=200), regret.ALPHA, None) for row in d]
        passing = [gain for gain, bound in zip(gains, bounds, strict=True) if bound <= margin]
        assert best_gain(d, gains, margin) == max(passing, default=0.0)


def test_the_error_is_over_draws_of_the_splits() -> None:
    rows = [replace(ROW, split=split, model=model, gain=0.5 - 0.1 * split) for split in range(3) for model in range(2)]
    mean, error = mean_regret(rows)
    assert mean == pytest.approx(0.1)
    assert error == pytest.approx(np.std([0.0, 0.1, 0.2], ddof=1) / np.sqrt(3))
    assert mean_regret(rows[:1])[1] == float("inf")


def test_a_certified_map_above_the_margin_is_false_and_an_empty_one_is_not() -> None:
    assert not ROW.false
    assert replace(ROW, drop=0.2).false
    assert not replace(ROW, drop=0.2, gain=0.0).false


def test_a_claim_fails_where_the_bound_is_not_kept() -> None:
    others = [replace(ROW, kind="overconfident", gain=0.5)]
    claims = {claim.name.split(",")[0]: claim.holds for claim in claims_of([ROW, *others])}
    assert claims == {
        "regret of the calibrated models": False,
        "regret of the overconfident models": True,
        "certified maps with a true drop above the margin": True,
    }


def test_all_ten_layers_can_be_quantised_and_training_repeats() -> None:
    model = Residual().eval()
    x = torch.randn(4, regret.FEATURES)
    batch = [{"x": x, "labels": torch.ones(4)}]
    inventory = discover(model, task_of(model, batch, batch, batch).forward, batch[0])
    assert len(inventory.layers) == 10
    assert all(min(layer.shape) >= 16 for layer in inventory.layers), "no hardware refuses one for its width"
    assert regret.SCHEME.weight.format.bits == 3 < scheme("int4-row").weight.format.bits
    one, other = trained(3), trained(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
