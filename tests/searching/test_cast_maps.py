"""The whole model in BF16 as a candidate: looked at, timed, certified as any map; and if it is not the answer, why."""

import copy
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from helpers.planted_times import QUIET, TURNS, TableWhole, Whole
from helpers.small_maps import map_of
from precimap import PrecisionMap, SearchResult, Splits, Task, certify, deploy, load_deployed, save_deployed, search
from precimap.errors import MapError
from precimap.layers.emulation import quantized
from precimap.layers.prepared import prepared
from precimap.layers.target import Hardware
from precimap.metrics import NE
from precimap.report.answer_page import answer_page
from precimap.report.run_record import read_run
from precimap.report.tables import run_page
from precimap.searching.allocation.rules import Knapsack

pytestmark = pytest.mark.filterwarnings("ignore")  # of maps for the emulation, which serve nothing
MARGIN, SHORT = 0.01, ("bf16", "int8")


class Net(nn.Module):
    """`gap` reads the difference of two numbers outside of every layer: a cast alone can lose it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.logit = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        with torch.no_grad():
            self.logit.weight.mul_(6)

    def forward(self, plain: Tensor, pair: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(plain))))
        result: Tensor = self.logit(hidden).squeeze(1) + (pair[:, 0] - pair[:, 1])
        return result


class Plain(Net):
    """Whose scores are what its last layer makes."""

    def forward(self, plain: Tensor, pair: Tensor) -> Tensor:
        result: Tensor = self.logit(torch.relu(self.second(torch.relu(self.first(plain))))).squeeze(1)
        return result


def task_of(model: nn.Module, *sizes: float) -> Task:
    """sizes: of the pairs in the calibration, search and certify split; their differences are alike."""
    generator = torch.Generator().manual_seed(1)

    def split(batches: int, size: float) -> list[dict[str, Tensor]]:
        made = []
        for _ in range(batches):
            plain, gap = torch.randn(250, 32, generator=generator), torch.randn(250, generator=generator)
            pair = torch.stack([size + gap, torch.full_like(gap, size)], 1)
            with torch.no_grad():
                clicks = torch.bernoulli(torch.sigmoid(model(plain, pair)), generator=generator)
            made.append({"plain": plain, "pair": pair, "labels": clicks})
        return made

    splits = Splits(*(split(count, size) for count, size in zip((2, 10, 20), sizes, strict=True)))
    return Task(model.eval(), splits=splits, metric=NE(), name="gaps")


@dataclass
class CastTimes(TableWhole):
    """Whose table has "cast" for a map that casts, beside "map"."""

    casts: tuple[torch.dtype, ...] = (torch.bfloat16,)

    def turns(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        found = super().turns(cases, seconds)
        served: Any = cases.get("map, eager")
        if served is not None and next(served.args[1].parameters()).dtype == torch.bfloat16:
            found["map, eager"] = [1e-3 * self.table["cast"]] * len(TURNS)
        return found


FASTER = {"base, eager": 6.0, "map, eager": 3.0, "cast": 2.0, "bfloat16, eager": 1.5}
SLOWER = {"base, eager": 6.0, "map, eager": 2.0, "cast": 3.0}


def searched(task: Task, folder: Path, table: Mapping[str, float] = FASTER, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": SHORT, "margin": MARGIN, "effort": QUIET, "ledger": folder / "ledger"}
    return search(task, target=Whole(CastTimes(table)), **{**asked, **changes})


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(Net(), 1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("casts")


@pytest.fixture(scope="module")
def fastest(task: Task, folder: Path) -> SearchResult:
    return searched(task, folder, run=folder / "run")


def test_the_faster_cast_is_the_answer_and_certified(fastest: SearchResult, folder: Path) -> None:
    assert fastest.certified
    assert fastest.map.cast == "bfloat16"
    assert fastest.certificate is not None
    assert fastest.certificate.map == fastest.map.fingerprint
    assert set(fastest.map.low) == {"first.weight", "second.weight"}
    assert {fastest.map.layers[name].scheme for name in fastest.map.low} == {"int8"}
    assert fastest.map.layers["logit.weight"].reason.endswith("it runs in bfloat16, as all else does")
    assert fastest.answer.startswith("certified: the whole model in bfloat16, 2 of its 3 layers in 8 bits")
    assert "end to end 3.00" in fastest.answer
    assert fastest.answer.endswith(
        "bfloat16, eager is faster still, 1.33 times, and is not the answer because with layers in 8 bits it was expected "
        "to be faster still, and that was asked about"
    )
    before, after = fastest.map.shrinks
    values = 32 * 64 + 64 * 64 + 64  # of weights, one byte each but for the logit's
    others = 64 + 64 + 1
    assert before == 4 * (values + others)
    assert after == (32 * 64 + 64 * 64) + 4 * 128 + 2 * (64 + others)
    assert PrecisionMap.load(folder / "run" / "map.json") == fastest.map


def test_the_maps_before_it_were_certified_first(fastest: SearchResult) -> None:
    """A fixed sequence: the cast is its last question."""
    maps = [certificate.map for certificate in fastest.certificates]
    assert maps[-1] == fastest.map.fingerprint
    assert len(maps) > 1
    assert all(certificate.certified for certificate in fastest.certificates)


def test_what_is_deployed_is_what_was_certified(task: Task, fastest: SearchResult, folder: Path) -> None:
    batch = task.splits.certify[0]
    model, layers = prepared(task.model, fastest.map)
    with torch.no_grad(), quantized(model, layers):
        expected = model(batch["plain"], batch["pair"])
    fast = deploy(task.model, fastest.map, target="emulated")
    save_deployed(fast, task.model, folder / "model.safetensors")
    loaded = load_deployed(Net().eval(), folder / "model.safetensors", target="emulated")
    with torch.no_grad():
        for one in (fast, loaded, copy.deepcopy(loaded)):
            found = one(batch["plain"], batch["pair"])
            assert found.dtype == torch.float32
            assert torch.equal(found, expected)
    assert {value.dtype for value in task.model.parameters()} == {torch.float32}
    assert loaded.logit.weight.dtype == torch.bfloat16  # type: ignore[union-attr]


class Listed(Net):
    """Its list of parameters prints their dtype, by which a model is known again; one buffer is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.full((64,), 1.5)])
        self.register_buffer("shift", torch.full((64,), 0.25), persistent=False)

    def forward(self, plain: Tensor, pair: Tensor) -> Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(plain)) * self.scales[0] + self.shift))
        result: Tensor = self.logit(hidden).squeeze(1)
        return result


