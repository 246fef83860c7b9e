"""Realigning the last logit: what it repairs, that it is shipped as measured, and where it is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from precimap import PrecisionMap, deploy, load_deployed, save_deployed, search
from precimap.errors import InputError, MapError, UncertifiedMapWarning
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_map
from precimap.layers.realign import realigned, score_layer
from precimap.metrics import Calibration, Guard, Head, LogLoss
from precimap.precision_map import Realignment
from precimap.searching.question import Effort
from precimap.searching.realigner import realigning
from precimap.task import first_batch
from searching.test_guards import Clicks, click_task

QUICK = Effort(rounding_draws=0, audit_units=250)


def searched(tmp_path: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "schemes": ["fp8-tensor"],
        "margin": 0.001,
        "effort": QUICK,
        "ledger": tmp_path / "ledger",
        "realign": True,
    }
    task = click_task(metric=LogLoss(), guards={"calibration": 0.002})
    return task, search(task, **{**fields, **changes})


@given(st.integers(0, 10**6), st.floats(0.5, 2), st.floats(-3, 3))
def test_a_scale_and_a_shift_are_found_again(seed: int, scale: float, shift: float) -> None:
    baseline = np.random.default_rng(seed).normal(size=50)
    (found,), (moved,) = realigning(((baseline - shift) / scale)[:, None], baseline[:, None])
    assert (found, moved) == pytest.approx((scale, shift), abs=1e-6)


@given(st.integers(0, 10**6))
def test_the_fit_is_scikit_learn_s_and_leaves_out_what_is_not_finite(seed: int) -> None:
    """On labels drawn by halves: a row with the probability p is two rows, weighted p and 1 - p."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=200)
    y = 0.8 * x - 1 + 0.5 * rng.normal(size=200)
    p = 1 / (1 + np.exp(-y))
    padded = np.append(x, [-np.inf, 1.0]), np.append(y, [-np.inf, -np.inf])
    fit = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000)
    fit.fit(np.r_[x, x][:, None], np.r_[np.ones(200), np.zeros(200)], sample_weight=np.r_[p, 1 - p])
    (scale,), (shift,) = realigning(*(column[:, None] for column in padded))
    assert (scale, shift) == pytest.approx((fit.coef_[0, 0], fit.intercept_[0]), abs=1e-4)
    assert np.mean(1 / (1 + np.exp(-scale * x - shift))) == pytest.approx(p.mean(), abs=1e-8)  # calibrated


def test_scores_that_say_nothing_are_only_shifted() -> None:
    (scale,), (shift,) = realigning(np.full((5, 1), 2.0), np.arange(5.0)[:, None])
    assert scale == 1.0
    mean = float(np.mean(1 / (1 + np.exp(-np.arange(5.0)))))
    assert 1 / (1 + np.exp(-2 - shift)) == pytest.approx(mean)
    assert realigning(-np.arange(5.0)[:, None], np.arange(5.0)[:, None])[0] == (1.0,)  # turned round: no repair


def test_the_miscalibrated_layer_comes_in_once_the_last_logit_is_realigned(tmp_path: Path) -> None:
    """Without it the guard keeps `gain` out (tests/searching/test_guards.py); its 1.1 % are undone by the last layer."""
    task = click_task(metric=Calibration())
    fields: dict[str, Any] = {"schemes": ["fp8-tensor"], "margin": 0.005, "effort": QUICK, "alpha_budget": 0.1}
    plain = search(task, ledger=tmp_path, **fields)
    assert "gain.weight" not in plain.map.low
    repaired = search(task, ledger=tmp_path, realign=True, **fields)
    assert repaired.certified
    assert "gain.weight" in repaired.map.low
    found = repaired.map.realignment
    assert found.layer == "last.weight"
    assert 0.97 < found.scale[0] < 237.44 / 240  # least squares shrinks a little more, for the rounding noise
    assert found.n == 250
    certificate = repaired.certificate
    assert certificate.unrepaired is not None
    assert certificate.unrepaired.drop > certificate.margin > certificate.upper > certificate.drop


