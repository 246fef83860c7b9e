"""What is not believed decides nothing: predictions of maps after the audit, and bounds where a probe is missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.small_tasks import planted_task
from precimap import search
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import paired_drop
from precimap.metrics.units import Units
from precimap.searching.allocation.price import Currency, Price, cost
from precimap.searching.comparison import Differences
from precimap.searching.evidence import gather as evidence_module
from precimap.searching.evidence.bound import bound
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.question import Effort

MARGIN = 0.2
KEY = (
    "outlier.weight",
    "fp8-tensor",
)  # its drop is more than three margins, and the screen is made to say nothing of it


def sample(d: np.ndarray, worst: float | None = None) -> PairedDrops:
    return PairedDrops(d=d, units=Units(n=len(d)), rows=len(d), changed=int(np.count_nonzero(d)), worst=worst)


@given(st.integers(0, 1000), st.integers(1, 5), st.sampled_from([None, 0.5, 1.0]))
def test_differences_add_up_to_the_worst_and_not_beyond(seed: int, count: int, worst: float | None) -> None:
    rng = np.random.default_rng(seed)
    parts = [np.minimum(rng.normal(0, 0.6, 20), np.inf if worst is None else worst) for _ in range(count)]
    first, *others = [Differences(sample(d, worst), {}, {}) for d in parts]
    added = first.plus(others).gate
    expected = [min(sum(column), np.inf if worst is None else worst) for column in zip(*parts, strict=True)]
    assert added.d == pytest.approx(np.array(expected))
    assert added.worst == worst


def test_only_what_all_hold_is_added() -> None:
    d = np.ones(3)
    one = Differences(sample(d), {"a": sample(d), "b": sample(d)}, {"shown": sample(d)})
    other = Differences(sample(d), {"b": sample(2 * d)}, {})
    added = one.plus([other])
    assert list(added.guards) == ["b"]
    assert added.guards["b"].d == pytest.approx(3 * d)
    assert not added.reported


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> EvidenceTable:
    """The screen is silent about the layer that per-tensor FP8 wrecks."""

    def silent(*args: object) -> Screen:
        found = screen(*args)  # type: ignore[arg-type]
        batches = {}
        for number, batch in found.batches.items():
            changes = batch.changes.copy()
            changes[found.pairs[KEY]] = 0
            batches[number] = replace(batch, changes=changes)
        return replace(found, batches=batches)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evidence_module, "screen", silent)
        folder: Path = tmp_path_factory.mktemp("ledger")
        asked = search(
            planted_task(), schemes=["fp8-tensor"], margin=MARGIN, ledger=folder, effort=Effort(rounding_draws=0)
        )
    return asked.evidence


def test_a_bound_rests_on_the_probe_of_what_is_not_believed(evidence: EvidenceTable) -> None:
    known, predictor = evidence.by_key(), evidence.predictor
    assert predictor is not None
    row = known[KEY]
    assert not row.trusted
    assert row.predicted is not None
    assert row.probed is not None
    assert row.predicted.upper == 0, "what the screen says is known, and shown"
    assert row.probed.drop.estimate > 3 * MARGIN
    assert bound(predictor, known, dict([KEY]), MARGIN) == pytest.approx(row.probed.upper)
    assert cost(row, Price(Currency.MEAN, MARGIN)) > 3 * MARGIN


def test_a_map_is_predicted_by_adding_what_its_probes_measured(evidence: EvidenceTable) -> None:
    """To the unit: the predicted drop of two layers is that of the one, and the probe of the other."""
    predictor, known = evidence.predictor, evidence.by_key()
    assert predictor is not None
    other = next(key for key in predictor.screen.pairs)
    joint, alone = predictor.comparison([other, KEY]), predictor.comparison([other])
    assert joint is not None
    assert alone is not None
    probed = predictor.probed[KEY].gate
    summed = paired_drop(predictor.loss_changes([other]) + probed.d, probed.units)
    assert (joint.drop.estimate, joint.drop.error) == pytest.approx((summed.estimate, summed.error))
    assert joint.drop.estimate == pytest.approx(alone.drop.estimate + paired_drop(probed.d, probed.units).estimate)
    assert known[KEY].probed is not None


def test_without_its_probe_it_cannot_be_in_any_plan(evidence: EvidenceTable) -> None:
    """Time ran out before it: nothing is known, whatever the screen said."""
    predictor, known = evidence.predictor, evidence.by_key()
    assert predictor is not None
    missing = {**known, KEY: replace(known[KEY], probed=None)}
    forgotten = replace(predictor, probed={})
    assert missing[KEY].decisive is None
    assert bound(forgotten, missing, dict([KEY]), MARGIN) == float("inf")
    assert forgotten.comparison([KEY]) is None
    for currency in Currency:
        assert cost(missing[KEY], Price(currency, MARGIN)) == float("inf")
    choice = dict(key for key, row in known.items() if row.trusted)
    assert len(choice) == 2
    assert bound(forgotten, missing, choice, MARGIN) < MARGIN, "what is believed is planned as before"


def test_a_probe_of_fewer_units_adds_its_upper_bound(evidence: EvidenceTable) -> None:
    predictor, known = evidence.predictor, evidence.by_key()
    assert predictor is not None
    probed = known[KEY].probed
    assert probed is not None
    assert bound(replace(predictor, probed={}), known, dict([KEY]), MARGIN) == pytest.approx(probed.upper)
