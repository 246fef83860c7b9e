"""Layers timed on the target: what does not gain is no candidate, profiles travel, and a resumed run decides the same."""

import io
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from helpers.small_tasks import planted_task
from precimap import CPU_INT8, EMULATED, HardwareProfile, SearchResult, Serving, Task, bench_device, discover, search
from precimap.errors import DeployError, InputError, JournalError, ProfileError
from precimap.hardware_profile import Device, LowTimes, Row, Times
from precimap.layers.inventory import Inventory, Layer, Read
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import BASE, Emulated, Turns
from precimap.numerics.schemes import SCHEMES, Percentile, scheme
from precimap.report.run_record import read_run
from precimap.report.tables import run_page
from precimap.runtime.x86.layer_timer import CpuTimer
from precimap.searching.allocation.table import gain
from precimap.searching.latency.planned import planned
from precimap.searching.question import Effort
from precimap.searching.timing.times import times_from_profile

HERE = Device(name="a", capability="b", threads=1, allocator="default", clock="processor time", torch="2", precimap="0")
EFFORT = Effort(rounding_draws=0)
TURNS = (0.9, 0.95, 1.0, 1.05, 1.1)  # of one time, in five turns: quartiles .95 and 1.05
MICRO = 1e-6


@dataclass
class TableTimer:
    """Times by a table: (in features, out features) -> microseconds of the base, and ratios of the low form by turn.

    quantising: in features -> microseconds that the low form takes less after a sibling has quantised its input.
    """

    table: Mapping[tuple[int, int], tuple[float, tuple[float, ...]]]
    where: Device = HERE
    asked: list[tuple[str, int]] = field(default_factory=list)
    quantising: Mapping[int, float] = field(default_factory=dict)

    def device(self) -> Device:
        return self.where

    def seconds(self, module: nn.Module, forms: Mapping[str, QuantizedLayer], rows: int, each: int) -> Turns:
        assert isinstance(module, nn.Linear)
        assert each == 1
        self.asked.append((str(module), rows))
        base, ratios = self.table[module.in_features, module.out_features]
        alone = {name: [MICRO * base * ratio for ratio in ratios] for name in forms}
        once = self.quantising.get(module.in_features)
        shared = {} if once is None else {name: [low - MICRO * once for low in alone[name]] for name in forms}
        return Turns({BASE: [MICRO * base] * len(ratios), **alone}, shared)


class Timed(Emulated):
    """Emulated arithmetic with times by a table."""

    name = "timed"

    def __init__(self, timer: TableTimer) -> None:
        self._timer = timer

    @property
    def timer(self) -> TableTimer:  # type: ignore[override]
        return self._timer


def ratios(center: float) -> tuple[float, ...]:
    return tuple(center * turn for turn in TURNS)


# first: 2 times as fast. outlier: slower, though nearly half of the FLOPs. last: faster by less than its spread.
PLANTED = {
    (64, 128): (40.0, ratios(0.5)),
    (128, 64): (50.0, ratios(1.2)),
    (64, 32): (5.0, ratios(0.5)),
    (64, 16): (5.0, ratios(0.98)),
}


