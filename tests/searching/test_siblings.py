"""Layers that read one input: what they save together, which of them are candidates, and that they share when deployed."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from precimap import HardwareProfile, SearchResult, Splits, Task, Threshold, deploy, discover, search
from precimap.hardware_profile import Device, LowTimes, Row, Times
from precimap.layers.inventory import Inventory, Layer, Read
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.target import BASE, Turns
from precimap.metrics import Loss
from precimap.numerics.fast import unsigned_codes
from precimap.numerics.formats import IntegerFormat
from precimap.numerics.schemes import SCHEMES, scheme
from precimap.runtime import shared_codes
from precimap.runtime.compiling.compiled import no_compiler
from precimap.runtime.compiling.target import CPU_INT8_COMPILED
from precimap.runtime.x86 import layer_timer
from precimap.runtime.x86.layer_timer import TWO
from precimap.runtime.x86.target import CpuInt8, has_qlinear, int8_scheme
from precimap.searching import pipeline
from precimap.searching.allocation.ladders import Option, total_gain
from precimap.searching.allocation.rules import KNAPSACK
from precimap.searching.latency.planned import planned
from precimap.searching.latency.savings import Quantising, Saved, Savings
from precimap.searching.latency.slower import too_slow
from precimap.searching.maps import choosing
from precimap.searching.maps.assemble import MapWriter
from precimap.searching.question import Effort

HERE = Device(name="a", capability="b", threads=1, allocator="default", clock="processor time", torch="2", precimap="0")
FP8 = scheme("fp8")


def layer(name: str, module: str, siblings: str | None = None, fused: str | None = None) -> Layer:
    read = (Read((4, 16), 4),)
    return Layer(
        name=name,
        shape=(16, 16),
        dtype="float32",
        element_bytes=4,
        ops=("linear",),
        calls=1,
        flops=1,
        contracted=(1,),
        inputs=16,
        outputs=16,
        module=module,
        reads=read,
        siblings=siblings,
        fused=fused,
    )


def times(ratio: float, spread: float) -> Times:
    return Times(median=ratio, lower=ratio - spread, upper=ratio + spread, n=5)


def profile(spread: float = 0.01, **modules: tuple[float, float, float | None]) -> HardwareProfile:
    """module -> seconds of the base, and ratios of the low form alone and with its input quantised."""
    rows = []
    for module, (base, low, shared) in modules.items():
        after = None if shared is None else times(shared, spread)
        forms = {"fp8": LowTimes(seconds=times(base * low, 0), ratio=times(low, spread), shared=after)}
        rows.append(Row(module=module, dtype="float32", each=1, rows=4, base=times(base, 0), low=forms))
    schemes = {"fp8": SCHEMES["fp8"].row()}
    return HardwareProfile(target="t", device=HERE, batch_sizes=(4,), schemes=schemes, rows=tuple(rows))


def plan(given: HardwareProfile, *layers: Layer) -> Any:
    return planned(
        Inventory(layers=layers, others=(), units=4, hidden_flops=(), products=()),
        [(one.name, FP8) for one in layers],
        given,
        (4,),
        (),
    )


def of_x(*names: str, module: str = "narrow") -> list[Layer]:
    return [layer(name, module, "input of a") for name in names]


# What is planned


def test_the_first_sibling_quantises_and_each_further_one_saves_that() -> None:
    """Of 10 s narrow layers take 1 each, 1.2 alone and .5 once their input is quantised, which takes .7."""
    found = plan(profile(narrow=(1, 1.2, 0.5), wide=(8, 0.9, 0.8)), *of_x("a", "b"), layer("w", "wide"))
    assert found.slower == {}
    total = found.savings.total
    assert total([("a", "fp8")])[0] == pytest.approx(-0.02)
    assert total([("a", "fp8"), ("b", "fp8")])[0] == pytest.approx((2 * (1 - 1.2) + 0.7) / 10)
    assert total([("w", "fp8")])[0] == pytest.approx(0.08), "what wide could share, nothing shares with it"
    together, lower, upper = total([("a", "fp8"), ("b", "fp8"), ("w", "fp8")])
    assert together == pytest.approx(0.08 + 0.03)
    # Two layers after the quantising, .01 of 1 s each; the quantising, .02; and .01 of 8 s.
    assert (together - lower, upper - together) == pytest.approx((0.012, 0.012))
    assert found.savings.sharing(("a", "fp8")).share == pytest.approx(0.07)
    assert found.savings.sharing(("w", "fp8")) is None
    assert Savings.of_row(found.row()) == found.savings


def test_a_sibling_is_out_only_if_it_loses_with_its_input_quantised() -> None:
    given = profile(narrow=(1, 1.2, 0.5), tiny=(1, 1.8, 1.1), wide=(8, 0.5, 0.5))
    found = plan(given, *of_x("a", "b"), *of_x("t", module="tiny"), layer("w", "wide"))
    assert found.slower == {
        ("t", "fp8"): "fp8, its input quantised by a sibling, takes 1.10 [1.09, 1.11] times as long as base precision "
        "(n = 5 turns)"
    }
    alone = plan(given, *of_x("a"), layer("w", "wide"))
    assert alone.slower == {("a", "fp8"): "fp8 takes 1.20 [1.19, 1.21] times as long as base precision (n = 5 turns)"}
    near = plan(profile(narrow=(1, 1.2, 0.996), wide=(8, 0.5, 0.5)), *of_x("a", "b"), layer("w", "wide"))
    assert "1.00 [0.99, 1.01]" in near.slower["a", "fp8"]
    assert "which is within the noise of timing" in near.slower["a", "fp8"]


def test_siblings_are_out_when_too_few_pay_for_the_quantising() -> None:
    """It takes .3, and each gains .1 after it: two do not pay for it, three just do not, four do."""
    given = profile(spread=0.001, narrow=(1, 1.2, 0.9), wide=(8, 0.5, 0.5))
    for count in (2, 3):
        found = plan(given, *of_x(*"abcd"[:count]), layer("w", "wide"))
        assert set(found.slower) == {(name, "fp8") for name in "abcd"[:count]}
        assert found.slower["a", "fp8"].startswith("fp8 for all that share the input of a takes 1.0")
    assert plan(given, *of_x(*"abcd"), layer("w", "wide")).slower == {}


def test_what_is_inside_its_spread_is_not_shared() -> None:
    """.02 of 1 s saved by sharing, with quartiles of .02 either side."""
    found = plan(profile(spread=0.01, narrow=(1, 0.5, 0.48)), *of_x("a", "b"))
    assert found.savings.quantising == {}
    assert found.savings.total([("a", "fp8"), ("b", "fp8")])[0] == pytest.approx(0.5)
    assert plan(profile(spread=0.009, narrow=(1, 0.5, 0.48)), *of_x("a", "b")).savings.quantising


def test_a_layer_that_gains_alone_stays_whatever_its_siblings_do() -> None:
    """a alone is surely faster; with b, whose own quantising takes long and is told badly, nothing is sure."""
    given = profile(spread=0.04, good=(1, 0.95, 0.6), poor=(1, 1.9, 0.95))
    found = plan(given, *of_x("a", module="good"), *of_x("b", module="poor"))
    assert found.savings.sharing(("a", "fp8")) is not None
    assert found.slower == {}


def test_a_sibling_counts_as_measured_where_a_lone_layer_inside_its_spread_counts_nothing() -> None:
    given = profile(spread=0.03, narrow=(1, 0.98, 0.5))
    assert plan(given, *of_x("a", "b")).savings.counted(("a", "fp8")) == pytest.approx(0.02 / 2)
    assert plan(given, layer("a", "narrow"), layer("b", "narrow")).savings.counted(("a", "fp8")) == 0


def test_a_fused_group_of_siblings_is_judged_with_what_it_shares() -> None:
    group = [layer(name, "narrow", "input of a", "a|b") for name in "ab"]
    given = profile(narrow=(1, 1.2, 0.5), wide=(8, 0.5, 0.5))
    assert plan(given, *group, layer("w", "wide")).slower == {}
    found = plan(profile(narrow=(1, 1.4, 0.9), wide=(8, 0.5, 0.5)), *group, layer("w", "wide"))
    assert found.slower["a", "fp8"].startswith("fp8 for all of a|b takes 1.15 [1.13, 1.17] times")
    apart = [layer("a", "narrow", None, "a|b"), layer("b", "narrow", None, "a|b")]
    assert set(plan(given, *apart, layer("w", "wide")).slower) == {("a", "fp8"), ("b", "fp8")}


def test_times_of_shared_inputs_are_interpolated_and_needed_of_all() -> None:
    low = LowTimes(seconds=times(1, 0), ratio=times(1.2, 0), shared=times(0.4, 0))
    rows = [Row(module="m", dtype="float32", each=1, rows=n, base=times(1, 0), low={"fp8": low}) for n in (10, 1000)]
    rows[1] = rows[1].model_copy(update={"low": {"fp8": low.model_copy(update={"shared": times(0.1, 0)})}})
    given = profile(narrow=(1, 1.2, 0.5)).model_copy(update={"rows": tuple(rows)})
    assert given.at("m", "float32", 1, 100, ["fp8"]).shared["fp8"].median == pytest.approx(0.2)
    rows[1] = rows[1].model_copy(update={"low": {"fp8": low.model_copy(update={"shared": None})}})
    given = given.model_copy(update={"rows": tuple(rows)})
    assert given.at("m", "float32", 1, 100, ["fp8"]).shared == {}


@st.composite
def invented(draw: st.DrawFn) -> tuple[Savings, dict[str, float]]:
    """Readers of one input without spread: what each gains once it is quantised, and what that takes."""
    after = draw(st.lists(st.integers(-5, 5), min_size=2, max_size=6))
    once = float(draw(st.integers(1, 12)))
    names = [f"l{number}" for number in range(len(after))]

    def saved(share: float) -> Saved:
        return Saved(
            share=share, lower=share, upper=share, ratio=1 - share, ratio_lower=1 - share, ratio_upper=1 - share, n=1
        )

    alone = {(name, "s"): saved(gain - once) for name, gain in zip(names, after, strict=True)}
    shared = {(name, "s"): saved(float(gain)) for name, gain in zip(names, after, strict=True)}
    quantising = {("x", "s"): Quantising(once, once, once)}
    return Savings(alone, shared, quantising, dict.fromkeys(names, "x")), dict.fromkeys(names, 1.0)


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    return [found for size in range(len(names) + 1) for found in itertools.combinations(names, size)]


@given(invented())
def test_candidates_are_the_best_of_all_subsets(case: tuple[Savings, dict[str, float]]) -> None:
    """Brute force: of the subset that saves most, those that add to it; nobody where none saves."""
    savings, base = case
    inventory = Inventory(
        layers=tuple(layer(name, "m", "x") for name in base), others=(), units=4, hidden_flops=(), products=()
    )

    def gain(names: Sequence[str]) -> float:
        return savings.total([(name, "s") for name in names])[0]

    best = max(gain(found) for found in subsets(list(base)))
    smallest = min((found for found in subsets(list(base)) if gain(found) == best), key=len) if best > 0 else ()
    out = too_slow(inventory, list(savings.alone), savings, base)
    assert {name for name, _ in out} == set(base) - set(smallest)


@given(invented())
def test_the_plan_and_the_knapsack_count_alike(case: tuple[Savings, dict[str, float]]) -> None:
    savings, base = case
    rows = [
        Option(
            layer=n,
            scheme="s",
            gain=savings.counted((n, "s")),
            cost=0.0,
            bytes=1,
            fused=None,
            siblings="x",
            shared=savings.sharing((n, "s")).share,
        )  # type: ignore[union-attr]
        for n in base
    ]
    for names in subsets(list(base)):
        chosen = [row for row in rows if row.layer in names]
        assert savings.total([(name, "s") for name in names])[0] == pytest.approx(total_gain(chosen))


# What is chosen and deployed


class Narrow(nn.Module):
    """Three narrow layers of one input; two towers of another, which they read between inputs of their own; a wide one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wide = nn.Linear(32, 64)
        self.red, self.green, self.blue = (nn.Linear(64, 16) for _ in range(3))
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.wide(x))
        # Two views of the same values, as models make them.
        parts = [self.red(hidden), self.green(hidden.view(hidden.shape)), self.blue(hidden)]
        joined = torch.cat(parts, 1)
        found: Tensor = 4 * (self.towers[0](joined) + self.towers[1](joined))
        return found


