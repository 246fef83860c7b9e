"""The audit of means against scipy's t test, its rate of false alarms, and planted shifts that no correlation sees."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import ttest_1samp

from helpers.small_tasks import planted_task
from precimap import Guard, SearchResult, Task, search
from precimap.metrics import Loss
from precimap.metrics.metric import PairedDrops
from precimap.metrics.units import Units
from precimap.report.run_record import read_run
from precimap.report.tables import run_page
from precimap.searching.comparison import Differences
from precimap.searching.evidence import gather as evidence_module
from precimap.searching.evidence.means import FALSE_ALARMS, GATE, MATERIAL, MeanAgreement, MeanTest, mean_agreement
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.question import Effort

QUICK = Effort(rounding_draws=0)
MARGIN = 0.02
LEVEL = FALSE_ALARMS / 2


def differences(d: np.ndarray, units: Units | None = None) -> Differences:
    return Differences(
        PairedDrops(d=d, units=units or Units(n=len(d)), rows=len(d), changed=int(np.count_nonzero(d)), worst=None),
        {},
        {},
    )


def agreement(
    predicted: np.ndarray, probed: np.ndarray, margin: float, of: int | None = None, units: Units | None = None
) -> MeanAgreement:
    """Rows are layers."""
    pairs = [(differences(p, units), differences(q, units)) for p, q in zip(predicted, probed, strict=True)]
    return mean_agreement(("fp8", None), MeanTest(GATE, margin, LEVEL), pairs, of or len(pairs))


# Against scipy


@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(1, 6), st.floats(-1, 1), st.integers(1, 4))
def test_the_verdict_is_that_of_a_t_test_where_it_matters(
    seed: int, n: int, layers: int, shift: float, more: int
) -> None:
    rng = np.random.default_rng(seed)
    probed = rng.normal(0, 1, (layers, n))
    predicted = probed + rng.normal(shift / layers, 0.3, (layers, n))
    found = agreement(predicted, probed, margin=1.0, of=layers * more)
    off = (predicted - probed).sum(0)
    beyond = ttest_1samp(off, 0).pvalue < LEVEL
    material = abs(off.mean()) * more > MATERIAL
    assert found.agrees == (not (beyond and material))
    assert (found.predicted, found.probed) == pytest.approx((predicted.sum(0).mean(), probed.sum(0).mean()))
    assert found.off == pytest.approx(more * off.mean())
    assert found.error == pytest.approx(off.std(ddof=1) / np.sqrt(n))


def test_units_of_a_cluster_are_no_evidence_of_their_own() -> None:
    """Ten clusters of ten equal units: the error is that of ten values."""
    rng = np.random.default_rng(1)
    off = rng.normal(0.5, 1, 10)
    units = Units(n=100, clusters=np.repeat(np.arange(10), 10))
    found = agreement(np.repeat(off, 10)[None], np.zeros((1, 100)), 0.1, units=units)
    assert found.error == pytest.approx(off.std(ddof=1) / np.sqrt(10))
    assert found.agrees == (ttest_1samp(off, 0).pvalue >= LEVEL)


def test_one_unit_accuses_nobody() -> None:
    assert agreement(np.array([[5.0]]), np.array([[1.0]]), margin=0.01).agrees


# Rates, and what is found


@pytest.mark.parametrize("heavy", [False, True])
def test_an_unbiased_screen_is_rarely_called_wrong(heavy: bool) -> None:
    """32 units, 8 layers, and a margin so small that every difference would matter."""
    rng, audits = np.random.default_rng(2), 3000
    alarms = 0
    for _ in range(audits):
        probed = rng.standard_t(3, (8, 32)) if heavy else rng.normal(0, 1, (8, 32))
        noise = rng.standard_t(3, (8, 32)) if heavy else rng.normal(0, 1, (8, 32))
        alarms += not agreement(probed + 0.3 * noise, probed, margin=1e-9).agrees
    assert alarms / audits <= LEVEL + 3 * np.sqrt(LEVEL * (1 - LEVEL) / audits)
    assert alarms > 0, "a test that never rejects has no error rate"


def test_a_mean_five_times_too_large_is_found_at_a_correlation_of_one() -> None:
    rng = np.random.default_rng(3)
    probed = rng.normal(0.01, 0.2, (8, 32))
    predicted = probed + 4 * 0.01
    assert np.corrcoef(predicted.ravel(), probed.ravel())[0, 1] == pytest.approx(1)
    assert not agreement(predicted, probed, margin=0.1).agrees
    assert agreement(predicted, probed, margin=10.0).agrees, "it would not matter"


def test_one_shift_in_many_kinds_is_found_in_their_sum() -> None:
    """Each of eight layers alone is within its error, or too small to matter."""
    rng = np.random.default_rng(4)
    probed = rng.normal(0, 1, (8, 400))
    predicted = probed + 0.03 + rng.normal(0, 0.3, (8, 400))
    alone = [agreement(predicted[[k]], probed[[k]], margin=0.5).agrees for k in range(8)]
    assert all(alone)
    assert not agreement(predicted, probed, margin=0.5).agrees


# In a search


def shifted(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    """A planted fault: what the screen predicts of one layer is `by` too large for every unit."""

    def wrong(*args: object) -> Screen:
        found = screen(*args)  # type: ignore[arg-type]
        batches = {}
        for number, batch in found.batches.items():
            changes = batch.changes.copy()
            changes[found.pairs[name, "fp8"]] += np.float32(by)
            batches[number] = replace(batch, changes=changes)
        return replace(found, batches=batches)

    monkeypatch.setattr(evidence_module, "screen", wrong)


def searched(folder: Path, task: Task | None = None, margin: float = MARGIN) -> SearchResult:
    asked = {"schemes": ["fp8"], "effort": QUICK, "ledger": folder / "ledger", "run": folder / "run"}
    return search(task or planted_task(), margin=margin, **asked)  # type: ignore[arg-type]


def test_a_shifted_mean_is_caught_and_the_probe_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted .0125 where .003 is measured; unit by unit the two agree by more than .96."""
    shifted(monkeypatch, "first.weight", 0.01)
    result = searched(tmp_path)
    audit, known = result.evidence.audit, result.evidence.by_key()
    assert audit is not None
    assert all(row.agrees for row in audit.rows), "correlation and size see nothing"
    assert audit.distrusted == (("linear", (128, 64), "fp8"),)
    row = known["first.weight", "fp8"]
    assert not row.trusted
    assert row.decisive is row.probed
    assert known["last.weight", "fp8"].trusted

    screen_of = result.evidence.predictor
    assert screen_of is not None
    assert ("first.weight", "fp8") not in screen_of.screen.pairs
    page = io.StringIO()
    Console(width=80, file=page).print(run_page(read_run(tmp_path / "run")))
    said = " ".join(page.getvalue().split())
    assert "3 of 3 agree unit by unit, but not in the mean" in said
    assert "predicted to change the metric by +0.013, and measured to change it by +0.003: they DISAGREE" in said
    assert "The screen is not believed for linear 128x64 under fp8: those layers were probed." in said


