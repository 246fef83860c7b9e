"""In which form a model is to be served: found by planted times, applied to what is searched, refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.planted_times import QUIET, TableWhole, Whole
from helpers.small_tasks import planted_task
from precimap import Effort, SearchResult, Serving, Task, bench_device, deploy, plan, search
from precimap.end_to_end import FormTimes, SizeTimes
from precimap.errors import InputError
from precimap.hardware_profile import Times
from precimap.layers.inventory import Layer
from precimap.layers.target import Hardware
from precimap.numerics.schemes import SCHEMES, Scheme
from precimap.runtime.compiling.compiled import no_compiler
from precimap.runtime.compiling.target import CPU, CPU_INT8_COMPILED
from precimap.runtime.x86.target import CPU_INT8, has_qlinear, int8_scheme
from precimap.searching.timing.form import chosen_form
from precimap.targets import target_of

pytestmark = pytest.mark.filterwarnings("ignore")
FP8 = [SCHEMES["fp8"], SCHEMES["fp8-tensor"]]


class Form(Whole):
    """Emulated arithmetic, called a form. refused: the scheme that it does not take."""

    def __init__(self, name: str, timer: TableWhole, refused: str = "") -> None:
        super().__init__(timer)
        self.name = name
        self._refused = refused

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return f"{self.name} has no {scheme.name}" if scheme.name == self._refused else None


def hardware(table: Mapping[str, float], refused: str = "", **how: Any) -> tuple[Hardware, TableWhole]:
    timer = TableWhole(table, **how)
    compiled = replace(timer, served="compiled", turned=timer.turned)
    forms = {"eager": Form("machine-eager", timer), "compiled": Form("machine-compiled", compiled, refused)}
    if timer.shapes is not None:
        forms["graphs"] = Form("machine-graphs", replace(compiled, served="graphs"), refused)
    return Hardware("machine", forms), timer


BASE = {"base, eager": 6.0, "base, compiled": 5.0}
EAGER = {**BASE, "map, eager": 2.0, "blanket fp8, eager": 2.0, "map, compiled": 3.0, "blanket fp8, compiled": 3.0}
COMPILED = {**BASE, "map, eager": 3.0, "map, compiled": 2.0, "blanket fp8, compiled": 2.0}
GRAPHS = {**COMPILED, "base, graphs": 4.0, "map, graphs": 1.0, "blanket fp8, graphs": 1.0}


def searched(on: Hardware, folder: Path, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 0.2, "effort": QUIET, "ledger": folder / "ledger"}
    return search(planted_task(), target=on, **{**asked, **changes})


@pytest.mark.parametrize(("table", "form"), [(EAGER, "eager"), (COMPILED, "compiled")])
def test_the_faster_form_is_searched_timed_and_certified(table: dict[str, float], form: str, tmp_path: Path) -> None:
    on, timer = hardware(table)
    found = searched(on, tmp_path, run=tmp_path / "run")
    assert found.certified
    assert found.map.target == f"machine-{form}"
    assert found.end_to_end is not None
    assert found.end_to_end.served == form
    assert any(note.startswith(f"the model is to be served {form}: the fastest take") for note in found.preflight.notes)
    before = len(timer.turned)
    again = searched(on, tmp_path, run=tmp_path / "run")
    assert again.map == found.map
    assert len(timer.turned) == before, "a run that is taken up times nothing again"


@pytest.mark.parametrize("form", ["auto", "graphs"])
def test_graphs_are_one_more_form(form: str, tmp_path: Path) -> None:
    on, _ = hardware(GRAPHS, shapes=1)
    found = searched(on, tmp_path, serving=Serving(form=form))
    assert found.certified
    assert found.map.target == "machine-graphs"
    assert found.end_to_end is not None
    assert found.end_to_end.served == "graphs"
    assert {one.form for one in found.end_to_end.sizes[0].forms} == {"eager", "compiled", "graphs"}
    if form == "auto":
        assert any(
            "served graphs" in note and "compiled 0.50" in note and "graphs 0.25" in note
            for note in found.preflight.notes
        )


def test_a_form_is_none_for_batches_of_too_many_shapes(tmp_path: Path) -> None:
    """One batch of the certify split is shorter: counted as the model meets them, before anything takes long."""
    task = planted_task()
    *batches, last = task.splits.certify
    shorter = [*batches, {name: value[:-1] for name, value in last.items()}]
    ragged = replace(task, splits=replace(task.splits, certify=shorter))

    def asked(task: Task, on: Hardware, **changes: Any) -> SearchResult:
        ledger = tmp_path / str(len(list(tmp_path.iterdir())))
        return search(task, schemes=["fp8"], margin=0.2, effort=QUIET, ledger=ledger, target=on, **changes)

    on, _ = hardware(GRAPHS, shapes=1)
    found = asked(ragged, on)
    assert found.map.target == "machine-compiled"
    (said,) = [note for note in found.preflight.notes if "is to be served" in note]
    assert said.endswith(
        "; graphs would be faster, but the batches give the model 2 different shapes, and there can be code for 1 of them"
    )
    with pytest.raises(InputError, match=r"expected fewer shapes for the form graphs: .* 2 different shapes"):
        asked(ragged, on, serving=Serving(form="graphs"))
    enough, _ = hardware(GRAPHS, shapes=2)
    assert asked(ragged, enough).map.target == "machine-graphs"

    def padded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x, rows = batch["x"], len(batch["x"])
        return model(torch.cat([x, x.new_zeros(len(batches[0]["x"]) - rows, *x.shape[1:])]))[:rows]

    assert asked(replace(ragged, forward=padded), on).map.target == "machine-graphs"


def test_the_user_may_say_the_form(tmp_path: Path) -> None:
    on, _ = hardware(COMPILED)
    found = searched(on, tmp_path, serving=Serving(form="eager"))
    assert found.map.target == "machine-eager"
    assert (
        "map, compiled is faster still, 1.50 times, and is not the answer because the question was about"
        in found.answer
    )


def test_what_the_form_refuses_is_refused(tmp_path: Path) -> None:
    on, _ = hardware(COMPILED, refused="fp8-tensor")
    found = searched(on, tmp_path, schemes=["fp8", "fp8-tensor"])
    assert found.map.target == "machine-compiled"
    assert {found.map.layers[name].scheme for name in found.map.low} == {"fp8"}


def test_a_scheme_that_loses_as_a_whole_is_out_where_another_can_be(tmp_path: Path) -> None:
    """Compiled alone: as it is, each layer's own time tells more."""
    table = {**COMPILED, "blanket fp8, compiled": 4.0, "blanket fp8-tensor, compiled": 2.0}
    on, _ = hardware(table)
    found = searched(on, tmp_path / "a", schemes=["fp8", "fp8-tensor"])
    assert {found.map.layers[name].scheme for name in found.map.low} <= {"fp8-tensor"}
    kept = [decision.reason for decision in found.map.layers.values() if decision.scheme is None]
    assert kept
    timed = {**EAGER, "blanket fp8, eager": 4.0, "blanket fp8-tensor, eager": 2.0}
    on, _ = hardware(timed)
    found = searched(on, tmp_path / "b", schemes=["fp8", "fp8-tensor"])
    assert "fp8" in {found.map.layers[name].scheme for name in found.map.low}