def task() -> Task:
    model, generator = Narrow().eval(), torch.Generator().manual_seed(0)

    def batches(units: int) -> list[dict[str, Tensor]]:
        x = torch.randn(units, 32, generator=generator)
        with torch.no_grad():
            scores = model(x)
        labels = (scores + torch.randn(scores.shape, generator=generator)).argmax(1)
        return [{"x": x[i : i + 100], "labels": labels[i : i + 100]} for i in range(0, units, 100)]

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores, batch["labels"], reduction="none")

    splits = Splits(batches(200), batches(400), batches(800))
    return Task(model, splits=splits, forward=lambda m, b: m(b["x"]), loss=loss, metric=Loss(), name="narrow")


@dataclass
class Clock:
    """By (in, out): microseconds in base precision, of the INT8 form, and of what quantising takes of that."""

    table: Mapping[tuple[int, int], tuple[float, float, float]]

    def device(self) -> Device:
        return HERE

    def seconds(self, module: nn.Module, forms: Mapping[str, QuantizedLayer], rows: int, each: int) -> Turns:
        assert isinstance(module, nn.Linear)
        base, low, once = (1e-6 * each for each in self.table[module.in_features, module.out_features])
        alone = {BASE: [base] * 3, **{name: [low] * 3 for name in forms}}
        return Turns(alone, {name: [low - once] * 3 for name in forms})


