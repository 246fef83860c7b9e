"""The tasks and the rival scores of the benchmarks: known baselines, disjoint splits, scores by hand."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from measuring import rival_scores
from models.click_model import Recipe
from models.click_training import ClickTraining, cached, train
from precimap import Splits, Task, discover
from precimap.errors import InputError
from precimap.layers.inventory import Inventory
from precimap.metrics import Loss
from precimap.numerics.schemes import scheme
from precimap.searching.calibrate import InputRanges
from precimap.task import first_batch, score
from tasks import real_data, real_tasks
from tasks.synthetic import deep_task

NO_CALIBRATION = InputRanges({})


# Real tasks


@pytest.mark.parametrize(
    ("make", "file"),
    [
        (real_tasks.stackfaq_minilm, "stackExchange-FAQ.json.gz"),
        (real_tasks.ncf, "mlp.safetensors"),
        (real_tasks.gmf, "gmf.safetensors"),
        (real_tasks.frappe_dcnv2, "frappe.validation.libfm.gz"),
        (real_tasks.frappe_wukong, "frappe.validation.libfm.gz"),
        (real_tasks.amazon_sasrec, "Video.txt.gz"),
    ],
)
def test_a_missing_file_is_named(
    make: Callable[[], Task], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_data, "DATA", tmp_path)
    with pytest.raises(FileNotFoundError, match=file):
        make()


def test_ncf_gives_its_published_ranking() -> None:
    task = _present(lambda: real_tasks.ncf(search_users=3000, certify_users=3000, calibration_users=40))

    scored = [score(task, task.model, split) for split in _splits(task)]

    ndcg = np.concatenate([part.reported["nDCG@10"] for part in scored])
    assert len(ndcg) == 6040
    assert ndcg.mean() == pytest.approx(0.39384, abs=1e-5)
    assert np.concatenate([part.losses for part in scored]).mean() == pytest.approx(0.1279, abs=0.001)
    users = torch.cat([batch["user"] for split in _splits(task) for batch in split])
    assert len(set(users.tolist())) == 6040
    live = [layer.name for layer in _inventory(task).layers if not layer.lookup]
    assert live == ["layer1.weight", "layer2.weight", "layer3.weight", "prediction.weight"]


@pytest.fixture(scope="module")
def stackfaq() -> Task:
    """The one slow thing here: 719 answers are embedded."""
    return _present(lambda: real_tasks.stackfaq_minilm(search=480, certify=64, calibration=64))


def test_minilm_answers_the_questions(stackfaq: Task) -> None:
    inventory = _inventory(stackfaq)

    scored = score(stackfaq, stackfaq.model, stackfaq.splits.search)

    assert scored.units.n == 480
    assert scored.losses.mean() == pytest.approx(0.9339, abs=0.001)
    assert scored.reported["MRR@10"].mean() == pytest.approx(0.8185, abs=0.002)  # .8115 over all 1,374 queries
    assert scored.reported["nDCG@10"].mean() == pytest.approx(0.6193, abs=0.002)  # .6207
    assert sum(layer.lookup for layer in inventory.layers) == 3
    assert [layer.name for layer in inventory.layers if layer.dead] == ["transformer.pooler.dense.weight"]
    assert len(rival_scores.eligible(inventory, scheme("fp8"))) == 36
    assert first_batch(stackfaq, stackfaq.splits.search)["labels"].shape == (32, 719)
    threads = [{int(thread) for batch in split for thread in batch["thread"]} for split in _splits(stackfaq)]
    assert sum(map(len, threads)) == len(set().union(*threads))


def test_minilm_loss_is_the_softmax_mass_of_the_relevant(stackfaq: Task) -> None:
    batch = first_batch(stackfaq, stackfaq.splits.search)
    scores = torch.randn(32, 719)

    mass = (scores.double().softmax(dim=1) * batch["labels"]).sum(dim=1)

    torch.testing.assert_close(stackfaq.loss(scores, batch).double(), -mass.log(), rtol=1e-5, atol=1e-5)


def test_dcnv2_learns_frappe_and_is_cached(tmp_path: Path) -> None:
    quick = Recipe(training=ClickTraining(epochs=1, batch_size=1024, learning_rate=2e-3))
    task = _present(lambda: real_tasks.frappe_dcnv2(4000, 8000, 1000, tmp_path, quick))

    assert score(task, task.model, task.splits.search).values.mean() == pytest.approx(0.33, abs=0.04)
    assert len(rival_scores.eligible(_inventory(task), scheme("fp8"))) == 6
    users = [{int(user) for batch in split for user in batch["features"][:, 0]} for split in _splits(task)[1:]]
    assert not users[0] & users[1]
    assert [sum(len(batch["labels"]) for batch in split) for split in _splits(task)] == [1000, 4000, 8000]
    assert len(list(tmp_path.iterdir())) == 1


# The click model


def test_training_is_deterministic_and_leaves_the_random_state(tmp_path: Path) -> None:
    features, labels = _clicks()
    recipe = _small(epochs=2, batch_size=64)
    before = torch.get_rng_state()

    one = train(recipe, features, labels).state_dict()

    assert torch.equal(before, torch.get_rng_state())
    torch.randn(3)
    for again in (train(recipe, features, labels), cached(recipe, features, labels, tmp_path)):
        assert all(torch.equal(value, one[name]) for name, value in again.state_dict().items())


def test_the_cache_is_read_and_its_key_holds_recipe_and_data(tmp_path: Path) -> None:
    features, labels = _clicks()
    recipe = _small(epochs=1, batch_size=64)
    cached(recipe, features, labels, tmp_path)
    (path,) = tmp_path.iterdir()
    written = path.stat().st_mtime_ns

    cached(recipe, features, labels, tmp_path)
    assert path.stat().st_mtime_ns == written
    cached(_small(epochs=1, batch_size=32), features, labels, tmp_path)
    cached(recipe, features, 1 - labels, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_training_takes_the_best_epoch() -> None:
    features, _ = _clicks()
    noise = torch.randint(2, (400,)).float()  # nothing to learn: after some epochs the validation rows only get worse
    how = ClickTraining(patience=30, epochs=30, batch_size=32, learning_rate=0.01)
    recipe = Recipe(width=4, deep=(32,), training=how)
    torch.manual_seed(how.seed)
    validation = torch.randperm(400)[:40]

    def loss(epochs: int) -> float:
        model = train(replace(recipe, training=replace(how, epochs=epochs)), features, noise)
        return float(F.binary_cross_entropy_with_logits(model(features[validation]), noise[validation]))

    assert loss(30) <= loss(1)


# The synthetic ranker


def test_the_ranker_has_the_layers_asked_for() -> None:
    task = deep_task(48, units=64)

    inventory = _inventory(task)

    assert len(inventory.layers) == 48
    assert len(rival_scores.eligible(inventory, scheme("fp8"))) == 48, "none dead, all widths fit"
    assert sum(isinstance(module, nn.Linear) for module in deep_task(1000, 1).model.modules()) == 1000
    for wrong in (36, 50):
        with pytest.raises(InputError, match=str(wrong)):
            deep_task(wrong)


def test_the_ranker_is_the_same_on_every_call_and_calibrated() -> None:
    one, other = deep_task(40, units=2048), deep_task(40, units=2048)

    scored = score(one, one.model, one.splits.search)
    entropies = []
    for batch in one.splits.search:
        logs = one.forward(one.model, batch).log_softmax(dim=1)
        entropies.append(-(logs.exp() * logs).sum(dim=1))

    assert np.array_equal(scored.losses, score(other, other.model, other.splits.search).losses)
    error = scored.losses.std() / np.sqrt(2048)
    assert scored.losses.mean() == pytest.approx(torch.cat(entropies).mean().item(), abs=4 * error)


# Rival scores, on two layers by hand


class _TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.second(torch.relu(self.first(x)))
        return scores


@dataclass(frozen=True, slots=True)
class _Toy:
    """Two layers under cross-entropy; the batches have 24 and 8 units."""

    task: Task
    model: _TwoLayers
    batches: list[dict[str, Tensor]]

    @property
    def inventory(self) -> Inventory:
        return discover(self.model, self.task.forward, self.batches[0])

    @torch.no_grad()
    def outputs(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.model.first(x)
        return first, self.model.second(torch.relu(first))

    @torch.no_grad()
    def changes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What per-tensor E4M3, as torch itself casts, changes of each layer's output on its exact input."""
        first, second = self.outputs(x)
        return _change(self.model.first, x, first), _change(self.model.second, torch.relu(first), second)


