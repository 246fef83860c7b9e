"""A run is taken up again by the task that began it and by no other; a question is one for the same task and data."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import EMULATED, Effort, Guard, Splits, Task, search
from precimap.errors import AlphaSpent, JournalError, TaskError
from precimap.journal import open_journal, run_journal
from precimap.metrics import NDCG, NE, Custom, LogLoss, Loss
from precimap.metrics.metric import UnitMean
from precimap.precision_map import PrecisionMap
from precimap.searching.certificate.one_map import certify
from precimap.searching.preflight.checks import check_task
from precimap.searching.result import SearchResult
from precimap.searching.same_task import check_first_batch, terms
from precimap.searching.splits.three_splits import fingerprint_splits

QUICK = Effort(screen_units=32, audit_units=16, check_units=32, rounding_draws=0)
UNITS = 320
MARGIN = 5.0  # so wide that whole maps pass: these tests ask who may ask


class Click(nn.Module):
    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(16, 32), act or nn.ReLU()
        self.second, self.last = nn.Linear(32, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.second(self.act(self.first(x))))).squeeze(1)


def model_of(act: nn.Module | None = None) -> Click:
    torch.manual_seed(0)
    return Click(act).eval()


def split(seed: int, units: int = UNITS, size: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, 16, generator=generator)
    whole = {
        "x": x,
        "labels": (x[:, 0] > torch.rand(units, generator=generator)).float(),
        "user": torch.arange(units) // 4,
    }
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, units, size)]


def cut_first(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[1:] for name, values in batch.items()}


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"])
    return scores


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")


def task_of(**changes: Any) -> Task:
    fields: dict[str, Any] = {
        "splits": Splits(split(1), split(2), split(3)),
        "forward": forward,
        "loss": loss,
        "metric": NE(),
        "clusters": lambda batch: batch["user"],
        "weights": lambda batch: torch.ones(len(batch["x"])),
        "guards": (Guard(LogLoss(), MARGIN, where=lambda batch: batch["x"][:, 1] > 0, name="s"),),
        "name": "clicks",
    }
    model = changes.pop("model", None) or model_of()
    return Task(model, **{**fields, **changes})


def searched(task: Task, folder: Path, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": MARGIN, "effort": QUICK, "run": folder / "run"}
    return search(task, **{**asked, "ledger": folder / "ledger", **changes})


def custom(function: Callable[..., float]) -> Task:
    """Its labels are read from outside of the batch's own columns, its weights not at all."""
    return task_of(metric=Custom("mine", function, higher_is_better=False), weights=None)


@dataclass(frozen=True)
class Scaled(UnitMean):
    """A metric of a user's own."""

    by: float = 1.0

    @property
    def name(self) -> str:
        return "scaled"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        return losses.double()


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(8 * x)


class ReLU(nn.Module):
    """Of the name of another class."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0) * 1.5


def spread(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    return float(np.mean((scores - labels) ** 2))


def trimmed(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """As `spread` on small errors."""
    return float(np.mean(np.minimum((scores - labels) ** 2, 1.2)))


PLAIN = task_of()
OTHERS: dict[str, tuple[Task, Task, str]] = {
    "forward": (PLAIN, task_of(forward=lambda m, b: 3 * forward(m, b)), "the loss of 40 of 40 units"),
    "forward, for few": (
        PLAIN,
        task_of(forward=lambda m, b: torch.where(b["x"][:, 0] > 1.2, 0, forward(m, b))),
        "the loss of . of 40 units .* when the run began",
    ),
    "loss": (task_of(metric=Loss()), task_of(metric=Loss(), loss=lambda s, b: loss(s, b) ** 2), "the loss of"),
    "activation": (PLAIN, task_of(model=model_of(Swish())), "architecture was"),
    "parameter of a module": (
        task_of(model=model_of(nn.LeakyReLU(0.01))),
        task_of(model=model_of(nn.LeakyReLU(0.3))),
        "architecture was",
    ),
    "a class of the same name": (PLAIN, task_of(model=model_of(ReLU())), "the loss of"),
    "clusters": (PLAIN, task_of(clusters=lambda b: b["user"] // 10), "clusters, weights and slices was"),
    "no clusters": (PLAIN, task_of(clusters=None), "clusters, weights and slices was"),
    "weights": (PLAIN, task_of(weights=lambda b: 1 + 49 * b["labels"]), "clusters, weights and slices was"),
    "labels": (PLAIN, task_of(labels=lambda b: 1 - b["labels"]), "labels, clusters, weights and slices was"),
    "slice": (
        PLAIN,
        task_of(guards=(Guard(LogLoss(), MARGIN, where=lambda b: b["x"][:, 1] > 1, name="s"),)),
        "clusters, weights and slices was",
    ),
    "NE(1) and NE(.1)": (PLAIN, task_of(metric=NE(0.1)), r"metrics was NE\(kept=1.0.* is NE\(kept=0.1"),
    "a guard's metric": (
        task_of(guards=(Guard(NE(), MARGIN),)),
        task_of(guards=(Guard(NE(0.1), MARGIN),)),
        r"metrics was .*NE\(kept=1.0.* is .*NE\(kept=0.1",
    ),
    "a user's own metric": (task_of(metric=Scaled()), task_of(metric=Scaled(2.0)), r"metrics was Scaled\(by=1.0\)"),
    "a function's code": (custom(spread), custom(trimmed), "the gate mine.* of the first search batch was"),
    "calibration data": (
        PLAIN,
        task_of(splits=Splits(split(9), split(2), split(3))),
        "calibration was",
    ),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the plain task and its ledger, for copies of it."""
    folder = tmp_path_factory.mktemp("begun")
    searched(PLAIN, folder)
    return folder