def searched(timer: TableTimer, folder: Path, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 0.2, "effort": EFFORT, "ledger": folder / "ledger"}
    return search(planted_task(), target=Timed(timer), **{**asked, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


@pytest.fixture(scope="module")
def first(folder: Path) -> SearchResult:
    return searched(TableTimer(PLANTED), folder, run=folder / "run")


def test_a_slower_layer_is_never_in_the_map_and_says_how_slow(first: SearchResult) -> None:
    assert first.certified
    assert first.map.low == ("first.weight",)
    outlier, last = first.map.layers["outlier.weight"], first.map.layers["last.weight"]
    assert outlier.verdict == last.verdict == "slower"
    assert outlier.reason == "fp8 takes 1.20 [1.14, 1.26] times as long as base precision (n = 5 turns)"
    assert "0.98 [0.93, 1.03] times as long" in last.reason
    assert "which is within the noise of timing" in last.reason
    assert first.map.layers["dead.weight"].verdict == "ineligible"
    assert {row.layer for row in first.evidence.known} == {"first.weight"}, "what is slower is not even screened"


def test_a_gain_is_the_share_of_the_time_of_all_timed_layers(first: SearchResult) -> None:
    """40 of 100 microseconds, halved; the dead layer's 5 are in the whole. Not its 42 % of the FLOPs."""
    assert first.latency is not None
    saved = first.latency.saved["first.weight", "fp8"]
    assert saved.share == pytest.approx(0.4 * 0.5)
    assert (saved.lower, saved.upper) == pytest.approx((0.4 * (1 - 0.525), 0.4 * (1 - 0.475)))
    assert sum(first.latency.base.values()) == pytest.approx(1)
    (known,) = first.evidence.known
    assert known.saved == saved.share
    bytes_saved = 1e-3 * 3 * 64 * 128 / (4 * (64 * 128 * 2 + 64 * 32 + 64 * 16))
    assert first.chain[-1].step.gain == pytest.approx(0.2 + bytes_saved)
    assert "20.0% [19.0%, 21.0%] of the layers' time saved" in first.answer


def test_the_report_says_where_times_are_from(first: SearchResult, folder: Path) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run_page(read_run(folder / "run")))
    text = " ".join(console.export_text().split())
    assert (
        "Of the time of the layers, 20.0% [19.0%, 21.0%] is saved: the sum of layers timed one by one (quartiles of n = 5 "
        "turns; at batch size 125 all of them take 0.1 ms" in text
    )
    assert "1 layer: fp8 takes 1.20 [1.14, 1.26]" in text
    assert "of the time of all timed layers" in text
    assert "layers timed here: a, b, 1 thread" in text


def test_each_module_is_timed_once_and_a_resumed_run_decides_the_same(first: SearchResult, folder: Path) -> None:
    again = TableTimer(dict.fromkeys(PLANTED, (40.0, ratios(0.1))))
    found = searched(again, folder, run=folder / "run")
    assert not again.asked
    assert found.map == first.map
    more = TableTimer(PLANTED)
    found = searched(more, folder, run=folder / "run", schemes=["fp8", "fp8-tensor"], alpha_budget=0.1)
    assert len(more.asked) == 3, "another scheme is timed; base precision and the dead layer are known"
    assert found.latency is not None
    assert found.latency.saved["first.weight", "fp8"] == first.latency.saved["first.weight", "fp8"]  # type: ignore[union-attr]


def test_a_run_that_is_killed_while_it_times_goes_on(first: SearchResult, tmp_path: Path) -> None:
    class Killed(TableTimer):
        def seconds(self, *asked: Any) -> Turns:
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().seconds(*asked)

    with pytest.raises(KeyboardInterrupt):
        searched(Killed(PLANTED), tmp_path, run=tmp_path / "run")
    rest = TableTimer(PLANTED)
    found = searched(rest, tmp_path, run=tmp_path / "run")
    assert len(rest.asked) == len(PLANTED) - 2
    assert found.map.low == first.map.low


def test_times_of_two_machines_are_not_mixed(first: SearchResult, folder: Path) -> None:
    elsewhere = TableTimer(PLANTED, where=HERE.model_copy(update={"threads": 2}))
    notes: list[str] = []
    searched(elsewhere, folder, run=folder / "run", on_preflight=lambda found: notes.extend(found.notes))
    assert any("timed on another machine than this: threads 1, not 2" in note for note in notes)
    with pytest.raises(JournalError, match="timed in part elsewhere: threads 1, not 2"):
        searched(elsewhere, folder, run=folder / "run", schemes=["fp8-static"], alpha_budget=0.2)


def test_not_worth_it_is_an_answer(tmp_path: Path) -> None:
    timer = TableTimer(dict.fromkeys(PLANTED, (40.0, ratios(1.0))))
    found = searched(timer, tmp_path)
    assert not found.certified
    assert found.certificate is None
    assert not found.map.low
    assert "not worth it on this hardware (a, b, 1 thread" in found.answer
    assert "takes 1.00 [0.95, 1.05] times as long as base precision (n = 5 turns)" in found.answer
    assert not (tmp_path / "ledger").exists(), "nothing was asked of the certify split"


def test_without_a_clock_gains_are_counted(tmp_path: Path) -> None:
    found = search(
        planted_task(), schemes=["fp8"], margin=0.2, effort=EFFORT, run=tmp_path / "run", ledger=tmp_path / "l"
    )
    assert found.latency is None
    assert all(row.saved is None for row in found.evidence.known)
    assert "outlier.weight" in found.map.low
    with pytest.raises(InputError, match="emulated counts FLOPs"):
        search(planted_task(), schemes=["fp8"], margin=0.2, serving=Serving((8,)))


# Profiles


def times(median: float, spread: float = 0.05, n: int = 5) -> Times:
    return Times(median=median, lower=median * (1 - spread), upper=median * (1 + spread), n=n)


def row(module: str, rows: int, base: float, **low: float) -> Row:
    made = {name: LowTimes(seconds=times(base * ratio), ratio=times(ratio), shared=None) for name, ratio in low.items()}
    return Row(module=module, dtype="float32", each=1, rows=rows, base=times(base), low=made)


def profile(*rows: Row, target: str = "timed", sizes: tuple[int, ...] = (10, 1000)) -> HardwareProfile:
    names = {name for one in rows for name in one.low}
    return HardwareProfile(
        target=target, device=HERE, batch_sizes=sizes, schemes={name: SCHEMES[name].row() for name in names}, rows=rows
    )


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    given = profile(row("m", 10, 1.0, fp8=0.5), row("m", 1000, 1 / 3, fp8=0.1 + 0.2))
    given.save(tmp_path / "p.json")
    assert HardwareProfile.load(tmp_path / "p.json") == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "the whole: Invalid JSON"),
        (lambda text: text.replace('"version": 2', '"version": 1'), "expected version 2, got 1; measure again with"),
        (lambda text: text.replace('"rows": 1000', '"rows": 10'), "stands twice"),
        (lambda text: text.replace('"median": 1.0', '"median": -1.0'), "base.median"),
        (lambda text: text.replace('"schemes": {\n    "fp8"', '"schemes": {\n    "fp9"'), "times under fp8"),
    ],
)
def test_a_damaged_profile_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    profile(row("m", 10, 1.0, fp8=0.5), row("m", 1000, 9.0, fp8=0.4)).save(path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ProfileError, match=message):
        HardwareProfile.load(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        HardwareProfile.load(tmp_path / "none.json")


def test_between_measured_rows_logarithms_are_interpolated() -> None:
    """Half way from 10 to 1000 in logarithms is 100, and half way from 1 to 9 is 3."""
    given = profile(row("m", 10, 1.0, fp8=0.8), row("m", 1000, 9.0, fp8=0.2))
    found = given.at("m", "float32", 1, 100, ["fp8"])
    assert found.base.median == pytest.approx(3)
    assert found.ratios["fp8"].median == pytest.approx(0.4)
    assert found.ratios["fp8"].upper == pytest.approx(0.4 * 1.05)
    assert found.between == (10, 1000)
    assert given.at("m", "float32", 1, 10, ["fp8"]).between is None
    quarter = given.at("m", "float32", 1, round(10**1.5), ["fp8"]).base.median
    assert quarter == pytest.approx(math.sqrt(3), rel=0.01)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("m", "float32", 1, 9, ["fp8"]), "m was measured at 10 to 1,000 rows, not at 9"),
        (("m", "float32", 1, 1001, []), "not at 1,001"),
        (("k", "float32", 1, 10, []), "k in float32 was not measured"),
        (("m", "bfloat16", 1, 10, []), "m in bfloat16 was not measured"),
        (("m", "float32", 4, 10, []), "with 4 ids a bag was not measured"),
        (("m", "float32", 1, 10, ["int8"]), "not measured under int8"),
    ],
)
def test_nothing_is_said_outside_what_was_measured(asked: Any, message: str) -> None:
    given = profile(row("m", 10, 1.0, fp8=0.8), row("m", 1000, 9.0, fp8=0.2))
    with pytest.raises(ProfileError, match=message):
        given.at(*asked)


