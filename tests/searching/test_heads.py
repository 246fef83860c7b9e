"""A model with several heads: the screen foretells each head's scores, and the metric of one of them."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.small_tasks import subject_on
from helpers.zoo_ranking_models import MultiGateExperts
from precimap import Splits, Task, search
from precimap.journal import open_journal, run_journal
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.metrics import Head, LogLoss
from precimap.numerics.schemes import SCHEMES
from precimap.searching.allocation.knapsack import Step
from precimap.searching.calibrate import InputRanges, prepare
from precimap.searching.comparison import compare
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.evidence.screen_plan import MOST_HEADS, Differentiated, located
from precimap.searching.maps.rescore import contributions
from precimap.searching.progress import silent
from precimap.searching.run import Run, scored_baseline
from precimap.task import Scored, score

INPUTS, HEADS, NONE = 32, 2, InputRanges({})


def log_loss_of(head: int) -> Head:
    return Head(LogLoss(), head)


def clicks(units: int, seed: int, size: int = 250) -> list[dict[str, Tensor]]:
    """Two labels that depend on the same inputs through a nonlinear rule each, with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, INPUTS, generator=generator)
    ways = torch.randn(INPUTS, 2 * HEADS, generator=torch.Generator().manual_seed(99)) / INPUTS**0.5
    hidden = x @ ways
    odds = 3 * hidden[:, :HEADS] * hidden[:, HEADS:] + 2 * hidden[:, :HEADS]
    labels = torch.bernoulli(torch.sigmoid(odds), generator=generator)
    return [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, units, size)]


@functools.cache
def trained() -> MultiGateExperts:
    """An MMoE of two tasks that has learned them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = MultiGateExperts(INPUTS, experts=4, tasks=HEADS)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for epoch in range(25):
            for batch in clicks(5000, seed=1000 + epoch):
                optimizer.zero_grad()
                torch.autograd.backward(F.binary_cross_entropy_with_logits(model(batch["x"]), batch["labels"]))
                optimizer.step()
    return model.eval().requires_grad_(False)


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"])
    return scores


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none").mean(1)


def task_of(**changes: Any) -> Task:
    splits = Splits(clicks(250, 1), clicks(1000, 2), clicks(3000, 3))
    fields: dict[str, Any] = {"splits": splits, "forward": forward, "loss": loss, "metric": log_loss_of(1)}
    return Task(trained(), **{**fields, "reported": (log_loss_of(0),), **changes})


def screened(task: Task, schemes: tuple[str, ...] = ("fp8",)) -> tuple[Predictor, Callable[[dict[str, str]], Scored]]:
    """The screen's predictor, and what measures a map."""
    with run_journal(None, {"a": "test"}) as journal:
        run = Run(task, journal, silent)
        subject, split = subject_on(run, [SCHEMES[name] for name in schemes]), task.splits.search
        baseline = scored_baseline(run)
        found = screen(subject, subject.pairs, 2**32, 250, baseline.scattered)

    def measure(choice: dict[str, str]) -> Scored:
        layers = subject.quantized({name: SCHEMES[s] for name, s in choice.items()})
        with quantized(task.model, layers):
            return score(task, task.model, split)

    return Predictor(task=task, screen=found, baseline=baseline, batches=dict(enumerate(split)), alpha=0.05), measure


def direct_changes(task: Task, found: Screen, choice: dict[str, str]) -> np.ndarray:
    """Of every score, float64 [units, heads], by running the map."""
    inventory = discover(task.model, task.forward, next(iter(task.splits.search)))
    layers = prepare(task, inventory, NONE, {name: SCHEMES[s] for name, s in choice.items()})
    changes = []
    for number, batch in enumerate(task.splits.search):
        with torch.no_grad(), quantized(task.model, layers):
            changes.append(task.forward(task.model, batch).double().numpy() - found.batches[number].scores)
    return np.concatenate(changes)


def foretold(found: Screen, keys: list[tuple[str, str]]) -> np.ndarray:
    """The same by the screen."""
    return np.concatenate([found.change(keys, number).reshape(-1, HEADS) for number in sorted(found.batches)])


def test_the_model_has_learned_both_tasks() -> None:
    task = task_of()
    found = score(task, task.model, task.splits.search)
    rates = torch.cat([batch["labels"] for batch in task.splits.search]).mean(0).double()
    entropy = -(rates * rates.log() + (1 - rates) * (1 - rates).log())
    for head, values in ((1, found.values), (0, found.reported[log_loss_of(0).name])):
        assert values.mean() < 0.8 * float(entropy[head])