@pytest.fixture(scope="module")
def plain_map(begun: Path) -> PrecisionMap:
    return PrecisionMap.load(begun / "run" / "map.json")


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_is_refused_to_another_task(begun: Path, tmp_path: Path, name: str) -> None:
    one, other, said = OTHERS[name]
    if one is PLAIN:
        shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    else:
        searched(one, tmp_path)
    before = (tmp_path / "run" / "map.json").read_bytes()
    with pytest.raises(JournalError, match=said):
        searched(other, tmp_path)
    assert (tmp_path / "run" / "map.json").read_bytes() == before
    again = searched(one, tmp_path)
    assert again.map.model_dump_json(indent=2).encode() + b"\n" == before, "the task that began it takes it up"


def test_values_in_the_middle_of_arrays_are_data(tmp_path: Path) -> None:
    """Of the certify split: the run is taken up, and its old scores are not."""

    def arrays(scale: float) -> Task:
        def numpy_split(seed: int, by: float) -> list[dict[str, Any]]:
            (batch,) = split(seed, size=UNITS)
            x = batch["x"].numpy().copy()
            x[70:110] *= by
            return [{"x": x, "labels": batch["labels"].numpy()}]

        splits = Splits(numpy_split(1, 1), numpy_split(2, 1), numpy_split(3, scale))
        return task_of(
            splits=splits,
            forward=lambda m, b: m(torch.from_numpy(b["x"])),
            loss=lambda s, b: F.binary_cross_entropy_with_logits(s, torch.from_numpy(b["labels"]), reduction="none"),
            clusters=None,
            guards=(),
        )

    first = searched(arrays(1), tmp_path)
    with pytest.raises(AlphaSpent, match=r"holds 87\.5 % of its units"):
        searched(arrays(30), tmp_path)
    second = searched(arrays(30), tmp_path, alpha_budget=0.1).certificate
    fresh = searched(arrays(30), tmp_path / "fresh").certificate
    assert first.certificate is not None
    assert second is not None
    assert fresh is not None
    assert second.drop == fresh.drop != first.certificate.drop


def test_other_margins_and_rounding_noise_take_a_run_up(tmp_path: Path) -> None:
    searched(task_of(), tmp_path)
    guards = (Guard(LogLoss(), 4.0, where=lambda batch: batch["x"][:, 1] > 0, name="s"),)
    assert searched(task_of(guards=guards), tmp_path, alpha_budget=0.1).certificate is not None
    assert searched(task_of(forward=lambda m, b: forward(m, b) * (1 + 1e-7)), tmp_path, alpha_budget=0.2) is not None