def times(**ratios: tuple[float, float, float]) -> tuple[SizeTimes, ...]:
    """By "precision form": quartiles of the time over the base model's."""
    one = Times(median=1.0, lower=1.0, upper=1.0, n=9)
    forms = [
        FormTimes(
            precision=name.rpartition(" ")[0], form=name.rpartition(" ")[2], seconds=one, p99=1.0,
            ratio=Times(median=median, lower=lower, upper=upper, n=9), memory=None,
        )
        for name, (lower, median, upper) in ratios.items()
    ]  # fmt: skip
    return (SizeTimes(units=8, rows=8, forms=tuple(forms)),)


def test_a_form_has_to_be_faster_by_more_than_a_little() -> None:
    base = {"base eager": (1.0, 1.0, 1.0), "base compiled": (0.9, 0.95, 1.05)}
    close = times(**base, **{"blanket fp8 eager": (0.4, 0.5, 0.6), "blanket fp8 compiled": (0.3, 0.48, 0.5)})
    assert chosen_form(["eager", "compiled"], close, FP8).form == "eager"
    noisy = times(**base, **{"blanket fp8 eager": (0.4, 0.5, 0.6), "blanket fp8 compiled": (0.3, 0.4, 0.7)})
    assert chosen_form(["eager", "compiled"], noisy, FP8).form == "compiled"
    clear = times(**base, **{"blanket fp8 eager": (0.4, 0.5, 0.6), "blanket fp8 compiled": (0.3, 0.4, 0.49)})
    choice = chosen_form(["eager", "compiled"], clear, FP8)
    assert (choice.form, choice.fastest, choice.slower) == ("compiled", None, {})
    assert (
        "eager 0.50 [0.40, 0.60] (all layers in fp8) and compiled 0.40 [0.30, 0.49] (all layers in fp8)" in choice.said
    )


