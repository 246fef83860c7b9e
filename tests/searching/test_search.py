"""The whole way on a small model whose truth is planted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_tasks import COUNTED_INT8, batches, planted_task
from precimap import CPU_INT8, PrecisionMap, SearchResult, Splits, Threshold, search
from precimap.errors import AlphaSpent, InputError, JournalError, ModelError, PremiseMismatch, SchemeError, TaskError
from precimap.journal import open_journal
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_map
from precimap.metrics import NDCG, LogLoss, Loss
from precimap.metrics.metric import Metric
from precimap.precision_map import Verdict
from precimap.report.run_record import STAGES, read_run
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.certificate.one_map import certify
from precimap.searching.preflight.checks import Preflight
from precimap.searching.question import Effort
from precimap.task import score

# A drop of 0.2 nats is far above what FP8 does here and far below what the planted layer does under one scale.
MARGIN = 0.2


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """One FP8 search of the planted task."""
    folder = tmp_path_factory.mktemp("search")
    return search(planted_task(), schemes=["fp8", "fp8-tensor"], margin=MARGIN, ledger=folder, run=folder / "run")


def test_the_planted_outliers_are_sensitive_to_one_scale_and_tolerant_of_one_per_channel(tmp_path: Path) -> None:
    verdicts = {}
    for number, scheme in enumerate(("fp8-tensor", "fp8")):
        found = search(planted_task(), schemes=[scheme], margin=MARGIN, ledger=tmp_path / str(number))
        verdicts[scheme] = {name: decision.verdict for name, decision in found.map.layers.items()}
        assert found.certified
    assert verdicts["fp8-tensor"]["outlier.weight"] is Verdict.SENSITIVE
    assert verdicts["fp8"]["outlier.weight"] is Verdict.TOLERANT
    harmless = ("first.weight", "last.weight")
    assert all(verdicts[scheme][name] is Verdict.TOLERANT for scheme in verdicts for name in harmless)


def test_the_sensitive_layer_is_kept_and_the_harmless_ones_are_not(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=["fp8-tensor"], margin=MARGIN, ledger=tmp_path)
    assert found.map.low == ("first.weight", "last.weight")
    alone = found.map.layers["outlier.weight"].evidence["fp8-tensor"]
    assert alone.drop > 3 * MARGIN  # probed: the screen was not believed for its kind


def test_the_planted_dead_layer_is_reported(result: SearchResult) -> None:
    assert result.inventory.layer("dead.weight").dead == "its result does not reach the output"
    decision = result.map.layers["dead.weight"]
    assert (decision.scheme, decision.verdict) == (None, Verdict.INELIGIBLE)
    assert "dead" in decision.reason


def test_the_map_is_total_and_certified(result: SearchResult) -> None:
    task = planted_task()
    assert set(result.map.layers) == {"first.weight", "outlier.weight", "dead.weight", "last.weight"}
    assert set(result.map.low) == {"first.weight", "outlier.weight", "last.weight"}
    certificate = result.certificate
    assert certificate is not None
    assert certificate.certified
    assert certificate.upper is not None
    assert certificate.drop < certificate.upper <= MARGIN
    assert (certificate.n, certificate.map) == (1000, result.map.fingerprint)
    result.map.check(weights=result.map.premise.weights, metric=task.metric.name)
    assert result.map.flops_share == pytest.approx(
        1 - result.inventory.layer("dead.weight").flops / result.inventory.weight_flops
    )


def test_the_certificate_is_what_scoring_the_map_gives(result: SearchResult) -> None:
    task = planted_task()
    with quantized(task.model, quantize_map(task.model, result.map)):
        low = score(task, task.model, task.splits.certify)
    with quantized(task.model, {}):
        base = score(task, task.model, task.splits.certify)
    assert result.certificate is not None
    assert result.certificate.drop == pytest.approx(float((low.values - base.values).mean()), abs=1e-12)


def test_every_measurement_is_in_the_journal_and_none_is_made_again(tmp_path: Path) -> None:
    asked = {"schemes": ["fp8"], "margin": MARGIN, "ledger": tmp_path, "run": tmp_path / "run"}
    found = search(planted_task(), **asked)
    with open_journal(tmp_path / "run") as journal:
        split = planted_task().splits.search
        first = {kind: journal.measurements(kind) for kind in STAGES}
        assert [row.subject for row in first["baseline"]] == [f"search @{n}" for n in range(len(split))]
        measured = [joint for joint in found.chain if joint.measured is not None]
        assert len(first["joint"]) == len(measured) * len(split) > 0
        assert len(first["certify"]) == (len(found.certificates) + 1) * len(planted_task().splits.certify)
    assert PrecisionMap.load(tmp_path / "run" / "map.json") == found.map
    again = search(planted_task(), **asked)
    assert (again.map, again.answer) == (found.map, found.answer)
    with open_journal(tmp_path / "run") as journal:
        for kind in STAGES:
            assert [row.made_at for row in journal.measurements(kind)] == [row.made_at for row in first[kind]]


def test_another_margin_takes_the_same_measurements(tmp_path: Path) -> None:
    """Allocation at another budget needs no forward pass of single layers; another task is refused by name."""
    asked = {"schemes": ["fp8"], "ledger": tmp_path, "run": tmp_path / "run"}
    search(planted_task(), margin=MARGIN, **asked)
    with open_journal(tmp_path / "run") as journal:
        before = {kind: journal.count(kind) for kind in ("baseline", "floor", "screen", "probe")}
    found = search(planted_task(), margin=MARGIN / 2, rule=Threshold(), alpha_budget=0.2, **asked)
    assert found.map.certificate is not None
    assert found.map.certificate.margin == MARGIN / 2
    with open_journal(tmp_path / "run") as journal:
        assert before == {kind: journal.count(kind) for kind in before}
    with pytest.raises(JournalError, match="search was"):
        search(planted_task(units=400), margin=MARGIN, **asked)


def test_the_chain_is_nested_and_passed_on_the_search_split(result: SearchResult) -> None:
    for before, after in zip(result.chain, result.chain[1:], strict=False):
        assert set(before.step.choice) < set(after.step.choice)
    assert {c.map for c in result.certificates} <= {
        joint.map.fingerprint for joint in result.chain if joint.map is not None
    }


def test_the_model_is_the_same_to_the_bit_after_a_search(tmp_path: Path) -> None:
    task = planted_task()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.model.modules()]
    search(task, schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in task.model.modules()]
    assert type(task.model.first) is nn.Linear


def test_the_model_is_the_same_to_the_bit_after_an_exception_inside_a_search(tmp_path: Path) -> None:
    task = planted_task()
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    calls = 0

    def failing(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("planted")
        scores: Tensor = model(batch["x"])
        return scores

    with torch.no_grad():
        plain = task.model(task.splits.search[0]["x"])
    with pytest.raises(TaskError, match="planted"):
        search(replace(task, forward=failing), schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    assert calls > 20
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(task.model(task.splits.search[0]["x"]), plain)


def test_two_searches_decide_the_same(tmp_path: Path) -> None:
    maps = [search(planted_task(), schemes=["fp8"], margin=MARGIN, ledger=tmp_path / str(i)).map for i in range(2)]
    assert maps[0] == maps[1]


def test_a_pinned_layer_stays(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=["fp8"], margin=MARGIN, pinned=["la*"], ledger=tmp_path)
    assert found.map.layers["last.weight"].verdict is Verdict.PINNED
    assert set(found.map.low) == {"first.weight", "outlier.weight"}
    with pytest.raises(InputError, match="matches a layer"):
        search(planted_task(), schemes=["fp8"], margin=MARGIN, pinned=["nothing*"], ledger=tmp_path)


def test_a_margin_that_nothing_meets_keeps_the_baseline(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=["fp8"], margin=1e-7, ledger=tmp_path)
    assert found.map.low == ()
    assert not found.certified
    assert found.answer.startswith("keep the baseline")
    assert not list(tmp_path.iterdir()), "no alpha is spent when no map reaches the certify split"


def test_the_certify_split_remembers(tmp_path: Path) -> None:
    first = search(planted_task(), schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    again = search(planted_task(), schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    assert again.map == first.map
    with pytest.raises(AlphaSpent, match="fresh"):
        search(planted_task(), schemes=["fp8-e5m2"], margin=MARGIN, ledger=tmp_path)
    other = search(planted_task(), schemes=["fp8-e5m2"], margin=MARGIN, ledger=tmp_path, alpha_budget=0.1)
    assert other.certificate is not None
    assert other.certificate.spent_alpha == pytest.approx(0.1)


def test_every_margin_of_a_map_is_booked_and_the_same_again_is_free(tmp_path: Path, result: SearchResult) -> None:
    """What certificate the map brings along changes nothing: the ledger says what was asked."""
    task = planted_task()
    asked: dict[str, Any] = {"target": _emulated(), "ledger": tmp_path}
    wider = certify(task, result.map, margin=2 * MARGIN, **asked)
    assert wider.certificate is not None
    assert result.certificate is not None
    assert wider.certificate.upper == result.certificate.upper
    assert wider.certificate.spent_alpha == 0.05
    again = certify(task, result.map, margin=2 * MARGIN, **asked)
    assert again.certificate is not None
    assert again.certificate.spent_alpha == 0.05
    for margin in (MARGIN / 100, 3 * MARGIN):
        with pytest.raises(AlphaSpent):
            certify(task, result.map, margin=margin, **asked)
    narrow = certify(task, result.map, margin=MARGIN / 100, alpha_budget=0.1, **asked)
    assert narrow.certificate is not None
    assert not narrow.certificate.certified
    assert narrow.certificate.spent_alpha == pytest.approx(0.1)


def _emulated() -> Any:
    from precimap import EMULATED

    return EMULATED


def test_a_map_of_another_model_is_refused(result: SearchResult, tmp_path: Path) -> None:
    task = planted_task()
    with torch.no_grad():
        task.model.first.weight[0, 0] += 1e-3
    with pytest.raises(PremiseMismatch, match="weights"):
        certify(task, result.map, target=_emulated(), margin=MARGIN, ledger=tmp_path)


def test_the_deployed_model_is_what_is_certified_on_this_cpu(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=[int8_scheme()], target=COUNTED_INT8, margin=MARGIN, ledger=tmp_path)
    assert found.certificate is not None
    assert found.certified
    assert "deployed model" in found.certificate.claim
    task = planted_task()
    with CPU_INT8.running(task.model, quantize_map(task.model, found.map)) as deployed:
        low = score(task, deployed, task.splits.certify)
    base = score(task, task.model, task.splits.certify)
    assert found.certificate.drop == pytest.approx(float((low.values - base.values).mean()), abs=1e-12)


# What is wrong with the input, and what the message must say.
BROKEN = {
    "training mode": (lambda t: t.model.train(), ModelError, r"model\.eval\(\)"),
    "nan weight": (lambda t: t.model.first.weight.data[0].fill_(float("nan")), ModelError, "first.weight"),
    "nan input": (lambda t: t.splits.search[0]["x"][0].fill_(float("nan")), TaskError, "NaN"),
    "nan calibration": (
        lambda t: t.splits.calibration[1]["x"][7].fill_(float("nan")),
        TaskError,
        "batch 1 of the calibration split: .*NaN .*row 7 ",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models_and_data_are_refused(case: str, tmp_path: Path) -> None:
    spoil, error, message = BROKEN[case]
    task = planted_task()
    spoil(task)
    with pytest.raises(error, match=message):
        search(task, schemes=["fp8-static"], margin=MARGIN, ledger=tmp_path)


def _in_batch(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return scores.sum(1) - scores.sum(1).mean()


# A click model of one logit whose labels are all 1.
ONE_CLASS: dict[str, Any] = {
    "forward": lambda m, b: m(b["x"])[:, 0],
    "loss": lambda s, b: torch.nn.functional.softplus(-s),
    "labels": lambda b: torch.ones(len(b["x"])),
}
REPLACED: dict[str, tuple[dict[str, Any], str]] = {
    "shared split": ({"splits": "shared"}, "also in the search split"),
    "empty split": ({"splits": "empty"}, "certify split, got none"),
    "generator": ({"splits": "generator"}, "list"),
    "shuffling": ({"splits": "shuffling"}, "shuffle=False"),
    "failing forward": ({"forward": lambda m, b: m(b["y"])}, "KeyError"),
    "no tensor": ({"forward": lambda m, b: [1.0]}, "one row per unit"),
    "random forward": ({"forward": lambda m, b: m(b["x"]) + torch.randn(1)}, "scored twice"),
    "loss of one number": ({"loss": lambda s, b: s.mean()}, r"one value per unit, \[125\]"),
    "units that influence each other": ({"loss": _in_batch}, "influence"),
    "constant metric": ({"loss": lambda s, b: s.sum(1) * 0 + 1}, "constant cannot show a drop"),
    "one class of whole numbers": (
        {"metric": LogLoss(), **ONE_CLASS, "labels": lambda b: torch.ones(len(b["x"]), dtype=torch.int64)},
        "both classes",
    ),
    "one class": ({"metric": LogLoss(), **ONE_CLASS}, "both classes"),
    "no labels": ({"metric": NDCG(10), "labels": lambda b: None}, "returned None"),
    "infinite loss": ({"loss": lambda s, b: s.sum(1) / 0}, "not finite"),
}


@pytest.mark.parametrize("case", REPLACED)
def test_bad_tasks_are_refused_in_the_user_s_terms(case: str, tmp_path: Path) -> None:
    changes, message = REPLACED[case]
    task = planted_task()
    if "splits" in changes:
        changes = {"splits": _splits(changes["splits"], task)}
    with pytest.raises(TaskError, match=message):
        search(replace(task, **changes), schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    assert not list(tmp_path.iterdir())


def _splits(kind: str, task: Any) -> Splits:
    calibration, searched, certify = task.splits.calibration, task.splits.search, task.splits.certify
    made: dict[str, Any] = {
        "shared": (calibration, searched, [*searched[1:], searched[0]]),
        "empty": (calibration, searched, []),
        "generator": (calibration, (batch for batch in searched), certify),
        "shuffling": (calibration, _Shuffling(searched), certify),
    }
    return Splits(*made[kind])


class _Shuffling:
    def __init__(self, batches: list[Any]) -> None:
        self._batches, self._first = batches, True

    def __iter__(self) -> Any:
        self._first = not self._first
        return iter(self._batches if self._first else self._batches[::-1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"margin": 0.0}, InputError, "above zero"),
        ({"margin": -1.0}, InputError, "above zero"),
        ({"margin": float("nan")}, InputError, "above zero"),
        ({"confidence": 1.0}, InputError, "confidence"),
        ({"cutoff": -1.0}, InputError, "cutoff"),
        ({"schemes": []}, InputError, "at least one"),
        ({"schemes": "fp3"}, SchemeError, "expected a scheme out of .* got 'fp3'"),
        ({"margin": "0.05%"}, InputError, "a margin in .* got 0.05%; per cent are for metrics whose drop is relative"),
        ({"margin": "small"}, InputError, "a margin such as 0.002 .* got 'small'"),
        ({"target": "gpu"}, InputError, r"a target out of emulated, cpu, .* got 'gpu'"),
        ({"schemes": ["fp3"]}, SchemeError, "fp8-static"),
    ],
)
def test_bad_arguments_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"schemes": ["fp8"], "margin": MARGIN, "ledger": tmp_path, **changes}
    with pytest.raises(error, match=message):
        search(planted_task(), **arguments)


def test_clusters_widen_the_error(tmp_path: Path) -> None:
    task = planted_task()
    clustered = replace(task, clusters=lambda b: torch.arange(len(b["x"])) // 5)
    plain = search(task, schemes=["fp8"], margin=MARGIN, ledger=tmp_path / "a")
    found = search(clustered, schemes=["fp8"], margin=MARGIN, ledger=tmp_path / "b")
    assert found.certificate is not None
    assert plain.certificate is not None
    assert found.certificate.clusters == 25
    assert found.certificate.drop == plain.certificate.drop
    assert found.certificate.upper is not None
    assert plain.certificate.upper is not None
    assert found.certificate.upper > plain.certificate.upper


def test_an_unseen_layer_on_the_calibration_split_is_named(tmp_path: Path) -> None:
    task = planted_task()

    def skipping(model: Any, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["x"]) if len(batch["x"]) > 10 else model.last(torch.zeros(len(batch["x"]), 64))
        return scores

    small = batches(task.model, 10, 9, size=10)
    changed = replace(task, forward=skipping, splits=replace(task.splits, calibration=small))
    found = search(changed, schemes=["fp8-static"], margin=MARGIN, ledger=tmp_path)
    assert "no row of the calibration split reached it" in found.map.layers["first.weight"].reason
    assert found.map.layers["last.weight"].verdict != "ineligible"


def test_the_metric_beside_the_gate_is_reported(tmp_path: Path) -> None:
    task = replace(planted_task(), metric=Loss(), reported=(NDCG(10),))
    found = search(task, schemes=["fp8"], margin=MARGIN, ledger=tmp_path, run=tmp_path / "run")
    assert found.certificate is not None
    assert set(found.certificate.reported) == {"nDCG@10"}
    assert json.loads((tmp_path / "run" / "map.json").read_text())["certificate"]["reported"]["nDCG@10"]


def test_what_a_table_shows_can_be_pinned_and_what_cannot_is_named(tmp_path: Path) -> None:
    found = search(planted_task(), schemes=["fp8"], margin=MARGIN, pinned=["last"], ledger=tmp_path)
    assert found.map.layers["last.weight"].verdict is Verdict.PINNED
    with pytest.raises(InputError, match=r"matches a layer \(first.weight, outlier.weight, "):
        search(planted_task(), schemes=["fp8"], margin=MARGIN, pinned=["nothing"], ledger=tmp_path)


def test_another_answer_does_not_overwrite_a_map_and_a_spent_split_is_said_first(tmp_path: Path) -> None:
    asked = {"schemes": ["fp8"], "ledger": tmp_path, "run": tmp_path / "run"}
    told: list[Preflight] = []
    first = search(planted_task(), margin=MARGIN, on_preflight=told.append, **asked)
    second = search(planted_task(), margin=1e-9, on_preflight=told.append, **asked)
    assert first.certified
    assert not second.certified
    assert PrecisionMap.load(tmp_path / "run" / "map.json").low == ()
    assert PrecisionMap.load(tmp_path / "run" / f"map-{first.map.fingerprint}.json") == first.map
    assert not told[0].notes
    assert any("has used alpha 0.05" in note for note in told[1].notes)
    written = [replace(found.preflight, outlook=()) for found in (first, second)]  # which speaks of the margin
    assert written[0] == written[1], "what is written down does not depend on what was judged before"


def test_a_spent_split_hides_nothing_of_the_search(tmp_path: Path) -> None:
    search(planted_task(), schemes=["fp8"], margin=MARGIN, ledger=tmp_path)
    with pytest.raises(AlphaSpent):
        search(planted_task(), schemes=["fp8-tensor"], margin=MARGIN, ledger=tmp_path, run=tmp_path / "run")
    record = read_run(tmp_path / "run")
    assert record.answer is not None
    assert "alpha of the certify split is spent" in record.answer
    assert record.result is not None
    assert any(one.measured is not None for one in record.result.chain)
    assert not record.certificates


@pytest.mark.parametrize("metric", [Loss(), NDCG(5)], ids=lambda metric: metric.name)
def test_the_default_dtype_changes_nothing(metric: Metric, tmp_path: Path) -> None:
    """Code that loads a model in BF16 may leave it set; ranges were once fitted in it."""
    task = planted_task(units=250, metric=metric)
    asked: dict[str, Any] = {
        "schemes": ["fp8-tensor", "int8-static"],
        "margin": 0.2,
        "effort": Effort(rounding_draws=2),
    }
    expected = search(task, **asked, ledger=tmp_path / "one").map
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = search(task, **asked, ledger=tmp_path / "other").map
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected
