"""What splits can tell before a search: against the certificates that they then give, and against arithmetic."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import precimap as pm
from precimap import plan
from precimap.errors import InputError
from precimap.metrics import AUC, GAUC, NDCG, NE, Calibration, Loss, Metric
from precimap.report.run_record import read_run
from precimap.searching.preflight.sample_size import Outlook

CLASSES = 50
QUICK = pm.Effort(rounding_draws=0)


def model_of(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, outputs)).eval()


def ranking(search: int, certify: int) -> pm.Task:
    """One relevant candidate of 50, which the model often has first."""
    model = model_of(CLASSES)

    def split(seed: int, units: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(units, 32, generator=generator)
        with torch.no_grad():
            best = (model(x) + 0.3 * torch.randn(units, CLASSES, generator=generator)).argmax(1)
        return [{"x": x[i : i + 64], "labels": best[i : i + 64]} for i in range(0, units, 64)]

    return pm.Task(
        model,
        splits=pm.Splits(split(0, 128), split(1, search), split(2, certify)),
        forward=lambda model, batch: model(batch["x"]),
        loss=lambda scores, batch: F.cross_entropy(scores, batch["labels"], reduction="none"),
        metric=NDCG(10),
    )


def clicks(metric: Metric, rate: float, units: int, **fields: object) -> pm.Task:
    model = model_of(1)

    def split(seed: int, size: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(size, 32, generator=generator)
        return [
            {"x": x, "labels": (torch.rand(size, generator=generator) < rate).float(), "user": torch.arange(size) // 8}
        ]

    return pm.Task(
        model,
        splits=pm.Splits(split(0, 128), split(1, units), split(2, units)),
        forward=lambda model, batch: model(batch["x"]).squeeze(-1) + math.log(rate),
        loss=lambda z, batch: F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none"),
        metric=metric,
        **fields,  # type: ignore[arg-type]
    )


def searched(task: pm.Task, margin: float, tmp_path: Path, **changes: object) -> pm.SearchResult:
    return pm.search(task, schemes=["fp8"], margin=margin, ledger=tmp_path / "ledger", effort=QUICK, **changes)  # type: ignore[arg-type]


def test_a_margin_that_nothing_can_pass_ends_the_search_before_it_begins(tmp_path: Path) -> None:
    """3 / 500 = .006 is the least bound of an order metric, also where no unit changes."""
    stages: set[str] = set()
    found = searched(
        ranking(500, 1000), 0.004, tmp_path, run=tmp_path / "run", progress=lambda stage, *_: stages.add(stage)
    )
    assert not found.certified
    assert found.map.low == ()
    assert "cannot tell with these splits: nDCG@10: the 500 units of the search split can pass no map" in found.answer
    (told,) = found.preflight.outlook
    assert told.least == pytest.approx(3 / 1000, rel=0.02)
    assert told.enough == pytest.approx(3 / 0.004, rel=0.02)
    assert f"needs at least {told.enough:,} units" in found.answer
    assert not stages & {"screen", "probe", "whole maps", "certify"}
    assert not (tmp_path / "ledger").exists(), "nothing was asked of the certify split"
    record = read_run(tmp_path / "run")
    assert record.answer == found.answer
    assert record.certificates == ()
    assert "it was not measured" in found.map.layers["0.weight"].reason


def test_as_many_units_as_it_asks_for_are_enough(tmp_path: Path) -> None:
    """The number is that of the bound: with it the same search goes on, and a map that changes little is certified."""
    needed = plan(ranking(200, 200), 0.01).asked[0]
    assert needed.enough is not None
    assert needed.about is not None
    assert needed.enough <= needed.about
    assert searched(ranking(needed.enough - 4, 2000), 0.01, tmp_path / "a").preflight.impossible is not None
    assert searched(ranking(2000, needed.enough - 4), 0.01, tmp_path / "b").preflight.impossible is not None
    assert searched(ranking(needed.enough + 1, needed.enough + 1), 0.01, tmp_path / "c").preflight.impossible is None
    assert searched(ranking(2 * needed.about, 2 * needed.about), 0.01, tmp_path / "d").certified


@pytest.mark.parametrize(
    ("task", "says"),
    [
        (lambda: ranking(15, 100), "the search split has 15 units and a certificate needs at least 20"),
        (lambda: ranking(100, 15), "the certify split has 15 units and a certificate needs at least 20"),
        (lambda: clicks(Loss(), 0.3, 40), "the search split has 40 units and a certificate needs at least 50"),
        (
            lambda: clicks(NE(), 0.02, 600),
            r"the search split has [\d.]+ positives, and a certificate needs at least 20",
        ),
        (
            lambda: clicks(NE(), 0.3, 120, clusters=lambda batch: batch["user"]),
            "the search split has 15 clusters and a certificate needs at least 20",
        ),
        (
            lambda: clicks(NE(), 0.3, 400, guards={"AUC": 0.01}),
            r"the guard AUC: the 400 units of the search split can pass no map at a margin of 0\.01",
        ),
    ],
    ids=["search", "certify", "a loss", "positives", "clusters", "a guard"],
)
def test_what_is_too_little_of_anything_is_said_first(task: object, says: str, tmp_path: Path) -> None:
    made = task()  # type: ignore[operator]
    found = searched(made, 0.5, tmp_path)
    assert not found.certified
    impossible = found.preflight.impossible
    assert impossible is not None
    import re

    assert re.search(says, impossible)


def test_a_plan_is_a_table_over_margins() -> None:
    task = clicks(NE(), 0.3, 1000, guards={"calibration": 0.01})
    found = plan(task, 0.002, schemes=["fp8", "int8"])
    gate = [row for row in found.rows if row.label == "NE"]
    assert [row.margin for row in gate] == [0.0005, 0.001, 0.002, 0.004, 0.008]
    asked = [row.about for row in gate]
    assert all(more is not None for more in asked)
    assert asked == sorted(asked, key=lambda units: -(units or 0)), "a smaller margin takes more units"
    assert [row.label for row in found.asked] == ["NE", "the guard calibration"]
    assert found.rows[-1].margin == 0.01
    assert found.possible


def test_the_noisiest_scheme_is_what_is_planned_with() -> None:
    """Whatever its place in the list."""
    both = [plan(ranking(300, 300), 0.05, schemes=schemes).asked[0] for schemes in (["int8", "fp8"], ["fp8", "int8"])]
    assert both[0] == both[1]
    alone = [plan(ranking(300, 300), 0.05, schemes=[scheme]).asked[0].detectable for scheme in ("fp8", "int8")]
    assert both[0].detectable == max(alone) > min(alone)


def test_a_plan_changes_and_books_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECIMAP_STATE", str(tmp_path / "state"))
    task = ranking(200, 200)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    plan(task, 0.01)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not (tmp_path / "state").exists()
    with pytest.raises(InputError, match="a margin above zero"):
        plan(task, 0.0)


def test_metrics_of_groups_are_planned_by_groups() -> None:
    """GAUC resamples users with both classes: units are counted in rows all the same."""
    task = clicks(GAUC(), 0.3, 1600, clusters=lambda batch: batch["user"])
    told: Outlook = plan(task, 0.02).asked[0]
    assert told.search_units == 1600
    assert told.enough is not None
    assert told.enough > 3 / 0.02 * 8 * 0.9, "about 3 / margin users of 8 rows"
    auc = plan(replace(task, metric=AUC(), clusters=None, guards=(pm.Guard(Calibration(), 0.05),)), 0.02).asked[0]
    assert auc.enough == pytest.approx(3 / 0.02 / 0.3, rel=0.15), "3 / margin positives"
