"""The main job of the benchmark of GPUs, from generated data to a served model, at sizes that a CPU can run."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import gpu
from helpers.gpu_played import plant_times, play_a_gpu
from measuring import parts
from measuring.gpu_jobs import Job
from measuring.parts import Part, in_turn
from models.gpu_models import Encoder
from precimap.demos.click_logs import generate
from precimap.runtime.compiling.compiled import no_compiler
from tasks.gpu_tasks import FIELDS, ClickSizes, EncoderSizes, click_task, encoder_task, features_of

CPU = torch.device("cpu")
CLICKS = ClickSizes(32, torch.bfloat16, 9_000, 500, (1, 4, 8), 20.0, layers=1, epochs=4)
ENCODER = EncoderSizes(Encoder(32, 2, 1, 4), 64, (1, 4, 8))


def asked_of(sizes: ClickSizes | EncoderSizes, form: str) -> Job:
    return gpu.Asked(sizes, margin=0.5, form=form, minutes=5.0, seconds=(300.0, 300.0)).job(2, CPU)


def checked(job: Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of what was served, and that both are right."""
    searched, served = rows
    assert [searched["part"], served["part"]] == [f"{job.name}: searched", f"{job.name}: served"]
    assert "failed" not in searched, searched
    assert "failed" not in served, served
    assert job.found is not None
    assert searched["certified"] == served["certified"] == job.found.certified
    forms = ("eager", "compiled", "compiled, graph")
    names = ("bf16", "map") if job.found.map.changes else ("bf16",)
    assert set(served["microseconds"]) == {f"{name}, {how}" for name in names for how in forms}
    assert set(served["times_as_fast"]) == set(served["microseconds"]) - {served["best_bf16"]}
    assert served["best_bf16"] in ("bf16, compiled", "bf16, compiled, graph")
    json.dumps(rows)
    assert f"margin: {job.margin:g}" in gpu._short(searched) or searched["certificate"] is None
    flops = job.found.inventory.flops / job.found.inventory.units * served["batch"]
    for name, times in served["microseconds"].items():
        assert served["of_peak"][name] == pytest.approx(flops / (1e-6 * times["median"]) / 1e9)
    return served


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(no_compiler() is not None, reason="compiled models need a C++ compiler")
@pytest.mark.parametrize(
    ("sizes", "form"),
    [(CLICKS, "eager"), (replace(CLICKS, dtype=torch.float32), "auto"), (ENCODER, "eager")],
    ids=["clicks in BF16", "clicks in float32", "encoder"],
)
def test_the_whole_job_runs_and_reports_what_is_right(
    sizes: ClickSizes | EncoderSizes, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: FP8 takes half the time, compiled and not. The rest is computed: a map is found, certified and served."""
    play_a_gpu(monkeypatch)
    plant_times(monkeypatch, {"fp8": 0.5, "blanket": 0.5, "map": 0.4})
    job = asked_of(sizes, form)
    rows = list(in_turn(job.parts(), 600.0))
    served = checked(job, rows)
    assert job.found is not None
    assert job.found.certified
    assert job.found.map.target == "cuda-fp8"
    assert job.found.map.low
    changes = served["rms_change"]
    for how in ("eager", "compiled", "compiled, graph"):
        assert 1e-5 < changes[f"map, {how}"] < 0.3
    rows[1]["part"] = "clicks 2048 wide: served"
    assert [claim.name.rpartition(": ")[2] for claim in gpu.claims(rows)] == [
        "certified", "the map, at best, as fast as the fastest compiled BF16",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(no_compiler() is not None, reason="compiled models need a C++ compiler")
def test_where_low_precision_saves_nothing_the_model_itself_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the times of this CPU, whose FP8 product is slow."""
    play_a_gpu(monkeypatch)
    job = asked_of(CLICKS, "eager")
    served = checked(job, list(in_turn(job.parts(), 600.0)))
    assert not served["certified"]
    assert [claim.value for claim in gpu.claims([{**served, "part": "encoder: served"}])] == [0.0, 0.0]


def test_a_search_that_fails_leaves_nothing_to_serve() -> None:
    job = asked_of(CLICKS, "eager")
    job.make = lambda: 1 / 0  # type: ignore[assignment, return-value]
    searched, served = in_turn(job.parts(), 600.0)
    assert searched["failed"] == "ZeroDivisionError: division by zero"
    assert "gave no map" in str(served["failed"])


def test_a_part_that_takes_too_long_is_stopped_and_the_next_one_runs() -> None:
    """Also one that swallows its end the first time."""

    def slow() -> dict[str, object]:
        while True:
            time.sleep(0.01)

    def stubborn() -> dict[str, object]:
        try:
            slow()
        except parts.OutOfTime:
            return slow()
        raise AssertionError

    def given() -> dict[str, object]:
        return {"value": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "AGAIN", 0.1)
        planted = [Part("slow", 0.1, slow), Part("stubborn", 0.1, stubborn), Part("next", 9.0, given)]
        rows = list(in_turn(planted, 60.0))
    assert [row.get("failed") for row in rows] == ["stopped after 0.1 seconds", "stopped after 0.1 seconds", None]
    assert rows[2]["value"] == 1
    (late, skipped) = in_turn([Part("slow", 9.0, slow), Part("next", 9.0, given)], 0.1)
    assert "stopped after" in str(late["failed"])
    assert skipped == {"part": "next", "skipped": "not begun within 0.1 seconds"}


def test_the_tasks_are_what_they_say() -> None:
    """A trained model knows more than the mean label; users are in one split alone, but for one at its edge."""
    features = features_of(generate(3000))
    assert features.shape == (3000, FIELDS)
    assert features.min() == 0
    assert all(len(features[:, i].unique()) > 1 for i in range(FIELDS))
    assert (features[:, 1:].amin(0) > features[:, :-1].amax(0)).all(), "each field has numbers of its own"
    task = click_task(replace(CLICKS, dtype=torch.float32, rows=30_000, epochs=12), CPU)
    assert [len(split) for split in (task.splits.calibration, task.splits.search, task.splits.certify)] == [1, 4, 8]
    users = [
        {int(user) for batch in split for user in batch["users"]} for split in (task.splits.search, task.splits.certify)
    ]
    assert len(users[0] & users[1]) <= 1
    labels = torch.cat([batch["labels"] for batch in task.splits.certify])
    scores = torch.cat([task.forward(task.model, batch) for batch in task.splits.certify])
    known = F.binary_cross_entropy_with_logits(scores, labels)
    mean = F.binary_cross_entropy(labels.mean().expand_as(labels), labels)
    assert known < 0.98 * mean
    encoder = encoder_task(ENCODER, CPU)
    logits = torch.cat([encoder.forward(encoder.model, batch) for batch in encoder.splits.certify])
    assert 1 < float(logits.std()) < 2.5
    assert 0.3 < float(torch.cat([batch["labels"] for batch in encoder.splits.certify]).mean()) < 0.7