def test_a_kill_before_the_first_score_leaves_what_the_run_is_bound_to(tmp_path: Path) -> None:
    task = task_of()
    first, prints = check_task(task), fingerprint_splits(task)
    with run_journal(tmp_path, terms(task, prints.search)) as journal:
        check_first_batch(journal, task, first.scored)
    other = check_task(task_of(forward=lambda m, b: 2 * forward(m, b)))
    with run_journal(tmp_path, terms(task, prints.search)) as journal, pytest.raises(JournalError, match="the loss of"):
        check_first_batch(journal, task, other.scored)
    with open_journal(tmp_path) as journal:
        assert len(journal.conclusions("first batch")) == 1


def test_an_order_that_turns_where_scores_are_nearly_equal_is_no_other_task(tmp_path: Path) -> None:
    """One unit of a thousand; two of a hundred are another metric."""
    scored = check_task(task_of(metric=Loss())).scored
    task = task_of(metric=Loss())

    def of(units: int, turned: int) -> Any:
        values = np.zeros(units)
        values[:turned] = 1
        return replace(scored, values=values, losses=np.arange(units) * 1.0, slices={}, guards={"LogLoss on s": values})

    bare = replace(task, guards=())
    for units, turned, refused in ((1000, 1, False), (100, 2, True)):
        with run_journal(tmp_path / str(units), {}) as journal:
            check_first_batch(journal, bare, of(units, 0))
            if refused:
                with pytest.raises(JournalError, match="the gate of 2 of 100 units"):
                    check_first_batch(journal, bare, of(units, turned))
            else:
                check_first_batch(journal, bare, of(units, turned))


# Questions

