"""Maps timed end to end: what does not pay as a whole is no answer, rivals are named, nothing is timed twice."""

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from helpers.planted_times import HERE, QUIET, TURNS, TableWhole, Whole
from helpers.small_tasks import planted_task
from precimap import CPU_INT8_COMPILED, Effort, PrecisionMap, SearchResult, Serving, Splits, Task, search
from precimap.end_to_end import EndToEnd, FormTimes, SizeTimes
from precimap.errors import DeployError, InputError
from precimap.hardware_profile import Times
from precimap.layers.quantized import quantize_map
from precimap.metrics import Loss
from precimap.report.end_to_end_table import end_to_end_page
from precimap.report.run_record import read_run
from precimap.report.tables import run_page
from precimap.runtime.compiling.compiled import CompiledCalls, no_compiler
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86.target import CPU_INT8, has_qlinear, int8_scheme
from precimap.searching.allocation.knapsack import Constraints
from precimap.searching.allocation.rules import Knapsack
from precimap.searching.answer import no_gain
from precimap.searching.preflight.batches import resized
from precimap.searching.worth import Share, Worth
from precimap.task import score

needs_compiler = pytest.mark.skipif(no_compiler() is not None, reason="no C++ compiler")

PAYS = {"base, eager": 3.0, "map, eager": 2.0, "base, compiled": 1.0}


def searched(timer: TableWhole, folder: Path, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 0.2, "effort": QUIET, "ledger": folder / "ledger"}
    return search(planted_task(), target=Whole(timer), **{**asked, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def paying(folder: Path) -> SearchResult:
    return searched(TableWhole(PAYS), folder, run=folder / "run")


def test_a_map_that_pays_carries_its_times(paying: SearchResult, folder: Path) -> None:
    times = paying.map.end_to_end
    assert paying.certified
    assert times is not None
    assert times == paying.end_to_end
    assert (times.map, times.device, times.served) == (paying.map.fingerprint, HERE, "eager")
    assert (times.gain.median, times.gain.lower, times.gain.upper) == pytest.approx((1.5, 1.425, 1.575))
    assert times.pays
    (size,) = times.sizes
    assert (size.units, size.rows) == (125, 125)
    assert all("same dtype, but got Float and Half" in why for why in times.refused.values()), "it makes a float32 mask"
    made = {f"{name}, {form}" for name in ("base", "map", "blanket") for form in ("eager", "compiled")}
    assert {form.name for form in size.forms} == made
    assert times.flops == (2 * (64 * 128 + 128 * 64 + 64 * 32 + 64 * 16))
    assert PrecisionMap.load(folder / "run" / "map.json").end_to_end == times
    assert "end to end 1.50 [1.43, 1.57] times as fast as the base model (eager, batch 125, n = 5)" in paying.answer


def test_what_is_faster_still_is_named(paying: SearchResult) -> None:
    """The base model in a form of its own, and not the map in the form that was certified."""
    assert paying.end_to_end is not None
    (other,) = paying.end_to_end.faster()
    assert other[0] == "base, compiled"
    assert paying.answer.endswith(
        "base, compiled is faster still, 2.00 times: that is the unchanged model in another form, and the question was "
        "about the model eager"
    )


def test_a_form_that_the_model_cannot_take_is_named(tmp_path: Path) -> None:
    """Its forward reads an attribute that a model in half precision has not got: first line of the error, no more."""

    def forward(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if next(model.parameters()).dtype == torch.float16:
            raise AttributeError("no half\nof it")
        result: torch.Tensor = model(batch["x"])
        return result

    task = replace(planted_task(), forward=forward)
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 0.2, "effort": QUIET, "ledger": tmp_path}
    found = search(task, target=Whole(TableWhole(PAYS)), **asked).end_to_end
    assert found is not None
    assert found.refused == {f"float16, {form}": "AttributeError: no half" for form in ("eager", "compiled")}


def test_the_report_fits_80_columns_and_says_it_all(paying: SearchResult, folder: Path) -> None:
    screen = io.StringIO()
    Console(width=80, file=screen).print(run_page(read_run(folder / "run")))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    assert "map, eager 2 62,500 1.00 [1.00, 1.00]" in flat
    assert "the map, eager, is 1.50 [1.43, 1.57] times as fast as the base model" in flat
    assert "faster than the map: base, compiled, 2.00 times as fast; its answers are the baseline's" in flat
    assert "n = 5 interleaved turns; p99 takes 200;" in flat


def test_a_resumed_run_times_nothing_again(paying: SearchResult, folder: Path) -> None:
    again = TableWhole({})
    found = searched(again, folder, run=folder / "run")
    assert found.map == paying.map
    assert not again.turned


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.04])
def test_a_map_that_saves_no_time_as_a_whole_is_no_answer(ratio: float, tmp_path: Path) -> None:
    """1.04 is inside the spread of the turns. The certify split is not asked about it."""
    found = searched(TableWhole({"base, eager": 2.0 * ratio, "map, eager": 2.0}), tmp_path)
    assert not found.certified
    assert not found.map.low
    assert found.map.end_to_end is None
    assert found.end_to_end is not None
    assert found.certificates == ()
    assert not (tmp_path / "ledger").exists()
    assert found.answer.startswith("keep the baseline: not worth it on this hardware (a, b, 1 thread")
    assert f"the fastest map is {ratio:.2f} [" in found.answer


