"""Predictions of whole maps against measured ones, and what is given back at the joint point."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from helpers.small_tasks import planted_task, subject_on
from precimap import Task
from precimap.journal import run_journal
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.metrics import NDCG, LogLoss, Loss
from precimap.metrics.paired import Drop
from precimap.numerics.schemes import SCHEMES
from precimap.searching.allocation.knapsack import Step
from precimap.searching.calibrate import InputRanges, prepare
from precimap.searching.comparison import Comparison, compare
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen import screen
from precimap.searching.evidence.screen_plan import MOST_HEADS
from precimap.searching.maps.rescore import contributions, halved, reverted
from precimap.searching.progress import silent
from precimap.searching.run import Run, scored_baseline
from precimap.task import Scored, judge_scores, score

NONE = InputRanges({})


@dataclass(frozen=True, eq=False)
class Screened:
    """A screened task, and what measures maps of it."""

    task: Task
    inventory: Inventory
    run: Run
    predictor: Predictor

    def measured(self, choice: dict[str, str]) -> Scored:
        layers = prepare(self.task, self.inventory, NONE, {name: SCHEMES[s] for name, s in choice.items()})
        with quantized(self.task.model, layers):
            return score(self.task, self.task.model, self.task.splits.search)

    def loss_changes(self, choice: dict[str, str]) -> np.ndarray:
        changed: np.ndarray = self.measured(choice).losses - self.predictor.baseline.whole.losses
        return changed

    def comparison(self, choice: dict[str, str]) -> Comparison:
        return compare(self.task, self.predictor.baseline.whole, self.measured(choice), 0.05)


@contextmanager
def screening(task: Task, schemes: tuple[str, ...]) -> Iterator[Screened]:
    """All batches, all open pairs."""
    with run_journal(None, {"a": "test"}) as journal:
        run = Run(task, journal, silent)
        subject, split = subject_on(run, [SCHEMES[name] for name in schemes]), task.splits.search
        baseline = scored_baseline(run)
        found = screen(subject, subject.pairs, 4 * 2**30, sum(baseline.sizes), baseline.scattered)
        yield Screened(
            task,
            subject.inventory,
            run,
            Predictor(task=task, screen=found, baseline=baseline, batches=dict(enumerate(split)), alpha=0.05),
        )


def planted(**changes: object) -> Task:
    return planted_task(**changes)  # type: ignore[arg-type]


def score_changes(found: Screened, key: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and measured change of every score."""
    task, predictor = found.task, found.predictor
    direct = []
    layers = prepare(task, found.inventory, NONE, {key[0]: SCHEMES[key[1]]})
    for number, batch in enumerate(task.splits.search):
        with torch.no_grad(), quantized(task.model, layers):
            low = task.forward(task.model, batch).double().numpy()
        direct.append((low - predictor.screen.batches[number].scores).ravel())
    predicted = [predictor.screen.change([key], number) for number in predictor.numbers]
    return np.concatenate(predicted), np.concatenate(direct)


def real(name: str) -> Task:
    """A task of the benchmarks; the test is skipped where its data are not."""
    from tasks import real_tasks

    try:
        return real_tasks.ncf(400, 200) if name == "ncf" else real_tasks.frappe_dcnv2(search=4000, certify=1000)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "by_score", "least"), [("ncf", 0.95, 0.95), ("frappe", 0.99, 0.7)])
def test_on_real_models_scores_and_joint_drops_are_predicted(name: str, by_score: float, least: float) -> None:
    """Score by score, and the log-loss drop of whole maps, by addition alone.

    On NCF what is left of a score is curvature: at a tenth of the error the correlation is .996, at a hundredth .999.
    """
    with screening(real(name), ("fp8", "int8")) as found:
        keys = list(found.predictor.screen.pairs)
        names = list(dict.fromkeys(name for name, _ in keys))
        assert found.predictor.screen.by_scores
        for key in [key for key in keys if key[1] == "fp8"]:
            predicted, direct = score_changes(found, key)
            assert np.corrcoef(predicted, direct)[0, 1] > by_score, key
        rng = np.random.default_rng(2)
        drops = []
        for _ in range(6):
            drawn = [(name, ("fp8", "fp8", "int8")[rng.integers(3)]) for name in names if rng.random() < 0.7]
            chosen = [key for key in drawn if key in keys] or keys[:1]
            joint = found.predictor.comparison(chosen)
            assert joint is not None
            drops.append((joint.drop.estimate, found.comparison(dict(chosen)).drop.estimate))
        predicted, direct = np.array(drops).T
        error = np.square(predicted - direct).sum() / np.square(direct - direct.mean()).sum()
        assert 1 - error > least, drops