def _layer(name: str, module: str | None = "m", fused: str | None = None) -> Layer:
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
        fused=fused,
    )


def _inventory(*layers: Layer) -> Inventory:
    return Inventory(layers=layers, others=(), units=4, hidden_flops=(), products=())


FP8 = scheme("fp8")


def test_every_batch_size_counts_alike() -> None:
    """Of 10 rows m takes 1 of 4 s and saves half; of 1000 rows 9 of 10 s and saves a fifth of it."""
    given = profile(
        *(
            row("m", 10, 1.0, fp8=0.5),
            row("m", 1000, 9.0, fp8=0.8),
            row("k", 10, 3.0, fp8=1),
            row("k", 1000, 1.0, fp8=1),
        )
    )
    pairs = [("a", FP8), ("b", FP8)]
    found = planned(_inventory(_layer("a"), _layer("b", "k")), pairs, given, (10, 1000), ())
    assert found.seconds == pytest.approx((4, 10))
    assert found.base["a"] == pytest.approx((1 / 4 + 9 / 10) / 2)
    assert found.saved["a", "fp8"].share == pytest.approx((0.5 / 4 + 0.2 * 9 / 10) / 2)
    assert set(found.slower) == {("b", "fp8")}
    assert found.savings.counted(("b", "fp8")) == 0, "inside its spread"