class Planned(CpuInt8):
    """The kernels of this CPU, with times by a table."""

    whole_timer = None  # type: ignore[assignment]

    def __init__(self, table: Mapping[tuple[int, int], tuple[float, float, float]]) -> None:
        self._clock = Clock(table)

    @property
    def timer(self) -> Clock:  # type: ignore[override]
        return self._clock


WIDE, NARROW, FIRST, SECOND = (32, 64), (64, 16), (48, 24), (24, 8)
TABLE = {WIDE: (40.0, 20.0, 5.0), NARROW: (10.0, 12.0, 6.0), FIRST: (10.0, 14.0, 5.0), SECOND: (10.0, 30.0, 5.0)}


def searched(table: Mapping[tuple[int, int], tuple[float, float, float]], folder: Path, **changes: Any) -> SearchResult:
    """With the table of times; margin and effort leave room for every layer."""
    asked: dict[str, Any] = {"schemes": [int8_scheme()], "margin": 0.5, "effort": Effort(rounding_draws=0)}
    return search(task(), target=Planned(table), ledger=folder / "ledger", **{**asked, **changes})


def quantised_inputs(found: SearchResult, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what the deployed model quantises in one pass of five rows."""
    fast, seen = deploy(task().model, found.map), list[tuple[int, ...]]()

    def counted(x: Tensor, format: IntegerFormat, scale: float, zero: int) -> tuple[Tensor, bool]:
        seen.append(tuple(x.shape))
        return unsigned_codes(x, format, scale, zero)

    monkeypatch.setattr(shared_codes, "unsigned_codes", counted)
    with torch.no_grad():
        fast(torch.randn(5, 32))  # finds out which inputs are read again
        seen.clear()
        fast(torch.randn(5, 32))
    return seen


NAMES = ("red.weight", "green.weight", "blue.weight")


def test_narrow_siblings_that_pay_only_together_are_chosen_and_share_when_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 us in base precision, 36 alone, 24 with one quantising. The towers' 20 become 23: not worth it."""
    found = searched(TABLE, tmp_path)
    assert found.certified
    assert set(found.map.low) == {"wide.weight", *NAMES}
    assert found.map.layers["towers.0.0.weight"].verdict == "slower"
    assert (
        "for all that share the input of towers.0.0.weight takes 1.15" in found.map.layers["towers.0.0.weight"].reason
    )
    assert found.latency is not None
    pairs = [(name, int8_scheme()) for name in found.map.low]
    assert found.latency.savings.total(pairs)[0] == pytest.approx((20 + 3 * (10 - 12) + 2 * 6) / 110)
    assert f"{26 / 110:.1%}" in found.answer
    bytes_saved = 1e-3 * 3 * (32 * 64 + 3 * 64 * 16) / (4 * (32 * 64 + 3 * 64 * 16 + 2 * 48 * 24 + 2 * 24 * 8))
    assert found.chain[-1].step.gain == pytest.approx(26 / 110 + bytes_saved)
    scales = {(found.map.layers[n].input_scale, found.map.layers[n].input_zero) for n in NAMES}
    assert len(scales) == 1, "siblings are calibrated on the same values"

    assert quantised_inputs(found, monkeypatch) == [(5, 32), (5, 64)], "as often as the plan counts"


def test_without_its_siblings_a_narrow_layer_is_refused(tmp_path: Path) -> None:
    found = searched(TABLE, tmp_path, pinned=["green", "blue"])
    assert found.map.low == ("wide.weight",)
    assert found.map.layers["red.weight"].verdict == "slower"
    assert "takes 1.20 [1.20, 1.20]" in found.map.layers["red.weight"].reason


def test_the_threshold_takes_no_sibling_alone(tmp_path: Path) -> None:
    """With a cutoff between the bounds of the first sibling and the second: the others are sensitive or come later."""
    bounds = sorted(
        row.decisive.upper for row in searched(TABLE, tmp_path, rule=Threshold()).evidence.known
        if row.layer in NAMES and row.decisive is not None
    )  # fmt: skip
    found = searched(TABLE, tmp_path, rule=Threshold(), cutoff=(bounds[0] + bounds[1]) / 2, alpha_budget=0.2)
    assert found.chain
    for joint in found.chain:
        assert len(joint.step.choice.keys() & NAMES) != 1


def test_a_map_that_gives_siblings_back_keeps_none_that_loses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[MapWriter] = []

    def recorded(writer: MapWriter, *rest: Any) -> Any:
        kept.append(writer)
        return choosing.chosen_maps(writer, *rest)

    monkeypatch.setattr(pipeline, "chosen_maps", recorded)
    searched(TABLE, tmp_path)
    low = int8_scheme()
    for names, left in (
        (("red",), ()),
        (("red", "wide"), ("wide",)),
        (("red", "green", "blue"), ("red", "green", "blue")),
    ):
        choice = {f"{name}.weight": low for name in names}
        step = choosing._priced(kept[0].table, choice, KNAPSACK.bytes_worth)
        assert step.choice == {f"{name}.weight": low for name in left}
    bytes_saved = 1e-3 * 3 * (3 * 64 * 16) / (4 * (32 * 64 + 3 * 64 * 16 + 2 * 48 * 24 + 2 * 24 * 8))
    assert step.gain == pytest.approx((3 * (10 - 12) + 2 * 6) / 110 + bytes_saved)


def test_towers_share_though_they_read_inputs_of_their_own_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {**TABLE, FIRST: (10.0, 12.0, 6.0), SECOND: (10.0, 9.0, 5.0)}
    found = searched(table, tmp_path)
    assert len(found.map.low) == 8
    assert quantised_inputs(found, monkeypatch) == [(5, 32), (5, 64), (5, 48), (5, 24), (5, 24)]
    assert found.latency is not None
    total = found.latency.savings.total([(name, int8_scheme()) for name in found.map.low])[0]
    quantised = 5 + 6 + 6 + 2 * 5
    products = 15 + 3 * 6 + 2 * 6 + 2 * 4
    assert total == pytest.approx(1 - (quantised + products) / 110)


def test_siblings_read_the_same_in_all_their_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            found: Tensor = self.a(x) + self.a(y) + self.b(x) + self.b(y) + self.c(x) + self.d(y)
            return found

    found = {one.name: one.siblings for one in discover(Twice(), lambda m, b: m(b), torch.ones(2, 4)).layers}
    assert found["a.weight"] == found["b.weight"] == "input of a.weight"
    assert found["c.weight"] is found["d.weight"] is None, "they meet a and b once, and each other never"


def test_the_timer_leaves_out_the_quantising_that_a_sibling_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted delay in the quantising is in the time of the layer alone, and not where it finds the codes."""

    def delayed(x: Tensor, format: IntegerFormat, scale: float, zero: int) -> tuple[Tensor, bool]:
        for _ in range(300):
            x = x + 0.0
        return unsigned_codes(x, format, scale, zero)

    monkeypatch.setattr(shared_codes, "unsigned_codes", delayed)
    linear = nn.Linear(16, 8)
    form = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.03, 100))
    found = replace(CpuInt8().timer, rounds=2, turns=3).seconds(linear, {"form": form}, 4, 1)
    assert {name: len(seconds) for name, seconds in found.alone.items()} == {BASE: 6, "form": 6}
    assert {name: len(seconds) for name, seconds in found.shared.items()} == {"form": 6}
    assert Times.of(found.alone["form"]).median > 5 * Times.of(found.shared["form"]).median


@pytest.mark.skipif(no_compiler() is not None or not has_qlinear(), reason="no C++ compiler, or no INT8 products")
@pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
def test_compiled_a_sibling_is_timed_in_one_code_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second of two takes there: planted times, each of a call by the products that its code holds."""
    products: dict[str, float] = {}

    def planted(cases: Mapping[Any, Any], turns: int, clock: Any) -> dict[Any, list[float]]:
        for call in cases.values():
            call()
        took = {("", "alone"): 10.0, ("form", "alone"): 8.0, ("", TWO): 17.0, ("form", TWO): 11.5}
        products.update(dict.fromkeys(map(str, cases)))
        return {case: [took[case] * turn for turn in range(1, turns + 1)] for case in cases}

    monkeypatch.setattr(layer_timer, "interleaved", planted)
    monkeypatch.setattr(layer_timer, "_repeats", lambda *_: 1)
    linear = nn.Linear(16, 8)
    form = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.03, 100))
    found = replace(CPU_INT8_COMPILED.timer, rounds=1, turns=3).seconds(linear, {"form": form}, 4, 1)
    assert found.alone == {BASE: [10.0, 20.0, 30.0], "form": [8.0, 16.0, 24.0]}
    # The call takes 3, which two in one code pay once; without it the second takes 3.5 low.
    assert found.shared == {"form": [6.5, 13.0, 19.5]}
    assert len(products) == 4
    both = 2 * 10.0 - found.alone["form"][0] - found.shared["form"][0]
    assert both == pytest.approx(17.0 - 11.5), "as much as two save in one code"


@pytest.mark.skipif(no_compiler() is not None or not has_qlinear(), reason="no C++ compiler, or no INT8 products")
@pytest.mark.filterwarnings("ignore")
def test_two_in_one_code_are_two_products() -> None:
    """Of two equal layers on one input, compilers leave one: these are not equal to them."""
    linear, x = nn.Linear(16, 8), torch.randn(4, 16)
    form = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.03, 100))
    two = CPU_INT8_COMPILED.timer._two_of_each(linear, {"form": form})
    with torch.no_grad():
        for name, products in ((BASE, r"mkldnn\._linear_pointwise"), ("form", r"onednn\.qlinear_pointwise")):
            torch._dynamo.reset()
            (first, second), (code,) = run_and_get_code(two[name], x)
            assert torch.equal(first, second)
            assert len(re.findall(rf" = torch\.ops\.{products}\.\w+\(", code)) == 2, code