def test_elementwise_gradient_by_hand() -> None:
    toy = _toy()

    scores = rival_scores.elementwise_gradient(
        toy.task, toy.inventory, NO_CALIBRATION, scheme("fp8-tensor"), toy.batches
    )

    expected = {"first.weight": 0.0, "second.weight": 0.0}
    for batch in toy.batches:
        first, second = toy.outputs(batch["x"])
        g2 = (second.softmax(dim=1) - F.one_hot(batch["labels"], 16)) / len(batch["labels"])
        g1 = (g2 @ toy.model.second.weight.detach()) * (first > 0)
        for name, gradient, change in zip(expected, (g1, g2), toy.changes(batch["x"]), strict=True):
            expected[name] += float((gradient * change).square().sum())
    assert scores == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in toy.model.parameters())


def test_elementwise_gradient_is_clamped() -> None:
    toy = _toy(steepness=1e25)

    scores = rival_scores.elementwise_gradient(
        toy.task, toy.inventory, NO_CALIBRATION, scheme("fp8-tensor"), toy.batches
    )

    elements = sum(int((toy.changes(batch["x"])[1] != 0).sum()) for batch in toy.batches)
    assert scores["second.weight"] == pytest.approx(1e20 * elements, rel=1e-4)


def test_layer_sqnr_by_hand() -> None:
    toy = _toy()

    scores = rival_scores.layer_sqnr(toy.task, toy.inventory, NO_CALIBRATION, scheme("fp8-tensor"), toy.batches)

    for place, name in enumerate(("first.weight", "second.weight")):
        noise = sum(float(toy.changes(batch["x"])[place].square().sum()) for batch in toy.batches)
        signal = sum(float(toy.outputs(batch["x"])[place].square().sum()) for batch in toy.batches)
        assert scores[name] == pytest.approx(noise / signal, rel=1e-4)