def test_a_prediction_by_losses_is_their_sum_and_says_nothing_of_an_order() -> None:
    def first_nine(model: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return task_of_all.forward(model, batch)[:, : MOST_HEADS + 1]

    task_of_all = planted()

    def loss(scores: torch.Tensor, _: object) -> torch.Tensor:
        return torch.nn.functional.softplus(scores[:, 0] - scores[:, 1])

    task = replace(task_of_all, forward=first_nine, loss=loss, metric=Loss(), labels=lambda batch: batch["labels"] * 0)
    task = replace(task, reported=(NDCG(1),))
    with screening(task, ("fp8", "int8")) as found:
        predictor = found.predictor
        assert predictor.screen.by_scores is False  # the scores of a unit share its hidden values, and are many
        keys = [("first.weight", "fp8"), ("last.weight", "int8")]
        both, first, last = (predictor.loss_changes(chosen) for chosen in (keys, keys[:1], keys[1:]))
        np.testing.assert_allclose(both, first + last, atol=1e-6)
        assert list(predictor.scored(keys).reported) == []  # an order metric is not predicted from losses
        assert list(predictor.comparison(keys).reported) == []  # type: ignore[union-attr]


def test_one_score_per_unit_is_judged_by_the_users_functions() -> None:
    base = planted()

    def one(model: object, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return base.forward(model, batch)[:, 0]

    def loss(scores: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        clicked = (batch["labels"] % 2).float()
        return torch.nn.functional.binary_cross_entropy_with_logits(scores, clicked, reduction="none")

    task = replace(base, forward=one, loss=loss, metric=LogLoss(), labels=lambda batch: batch["labels"] % 2)
    with screening(task, ("fp8", "int8")) as found:
        predictor, keys = found.predictor, [("first.weight", "fp8"), ("last.weight", "int8")]
        assert predictor.screen.by_scores
        expected = []
        for number, batch in enumerate(task.splits.search):
            moved = predictor.screen.batches[number].scores + sum(predictor.screen.change([k], number) for k in keys)
            expected.append(judge_scores(task, torch.from_numpy(moved).float(), batch, f"batch {number}").values)
        np.testing.assert_allclose(predictor.scored(keys).values, np.concatenate(expected), atol=1e-6)
        np.testing.assert_allclose(predictor.scored([]).values, predictor.baseline.whole.values, atol=1e-6)
        joint, direct = predictor.comparison(keys), found.comparison(dict(keys))
        assert joint is not None
        assert joint.drop.estimate == pytest.approx(direct.drop.estimate, abs=2 * direct.drop.error)
        assert np.corrcoef(predictor.loss_changes(keys), found.loss_changes(dict(keys)))[0, 1] > 0.97
        mean = np.concatenate([predictor.screen.change(keys, number) for number in predictor.numbers]).mean()
        assert predictor.drift(keys) == pytest.approx(mean)


def test_the_curvature_is_fitted_to_a_measured_map_and_serves_others() -> None:
    with screening(planted(), ("fp8-e5m2",)) as found:
        keys = list(found.predictor.screen.pairs)
        direct = found.comparison(dict(keys))
        fitted = found.predictor.fitted(keys, direct)
        again, straight = fitted.comparison(keys), found.predictor.comparison(keys)
        assert again is not None
        assert straight is not None
        assert again.drop.estimate == pytest.approx(direct.drop.estimate, rel=1e-6)
        assert straight.drop.estimate != pytest.approx(direct.drop.estimate, rel=1e-3)
        part = keys[:2]
        measured = found.comparison(dict(part)).drop.estimate
        errors = [abs(p.comparison(part).drop.estimate - measured) for p in (fitted, found.predictor)]  # type: ignore[union-attr]
        assert errors[0] < errors[1]
        assert found.predictor.fitted([*keys, ("unseen.weight", "fp8")], direct) is found.predictor


def test_joint_rescoring_finds_the_planted_layer() -> None:
    with screening(planted(), ("fp8-tensor",)) as found:
        choice = {name: "fp8-tensor" for name, _ in found.predictor.screen.pairs}
        direct = found.comparison(choice)
        added = contributions(found.run, found.predictor, Step(choice, 1.0, 1.0, 1))
        assert set(added) == {"first.weight", "outlier.weight", "last.weight"}
        kept = reverted(Step(choice, 1.0, 1.0, 1), direct, added, dict.fromkeys(choice), margin=0.2)
        assert kept is not None
        assert "outlier.weight" not in kept
        assert found.comparison(kept).upper <= 0.2


def test_contributions_at_moderate_errors_add_up_to_the_joint_change() -> None:
    with screening(planted(), ("fp8-e5m2",)) as found:
        choice = {name: "fp8-e5m2" for name, _ in found.predictor.screen.pairs}
        added = sum(contributions(found.run, found.predictor, Step(choice, 1.0, 1.0, 1)).values())
        joint, singles = found.loss_changes(choice), found.predictor.loss_changes(list(choice.items()))
        near, far = (float(np.square(values - joint).mean()) for values in (added, singles))
        assert near < far
        assert np.corrcoef(added, joint)[0, 1] > 0.95


def comparison(upper: float) -> Comparison:
    return Comparison(
        drop=Drop(estimate=upper - 0.1, error=0.05, n=10, clusters=10, changed=10),
        lower=0.0,
        upper=upper,
        reported={},
        largest=1.0,
    )


STEP = Step({"a": "s", "b": "s", "c": "s", "d": "s"}, 1.0, 1.0, 1)
ADDED = {name: np.full(4, mean) for name, mean in {"a": 0.3, "b": 0.25, "c": 0.2, "d": -0.5}.items()}


def test_layers_go_back_in_the_order_of_what_they_add_and_no_more_than_needed() -> None:
    alone = dict.fromkeys("abcd")
    assert reverted(STEP, comparison(1.0), ADDED, alone, 0.8) == {"b": "s", "c": "s", "d": "s"}
    assert reverted(STEP, comparison(1.0), ADDED, alone, 0.5) == {"c": "s", "d": "s"}
    assert reverted(STEP, comparison(0.5), ADDED, alone, 0.5) == STEP.choice
    assert reverted(STEP, comparison(1.0), ADDED, alone, 0.1) is None  # taking `d` off as well would be a credit


def test_groups_go_back_together() -> None:
    fused = {"a": None, "b": "pair", "c": "pair", "d": None}
    assert reverted(STEP, comparison(1.0), ADDED, fused, 0.6) == {"a": "s", "d": "s"}
    assert halved(STEP, ADDED, fused) == {"a": "s"}  # `d` moves the losses most, the pair next
    assert halved(STEP, ADDED, dict.fromkeys("abcd")) == {"b": "s", "c": "s"}
