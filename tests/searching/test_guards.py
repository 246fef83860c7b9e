"""A planted layer that keeps every order and breaks calibration: what the gate cannot see, the guard does."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import Guard, SearchResult, Splits, Task, Threshold, search
from precimap.errors import AlphaSpent, JournalError, TaskError
from precimap.layers.target import EMULATED
from precimap.metrics import AUC, GAUC, NE, Calibration, Custom, Head, LogLoss, Loss
from precimap.report.run_record import read_run
from precimap.report.tables import run_page
from precimap.searching.certificate.one_map import certify
from precimap.searching.question import Effort
from precimap.task import score

INPUTS, HIDDEN = 16, 32
QUICK = Effort(rounding_draws=0, audit_units=250)
GUARD = {"calibration": 0.005}


class Clicks(nn.Module):
    """A click model whose `gain` multiplies all hidden values by 0.53, which one FP8 scale rounds up by 1.1 %.

    Element [0, 0] of it, whose result is not used, is 1 and fixes the scale: 0.53 * 448 = 237.4 becomes 240.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.gain = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.last = nn.Linear(HIDDEN, 1, bias=False)
        with torch.no_grad():
            for parameter in self.first.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            self.first.bias.add_(1.0)
            self.gain.weight.copy_(0.53 * torch.eye(HIDDEN))
            self.gain.weight[0, 0] = 1.0
            self.last.weight.copy_(-0.12 - 0.05 * torch.rand(1, HIDDEN, generator=generator))
            self.last.weight[0, 0] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.gain(torch.relu(self.first(x)))).squeeze(-1)
        return logits