def test_a_model_that_prints_its_dtypes_is_loaded(tmp_path: Path) -> None:
    task = task_of(Listed(), 1.0, 1.0, 1.0)
    chosen = map_of(task, {"second.weight": "int8"}).model_copy(update={"cast": "bfloat16"})
    fast = deploy(task.model, chosen, target="emulated")
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    loaded = load_deployed(Listed().eval(), tmp_path / "model.safetensors")
    batch = task.splits.certify[0]
    with torch.no_grad():
        assert torch.equal(loaded(batch["plain"], batch["pair"]), fast(batch["plain"], batch["pair"]))
    with pytest.raises(MapError, match="scales"):
        load_deployed(Net().eval(), tmp_path / "model.safetensors")


def test_it_can_be_certified_anew(task: Task, fastest: SearchResult, tmp_path: Path) -> None:
    fresh = Splits(task.splits.calibration, task.splits.search, task_of(Net(), 1.0, 1.0, 1.1).splits.certify)
    other = Task(task.model, splits=fresh, metric=NE(), name="fresh")
    found = certify(other, fastest.map, margin=MARGIN, target=Whole(CastTimes({})), ledger=tmp_path)
    assert found.certificate is not None
    assert found.certificate.certified
    assert found.certificate.map == fastest.map.fingerprint


def test_the_run_tells_it(fastest: SearchResult, folder: Path) -> None:
    assert SearchResult.load(folder / "run").casts == fastest.casts
    screen = io.StringIO()
    for page in (answer_page, run_page):
        Console(width=80, file=screen).print(page(read_run(folder / "run")))
    text = " ".join(screen.getvalue().split())
    assert "Certified: the whole model in bfloat16" in text
    assert "The whole model in 16 bits, with 2 layers in 8 bits: its drop on the search split is" in text
    assert "logit.weight bfloat16" in text


def test_a_slower_cast_leaves_the_map(task: Task, tmp_path: Path) -> None:
    found = searched(task, tmp_path, SLOWER)
    assert found.certified
    assert found.map.cast is None
    assert found.casts.candidates[0].passed(MARGIN)


@pytest.mark.parametrize(("worth", "cast"), [(0.5, None), (20.0, "bfloat16")])
def test_bytes_count_for_a_cast_as_for_a_map(task: Task, tmp_path: Path, worth: float, cast: str | None) -> None:
    """It takes a twentieth longer than the map, and saves 1.5 % of the bytes more: all that is between the layers."""
    rule = Knapsack(bytes_worth=worth)
    found = searched(task, tmp_path, {"base, eager": 6.0, "map, eager": 2.0, "cast": 2.3}, rule=rule)
    assert found.certified
    assert found.map.cast == cast


