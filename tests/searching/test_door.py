"""The ways in: names where objects may stand, margins in per cent, one map judged, a second model compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precimap as pm
from helpers.small_tasks import Planted, planted_task
from precimap import CPU_INT8, Task, search
from precimap.certificate import Certificate
from precimap.errors import AlphaSpent, DeployError, EmulatedWarning, InputError, ModelError, TaskError
from precimap.layers.target import EMULATED, Hardware
from precimap.metrics import NE, Loss
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.certificate.one_map import certify
from precimap.searching.certificate.second_model import compare
from precimap.searching.question import Effort, margin_of
from precimap.targets import TARGETS, hardware_of, target_of

MARGIN = 0.2
QUICK = Effort(rounding_draws=0)


def test_every_target_has_one_name() -> None:
    hardware = {name: found for name in TARGETS if isinstance(found := hardware_of(name), Hardware)}
    assert hardware.keys() == {"cpu", "cuda"}
    assert all(found.name == name for name, found in hardware.items())
    targets = TARGETS.keys() - hardware.keys()
    for name in targets:
        assert target_of(name).name == name
        assert target_of(target_of(name)) is target_of(name)
    assert {form.name for found in hardware.values() for form in found.forms.values()} <= targets
    named = {name: getattr(pm, name) for name in pm.__all__ if name.isupper()}
    assert {one.name: one for one in named.values()} == {name: target_of(name) for name in targets}


@pytest.mark.parametrize(
    ("given", "found"),
    [(0.01, 0.01), ("0.01", 0.01), ("0.05%", 0.0005), ("5e-4", 5e-4), (" 0.1%", 0.001)],
)
def test_margins_of_ne(given: float | str, found: float) -> None:
    assert margin_of(given, NE()) == pytest.approx(found, rel=1e-12)


@pytest.mark.parametrize("given", ["", "%", "ten", "1,5", "0.1%%"])
def test_texts_that_are_no_margin_are_refused(given: str) -> None:
    with pytest.raises(InputError, match=r"expected a margin such as 0\.002"):
        margin_of(given, NE())


def test_names_and_objects_ask_the_same(tmp_path: Path) -> None:
    by_name = search(
        planted_task(), schemes="fp8", margin=str(MARGIN), target="emulated", effort=QUICK, ledger=tmp_path
    )
    by_object = search(
        planted_task(),
        schemes=[SCHEMES["fp8"]],
        margin=MARGIN,
        target=EMULATED,
        effort=QUICK,
        ledger=tmp_path,
    )
    assert by_name.map == by_object.map
    file = tmp_path / "map.json"
    by_name.map.save(file)
    judged = certify(planted_task(), file, margin=str(MARGIN), ledger=tmp_path / "another")
    assert judged.certificate is not None
    assert judged.certificate.certified
    assert judged.certificate.upper == by_name.map.certificate.upper  # type: ignore[union-attr]


def test_a_model_is_deployed_for_a_name_or_an_object(tmp_path: Path) -> None:
    task = planted_task()
    found = search(task, schemes=int8_scheme(), margin=MARGIN, effort=QUICK, ledger=tmp_path).map
    x = torch.randn(8, 64)
    with torch.no_grad():
        assert torch.equal(
            pm.deploy(task.model, found, target="cpu-int8")(x), pm.deploy(task.model, found, target=CPU_INT8)(x)
        )
        assert torch.equal(pm.deploy(task.model, found)(x), pm.deploy(task.model, found, target=EMULATED)(x))
    with pytest.raises(DeployError, match=r"expected a target out of emulated, cpu, .* got 'tpu'"):
        pm.deploy(task.model, found, target="tpu")


# --- a second model -----------------------------------------------------------------------------------------------


def turned(degree: float) -> nn.Module:
    """The planted model with its last layer moved by some noise."""
    model = Planted().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.last.weight.add_(degree * torch.randn(model.last.weight.shape, generator=generator))
    return model


def compared(second: Any, folder: Path, task: Task | None = None, **changes: Any) -> Certificate:
    asked: dict[str, Any] = {"margin": MARGIN, "ledger": folder, **changes}
    return compare(planted_task() if task is None else task, second, **asked)


def test_a_cast_model_is_certified_and_a_broken_one_is_not(tmp_path: Path) -> None:
    good = compared(turned(1e-4), tmp_path)
    assert good.certified
    assert good.claim == "The scores of the second model as it ran here."
    assert good.spent_alpha == 0.05
    bad = compared(turned(1.0), tmp_path / "other")
    assert not bad.certified
    assert bad.verdict.startswith("no: the drop is above the margin")


def test_the_drop_is_that_of_the_losses(tmp_path: Path) -> None:
    """Against the mean difference of the losses, by hand."""
    task, second = planted_task(), turned(0.05)
    with torch.no_grad():
        drops = torch.cat(
            [task.loss(second(b["x"]), b) - task.loss(task.model(b["x"]), b) for b in task.splits.certify]
        ).double()
    found = compared(second, tmp_path, task)
    assert found.drop == pytest.approx(float(drops.mean()), abs=1e-6)
    assert found.error == pytest.approx(float(drops.std()) / len(drops) ** 0.5, rel=1e-3)
    assert found.upper is not None
    assert found.upper > float(drops.mean())


def test_a_function_that_returns_scores_is_enough(tmp_path: Path) -> None:
    model = turned(0.05)

    def scores(batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = model(batch["x"])
        return found

    by_function, by_model = compared(scores, tmp_path / "function"), compared(model, tmp_path / "model")
    for name in ("drop", "error", "upper", "certified", "n"):
        assert getattr(by_function, name) == getattr(by_model, name)


def test_the_same_question_is_free_and_another_model_is_another_question(tmp_path: Path) -> None:
    first = compared(turned(0.05), tmp_path)
    again = compared(turned(0.05), tmp_path)
    assert again.spent_alpha == first.spent_alpha == 0.05
    assert again.upper == first.upper
    with pytest.raises(AlphaSpent):
        compared(turned(0.06), tmp_path)
    with pytest.raises(AlphaSpent):
        compared(turned(0.05), tmp_path, margin=2 * MARGIN)
    other = compared(turned(0.06), tmp_path, alpha_budget=0.1)
    assert other.spent_alpha == pytest.approx(0.1)


def test_both_models_stay_as_they_were(tmp_path: Path) -> None:
    task, second = planted_task(), turned(0.05)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (task.model, second)]
    compared(second, tmp_path, task)
    for model, held in zip((task.model, second), before, strict=True):
        assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


def test_by_chance_a_worse_model_is_rarely_certified(tmp_path: Path) -> None:
    """Simulation: second models whose true drop is the margin, on 100 fresh certify splits; at most alpha may pass."""
    passed, alpha = 0, 0.2
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(300, 4, generator=generator)
        batches = [{"x": x[i : i + 100], "labels": torch.zeros(100)} for i in (0, 100, 200)]
        noise = torch.randn(300, generator=generator)
        task = Task(
            nn.Linear(4, 1).eval(),
            splits=pm.Splits(batches[:1], batches[1:2], batches[2:]),
            forward=lambda model, batch: model(batch["x"]),
            loss=lambda scores, batch: scores[:, 0].clamp(-3, 3),
            metric=Loss(),
        )

        def worse(batch: dict[str, Tensor], task: Task = task, x: Tensor = x, noise: Tensor = noise) -> Tensor:
            with torch.no_grad():
                base = task.model(batch["x"])
            row = int((x == batch["x"][0]).all(1).nonzero()[0, 0])
            moved: Tensor = base + 0.1 + 0.5 * noise[row : row + len(base), None]
            return moved

        found = compare(task, worse, margin=0.1, confidence=1 - alpha, ledger=tmp_path / str(seed))
        passed += found.certified
    assert passed <= 100 * alpha + 3 * (100 * alpha * (1 - alpha)) ** 0.5


@pytest.mark.parametrize(
    ("second", "error", "message"),
    [
        ("model.pt", InputError, "expected a model, or a function of a batch that returns scores, got 'model.pt'"),
        (Planted().train(), ModelError, "in evaluation mode"),
        (lambda batch: torch.zeros(3, 16), TaskError, "loss failed on batch 0 of the search split"),
        (lambda batch: [1.0], TaskError, "expected forward to return a tensor"),
        (nn.Linear(3, 3).eval(), TaskError, "forward"),
    ],
)
def test_what_cannot_be_compared_is_refused(second: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        compared(second, tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_deploying_the_emulation_warns_that_it_is_for_looking(tmp_path: Path) -> None:
    task = planted_task()
    found = search(task, schemes="fp8", margin=MARGIN, effort=QUICK, ledger=tmp_path).map
    with pytest.warns(EmulatedWarning, match="in several times the time of the model: it is for looking"):
        pm.deploy(task.model, found)
