"""What people see of the values: one line each, a table in a notebook, and a result that goes through a file."""

import json
import pickle
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.small_tasks import planted_task
from precimap import SearchResult, plan, search
from precimap.errors import JournalError
from precimap.journal import run_journal
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.question import Effort

MARGIN = 0.2


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    task, effort = planted_task(name="<b>shop & co"), Effort(rounding_draws=2)
    folder = tmp_path_factory.mktemp("ledger")
    return search(task, schemes=["fp8", "fp8-tensor"], margin=MARGIN, ledger=folder, effort=effort)


def test_every_value_is_one_line(result: SearchResult) -> None:
    task = planted_task()
    shown = [task, task.splits, result, result.map, result.inventory, result.evidence, result.preflight, *result.chain]
    shown.append(plan(task, MARGIN))
    for value in shown:
        text = repr(value)
        assert "\n" not in text
        assert len(text) < 200, text
        assert "tensor(" not in text
        assert text.startswith(type(value).__name__)
    assert repr(task) == "Task(planted: Planted, loss)"
    assert repr(task.splits) == "Splits(calibration: 2 batches, search: 4 batches, certify: 8 batches)"
    assert repr(result.map) == "PrecisionMap(emulated, 3 of 4 layers in low precision, certified)"
    assert str(result.map) == repr(result.map)


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_notebook_shows_each_layer_with_its_reason(result: SearchResult) -> None:
    read = Cells()
    read.feed(result._repr_html_())
    found = {cells[0]: cells for cells in read.rows if cells}
    assert list(found) == list(result.map.layers)
    for name, (_, scheme, drop, share, why) in found.items():
        decision = result.map.layers[name]
        assert scheme == (decision.scheme or "base precision")
        assert why == decision.reason
        assert share == f"{decision.flops_share:.1%}"
        assert bool(drop) == (decision.scheme is not None)
    assert read.tags == {"p", "b", "table", "tr", "th", "td"}
    assert result.answer in result._repr_html_()


def test_a_result_goes_through_a_file(result: SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "result.pickle"
    path.write_bytes(pickle.dumps(result))
    read = pickle.loads(path.read_bytes())
    assert isinstance(read, SearchResult)
    for field in fields(SearchResult):
        if field.name != "evidence":
            assert getattr(read, field.name) == getattr(result, field.name)
    assert result.evidence is not None
    assert read.evidence is not None
    assert read.evidence.known == result.evidence.known
    assert read.evidence.audit == result.evidence.audit
    assert read.evidence.rates == result.evidence.rates
    assert read.evidence.predictor is None, "it holds the model and the data"
    assert path.stat().st_size < 200_000


def test_a_run_is_read_back_as_what_the_search_returned(tmp_path: Path) -> None:
    """All values but those that hold the task: the predictor, and the maps that the run names by their fingerprints."""
    found = search(
        planted_task(guards={"accuracy": 0.05}),
        schemes=["fp8", "fp8-tensor", "int8-static"],
        margin=0.2,
        run=tmp_path / "run",
        ledger=tmp_path,
        effort=Effort(rounding_draws=2),
    )
    read = SearchResult.load(tmp_path / "run")
    assert found.evidence is not None
    assert read.evidence is not None
    kept = [one.name for one in fields(EvidenceTable) if one.name not in ("predictor", "suspects")]
    for name in kept:
        assert getattr(read.evidence, name) == getattr(found.evidence, name), name
    for one in fields(SearchResult):
        if one.name != "evidence":
            assert getattr(read, one.name) == getattr(found, one.name), one.name
    assert [one.map is not None for one in found.chain] != [False] * len(found.chain)
    assert all(one.map is None for one in read.chain)


def test_a_run_that_is_none_or_not_finished_is_refused(result: SearchResult, tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="expected a run directory"):
        SearchResult.load(tmp_path)
    with run_journal(tmp_path / "begun", {"weights": "w"}):
        pass
    with pytest.raises(JournalError, match="has not finished; the same command goes on"):
        SearchResult.load(tmp_path / "begun")
    with run_journal(tmp_path / "older", {"weights": "w"}) as journal:
        journal.conclude("summary", "answer", {"answer": "no", "map": json.loads(result.map.model_dump_json())})
    with pytest.raises(JournalError, match="an older precimap wrote this run"):
        SearchResult.load(tmp_path / "older")