def test_a_shift_that_the_margin_does_not_feel_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, "first.weight", 0.01)
    audit = searched(tmp_path, margin=1.0).evidence.audit
    assert audit is not None
    assert audit.distrusted == ()


def test_a_good_screen_agrees_in_the_mean_and_the_report_says_with_what_error(tmp_path: Path) -> None:
    audit = searched(tmp_path).evidence.audit
    assert audit is not None
    assert audit.distrusted == ()
    whole = [row for row in audit.means if row.kind is None]
    assert [(row.layers, row.of, row.n) for row in whole] == [(3, 3, 125)]
    page = io.StringIO()
    Console(width=80, file=page).print(run_page(read_run(tmp_path / "run")))
    said = " ".join(page.getvalue().split())
    assert (
        "3 pairs of layer and scheme were drawn and measured one by one: 3 of 3 agree (with 95 % confidence at least"
        in said
    )
    assert "predicted to change the metric by +0.018, and measured to change it by +0.021: they agree (n = 125" in said


def test_the_mean_of_a_guard_is_audited_against_its_own_margin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's margin hardly feels the shift, the guard's does."""
    shifted(monkeypatch, "first.weight", 0.01)
    guard = Guard(Loss("guarded loss"), margin=MARGIN)
    audit = searched(tmp_path, planted_task(guards=(guard,)), margin=1.0).evidence.audit
    assert audit is not None
    assert audit.distrusted == (("linear", (128, 64), "fp8"),)
    assert [row.what for row in audit.means if not row.agrees] == [guard.label]