def lost(task: Task, folder: Path, why: str, **changes: Any) -> SearchResult:
    """A search whose answer is no cast, and that says so of the faster cast, with the reason."""
    found = searched(task, folder, **changes)
    assert found.certified, found.answer
    assert found.map.cast is None
    assert found.map.low
    assert "bfloat16, eager is faster still, 2.00 times, and is not the answer because " in found.answer
    assert found.answer.split("because ")[1].startswith(why), found.answer
    return found


def test_a_cast_that_loses_on_the_search_split(tmp_path: Path) -> None:
    found = lost(task_of(Net(), 900.0, 900.0, 900.0), tmp_path, "already on the search split its drop is +")
    assert len(found.casts.candidates) == 1, "with layers in 8 bits it was not looked at"
    assert all(certificate.certified for certificate in found.certificates)


def test_a_cast_that_loses_on_the_certify_split_alone(tmp_path: Path) -> None:
    """What was certified before it stays."""
    found = lost(
        task_of(Net(), 1.0, 1.0, 900.0), tmp_path, "the certify split does not prove it (no: the drop is above"
    )
    assert [certificate.certified for certificate in found.certificates] == [True] * (len(found.certificates) - 1) + [
        False
    ]
    assert found.certificate is not None
    assert found.certificate.map == found.map.fingerprint


def test_a_cast_that_is_not_surely_faster_is_not_asked_about(task: Task, tmp_path: Path) -> None:
    found = lost(task, tmp_path, "timed by itself it was not faster than the map", table={**FASTER, "cast": 2.9})
    assert all(certificate.certified for certificate in found.certificates)


def test_the_user_said_no(task: Task, tmp_path: Path) -> None:
    lost(task, tmp_path / "a", "no scheme of 16 bits is among those asked for", schemes=["int8"])
    lost(task, tmp_path / "b", "some layers are pinned", pinned=["logit.weight"])
    plain = lost(task_of(Plain(), 1.0, 1.0, 1.0), tmp_path / "c", "maps are realigned", realign=True)
    assert plain.map.realignment is not None


def test_a_model_that_does_not_run_in_16_bits(tmp_path: Path) -> None:
    class Picky(Net):
        def forward(self, plain: Tensor, pair: Tensor) -> Tensor:
            return super().forward(plain @ torch.eye(32), pair)

    found = searched(task_of(Picky(), 1.0, 1.0, 1.0), tmp_path)
    assert found.map.cast is None
    assert found.casts.candidates == ()
    assert str(found.casts.refused).startswith("the model does not run in bfloat16 (forward failed on batch 0")


def test_where_no_map_pays_the_cast_may(task: Task, tmp_path: Path) -> None:
    found = searched(task, tmp_path, {"base, eager": 3.0, "map, eager": 3.0, "cast": 2.0})
    assert found.certified
    assert found.map.cast == "bfloat16"
    assert len(found.certificates) == 1


@pytest.mark.parametrize(("schemes", "form"), [(("int8",), "eager"), (SHORT, "compiled")])
def test_a_cast_counts_for_the_form_where_it_may_be_the_answer(
    schemes: tuple[str, ...], form: str, task: Task, tmp_path: Path
) -> None:
    timer = CastTimes({"base, eager": 6.0, "bfloat16, compiled": 0.5, "cast": 2.0, "map, eager": 3.0})
    forms = {name: Whole(replace(timer, served=name)) for name in ("eager", "compiled")}
    for name, one in forms.items():
        one.name = f"machine-{name}"
    asked: dict[str, Any] = {"margin": MARGIN, "effort": QUIET, "ledger": tmp_path / "ledger"}
    found = search(task, schemes=schemes, target=Hardware("machine", forms), **asked)
    assert found.map.target == f"machine-{form}"


def test_a_map_that_casts_says_so(fastest: SearchResult) -> None:
    plain = fastest.map.model_copy(update={"cast": None})
    assert plain.fingerprint != fastest.map.fingerprint
    assert plain.diff(fastest.map) == ("cast: none -> bfloat16",)
    assert "the model in bfloat16, 2 of 3 layers in low precision" in repr(fastest.map)
    claimless = fastest.map.model_copy(update={"certificate": None, "end_to_end": None})
    for wrong in ("float32", "int8", 3):
        with pytest.raises(MapError, match="cast: Input should be 'bfloat16' or 'float16'"):
            PrecisionMap.parse(json.dumps({**claimless.model_dump(mode="json"), "digest": None, "cast": wrong}))
    short = fastest.map.premise.model_copy(update={"base_precision": "bfloat16"})
    with pytest.raises(MapError, match="it casts a model of bfloat16; expected one of float32 or float64"):
        PrecisionMap.parse(claimless.model_copy(update={"premise": short}).text())
