"""What a look at the certify split costs, and what costs none: a split that can tell nothing gives nothing away."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from precimap import EMULATED, Effort, Guard, PrecisionMap, SearchResult, Splits, Task, search
from precimap.cli import app
from precimap.errors import AlphaSpent
from precimap.layers.target import Emulated
from precimap.metrics import NE, Loss
from precimap.searching.certificate.one_map import certify

QUICK = Effort(screen_units=32, audit_units=16, check_units=32, rounding_draws=0)
MARGIN = 5.0


class Click(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.first(x))).squeeze(1)
        return logits


def split(seed: int, units: int = 320, positives: int | None = None) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, 16, generator=generator)
    labels = (torch.arange(units) % 2).float() if positives is None else (torch.arange(units) < positives).float()
    whole = {"x": x, "labels": labels, "user": torch.arange(units) // 10}
    return [{name: values[i : i + 40] for name, values in whole.items()} for i in range(0, units, 40)]


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")


def task_of(certify: list[dict[str, Tensor]], **changes: Any) -> Task:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"forward": lambda m, b: m(b["x"]), "loss": loss, "metric": Loss(), "name": "clicks"}
    return Task(Click().eval(), splits=Splits(split(1), split(2), certify), **{**fields, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PrecisionMap]:
    """A map for each metric that the tests below judge it by."""
    folder = tmp_path_factory.mktemp("ledger")
    tasks = {"loss": task_of(split(3)), "NE": task_of(split(3), metric=NE())}
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": MARGIN, "effort": QUICK}
    return {name: search(task, ledger=folder / name, **asked).map for name, task in tasks.items()}


TOO_SMALL: dict[str, tuple[str, Task, str]] = {
    "units": ("loss", task_of(split(4, 40)), "the drop: 40 units and a certificate needs at least 50"),
    "clusters": (
        "loss",
        task_of(split(4, 160), clusters=lambda b: b["user"]),
        "the drop: 16 clusters and a certificate needs at least 20",
    ),
    "effective clusters": (
        "loss",
        task_of(split(4, 280), clusters=lambda b: b["user"], weights=lambda b: 1.0 + 20 * (b["user"] == 0)),
        r"the drop: 28 clusters are worth \d+(\.\d+)? of equal weight",
    ),
    "positives": (
        "NE",
        task_of(split(4, 320, 9), metric=NE()),
        "the drop: 9 positives, and a certificate needs at least 20",
    ),
    "units of a guard's slice": (
        "loss",
        task_of(split(4), guards=(Guard(Loss(), 1.0, where=lambda b: b["user"] < 3, name="few"),)),
        "the guard .*few: 30 units and a certificate needs at least 50",
    ),
}


@pytest.mark.parametrize("case", TOO_SMALL)
def test_a_split_that_can_certify_nothing_is_asked_nothing(
    tmp_path: Path, found: dict[str, PrecisionMap], case: str
) -> None:
    metric, task, says = TOO_SMALL[case]
    stages: list[tuple[str, int, int]] = []
    judged = certify(
        task,
        found[metric],
        target=EMULATED,
        margin=MARGIN,
        ledger=tmp_path / "ledger",
        progress=lambda *stage: stages.append(stage),
    )
    certificate = judged.certificate
    assert certificate is not None
    assert not certificate.certified
    assert certificate.drop is None
    assert certificate.error is None
    assert certificate.spent_alpha == 0
    assert re.search(f"^cannot tell {says}", certificate.verdict)
    assert not (tmp_path / "ledger").exists()
    assert not [stage for stage in stages if stage[0] == "certify"], "a map was scored there"
    # It can be written and read, and is no try that a later certificate would have to count.
    judged.save(tmp_path / "map.json")
    read = PrecisionMap.load(tmp_path / "map.json")
    assert read.certificate == certificate
    assert read.not_certified is not None
    fresh = task_of(split(5), metric=task.metric)
    after = certify(fresh, read, target=EMULATED, margin=MARGIN, ledger=tmp_path / "b").certificate
    assert after is not None
    assert after.certified
    assert after.earlier == certificate.earlier
    assert [row.certified for row in after.earlier] == [True], "of the search alone"


def test_a_search_whose_certify_split_turns_out_too_small_books_nothing(tmp_path: Path) -> None:
    """Its share of positives is not that of the search split, from which the outlook is told."""
    task = task_of(split(4, 320, 15), metric=NE())
    result = search(
        task, schemes=["fp8"], margin=MARGIN, effort=QUICK, ledger=tmp_path / "ledger", run=tmp_path / "run"
    )
    assert not result.certified
    assert "cannot tell the drop: 15 positives" in result.answer
    assert not (tmp_path / "ledger").exists()


def test_a_small_split_that_was_asked_before_says_what_it_has_given_away(
    tmp_path: Path, found: dict[str, PrecisionMap]
) -> None:
    """Rows that judged with others, alone: nothing more is given away, what was is told."""
    ledger = tmp_path / "ledger"
    certify(task_of(split(4)), found["loss"], target=EMULATED, margin=MARGIN, ledger=ledger)
    before = {path.name: path.read_text() for path in ledger.glob("*.json")}
    judged = certify(task_of(split(4)[:1]), found["loss"], target=EMULATED, margin=MARGIN, ledger=ledger)
    assert judged.certificate is not None
    assert judged.certificate.spent_alpha == 0.05
    assert {path.name: path.read_text() for path in ledger.glob("*.json")} == before


TASK_FILE = """
import torch
from torch.nn import functional as F
from precimap import Splits, Task
from precimap.metrics import Loss

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).eval()