def test_bytes_that_are_asked_for_are_worth_time(tmp_path: Path) -> None:
    """A tenth more time for three quarters of the bytes: at a worth of 1 yes, at .1 no; a bound on bytes settles it."""
    slower = {"base, eager": 2.0, "map, eager": 2.2}
    asked = {
        "worth": Knapsack(bytes_worth=1.0),
        "not": Knapsack(bytes_worth=0.1),
        "bound": Knapsack(Constraints(maximum_bytes=60_000)),
    }
    found = {name: searched(TableWhole(slower), tmp_path / name, rule=rule) for name, rule in asked.items()}
    assert {name: one.certified for name, one in found.items()} == {"worth": True, "not": False, "bound": True}
    before, after = found["worth"].map.shrinks
    saved = 1 - after / before
    assert (
        f"-10% [-16%, -5%] of the time and {saved:+.0%} of the bytes are saved, together worth {saved - 0.1:+.0%} "
        f"[{saved - 0.1579:+.0%}, {saved - 0.0476:+.0%}] of the time, as all bytes are to count 1 times as much"
    ) in found["worth"].answer
    assert "times as fast as the base model, and so slower (n = " in found["not"].answer
    assert "are saved, together worth -" in found["not"].answer
    assert "to count" not in found["bound"].answer, "nobody gave bytes a price"


@pytest.mark.parametrize(("worth", "certified"), [(0.0, False), (0.02, False), (0.05, False), (0.3, True)])
def test_the_spread_of_timing_is_in_the_price(worth: float, certified: bool, tmp_path: Path) -> None:
    """Surely slower by .01 to .11 of the time, at three quarters of the bytes: .05 pays in the median, and not surely."""
    found = searched(TableWhole({"base, eager": 2.0, "map, eager": 2.12}), tmp_path, rule=Knapsack(bytes_worth=worth))
    assert found.certified == certified


def test_bytes_that_grow_cost_what_they_are_worth() -> None:
    """Where parameters stay beside their codes, a faster model is larger: at a price that is no answer."""
    faster = Worth(Share(0.2, 0.15, 0.25), -0.3, 0.0)
    assert faster.pays
    assert str(faster) == ""
    priced = replace(faster, bytes_worth=1.0)
    assert not priced.pays
    assert priced.both.lower == pytest.approx(-0.15)
    assert faster.above(priced)
    assert not priced.above(faster)