def test_what_engines_fuse_is_judged_as_one() -> None:
    """The group gains 1 of 4 s although one of its members loses; alone the loser is out."""
    given = profile(row("m", 4, 3.0, fp8=0.6), row("k", 4, 1.0, fp8=1.2))
    pairs = [("a", FP8), ("b", FP8)]
    together = _inventory(_layer("a", fused="a|b"), _layer("b", "k", fused="a|b"))
    assert planned(together, pairs, given, (4,), ()).slower == {}
    apart = planned(_inventory(_layer("a"), _layer("b", "k")), pairs, given, (4,), ())
    assert set(apart.slower) == {("b", "fp8")}
    losing = profile(row("m", 4, 3.0, fp8=0.99), row("k", 4, 1.0, fp8=1.2))
    assert set(planned(together, pairs, losing, (4,), ()).slower) == {("a", "fp8"), ("b", "fp8")}


def test_what_only_stores_low_is_never_out_for_its_time_but_pays_for_it() -> None:
    rows = scheme("int8-row")
    given = profile(row("m", 4, 3.0, **{"int8-row": 1.5}), row("k", 4, 1.0))
    inventory = _inventory(replace(_layer("a"), lookup=True, ops=("embedding",), flops=0), _layer("b", "k"))
    found = planned(inventory, [("a", rows)], given, (4,), ())
    assert found.slower == {}
    lost = found.savings.counted(("a", "int8-row"))
    assert lost == pytest.approx(-0.5 * 3 / 4)
    assert gain(inventory, "a", rows, 0.0, lost) == lost
    assert gain(inventory, "a", rows, 1.0, lost) == pytest.approx(lost + (16 * 16 * 4 - 16 * 24) / (2 * 16 * 16 * 4))


def test_a_search_plans_with_the_times_of_another_machine(first: SearchResult, folder: Path, tmp_path: Path) -> None:
    """The same table, as a profile of a target that is not at hand, gives the same map; and it is said."""
    made = bench_device(planted_task(), target=Timed(TableTimer(PLANTED)), batch_sizes=(125,), schemes=[FP8])
    notes: list[str] = []
    found = search(
        planted_task(),
        schemes=["fp8"],
        margin=0.2,
        effort=EFFORT,
        serving=Serving(profile=made),
        ledger=tmp_path,
        on_preflight=lambda found: notes.extend(found.notes),
    )
    assert found.map.low == first.map.low
    assert found.map.target == "emulated"
    assert found.latency is not None
    assert found.latency.saved == first.latency.saved  # type: ignore[union-attr]
    assert any("times of layers by a profile of timed: a, b" in note for note in notes)