QUESTIONS: dict[str, Callable[[], Task]] = {
    "no clusters": lambda: task_of(clusters=None),
    "other clusters": lambda: task_of(clusters=lambda b: b["user"] // 2),
    "weights": lambda: task_of(weights=lambda b: 1 + b["labels"]),
    "kept": lambda: task_of(metric=NE(0.1)),
    "slice": lambda: task_of(guards=(Guard(LogLoss(), MARGIN, where=lambda b: b["x"][:, 1] > 1, name="s"),)),
    "margin of a guard": lambda: task_of(guards=(Guard(LogLoss(), 4.0, where=lambda b: b["x"][:, 1] > 0, name="s"),)),
    "no guard": lambda: task_of(guards=()),
    "loss": lambda: task_of(forward=lambda m, b: 1.3 * forward(m, b)),
    "a row less": lambda: task_of(splits=Splits(split(1), split(2), [cut_first(split(3, size=UNITS)[0])])),
    "a part": lambda: task_of(splits=Splits(split(1), split(2), split(3)[:6])),
}


@pytest.mark.parametrize("other", QUESTIONS.values(), ids=QUESTIONS)
def test_another_question_about_a_map_is_booked(
    plain_map: PrecisionMap, tmp_path: Path, other: Callable[[], Task]
) -> None:
    found = plain_map
    asked: dict[str, Any] = {"target": EMULATED, "margin": MARGIN, "ledger": tmp_path / "other"}
    assert certify(task_of(), found, **asked).certificate.spent_alpha == 0.05  # type: ignore[union-attr]
    assert certify(task_of(), found, **asked).certificate.spent_alpha == 0.05  # type: ignore[union-attr]
    with pytest.raises(AlphaSpent):
        certify(other(), found, **asked)
    assert certify(other(), found, alpha_budget=0.1, **asked).certificate.spent_alpha == pytest.approx(0.1)  # type: ignore[union-attr]


def test_another_margin_of_the_same_chain_is_booked(tmp_path: Path) -> None:
    """Several margins on one chain have several first maps that are too bad."""
    first = searched(task_of(), tmp_path)
    again = searched(task_of(), tmp_path)
    assert again.certificates == first.certificates
    with pytest.raises(AlphaSpent, match="margin 5"):
        searched(task_of(), tmp_path, margin=2 * MARGIN)
    wider = searched(task_of(), tmp_path, margin=2 * MARGIN, alpha_budget=0.1)
    assert [c.map for c in wider.certificates] == [c.map for c in first.certificates]
    assert wider.certificate is not None
    assert wider.certificate.spent_alpha == pytest.approx(0.1)
    assert [row.margin for row in wider.certificate.earlier] == [MARGIN]
    assert first.certificate is not None
    later = searched(task_of(), tmp_path).certificate
    assert later == first.certificate.model_copy(update={"spent_alpha": later.spent_alpha if later else 0})


FORMS: dict[str, Callable[[], list[dict[str, Tensor]]]] = {
    "batch size": lambda: split(3, size=16),
    "order": lambda: split(3)[::-1],
    "another key": lambda: [{**b, "row": torch.arange(len(b["x"]))} for b in split(3)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_same_question_in_other_batches_is_free_and_another_is_not(
    plain_map: PrecisionMap, tmp_path: Path, form: Callable[[], list[dict[str, Tensor]]]
) -> None:
    found = plain_map
    again = task_of(splits=Splits(split(1), split(2), form()))
    asked: dict[str, Any] = {"target": EMULATED, "ledger": tmp_path / "other"}
    certify(task_of(), found, margin=MARGIN, **asked)
    assert certify(again, found, margin=MARGIN, **asked).certificate.spent_alpha == 0.05  # type: ignore[union-attr]
    with pytest.raises(AlphaSpent):
        certify(again, found, margin=2 * MARGIN, **asked)


def test_other_batches_are_another_question_where_a_scale_is_shared(tmp_path: Path) -> None:
    found = searched(task_of(), tmp_path, schemes=["fp8-tensor"]).map
    assert found.low
    asked: dict[str, Any] = {"target": EMULATED, "margin": MARGIN, "ledger": tmp_path / "other"}
    certify(task_of(), found, **asked)
    with pytest.raises(AlphaSpent):
        certify(task_of(splits=Splits(split(1), split(2), split(3, size=16))), found, **asked)


@pytest.fixture(scope="module")
def chosen_on_certify(tmp_path_factory: pytest.TempPathFactory) -> PrecisionMap:
    """A map without a certificate, that was chosen on what is the certify split elsewhere in this file."""
    swapped = task_of(splits=Splits(split(1), split(3), split(2)))
    return searched(swapped, tmp_path_factory.mktemp("swapped")).map.model_copy(update={"certificate": None})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_data_that_chose_a_map_do_not_certify_it(
    chosen_on_certify: PrecisionMap, tmp_path: Path, form: Callable[[], list[dict[str, Tensor]]]
) -> None:
    """By the sketch that the map carries, in whatever batches; also where only a part of them chose it."""
    found = chosen_on_certify
    ledger = tmp_path / "other"
    for given, share in ((form(), "100"), (form()[:1] + split(4, 1000), "")):
        with pytest.raises(TaskError, match=rf"the map was chosen on {share}.* % of this certify split's"):
            certify(
                task_of(splits=Splits(split(1), split(2), given)),
                found,
                target=EMULATED,
                margin=MARGIN,
                ledger=ledger,
            )
    assert not ledger.exists(), "nothing was booked"


def test_earlier_judgements_stand_in_the_next_certificate(plain_map: PrecisionMap, tmp_path: Path) -> None:
    found = plain_map
    asked: dict[str, Any] = {"target": EMULATED, "ledger": tmp_path / "other"}
    failed = certify(task_of(), found, margin=1e-9, **asked)
    assert failed.certificate is not None
    assert not failed.certificate.certified
    fresh = task_of(splits=Splits(split(1), split(2), split(7)))
    for brought in (failed, found):  # also where the map does not bring its history along
        after = certify(fresh, brought, margin=MARGIN, **asked).certificate
        assert after is not None
        rows = [(row.split, row.margin, row.certified) for row in after.earlier]
        assert (failed.certificate.split, 1e-9, False) in rows
        assert len(set(rows)) == len(rows)
        assert "This map was judged" in str(after)
        chance = f"with all tries counted, the chance of a false yes is up to {0.05 * (1 + len(rows)):g}."
        assert f"failed 1 of these times: {chance}" in str(after)
    assert found.certificate is not None
    assert found.certificate.earlier == ()
    alone = certify(fresh, failed, margin=MARGIN, target=EMULATED, ledger=tmp_path / "elsewhere").certificate
    assert alone is not None
    assert [row.certified for row in alone.earlier] == [True, False], "from the map, where the ledger knows nothing"


def test_units_that_stand_in_the_certify_split_twice_count_once(tmp_path: Path) -> None:
    bare: dict[str, Any] = {"clusters": None, "guards": (), "metric": NDCG(1)}
    bare |= {
        "forward": lambda m, b: torch.stack((forward(m, b), 0 * b["labels"]), 1),
        "labels": lambda b: b["labels"].long(),
    }
    bare["loss"] = lambda s, b: loss(s[:, 0], b)
    once = searched(task_of(**bare), tmp_path / "a").certificate
    four = searched(task_of(**{**bare, "splits": Splits(split(1), split(2), split(3) * 4)}), tmp_path / "b")
    assert once is not None
    assert four.certificate is not None
    assert (four.certificate.n, four.certificate.upper) == (UNITS, once.upper)
    some = searched(task_of(**{**bare, "splits": Splits(split(1), split(2), split(3) + split(3)[:2])}), tmp_path / "c")
    assert some.certificate is not None
    assert (some.certificate.n, some.certificate.clusters) == (UNITS + 80, UNITS)
    assert any("75 % (960) of the certify split's 1,280 units" in note for note in four.preflight.notes)


def test_noise_that_begins_late_is_found_before_the_answer(tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def noisy(model: Any, batch: Any) -> Tensor:
        return forward(model, batch) + (1e-3 * torch.randn(len(batch["x"])) if next(calls) > 13 else 0)

    with pytest.raises(TaskError, match="other losses now than"):
        searched(task_of(forward=noisy), tmp_path)
    assert not (tmp_path / "run" / "map.json").exists()


class Loader:
    """A loader that draws noise from its batch number `since` on."""

    def __init__(self, batches: list[dict[str, Tensor]], since: int) -> None:
        self.batches, self.since = batches, since

    def __iter__(self) -> Any:
        for batch in self.batches:
            self.since -= 1
            yield {**batch, "x": batch["x"] + 1e-3 * (self.since < 0)}


@pytest.mark.parametrize("which", ["calibration", "search", "certify"])
def test_a_loader_that_changes_late_is_found_by_split(tmp_path: Path, which: str) -> None:
    """In its fourth pass; the first three are read before anything is measured."""
    splits = task_of().splits
    batches = getattr(splits, which)
    loader = Loader(batches, 3 * len(batches) + 1)
    if which == "search":
        loader.since += 3  # its first batch is looked at before, at each look
    changing = task_of(splits=replace(splits, **{which: loader}))
    with pytest.raises(TaskError, match=f"batch . of the {which} split is another one than when this run began"):
        searched(changing, tmp_path, schemes=["fp8-static"])
    assert not (tmp_path / "run" / "map.json").exists()


def test_the_same_rows_with_other_labels_judge_something_else(tmp_path: Path) -> None:
    """Clicks and purchases of the same impressions: two questions to two sets of evidence. Equal labels are the same."""
    first = task_of()
    searched(first, tmp_path / "a", ledger=tmp_path / "ledger")

    def relabelled(share: float) -> Task:
        def other(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
            changed = []
            for batch in batches:
                labels = batch["labels"].clone()
                count = round(share * len(labels))
                labels[:count] = (labels[:count] + 1) % 2
                changed.append({**batch, "labels": labels})
            return changed

        splits = replace(first.splits, search=other(first.splits.search), certify=other(first.splits.certify))
        return task_of(splits=splits)

    with pytest.raises(AlphaSpent, match=r"which holds \d+ % of its units"):
        searched(relabelled(0.5), tmp_path / "b", ledger=tmp_path / "ledger")
    found = searched(relabelled(1.0), tmp_path / "c", ledger=tmp_path / "ledger")
    assert found.certificate is not None
    assert found.certificate.spent_alpha == 0.05


def test_a_function_with_another_threshold_is_another_question(tmp_path: Path) -> None:
    """Also where the first batch cannot tell them apart; the same function asked again is free."""

    def above(threshold: float) -> Callable[..., float]:
        return lambda scores, labels, groups: float(np.mean(scores > threshold))

    searched(custom(above(0.5)), tmp_path / "a", ledger=tmp_path / "ledger")
    again = searched(custom(above(0.5)), tmp_path / "b", ledger=tmp_path / "ledger")
    assert again.certificate is None or again.certificate.spent_alpha == 0.05
    with pytest.raises(AlphaSpent):
        searched(custom(above(0.5000001)), tmp_path / "c", ledger=tmp_path / "ledger")