def test_direct_truth_and_residual_by_swapping_weights() -> None:
    toy = _toy()
    arguments = (toy.task, toy.inventory, NO_CALIBRATION, scheme("fp8-weight"))

    truth = rival_scores.direct(*arguments, toy.batches)
    residual = rival_scores.residual_error(*arguments, {"second.weight"}, toy.batches)

    x, labels = (torch.cat([batch[key] for batch in toy.batches]) for key in ("x", "labels"))
    base = toy.model(x).detach()
    assert truth.layers == ("first.weight", "second.weight")
    for row in range(2):
        swapped = copy.deepcopy(toy.model)
        weight = (swapped.first, swapped.second)[row].weight
        weight.data = _e4m3(weight.data, weight.data.abs().amax(dim=1, keepdim=True))
        scores = swapped(x).detach()
        losses = [F.cross_entropy(z, labels, reduction="none").double() for z in (scores, base)]
        delta = (losses[0] - losses[1]).numpy()
        np.testing.assert_allclose(truth.deltas[row], delta, atol=2e-6)
        assert truth.mean[row] == pytest.approx(delta.mean(), abs=1e-6)
        assert truth.error[row] == pytest.approx(delta.std(ddof=1) / np.sqrt(len(delta)), rel=1e-3)
        assert truth.second_moment[row] == pytest.approx((delta**2).mean(), rel=1e-3)
        assert truth.output_error[row] == pytest.approx(float((scores - base).square().sum(dim=1).mean()), rel=1e-4)
    assert residual == pytest.approx(truth.output_error[0], rel=1e-6)
    assert rival_scores.residual_error(*arguments, set(truth.layers), toy.batches) == 0.0


def _toy(steepness: float = 1.0) -> _Toy:
    model = _TwoLayers().eval()
    batches = [{"x": torch.randn(units, 32), "labels": torch.randint(16, (units,))} for units in (24, 8)]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["x"])
        return scores

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return steepness * F.cross_entropy(scores, batch["labels"], reduction="none")

    splits = Splits(batches, batches, batches)
    return _Toy(Task(model, splits=splits, forward=forward, loss=loss, metric=Loss("log-loss")), model, batches)


def _change(layer: nn.Linear, x: Tensor, output: Tensor) -> Tensor:
    weight = _e4m3(layer.weight, layer.weight.abs().amax())
    return F.linear(_e4m3(x, x.abs().amax()), weight, layer.bias) - output


def _e4m3(x: Tensor, amax: Tensor) -> Tensor:
    scale = amax / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def _small(**training: Any) -> Recipe:
    return Recipe(width=4, deep=(8,), training=ClickTraining(**training))


def _clicks() -> tuple[Tensor, Tensor]:
    """400 rows of 3 fields with 8 values each; the label follows from the first two fields."""
    values = torch.randint(8, (400, 3), generator=torch.Generator().manual_seed(2))
    values[0] = 7
    return values + torch.tensor([0, 8, 16]), ((values[:, 0] + values[:, 1]) % 2).float()


def _inventory(task: Task) -> Inventory:
    return discover(task.model, task.forward, first_batch(task, task.splits.search))


def _splits(task: Task) -> list[list[dict[str, Tensor]]]:
    return [list(getattr(task.splits, name)) for name in ("calibration", "search", "certify")]


def _present(make: Callable[[], Task]) -> Task:
    try:
        return make()
    except FileNotFoundError as error:
        pytest.skip(str(error))