def batches(model: nn.Module, units: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, INPUTS, generator=generator)
    with torch.no_grad():
        labels = (torch.rand(units, generator=generator) < torch.sigmoid(model(x))).float()
    user = torch.randint(0, units // 10, (units,), generator=generator)
    return [
        {"x": x[i : i + 250], "labels": labels[i : i + 250], "user": user[i : i + 250]} for i in range(0, units, 250)
    ]


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"])
    return scores


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")


def click_task(**changes: Any) -> Task:
    model = Clicks().eval()
    splits = Splits(batches(model, 250, 1), batches(model, 2000, 2), batches(model, 4000, 3))
    fields: dict[str, Any] = {"splits": splits, "forward": forward, "loss": loss, "metric": AUC(), "name": "clicks"}
    return Task(model, **{**fields, **changes})


def searched(task: Task, tmp_path: Path, **changes: Any) -> SearchResult:
    fields: dict[str, Any] = {"schemes": ["fp8-tensor"], "margin": 0.1, "effort": QUICK, "ledger": tmp_path / "ledger"}
    return search(task, **{**fields, **changes})


def test_order_alone_lets_the_miscalibrated_layer_in(tmp_path: Path) -> None:
    result = searched(click_task(reported=(Calibration(),)), tmp_path)
    assert result.certified
    assert "gain.weight" in result.map.low
    assert result.certificate is not None
    drop, error = result.certificate.reported["calibration"]
    assert drop < -0.005 - 5 * error  # predictions are smaller: every logit is negative


def test_a_guard_keeps_it_out_and_stands_in_the_certificate(tmp_path: Path) -> None:
    result = searched(click_task(guards=GUARD, clusters=lambda batch: batch["user"]), tmp_path)
    assert result.certified
    assert result.map.low == ("first.weight",)
    certificate = result.certificate
    assert certificate is not None
    guard = certificate.guards["calibration"]
    assert guard.held
    assert guard.upper is not None
    assert abs(guard.drop) < guard.upper <= guard.margin == 0.005
    assert (guard.n, guard.clusters) == (4000, certificate.clusters)
    assert guard.baseline == pytest.approx(1, abs=0.1)
    assert "Guard calibration held" in str(certificate)


def test_a_map_whose_guard_fails_is_not_certified_and_the_verdict_names_the_guard(tmp_path: Path) -> None:
    without = searched(click_task(), tmp_path)
    judged = certify(
        click_task(guards=GUARD), without.map, target=EMULATED, margin=0.1, ledger=tmp_path / "other ledger"
    ).certificate
    assert judged is not None
    assert not judged.certified
    assert judged.verdict == "no: the guard calibration is above the margin"
    assert judged.upper is not None
    assert judged.upper <= judged.margin  # the gate itself holds
    assert not judged.guards["calibration"].held


def test_what_the_certificate_says_of_a_guard_is_what_scoring_the_map_gives(tmp_path: Path) -> None:
    task = click_task()
    judged = certify(
        click_task(guards=GUARD), searched(task, tmp_path).map, target=EMULATED, margin=0.01, ledger=tmp_path / "o"
    ).certificate
    assert judged is not None
    gain, first = task.model.gain, task.model.first
    means = []
    for scale in (0.53, 240 / 448):  # the weight that the codes stand for; inputs round by less and to both sides
        with torch.no_grad():
            gain.weight.copy_(scale * torch.eye(HIDDEN))
            predictions = torch.cat([torch.sigmoid(task.model(batch["x"])) for batch in task.splits.certify])
        means.append(float(predictions.double().mean()))
    assert first.weight.shape == (HIDDEN, INPUTS)
    assert judged.guards["calibration"].drop == pytest.approx(means[1] / means[0] - 1, rel=0.2)


def test_a_guard_on_a_slice_judges_the_slice_alone(tmp_path: Path) -> None:
    """Half of the users, and their rows only; a slice where nothing is wrong holds where the whole does not."""
    few = Guard(NE(), 0.05, where=lambda batch: batch["user"] < 60, name="old users")
    result = searched(click_task(guards=(few,), clusters=lambda batch: batch["user"]), tmp_path)
    assert result.certificate is not None
    answer = result.certificate.guards["NE on old users"]
    users = torch.cat([batch["user"] for batch in click_task().splits.certify])
    assert answer.n == int((users < 60).sum())
    assert answer.clusters == len(torch.unique(users[users < 60]))


def test_guards_are_part_of_the_question(tmp_path: Path) -> None:
    """Another guard needs other measurements, so another run; another margin of a guard is another question."""
    run = tmp_path / "run"
    first = searched(click_task(guards=GUARD), tmp_path, run=run)
    again = searched(click_task(guards=GUARD), tmp_path, run=run)
    assert again.certificate == first.certificate
    with pytest.raises(JournalError, match="metrics beside it was guard calibration, is guard NE"):
        searched(click_task(guards={"NE": 0.1}), tmp_path, run=run)
    with pytest.raises(AlphaSpent):
        searched(click_task(guards={"calibration": 0.006}), tmp_path, run=run)


def test_one_head_gates_and_another_is_guarded(tmp_path: Path) -> None:
    """Two heads over one body; the guard is on the head that breaks."""

    def both(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        hidden = torch.relu(model.first(batch["x"]))
        return torch.stack((hidden.sum(1) / 20 - 1, model(batch["x"])), dim=1)

    def of_both(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"].unsqueeze(1).expand_as(scores)
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").sum(1)

    heads = {"forward": both, "loss": of_both, "metric": Head(LogLoss(), 0)}
    free = searched(click_task(**heads), tmp_path)
    assert "gain.weight" in free.map.low
    guard = Guard(Head(Calibration(), 1), 0.005)
    guarded = searched(click_task(**heads, guards=(guard,)), tmp_path, alpha_budget=0.1)
    assert guarded.map.low in ((), ("first.weight",))
    assert guarded.certificate is None or "calibration of head 1" in guarded.certificate.guards


@pytest.mark.parametrize("gate", [NE(), GAUC(), Calibration()], ids=lambda metric: metric.name)
def test_metrics_that_are_no_means_can_gate(gate: Any, tmp_path: Path) -> None:
    margin = 0.05 if gate.name == "GAUC" else 0.004  # of 200 users who choose, a bound of GAUC is at least 3 / 200
    result = searched(click_task(metric=gate, clusters=lambda batch: batch["user"]), tmp_path, margin=margin)
    certificate = result.certificate
    assert certificate is not None
    assert result.certified
    assert certificate.unit == gate.unit
    assert ("gain.weight" in result.map.low) == (gate.name != "calibration")


def test_wrong_guards_are_refused() -> None:
    with pytest.raises(TaskError, match=r"expected a metric out of .*calibration.*, got 'calibrated'"):
        click_task(guards={"calibrated": 0.1})
    with pytest.raises(TaskError, match="margin above zero for the guard NE, got 0"):
        Guard(NE(), 0)
    with pytest.raises(TaskError, match="a name for the slice that NE guards"):
        Guard(NE(), 0.1, where=lambda batch: batch["user"] == 0)
    with pytest.raises(TaskError, match="names of their own, got loss, loss"):
        click_task(guards=(Guard(Loss(), 0.1), Guard(Loss(), 0.2)))
    with pytest.raises(TaskError, match="names of their own, got NE, NE"):
        click_task(reported=(NE(), NE(0.5)))


def test_a_slice_without_units_is_refused_before_the_long_work(tmp_path: Path) -> None:
    nobody = Guard(NE(), 0.1, where=lambda batch: batch["user"] < 0, name="nobody")
    with pytest.raises(
        TaskError, match=r"NE on nobody needs at least two units .* it has 0 of 2000 units, in 0 clusters"
    ):
        searched(click_task(guards=(nobody,)), tmp_path)
    odd = Guard(NE(), 0.1, where=lambda batch: np.ones(3), name="odd")
    with pytest.raises(TaskError, match=r"where of NE on odd to give True or False for each unit, \[250\]"):
        searched(click_task(guards=(odd,)), tmp_path)


def test_the_page_of_a_run_says_which_guard_kept_a_map_back(tmp_path: Path) -> None:
    """`gain` comes in by AUC and fails by the guard; the page is read back from the journal and fits 80 columns."""
    searched(click_task(guards=GUARD), tmp_path, run=tmp_path / "run", rule=Threshold(), cutoff=0.005)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run_page(read_run(tmp_path / "run")))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join("\n".join(lines).split())
    assert re.search(
        r"with 2 layers low is predicted to have a bound of \d\.\d times the margin for the guard calibration", text
    )
    assert re.search(r"guard calibration held: [+-]0\.\d+ ± 0\.\d+ as a share of the baseline's 0?\d\.\d+,", text)


def test_large_ids_of_clusters_stay_apart_and_fractions_are_refused(tmp_path: Path) -> None:
    """Hashed user ids: above 2**53 two of them are one float64."""
    task = click_task(clusters=lambda batch: 2**60 + batch["user"])
    plain = click_task(clusters=lambda batch: batch["user"])
    counts = [len(np.unique(score(t, t.model, t.splits.search).units.clusters)) for t in (task, plain)]
    assert counts[0] == counts[1] > 100
    with pytest.raises(TaskError, match=r"one integer per unit, \[250\], got torch\.float32"):
        searched(click_task(clusters=lambda batch: batch["user"].float()), tmp_path)


def test_probabilities_and_margins_of_several_times_the_metric_are_doubted(tmp_path: Path) -> None:
    """A sigmoid in forward: the model is then worse than the mean label, which NE shows and nothing refuses."""
    doubtful = click_task(metric=NE(), forward=lambda model, batch: torch.sigmoid(forward(model, batch)))
    seen: list[str] = []
    searched(doubtful, tmp_path, margin=5.0, on_preflight=lambda found: seen.extend(found.notes))
    assert any("NE of the baseline is" in note and "logits (not probabilities)" in note for note in seen)
    assert any("a margin of 5 for NE is 500% of the baseline's" in note for note in seen)
    seen.clear()
    told = {"margin": 0.005, "on_preflight": lambda found: seen.extend(found.notes)}
    searched(click_task(metric=NE()), tmp_path / "other", **told)
    assert not [note for note in seen if ("baseline" in note and "is that meant" in note) or "logits" in note]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guards": (Head(Calibration(), 0),)}, r"expected guards as Guard\(metric, margin\), got Head"),
        ({"reported": (7,)}, r"expected metrics such as pm\.metrics\.AUC\(\) .* got 7"),
        ({"reported": ("AUCC",)}, r"expected a metric out of .* got 'AUCC'"),
        ({"metric": 7}, r"expected metrics such as .* got 7"),
    ],
)
def test_what_is_no_metric_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        click_task(**changes)
    with pytest.raises(TaskError, match=r"margin as a number\), got Guard\(NE\(.*\), '0\.5%'\)"):
        Guard(NE(), "0.5%")  # type: ignore[arg-type]


def test_texts_as_clusters_and_numbers_as_a_slice_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="expected clusters to give integers, got list"):
        searched(click_task(clusters=lambda batch: ["a"] * len(batch["x"])), tmp_path)
    forgotten = Guard(NE(), 0.1, where=lambda batch: batch["user"], name="old users")
    with pytest.raises(TaskError, match=r"where of NE on old users to give True or False .* got torch\.int64"):
        searched(click_task(guards=(forgotten,)), tmp_path)


def test_a_metric_whose_name_begins_alike_is_not_taken_for_ne(tmp_path: Path) -> None:
    far = Custom("NEgative logit", lambda scores, labels, _: float(1.5 - scores.mean()), higher_is_better=False)
    seen: list[str] = []
    searched(click_task(metric=far), tmp_path, margin=1.0, on_preflight=lambda found: seen.extend(found.notes))
    assert not any("worse than the mean label" in note for note in seen)