def test_a_profile_that_does_not_fit_is_refused_by_name() -> None:
    inventory, pairs = _inventory(_layer("a"), _layer("b", None)), [("a", FP8)]
    given = profile(row("m", 10, 1.0, fp8=0.8), row("m", 1000, 9.0, fp8=0.2))
    here = Timed(TableTimer(PLANTED, where=HERE.model_copy(update={"torch": "3"})))
    found = times_from_profile(inventory, pairs, here, Serving((100,), given))
    assert found is not None
    assert found.notes == (
        "the profile is of another machine than this: torch 2, not 3; no map is timed end to end",
        "times of 1 layers are interpolated between measured batch sizes",
    )
    with pytest.raises(ProfileError, match="no times for a: m was measured at 10 to 1,000 rows, not at 5"):
        times_from_profile(inventory, pairs, here, Serving((5,), given))
    with pytest.raises(
        ProfileError,
        match=r"no times for b: Linear\(in_features=16.* in float32 was not measured",
    ):
        times_from_profile(inventory, [*pairs, ("b", FP8)], here, Serving((), given))
    with pytest.raises(ProfileError, match="a profile of timed, or the target emulated, got one of other"):
        times_from_profile(inventory, pairs, here, Serving((), given.model_copy(update={"target": "other"})))
    other = replace(scheme("int8-static"), name="fp8")
    with pytest.raises(ProfileError, match="another scheme"):
        times_from_profile(inventory, [("a", other)], here, Serving((), given))
    with pytest.raises(InputError, match="at least 1, each once, got 4, 4"):
        Serving((4, 4))


def test_how_a_range_was_chosen_is_nothing_to_a_kernel() -> None:
    static = scheme("fp8-static")
    given = profile(row("m", 4, 1.0, **{"fp8-static": 0.8}))
    pairs = [("a", static.with_range(Percentile(99.0)))]
    assert times_from_profile(_inventory(_layer("a")), pairs, EMULATED, Serving((4,), given)) is not None


# The real thing


