"""The page of a run: the answer first, whole names, one unit, every layer with its reason."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import RenderableType

from helpers.small_tasks import planted_task
from precimap import Effort, search
from precimap.report.answer_page import answer_page, shared_prefix
from precimap.report.run_record import RunRecord, read_run
from precimap.report.terminal import Terminal

QUICK = Effort(rounding_draws=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("page")
    search(
        planted_task(guards={"accuracy": 0.05}), schemes=["fp8", "fp8-tensor"], margin=0.2, run=found / "run",
        ledger=found / "ledger", effort=QUICK, pinned=["first.weight"],
    )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def record(folder: Path) -> RunRecord:
    return read_run(folder / "run")


def printed(page: RenderableType, width: int = 100) -> str:
    screen = io.StringIO()
    Terminal(width=width, file=screen).print(page)
    return screen.getvalue()


def test_the_answer_comes_first_with_drop_bound_and_margin_on_one_line(record: RunRecord) -> None:
    lines = printed(answer_page(record), 160).splitlines()
    assert lines[0].startswith("╭─ certified ─")
    assert lines[1].strip("│ ").startswith("Certified: ")
    certificate = record.certificates[-1]
    assert certificate.drop is not None
    (proof,) = [line for line in lines if "The drop of loss is" in line]
    assert f"{certificate.drop:+.3f}" in proof
    assert f"{certificate.upper:+.3f}" in proof
    assert "the margin is 0.200" in proof
    assert f"n = {certificate.n:,}" in proof
    assert any("The guard accuracy is held" in line for line in lines)
    assert any("precimap deploy TASK" in line for line in lines)


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_layer_has_its_whole_name_and_its_reason_at_any_width(record: RunRecord, width: int) -> None:
    page = printed(answer_page(record), width)
    assert all(len(line) <= width for line in page.splitlines())
    squeezed = re.sub(r"\s+", "", page)
    assert record.map is not None
    for name, decision in record.map.layers.items():
        if width >= 80:
            assert name in page
            words = decision.reason.split()
            assert all(word in page for word in words), f"{name}: {decision.reason}"
        assert name.split(".")[0] in squeezed or width < 80
    assert "…" not in page


def test_a_drop_is_the_one_that_decided(record: RunRecord) -> None:
    """The limit that a reason names is above the drop beside it."""
    assert record.map is not None
    page = printed(answer_page(record), 200)
    told = 0
    for name in record.map.layers:
        (line,) = [line for line in page.splitlines() if line.startswith(name)]
        found = re.search(r"([+-]\d\.\d+) ± .*its own drop is at most (\S+),", line)
        if found:
            told += 1
            assert float(found[1]) <= float(found[2]) + 1e-3
    assert told


def test_the_next_command_names_the_task_of_the_run(record: RunRecord) -> None:
    page = " ".join(printed(answer_page(replace(record, asked={"task": "mine.py"})), 500).split())
    assert f"precimap deploy mine.py {record.directory / 'map.json'} --output deployed.safetensors" in page
    assert "For speed, search again with a target that this machine computes, such as --target cpu-int8" in page


def test_drops_stand_in_the_margin_s_unit(record: RunRecord) -> None:
    page = printed(answer_page(record), 160)
    drops = re.findall(r"([+-]\d+\.\d+) ± (\d+\.\d+)  +\d", page)
    assert len(drops) >= 2
    assert {len(number.split(".")[1]) for pair in drops for number in pair} == {3}


def test_a_run_without_a_certified_map_says_what_to_do(tmp_path: Path) -> None:
    search(planted_task(), schemes=["fp8-tensor"], margin=1e-5, run=tmp_path / "run", ledger=tmp_path, effort=QUICK)
    page = printed(answer_page(read_run(tmp_path / "run")), 120)
    assert page.splitlines()[0].startswith("╭─ keep the model as it is ─")
    assert "Keep the baseline: " in page
    assert "Next: precimap plan TASK" in page
    assert "certified ─" not in page


def test_an_unfinished_run_says_how_to_go_on(record: RunRecord) -> None:
    page = printed(answer_page(replace(record, result=None)))
    assert "This run is not finished. The same command goes on." in " ".join(page.split())


NAMES = st.lists(st.lists(st.sampled_from(["a", "ab", "b", "layer", "0", "1"]), min_size=1, max_size=5), min_size=2)


@given(NAMES)
def test_a_shared_prefix_is_shared_and_the_rest_tells_names_apart(parts: list[list[str]]) -> None:
    names = sorted({".".join(one) for one in parts})
    common = shared_prefix(names)
    assert all(name.startswith(common) or f"{name}." == common for name in names)
    if len(names) > 1:
        assert len({name[len(common) :] for name in names}) == len(names)
        firsts = {name[len(common) :].partition(".")[0] for name in names if "." in name[len(common) :]}
        assert len(firsts) != 1 or any("." not in name[len(common) :] for name in names)