def test_the_change_of_each_score_of_each_head_is_that_of_running_the_layer() -> None:
    task = task_of()
    predictor, _ = screened(task)
    found = predictor.screen

    assert found.plan.what is Differentiated.HEADS
    assert not found.unseen
    assert len(found.batches) == 4, "scores are screened on the whole split, however few units spreads would need"
    names = [name for name, _ in found.pairs]
    assert {name.partition(".")[0] for name in names} == {"experts", "towers"}
    for name in names:
        predicted, direct = foretold(found, [(name, "fp8")]), direct_changes(task, found, {name: "fp8"})
        for head in range(HEADS):
            if name.startswith(f"towers.{1 - head}"):  # the other task's
                assert not predicted[:, head].any()
                assert not direct[:, head].any()
                continue
            assert np.corrcoef(predicted[:, head], direct[:, head])[0, 1] > 0.99, (name, head)
            assert predicted[:, head].std() == pytest.approx(direct[:, head].std(), rel=0.05)
        errors = np.square(predicted).sum(1)
        np.testing.assert_allclose(found.output_error((name, "fp8"))[0], errors.mean(), rtol=1e-5)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_the_metric_of_one_head_is_foretold_for_a_map(scheme: str) -> None:
    """Unit by unit where no layer of the map reads another's result; else a tower's rounding is drawn anew (.83, fp8)."""
    task = task_of()
    predictor, measure = screened(task, (scheme,))
    assert predictor.predicts_metric
    keys = list(predictor.screen.pairs)
    experts = [key for key in keys if key[0].startswith("experts")]
    towers = [key for key in keys if key[0].startswith("towers.1")]
    for chosen, least in ((experts, 0.995), (towers, 0.995), (experts[:2], 0.995), (keys, 0.8)):
        measured = measure(dict(chosen))
        three = predictor.baseline.whole, predictor.scored(chosen), measured
        for each in ([part.values for part in three], [part.reported[log_loss_of(0).name] for part in three]):
            before, predicted, direct = each
            if (predicted != before).any():  # a tower moves its own head alone
                moved = (predicted - before)[:, 0], (direct - before)[:, 0]  # beside it the labels, which stay
                assert np.corrcoef(*moved)[0, 1] > least, (chosen, scheme)
        joint, run = predictor.comparison(chosen), compare(task, predictor.baseline.whole, measured, 0.05)
        assert joint is not None
        assert joint.drop.estimate == pytest.approx(run.drop.estimate, abs=run.drop.error * (0.1 if least > 0.9 else 1))


def test_a_gate_on_one_head_is_searched_and_certified(tmp_path: Path) -> None:
    found = search(task_of(), schemes=["fp8"], margin=0.01, run=tmp_path)
    assert found.certified
    assert len(found.map.low) == 6
    with open_journal(tmp_path) as journal:
        assert {row.value["backwards"] for row in journal.measurements("screen")} == {HEADS}


class Columns(nn.Module):
    """As many scores of each unit as asked for; `probabilities`: they sum to one."""

    def __init__(self, columns: int, probabilities: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.first, self.last = nn.Linear(INPUTS, 16), nn.Linear(16, columns)
        self.probabilities = probabilities
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.tanh(self.first(x)))
        return scores.softmax(1) if self.probabilities else scores


def columns_task(model: nn.Module) -> Task:
    task = task_of(metric=log_loss_of(0), reported=(), labels=lambda batch: batch["labels"][:, 0])
    return replace(task, model=model.eval(), loss=lambda scores, _: scores.square().mean(1))


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (1, Differentiated.SCORES),
        (2, Differentiated.HEADS),
        (MOST_HEADS, Differentiated.HEADS),
        (MOST_HEADS + 1, Differentiated.LOSSES),
    ],
)
def test_few_columns_are_heads_and_many_are_not(columns: int, what: Differentiated) -> None:
    predictor, _ = screened(columns_task(Columns(columns)))
    assert predictor.screen.plan.what is what
    assert not predictor.screen.unseen
    changes = predictor.screen.change([("first.weight", "fp8")], min(predictor.screen.batches))
    assert changes.shape == (250 * (1 if what is Differentiated.LOSSES else columns),)


def test_scores_that_sum_to_one_are_seen() -> None:
    """Their plain sum has no gradient; every layer would be taken for one that nothing is known of."""
    predictor, _ = screened(columns_task(Columns(2, probabilities=True)))
    assert not predictor.screen.unseen
    changes = predictor.screen.change([("first.weight", "fp8")], 0).reshape(-1, 2)
    assert changes.any()
    np.testing.assert_allclose(changes.sum(1), 0, atol=1e-6)


class Sorted(Columns):
    """The first layer sees the units in an order of their own, as an expert does that gathers its tokens."""

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        hidden = torch.empty(len(x), 16).index_copy(0, order, self.first(x[order]))
        scores: Tensor = self.last(torch.tanh(hidden))
        return scores


def test_rows_that_are_gathered_are_found_for_every_head() -> None:
    task = columns_task(Sorted(HEADS))
    predictor, _ = screened(task)
    assert predictor.screen.plan.routed == {"first.weight"}
    predicted = foretold(predictor.screen, [("first.weight", "fp8")])
    direct = direct_changes(task, predictor.screen, {"first.weight": "fp8"})
    for head in range(HEADS):
        assert np.corrcoef(predicted[:, head], direct[:, head])[0, 1] > 0.99


def test_what_layers_add_at_the_joint_point_is_the_change_of_the_losses() -> None:
    task = task_of()
    predictor, measure = screened(task)
    choice = dict(list(predictor.screen.pairs))
    with run_journal(None, {"a": "test"}) as journal:
        added = contributions(Run(task, journal, silent), predictor, Step(choice, 1.0, 1.0, 1))
    assert set(added) == set(choice)
    direct = measure(choice).losses - predictor.baseline.whole.losses
    assert np.corrcoef(sum(added.values()), direct)[0, 1] > 0.98


def test_rows_are_located_by_all_heads_differently() -> None:
    heads = torch.randn(3, 4)
    torch.testing.assert_close(located(tuple(heads)), heads[0] + 2 * heads[1] + 3 * heads[2])
    assert torch.equal(located(heads[:1].unbind()), heads[0])