def test_what_is_certified_is_what_scoring_the_realigned_map_gives(tmp_path: Path) -> None:
    task, result = searched(tmp_path)
    model = realigned(task.model, result.map.realignment)
    drops, plain_drops = [], []
    layers, plain_layers = quantize_map(model, result.map), quantize_map(task.model, result.map)
    with torch.no_grad():
        for batch in task.splits.certify:
            base = task.loss(task.model(batch["x"]), batch).double()
            with quantized(model, layers):
                drops.append(task.loss(model(batch["x"]), batch).double() - base)
            with quantized(task.model, plain_layers):
                plain_drops.append(task.loss(task.model(batch["x"]), batch).double() - base)
    assert result.certificate.drop == pytest.approx(float(torch.cat(drops).mean()), abs=1e-7)
    assert result.certificate.unrepaired.drop == pytest.approx(float(torch.cat(plain_drops).mean()), abs=1e-7)


def test_the_realigned_map_is_deployed_saved_and_loaded_and_the_model_stays(tmp_path: Path) -> None:
    task, result = searched(tmp_path)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    deployed = deploy(task.model, result.map, task=task)
    agreement = deployed.precimap.agreement  # the emulated kernel multiplies values, not codes: last bits differ
    assert agreement.largest_difference <= 2.0**-20 * agreement.largest_output
    save_deployed(deployed, task.model, tmp_path / "model.safetensors")
    loaded = load_deployed(Clicks().eval(), tmp_path / "model.safetensors")
    x = first_batch(task, task.splits.certify)["x"]
    with torch.no_grad():
        assert torch.equal(loaded(x), deployed(x))
        with pytest.warns(UncertifiedMapWarning, match="its certificate is of another map"):
            plain = deploy(task.model, result.map.model_copy(update={"realignment": None}))
        assert not torch.equal(plain(x), deployed(x))
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())
    assert task.model.last.bias is None


def test_the_realignment_belongs_to_the_map(tmp_path: Path) -> None:
    _, result = searched(tmp_path)
    plain = result.map.model_copy(update={"realignment": None})
    assert plain.fingerprint != result.map.fingerprint
    (line,) = plain.diff(result.map)
    assert line.startswith(f"realignment: none -> x {result.map.realignment.scale[0]:.5f} ")
    result.map.save(tmp_path / "map.json")
    assert PrecisionMap.load(tmp_path / "map.json") == result.map


def test_a_run_taken_up_again_realigns_as_before(tmp_path: Path) -> None:
    _, first = searched(tmp_path, run=tmp_path / "run")
    _, again = searched(tmp_path, run=tmp_path / "run")
    assert again.map == first.map


def test_rounding_draws_realign_anew_on_every_grid(tmp_path: Path) -> None:
    """Realigned once for all, the lottery of the grid would stay; realigned on each grid it is mostly gone."""
    effort = Effort(rounding_draws=6, audit_units=250, check_units=1000)
    wide = {"margin": 0.05, "effort": effort}
    task = click_task(metric=Calibration())
    plain = search(task, schemes=["fp8-tensor"], ledger=tmp_path / "a", **wide)
    repaired = search(task, schemes=["fp8-tensor"], ledger=tmp_path / "b", realign=True, **wide)
    assert plain.map.low == repaired.map.low == ("first.weight", "gain.weight")
    assert repaired.map.rounding.sd < plain.map.rounding.sd / 2


