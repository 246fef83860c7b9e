"""The benchmark of the search's cost: what it counts, scales, ranks and predicts, against hand counts and slow oracles."""

import json
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import prediction
import search_cost
from helpers.small_tasks import planted_task
from measuring import peak_memory, search_turns
from measuring.layer_ranking import Residuals, Truth, ranked
from measuring.rival_scores import residual_error
from measuring.search_work import Cost, Pass, Work, default_search, plain_pass, replayed_loop, work_of
from precimap.numerics.schemes import scheme
from precimap.searching.pairs import Pair
from tasks import real_data
from tasks.synthetic import deep_task

FP8, INT8 = scheme("fp8"), scheme("int8")


@pytest.fixture(scope="module")
def deep() -> Work:
    return work_of(deep_task(40, 256), (FP8, INT8))


def test_a_default_search_counts_every_forward_where_it_belongs() -> None:
    plain = 0

    def forward(model: Any, batch: Any) -> Tensor:
        nonlocal plain
        scores: Tensor = task.forward(model, batch)
        plain += 0 if torch.is_grad_enabled() else len(scores)
        return scores

    task = planted_task(500)
    found = default_search(replace(task, forward=forward), (FP8,), margin=0.2)

    columns, n = found.row.forwards, 500
    assert found.result.certified
    # Batches of 125. Three are screened: forward, two backwards, one scheme's errors; the first is explored before that.
    assert columns["screen"] * n == 375 * (1 + 2 * 2 + 1) + 125 * (1 + 4 * 2 + 1)
    # The baseline's split, and the 128 units of the floor in two batches.
    assert columns["before"] * n == 500 + 250
    assert columns["certify"] * n == 1000 * (1 + len(found.result.certificates))
    assert columns["draws"] * n == 250 * (1 + 8)
    looks = sum(joint.measured is not None for joint in found.result.chain)
    assert columns["chain"] * n == 500 * looks
    # Three layers are probed on one batch, which is recorded once.
    others = sum(columns[name] for name in ("before", "chain", "rest", "certify", "draws"))
    assert plain - round(others * n) == 3 * 125 + 125
    assert columns["rest"] > 0


def test_seconds_add_up_to_the_wall_and_end_at_certification() -> None:
    found = default_search(planted_task(250), (FP8,), margin=0.2)

    row = found.row
    before = sum(row.seconds[name] for name in ("before", "screen", "probes", "chain", "rest"))
    assert before == pytest.approx(row.cost.wall)
    assert row.seconds["rest"] > 0
    assert found.after.wall >= row.seconds["certify"] + row.seconds["draws"] > 0


def test_the_replayed_loop_gives_the_bits_of_the_plain_one(deep: Work) -> None:
    row, probes = replayed_loop(deep, deep.of(FP8)[:3])
    singles: dict[Pair | None, Pass] = {None: plain_pass(deep, (), deep.task.splits.search)}
    singles |= {pair: plain_pass(deep, [pair], deep.task.splits.search) for pair in deep.of(FP8)[:3]}
    searched = default_search(planted_task(250), (FP8,), margin=0.2)
    measured = search_turns.Timed((row,), singles, probes, searched)

    assert search_cost.same_bits(deep, measured).holds

    changed = deep.of(FP8)[1]
    wrong = replace(singles[changed], losses=singles[changed].losses + 1e-9 * (np.arange(256) == 5))
    faulty = search_cost.same_bits(deep, replace(measured, singles={**singles, changed: wrong}))
    assert (faulty.value, faulty.holds) == (1, False)


def test_what_was_timed_in_part_is_scaled_by_scheme(deep: Work) -> None:
    def single(wall: float) -> Pass:
        return Pass(Cost(wall, wall / 2), np.zeros(256), ())

    fp8, int8 = deep.of(FP8), deep.of(INT8)
    singles: dict[Pair | None, Pass] = {None: single(1.0), int8[0]: single(3.0), int8[7]: single(5.0)}
    singles |= dict.fromkeys(fp8, single(2.0))

    row = search_turns._plain_row(deep, singles, (FP8, INT8))

    assert row.cost == Cost(1 + 40 * 2 + 40 * 4, (1 + 40 * 2 + 40 * 4) / 2)
    assert row.note == "int8 scaled from 2 of 40 layers"
    assert search_turns._plain_row(deep, singles, (FP8,)).note == ""