class Mixed(nn.Module):
    """A table of rows, a table of bags and a product: all that this CPU deploys."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(50, 16)
        self.bags = nn.EmbeddingBag(40, 16, mode="mean")
        self.product = nn.Linear(32, 64, bias=False)

    def forward(self, ids: torch.Tensor, bags: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.product(torch.cat([self.rows(ids), self.bags(bags)], 1))
        return found


def _mixed_task() -> Task:
    torch.manual_seed(0)
    batch = {"ids": torch.randint(50, (8,)), "bags": torch.randint(40, (8, 3))}
    task = planted_task()
    splits = replace(task.splits, calibration=[batch], search=[batch], certify=[batch])
    return replace(task, model=Mixed().eval(), splits=splits, forward=lambda m, b: m(b["ids"], b["bags"]))


def test_discovery_keeps_what_timing_needs() -> None:
    task = _mixed_task()
    found = {layer.name: layer for layer in discover(task.model, task.forward, task.splits.search[0]).layers}
    assert found["rows.weight"].reads == (Read((8,), 8, lookup=True),)
    assert found["bags.weight"].reads == (Read((8, 3), 8, lookup=True),)
    assert found["bags.weight"].reads[0].each == 3
    assert found["product.weight"].reads == (Read((8, 32), 8),)
    assert found["product.weight"].module == "Linear(in_features=32, out_features=64, bias=False)"
    assert found["bags.weight"].module == "EmbeddingBag(40, 16, mode='mean')"
    raw = nn.ParameterDict({"w": nn.Parameter(torch.ones(4, 4))})
    (layer,) = discover(raw, lambda m, b: b @ m["w"], torch.ones(2, 4)).layers
    assert layer.module is None


def test_this_cpu_times_what_it_deploys() -> None:
    """Once, for real: every kind of module, in each scheme that runs here, at both batch sizes."""
    given = bench_device(_mixed_task(), target=CPU_INT8, batch_sizes=(8, 64))
    assert given.target == "cpu-int8"
    assert given.device == CPU_INT8.timer.device()
    assert given.device.threads == torch.get_num_threads()
    kinds = {(found.module.split("(")[0], found.rows, found.each): found for found in given.rows}
    assert set(kinds) == {(k, r, e) for k, e in (("Embedding", 1), ("EmbeddingBag", 3), ("Linear", 1)) for r in (8, 64)}
    for (kind, *_), found in kinds.items():
        assert found.base.n == 15
        assert found.base.lower <= found.base.median <= found.base.upper
        products = {name for name in ("int8-static", "int8-static-u7") if name in given.schemes}
        of_linear = products | ({"int8", "bf16"} & set(given.schemes)) | {"fp8-weight", "int8-weight"}
        assert set(found.low) == (of_linear if kind == "Linear" else {"int8-row", "int4-row"})
        assert products
        assert all((low.shared is not None) == (name in products) for name, low in found.low.items())
    with pytest.raises(InputError, match="emulated has none"):
        bench_device(_mixed_task(), target=EMULATED)
    with pytest.raises(InputError, match="nothing to time; no layer can take fp8"):
        bench_device(_mixed_task(), target=CPU_INT8, schemes=[FP8])


class Watched(nn.Module):
    """Stands in a layer's place, remembers what it was called with, and takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        for _ in range(2000):
            x = x + 1
        return x


def test_a_timer_times_the_module_that_takes_the_layers_place() -> None:
    """A planted delay in the deployed form is in its time and not in the base's."""
    watched, linear = Watched(), nn.Linear(8, 4)
    found = CpuTimer(lambda module, layer: watched, rounds=2, turns=3).seconds(linear, {"slow": None}, 6, 1)  # type: ignore[dict-item]
    assert {name: len(seconds) for name, seconds in found.alone.items()} == {BASE: 6, "slow": 6}
    assert not found.shared, "nothing of it can be shared"
    assert Times.of(found.alone["slow"]).median > 10 * Times.of(found.alone[BASE]).median
    assert {tuple(x.shape) for x in watched.seen} == {(6, 8)}
    assert all(a is not b for a, b in pairwise(watched.seen)), "what is kept of the last input is of no use"


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_one_thread_is_timed_by_the_processor_and_several_by_the_wall() -> None:
    with threads(1):
        assert CPU_INT8.timer.device().clock == "processor time"
    with threads(2):
        assert CPU_INT8.timer.device().clock == "wall time"


class Failing(TableTimer):
    """A timer whose kernel for one size cannot run."""

    def seconds(self, module: Any, forms: Any, rows: int, each: int) -> Any:
        if forms and (module.in_features, module.out_features) == (128, 64):
            raise DeployError("planted: no kernel of this size")
        return super().seconds(module, forms, rows, each)


def test_a_layer_that_cannot_be_timed(tmp_path: Path) -> None:
    timer = Failing(PLANTED)
    result = searched(timer, tmp_path, run=tmp_path / "run")
    assert result.certified
    assert result.map.low == ("first.weight",)
    assert result.map.layers["outlier.weight"].verdict == "ineligible"
    assert result.map.layers["outlier.weight"].reason == (
        "its kernel fails on 125 rows (planted: no kernel of this size)"
    )
    again = searched(TableTimer(PLANTED), tmp_path, run=tmp_path / "run")
    assert again.map == result.map, "what failed is written down, and not timed again"
    profile = bench_device(planted_task(), target=Timed(timer))
    (row,) = [row for row in profile.rows if "in_features=128" in row.module]
    assert row.low == {}