class Summed(nn.Module):
    """Scores that are the sum of two parts, or a multiple of one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 1), nn.Linear(16, 1)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x).squeeze(-1), self.second(x).squeeze(-1)
        return {"sum": first + second, "sigmoid": first.sigmoid(), "views": first.unsqueeze(0).T.reshape(-1)}[self.kind]


@pytest.mark.parametrize("kind", ["sum", "sigmoid"])
def test_scores_that_no_layer_makes_alone_are_refused(kind: str) -> None:
    task, model = click_task(), Summed(kind)
    batch = first_batch(task, task.splits.search)
    inventory = discover(model, task.forward, batch)
    with pytest.raises(InputError, match=r"expected a last nn\.Linear whose result is the score itself, got none"):
        score_layer(model, task.forward, inventory, batch)


def test_views_of_the_last_result_are_seen_through_and_other_layers_are_not_taken_for_it() -> None:
    task = click_task()
    batch = first_batch(task, task.splits.search)
    for model, expected in ((Summed("views"), "first.weight"), (Clicks(), "last.weight")):
        inventory = discover(model, task.forward, batch)
        assert score_layer(model, task.forward, inventory, batch) == expected


def test_a_map_for_another_architecture_is_refused() -> None:
    with pytest.raises(MapError, match=r"the map realigns head\.weight"):
        realigned(Clicks(), Realignment(layer="head.weight", scale=(1.0,), shift=(0.0,), n=1))


class TwoHeads(nn.Module):
    """Two heads in one last layer; `turned` puts them along another dim than the last."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.heads = nn.Linear(16, 32), nn.Linear(32, 2)
        self.turned = turned
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.heads(torch.relu(self.first(x)))
        return logits.T.reshape(logits.shape) if self.turned else logits


def test_every_head_has_a_scale_and_a_shift_of_its_own() -> None:
    """Heads that were moved in opposite ways come back; one pooled fit could not do that."""
    task, model = click_task(), TwoHeads()
    batch = first_batch(task, task.splits.search)
    inventory = discover(model, task.forward, batch)
    assert score_layer(model, task.forward, inventory, batch) == "heads.weight"
    with torch.no_grad():
        before = model(batch["x"]).double().numpy()
    moved = before * [0.8, 1.25] + [0.5, -0.3]
    scale, shift = realigning(moved, before)
    assert scale == pytest.approx((1.25, 0.8), abs=1e-5)
    assert shift == pytest.approx((-0.625, 0.24), abs=1e-5)
    folded = realigned(model, Realignment(layer="heads.weight", scale=scale, shift=shift, n=250))
    with torch.no_grad():
        model.heads.weight.mul_(torch.tensor([[0.8], [1.25]]))
        model.heads.bias.mul_(torch.tensor([0.8, 1.25])).add_(torch.tensor([0.5, -0.3]))
        again = realigned(model, Realignment(layer="heads.weight", scale=scale, shift=shift, n=250))
        assert np.allclose(again(batch["x"]).numpy(), before, atol=1e-5)
    assert not np.allclose(folded(batch["x"]).detach().numpy(), before, atol=1e-2)


def test_heads_along_another_dim_are_refused() -> None:
    task, model = click_task(), TwoHeads(turned=True)
    batch = first_batch(task, task.splits.search)
    inventory = discover(model, task.forward, batch)
    with pytest.raises(InputError, match="as heads side by side or a sum"):
        score_layer(model, task.forward, inventory, batch)


def test_a_head_is_searched_and_certified_realigned(tmp_path: Path) -> None:
    task = click_task()
    model = TwoHeads().eval()
    both = replace(
        task,
        model=model,
        loss=lambda scores, batch: torch.nn.functional.binary_cross_entropy_with_logits(
            scores, batch["labels"].unsqueeze(1).expand_as(scores), reduction="none"
        ).sum(1),
        metric=Head(LogLoss(), 0),
        guards=(Guard(Head(Calibration(), 1), 0.01),),
    )
    result = search(both, schemes=["fp8-tensor"], margin=0.01, effort=QUICK, ledger=tmp_path, realign=True)
    assert result.certified
    assert result.map.realignment is not None
    assert len(result.map.realignment.scale) == 2
    assert result.map.realignment.n == 250