def split(seed, units):
    x = torch.randn(units, 16, generator=torch.Generator().manual_seed(seed))
    return [{"x": x, "labels": (x[:, 0] > 0).float()}]


def task(certify=200):
    return Task(
        model,
        splits=Splits(split(1, 100), split(2, 200), split(3, certify)),
        forward=lambda model, batch: model(batch["x"]).squeeze(1),
        loss=lambda scores, batch: F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none"),
        metric=Loss(),
    )


def few():
    return task(30)
"""


def test_the_command_says_no_and_books_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECIMAP_STATE", str(tmp_path / "state"))
    (tmp_path / "mine.py").write_text(TASK_FILE)
    run = CliRunner()
    begin = ["search", f"{tmp_path}/mine.py:task", "--scheme", "fp8", "--margin", "5", "--run", f"{tmp_path}/run"]
    told = run.invoke(app, [*begin, "--rounding-draws", "0"])
    assert told.exit_code == 0, told.output
    before = {path.name: path.read_text() for path in (tmp_path / "state").glob("*.json")}
    assert before
    ask = ["certify", f"{tmp_path}/mine.py:few", f"{tmp_path}/run/map.json", "--margin", "5"]
    told = run.invoke(app, ask)
    assert told.exit_code == 1
    assert "Cannot tell the drop: 30 units" in told.output
    row = json.loads(run.invoke(app, [*ask, "--json"]).stdout)
    assert (row["drop"], row["certified"]) == (None, False)
    assert {path.name: path.read_text() for path in (tmp_path / "state").glob("*.json")} == before


class Elsewhere(Emulated):
    """A target by another name."""

    name = "elsewhere"


LONG = {"screen", "probe", "whole maps", "certify", "time"}


def stages_of(task: Task, folder: Path, **changes: Any) -> tuple[set[str], SearchResult | AlphaSpent]:
    """The stages that a search came to, and how it ended."""
    stages: set[str] = set()
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": MARGIN, "effort": QUICK, "ledger": folder / "ledger"}
    try:
        found = search(task, **{**asked, "progress": lambda stage, *_: stages.add(stage), **changes})
    except AlphaSpent as error:
        return stages, error
    return stages, found


OTHERS: dict[str, tuple[Task, dict[str, Any]]] = {
    "another margin": (task_of(split(3)), {"margin": 4.0}),
    "another target": (task_of(split(3)), {"target": Elsewhere()}),
    "another metric": (task_of(split(3), metric=NE()), {}),
    "a guard more": (task_of(split(3), guards=(Guard(NE(), 4.0),)), {}),
    "another loss": (task_of(split(3), loss=lambda s, b: 2 * loss(s, b)), {}),
    "other rows beside": (task_of([*split(3), *split(9, 40)]), {}),
    "less confidence": (task_of(split(3)), {"confidence": 0.9, "alpha_budget": 0.07}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_search_that_can_ask_nothing_ends_before_the_long_work(tmp_path: Path, case: str) -> None:
    assert not isinstance(stages_of(task_of(split(3)), tmp_path)[1], AlphaSpent)
    before = {path.name: path.read_text() for path in (tmp_path / "ledger").glob("*.json")}
    task, changes = OTHERS[case]
    stages, ended = stages_of(task, tmp_path, run=tmp_path / "run", **changes)
    assert isinstance(ended, AlphaSpent)
    assert f"margin {changes.get('margin', MARGIN):g}' at alpha" in str(ended)
    assert re.search(r"a fresh certify split, or a budget of at least 0\.1\b", str(ended))
    assert not stages & LONG
    assert {path.name: path.read_text() for path in (tmp_path / "ledger").glob("*.json")} == before
    budget = {**changes, "alpha_budget": 0.2, "run": tmp_path / "run"}
    assert not isinstance(stages_of(task, tmp_path, **budget)[1], AlphaSpent), "the run can be taken up"


def test_the_same_question_is_served_whatever_is_left(tmp_path: Path) -> None:
    """In its run, in another run, where its process died before the answer, at less confidence."""
    first = stages_of(task_of(split(3)), tmp_path, run=tmp_path / "run")[1]
    assert isinstance(first, SearchResult)
    for changes in (
        {"run": tmp_path / "run"},
        {"run": tmp_path / "other"},
        {"alpha_budget": 0.01},
        {"confidence": 0.96},
    ):
        again = stages_of(task_of(split(3)), tmp_path, **changes)[1]  # type: ignore[arg-type]
        assert isinstance(again, SearchResult)
        assert again.map.fingerprint == first.map.fingerprint
    (path,) = (tmp_path / "ledger").glob("*.json")
    row = json.loads(path.read_text())
    path.write_text(json.dumps({**row, "answers": []}))
    assert isinstance(stages_of(task_of(split(3)), tmp_path)[1], SearchResult)
    # Of a map by itself: a search may end with that one.
    alone = task_of(split(4))
    certify(alone, first.map, target=EMULATED, margin=MARGIN, ledger=tmp_path / "ledger")
    stages, ended = stages_of(alone, tmp_path)
    assert stages & LONG
    assert isinstance(ended, SearchResult if len(first.certificates) == 1 else AlphaSpent)


def test_maps_of_another_scheme_are_refused_in_the_end_with_what_was_found(tmp_path: Path) -> None:
    """They may turn out to be those that were judged: nobody knows before."""
    stages_of(task_of(split(3)), tmp_path)
    stages, ended = stages_of(task_of(split(3)), tmp_path, schemes=["fp8-tensor"], run=tmp_path / "run")
    assert isinstance(ended, AlphaSpent)
    assert stages & LONG


def test_a_run_that_has_found_maps_goes_on_at_another_margin(tmp_path: Path) -> None:
    """It holds its measurements, and at this margin no map is sent to the certify split."""
    stages_of(task_of(split(3)), tmp_path, run=tmp_path / "run")
    ended = stages_of(task_of(split(3)), tmp_path, run=tmp_path / "run", margin=1e-9)[1]
    assert isinstance(ended, SearchResult)
    assert not ended.certified