def test_a_form_that_cannot_be_is_said() -> None:
    found = times(**{"base eager": (1, 1, 1)})
    assert chosen_form(["eager", "compiled"], found, []).said.endswith("; compiled could not be timed")


def test_slower_schemes_are_those_that_surely_lose() -> None:
    blankets = {"blanket fp8 compiled": (0.40, 0.42, 0.44), "blanket fp8-tensor compiled": (0.30, 0.32, 0.39)}
    found = times(**{"base eager": (1, 1, 1), **blankets})
    choice = chosen_form(["eager", "compiled"], found, FP8)
    assert choice.fastest == "fp8-tensor"
    assert choice.slower == {"fp8": "with every layer low and compiled, fp8-tensor takes 0.76 of its time"}
    close = {**blankets, "blanket fp8 compiled": (0.38, 0.42, 0.44)}
    assert chosen_form(["eager", "compiled"], times(**{"base eager": (1, 1, 1), **close}), FP8).slower == {}


def test_what_cannot_be_obeyed_is_refused(tmp_path: Path) -> None:
    task = planted_task()
    with pytest.raises(InputError, match="expected a form out of auto, eager, compiled, graphs, got 'fast'"):
        Serving(form="fast")
    with pytest.raises(InputError, match="expected a form of cpu, eager or compiled, got graphs"):
        search(task, schemes="int8-static", margin=0.2, target="cpu", serving=Serving(form="graphs"))
    with pytest.raises(InputError, match="expected the target cpu or cuda beside the form eager; cpu-int8 is one form"):
        search(task, schemes="int8-static", margin=0.2, target="cpu-int8", serving=Serving(form="eager"))
    with pytest.raises(InputError, match=r"expected a form .eager or compiled. for cpu where no whole model is timed"):
        search(task, schemes="int8-static", margin=0.2, target="cpu", effort=Effort(timing_seconds=0))
    with pytest.raises(InputError, match="expected one form of cpu, cpu-int8 or cpu-int8-compiled"):
        bench_device(task, target="cpu")
    with pytest.raises(
        InputError, match="made for cpu-int8 or cpu-int8-compiled, which are the forms of cpu, got emulated"
    ):
        target_of("cpu", "emulated")


def test_a_map_says_its_form() -> None:
    assert target_of("cpu", "cpu-int8") is CPU_INT8
    assert target_of("cpu", "cpu-int8-compiled") is CPU_INT8_COMPILED
    assert target_of(CPU, "cpu-int8") is CPU_INT8


@pytest.mark.skipif(no_compiler() is not None or not has_qlinear(), reason="no C++ compiler, or no INT8 products")
def test_for_real_from_search_to_deployment(tmp_path: Path) -> None:
    """Whatever this machine finds; an answer is certified in the form that it names, and deployed in it."""
    task = planted_task()
    assert plan(task, 0.2, schemes=int8_scheme(), target="cpu").rows
    found = search(
        task,
        schemes=int8_scheme(),
        margin=0.2,
        target="cpu",
        effort=Effort(rounding_draws=0, timing_seconds=0.1),
        ledger=tmp_path,
    )
    assert any("is to be served" in note for note in found.preflight.notes)
    assert found.map.target in ("cpu-int8", "cpu-int8-compiled")
    if found.map.low:
        fast = deploy(task.model, found.map, target="cpu")
        assert fast.precimap.target == found.map.target  # type: ignore[union-attr]