def test_the_worst_layers_are_kept_and_the_error_left_is_measured(deep: Work) -> None:
    batches = list(deep.task.splits.search)
    layers = [layer for layer, _ in deep.of(FP8)]
    scores = {layer: float((7 * at) % 40) for at, layer in enumerate(layers)}
    truth = Truth(scores, {layer: -value for layer, value in scores.items()}, 256)

    found = ranked("a score", scores, truth, Residuals(deep, FP8, batches))

    assert found.loss == pytest.approx(1)
    assert found.output == pytest.approx(-1)
    for k in (2, 6, 12):
        worst = {layer for layer in layers if scores[layer] >= 40 - k}
        assert found.left[k] == pytest.approx(
            residual_error(deep.task, deep.inventory, deep.calibration, FP8, worst, batches), rel=1e-6
        )


def test_a_peak_is_seen_and_forgotten() -> None:
    if not peak_memory.reset_peak():
        pytest.skip("this system does not let a process reset its peak")
    before = peak_memory.peak_bytes()
    # 64 MB from the kernel itself: torch may find as much in what the process was given before, and the peak stays.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for _ in range(64):
            block.write(bytes(2**20))
        with_block = peak_memory.peak_bytes()
    peak_memory.reset_peak()

    assert with_block - before >= 60 * 2**20
    assert peak_memory.peak_bytes() <= with_block - 60 * 2**20


def test_r2_is_about_the_line_of_slope_one() -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    measured, predicted = rng.normal(size=(2, 30))

    row = prediction.judged("a task", "a score", predicted, measured, 9)

    assert row.r2 == pytest.approx(sklearn_metrics.r2_score(measured, predicted))
    assert prediction.judged("a task", "a score", 2 * measured, measured, 9).r2 < 1
    assert (row.maps, row.n) == (30, 9)


def test_random_maps_take_each_layer_once_under_a_scheme_it_allows(deep: Work) -> None:
    pairs = [pair for pair in deep.pairs if pair != deep.of(INT8)[0]]

    maps = prediction.random_maps(pairs, 40)

    assert maps == prediction.random_maps(pairs, 40)
    assert all(set(chosen) <= set(pairs) for chosen in maps)
    assert all(len({layer for layer, _ in chosen}) == len(chosen) for chosen in maps)
    sizes = [len(chosen) for chosen in maps]
    assert 8 <= min(sizes) < 14
    assert 30 < max(sizes) <= 36


def test_predictions_of_a_small_model() -> None:
    rows = {row.score: row for row in prediction.on_task(planted_task(250), maps=8)}

    assert rows[prediction.VARIANCE].maps == 4
    assert rows[prediction.FITTED].maps == 7
    assert rows[prediction.CERTIFY].n == 500
    # Of two layers or three nothing is lost by adding up what each was measured to do.
    assert rows[prediction.MEASURED].r2 > 0.5


def test_a_run_without_data_says_so_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_data, "DATA", tmp_path)
    for name, value in (("DEEP_LAYERS", 40), ("DEEP_SAMPLE", 2), ("DEEP_UNITS", (128,)), ("CLAIMED_UNITS", 128)):
        monkeypatch.setattr(search_cost, name, value)
    file = tmp_path / "cost.json"
    monkeypatch.setattr(sys, "argv", ["search_cost.py", "--json", str(file)])

    assert search_cost.main() == 0

    document, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert "the real task is not measured" in printed
    assert [row["way"] for row in document["rows"]] == ["plain loop", "default search"]
    assert document["rows"][0]["note"] == "fp8 scaled from 2 of 40 layers"
    (claim,) = document["claims"]
    ratio = document["rows"][0]["cost"]["wall"] / document["rows"][1]["cost"]["wall"]
    assert claim["value"] == pytest.approx(ratio)
    assert claim["holds"] == (ratio >= 100)
    assert f"{'holds' if claim['holds'] else 'FAILS'}: {claim['name']}" in printed
    assert document["machine"]["torch"] == torch.__version__