def test_only_what_is_close_is_timed_for_long(tmp_path: Path) -> None:
    """A map that surely gains, or surely loses, is timed in few turns."""
    turned = {}
    for name, base in (("gains", 3.0), ("loses", 1.0), ("close", 2.04)):
        timer = TableWhole({"base, eager": base, "map, eager": 2.0})
        times = searched(timer, tmp_path / name).end_to_end
        assert times is not None
        turned[name] = (len(timer.turned), times.gain.n)
    assert turned == {"gains": (1, len(TURNS)), "loses": (1, len(TURNS)), "close": (2, 2 * len(TURNS))}


def test_nothing_is_timed_unasked_or_for_another_machine(tmp_path: Path) -> None:
    timer = TableWhole(PAYS)
    assert searched(timer, tmp_path, effort=replace(QUIET, timing_seconds=0)).end_to_end is None
    assert not timer.turned
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="timing_seconds"):
            Effort(timing_seconds=wrong)
    with pytest.raises(InputError, match="peak TFLOPs"):
        Serving(peak_tflops=0.0)


def test_forms_that_this_machine_cannot_make_are_named(tmp_path: Path) -> None:
    found = searched(TableWhole(PAYS, broken=("compiled",)), tmp_path).end_to_end
    assert found is not None
    assert found.refused["base, compiled"] == "no compiler here"
    assert "base, compiled" not in {form.name for form in found.sizes[0].forms}
    with pytest.raises(DeployError, match="no compiler here"):
        searched(TableWhole(PAYS, broken=("compiled",), served="compiled"), tmp_path)


def test_a_batch_size_that_cannot_be_made_is_refused_before_the_long_work(tmp_path: Path) -> None:
    """Nothing in these batches has one row per unit: a leading dim of one, as of a request."""
    plain = planted_task()
    each = (plain.splits.calibration, plain.splits.search, plain.splits.certify)
    task = replace(
        plain,
        splits=Splits(*([{name: value[None] for name, value in b.items()} for b in split] for split in each)),
        forward=lambda m, b: m(b["x"][0]),
        labels=lambda b: b["labels"][0],
        loss=lambda s, b: nn.functional.cross_entropy(s, b["labels"][0], reduction="none"),
    )
    seen: list[str] = []
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 0.2, "effort": QUIET, "ledger": tmp_path}
    whole = Whole(TableWhole(PAYS))
    with pytest.raises(InputError, match="no batch of 7 can be made"):
        search(task, target=whole, serving=Serving((7,)), progress=lambda stage, *_: seen.append(stage), **asked)
    assert "screen" not in seen


def test_a_batch_is_grown_and_cut_along_its_units() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "texts": ["a", "b", "c"], "k": 3}
    grown, shrunk = resized(batch, 3, 7), resized(batch, 3, 2)
    assert grown["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5], [0, 1]]
    assert grown["texts"] == ["a", "b", "c", "a", "b", "c", "a"]
    assert shrunk["x"].tolist() == [[0, 1], [2, 3]]
    assert grown["k"] == shrunk["k"] == 3
    assert resized(batch, 3, 3) is batch
    assert resized({"x": torch.arange(4)}, 3, 7) is None


def times(*sizes: Mapping[str, tuple[float, float, float]]) -> EndToEnd:
    """name -> quartiles of its time over the map's, by batch size."""
    ratios = [
        tuple(
            FormTimes(
                precision=name.split(", ")[0],
                form=name.split(", ")[1],
                seconds=Times.of([1e-3] * 9),
                p99=1e-3,
                ratio=Times(lower=lower, median=median, upper=upper, n=9),
                memory=None,
            )
            for name, (lower, median, upper) in size.items()
        )
        for size in sizes
    ]
    return EndToEnd(
        map="m",
        device=HERE,
        served="eager",
        sizes=tuple(SizeTimes(units=8 * (k + 1), rows=4 * (k + 1), forms=forms) for k, forms in enumerate(ratios)),
        refused={},
        foretold=None,
        flops=1,
        peak_flops=1.0,
        peak_given=True,
    )


@pytest.mark.parametrize(
    ("foretold", "off", "said"), [(1.25, 0.3, "too slow by 0.30"), (4.0, -0.25, "too fast by 0.25")]
)
def test_the_sum_of_layers_says_by_how_much_it_is_off(foretold: float, off: float, said: str) -> None:
    """A map that takes half of the base model's time."""
    found = times({"base, eager": (1.9, 2.0, 2.1), "map, eager": (1, 1, 1)})
    told = found.model_copy(update={"foretold": Times(median=foretold, lower=foretold, upper=foretold, n=5)})
    assert found.foretold_off is None
    assert told.foretold_off == pytest.approx(off)
    screen = io.StringIO()
    for one in (found, told):
        Console(width=200, file=screen).print(end_to_end_page(one))
    assert screen.getvalue().count("of the base model's time") == 1
    assert f"{said} of the base model's time" in screen.getvalue()
    assert f"is off by {abs(off):.2f} of the base model's time" in no_gain(told, "")


def test_batch_sizes_count_alike_and_quartiles_decide() -> None:
    """A gain at one size and a loss at another: the mean of the ratios, its quartiles as if all moved as one."""
    found = times(
        {"base, eager": (1.3, 1.4, 1.5), "map, eager": (1, 1, 1), "bfloat16, eager": (0.7, 0.8, 0.9)},
        {"base, eager": (0.8, 0.9, 1.0), "map, eager": (1, 1, 1), "bfloat16, eager": (0.9, 1.0, 1.2)},
    )
    assert (found.gain.lower, found.gain.median, found.gain.upper) == pytest.approx((1.05, 1.15, 1.25))
    assert found.pays
    assert list(found.faster()) == [], "0.9 in the mean, but 1.05 is within its quartiles"
    assert found.rows_measured() == (4, 8)
    assert found.speedup("base", "compiled") is None


def test_the_verdict_on_the_page_goes_by_quartiles() -> None:
    screen = io.StringIO()
    Console(width=80, file=screen).print(
        end_to_end_page(times({"base, eager": (0.99, 1.2, 1.3), "map, eager": (1, 1, 1)}))
    )
    assert "no gain in time that can be told" in " ".join(screen.getvalue().split())


class Wide(nn.Module):
    """Two layers that are wide enough for INT8 to pay wherever it does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.last = nn.Linear(512, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(self.inner(x))
        return result


def wide_task() -> Task:
    torch.manual_seed(0)
    model = Wide().eval()

    def split(seed: int) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(400, 512, generator=generator)
        with torch.no_grad():
            labels = torch.distributions.Categorical(logits=4 * model(x)).sample()
        return [{"x": x[k : k + 200], "labels": labels[k : k + 200]} for k in (0, 200)]

    return Task(
        model,
        splits=Splits(split(1), split(2), split(3)),
        forward=lambda m, batch: 4 * m(batch["x"]),
        loss=lambda scores, batch: nn.functional.cross_entropy(scores, batch["labels"], reduction="none"),
        metric=Loss(),
    )


@needs_compiler
@pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
@pytest.mark.skipif(not has_qlinear(), reason="no INT8 products")
def test_the_compiled_model_is_what_is_certified_and_timed(tmp_path: Path) -> None:
    """By the real timers: every form is made and run, and the model stays as it was. Speeds are for benches to claim."""
    torch._dynamo.reset()
    task = wide_task()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    found = search(
        task,
        schemes=[int8_scheme()],
        target=Untimed(CPU_INT8, CPU_INT8_COMPILED.claim),
        margin=0.05,
        rule=Knapsack(Constraints(maximum_bytes=3_000_000)),  # asked for bytes, so that time decides nothing here
        effort=replace(QUIET, timing_seconds=0.01),
        ledger=tmp_path,
    )
    assert found.certified
    assert found.certificate is not None
    assert "Inductor" in found.certificate.claim
    measured = found.map.end_to_end
    assert measured is not None
    assert measured.served == "compiled"
    assert not measured.refused
    assert {"base, eager", "base, compiled", "map, eager", "map, compiled", "blanket, compiled"} <= {
        form.name for form in measured.sizes[0].forms
    }
    assert all(form.seconds.n >= 15 and form.memory for form in measured.sizes[0].forms)
    layers = quantize_map(task.model, found.map)
    with CPU_INT8_COMPILED.running(task.model, layers) as compiled:
        low = score(task, compiled, task.splits.certify)
    base = score(task, task.model, task.splits.certify)
    assert found.certificate.drop == pytest.approx(float((low.values - base.values).mean()), abs=1e-9)
    assert all(torch.equal(before[name], value) for name, value in task.model.state_dict().items())


@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not has_qlinear(), reason="no INT8 products")
def test_the_answer_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its times, for its certificate, and as blanket low precision, which it is where every layer is in."""
    made: dict[frozenset[str], set[int]] = {}
    compiling, kept = CompiledCalls._compiling, []

    def seen(calls: CompiledCalls, *args: Any, **kwargs: Any) -> Any:
        made.setdefault(frozenset(low_weights(calls.model)), set()).add(id(calls))
        kept.append(calls)  # or an id could be given twice
        return compiling(calls, *args, **kwargs)

    monkeypatch.setattr(CompiledCalls, "_compiling", seen)
    asked: dict[str, Any] = {"schemes": [int8_scheme()], "margin": 0.5, "ledger": tmp_path}
    found = search(wide_task(), target=Untimed(CPU_INT8, CPU_INT8_COMPILED.claim), effort=QUIET, **asked)
    assert found.certified
    assert len(found.map.low) == len(found.map.layers)
    assert len(made[frozenset(found.map.low)]) == 1


class Untimed(type(CPU_INT8_COMPILED)):  # type: ignore[misc]
    """Layers are counted in FLOPs, whole models are timed."""

    timer = None


def test_a_least_gain_does_not_switch_the_gate_of_time_off(tmp_path: Path) -> None:
    """The empty map has no gain either; that is no wish for bytes."""
    slower = TableWhole({"base, eager": 1.8, "map, eager": 2.0})
    assert not searched(slower, tmp_path, rule=Knapsack(Constraints(minimum_gain=0.01))).certified


def test_another_batch_size_is_another_measurement(tmp_path: Path) -> None:
    """In one run directory; a peak that is given counts for times that are known, too."""
    for sizes, timed in (((64,), True), ((100,), True), ((64,), False)):
        timer = TableWhole(PAYS)
        found = searched(timer, tmp_path, run=tmp_path / "run", serving=Serving(sizes, peak_tflops=5e-3)).end_to_end
        assert found is not None
        assert [size.units for size in found.sizes] == list(sizes)
        assert bool(timer.turned) is timed
        assert (found.peak_flops, found.peak_given) == (5e9, True)


def test_a_report_shows_the_times_of_its_own_question(tmp_path: Path) -> None:
    searched(TableWhole(PAYS), tmp_path, run=tmp_path / "run")
    assert SearchResult.load(tmp_path / "run").end_to_end is not None
    searched(TableWhole(PAYS), tmp_path, run=tmp_path / "run", effort=replace(QUIET, timing_seconds=0))
    assert SearchResult.load(tmp_path / "run").end_to_end is None


@needs_compiler
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not has_qlinear(), reason="no INT8 products")
def test_no_certificate_of_compiled_code_without_any(tmp_path: Path) -> None:
    """Its forward calls parts of the model; taken up again, the run must not find scores that eager code made."""
    task = wide_task()
    task = replace(task, forward=lambda m, b: 4 * m.last(m.inner(b["x"])))
    asked: dict[str, Any] = {"schemes": [int8_scheme()], "margin": 0.05, "ledger": tmp_path, "run": tmp_path / "run"}
    for _ in range(2):
        with pytest.raises(DeployError, match="called parts of it only"):
            search(
                task,
                target=Untimed(CPU_INT8, CPU_INT8_COMPILED.claim),
                effort=replace(QUIET, timing_seconds=0),
                **asked,
            )
