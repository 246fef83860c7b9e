"""Whether a wrong screen is caught, and which pairs a decision hangs on: against scipy and brute force."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest

from helpers.small_tasks import planted_task
from precimap import search
from precimap.layers.inventory import Inventory, Layer
from precimap.numerics.schemes import SCHEMES
from precimap.searching.evidence import gather as evidence_module
from precimap.searching.evidence.audit import LEAST_AUDITED, MOST_AUDITED, Audit, Audited, ambiguous, to_audit
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.means import kind_of
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.question import Effort

Changed = Callable[[NDArray[np.float32]], NDArray[np.float32]]
MARGIN = 0.2
QUICK = Effort(rounding_draws=0)


def audited(correlation: float, predicted: float = 1.0, probed: float = 1.0, error: float = 0.0) -> Audited:
    return Audited(
        layer="layer",
        scheme="fp8",
        correlation=correlation,
        ratio=1.0,
        predicted=predicted,
        probed=probed,
        error=error,
        n=10,
    )


def invented(kinds: list[int]) -> Inventory:
    """One layer for each entry; layers of one entry's number have one shape."""
    layers = tuple(
        Layer(
            name=f"l{i}",
            shape=(16, 16 * (1 + kind)),
            dtype="float32",
            element_bytes=4,
            ops=("linear",),
            calls=1,
            flops=1,
            contracted=(1,),
            inputs=16,
            outputs=16,
        )
        for i, kind in enumerate(kinds)
    )
    return Inventory(layers=layers, others=(), units=1, hidden_flops=(), products=())


@given(st.integers(0, 20), st.integers(0, 20))
def test_the_share_and_its_bound_are_clopper_and_pearsons(agreeing: int, others: int) -> None:
    found = Audit((audited(0.95),) * agreeing + (audited(0.5),) * others, ())
    if not agreeing + others:
        assert found.share == (1.0, 0.0)
        return
    test = binomtest(agreeing, agreeing + others, alternative="greater")
    share, lower = found.share
    assert share == agreeing / (agreeing + others)
    assert lower == pytest.approx(test.proportion_ci(0.95, method="exact").low, abs=1e-12)


def test_the_approximation_is_a_root_mean_square_share() -> None:
    rows = (audited(1, predicted=2.0, probed=2.2), audited(1, predicted=-1.0, probed=0.0, error=1.0), audited(1, 0, 0))
    assert Audit(rows, ()).approximation == pytest.approx(((0.1**2 + 0.5**2 + 0) / 3) ** 0.5)
    assert Audit((), ()).approximation == 0


@given(
    st.lists(st.integers(0, 25), min_size=1, max_size=60),
    st.sampled_from([("fp8",), ("fp8", "int8")]),
    st.integers(0, 9),
)
def test_a_sample_holds_each_kind_and_at_least_eight(kinds: list[int], schemes: tuple[str, ...], seed: int) -> None:
    inventory = invented(kinds)
    pairs = [(layer.name, SCHEMES[scheme]) for layer in inventory.layers for scheme in schemes]
    chosen = to_audit(inventory, pairs, seed)
    assert chosen == to_audit(inventory, pairs, seed)
    assert len(set(chosen)) == len(chosen) <= MOST_AUDITED
    assert set(chosen) <= set(pairs)
    assert len(chosen) >= min(LEAST_AUDITED, len(pairs))
    counts = Counter(kind_of(inventory, (name, scheme.name)) for name, scheme in chosen)
    all_kinds = {kind_of(inventory, (name, scheme.name)) for name, scheme in pairs}
    assert len(counts) == min(len(all_kinds), MOST_AUDITED)
    if len(all_kinds) >= LEAST_AUDITED:
        assert set(counts.values()) == {1}


def test_samples_of_other_seeds_differ() -> None:
    inventory = invented([0] * 40)
    pairs = [(layer.name, SCHEMES["fp8"]) for layer in inventory.layers]
    assert len({to_audit(inventory, pairs, seed) for seed in range(5)}) == 5


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0.1, 3)), min_size=2, max_size=9),
    st.data(),
    st.floats(0.01, 0.9),
)
def test_ambiguous_are_those_whose_membership_flips(
    table: list[tuple[float, float]], data: st.DataObject, error: float
) -> None:
    """A pair is in when its price is at most that of some budget between the dearest taken and the cheapest left."""
    keys = [(f"l{i}", "fp8") for i in range(len(table))]
    costs = {key: cost for key, (cost, _) in zip(keys, table, strict=True)}
    gains = {key: gain for key, (_, gain) in zip(keys, table, strict=True)}
    prices = {key: costs[key] / gains[key] for key in keys}
    order = sorted(keys, key=lambda key: prices[key])
    taken = data.draw(st.integers(1, len(order) - 1))
    chosen = dict(order[:taken])
    limits = np.linspace(prices[order[taken - 1]], prices[order[taken]], 50)
    flipping = set()
    for key in keys:
        inside = key[0] in chosen
        reach = prices[key] * (1 + error) if inside else prices[key] * (1 - error)
        margin = 1e-9 * prices[key]
        if any(reach >= limit - margin if inside else reach <= limit + margin for limit in limits):
            flipping.add(key)
    found = ambiguous(costs, gains, chosen, error, most=100)
    sure = {k for k in keys if abs(_distance(prices[k], limits) - error) > 1e-6}
    assert set(found) & sure == flipping & sure
    distances = [_distance(prices[key], limits) for key in found]
    assert distances == sorted(distances)
    assert ambiguous(costs, gains, chosen, error, most=1) == found[:1]


def _distance(price: float, limits: NDArray[np.float64]) -> float:
    low, high = float(limits[0]), float(limits[-1])
    return max(low - price, price - high, 0.0) / price


def test_nothing_is_ambiguous_where_all_or_none_is_taken() -> None:
    costs, gains = {("a", "fp8"): 1.0, ("b", "fp8"): 2.0}, {("a", "fp8"): 1.0, ("b", "fp8"): 1.0}
    assert ambiguous(costs, gains, {}, 1.0, 9) == ()
    assert ambiguous(costs, gains, {"a": "fp8", "b": "fp8"}, 1.0, 9) == ()
    assert ambiguous(costs | {("b", "fp8"): float("inf")}, gains, {"a": "fp8"}, 1.0, 9) == ()


def searched(folder: Path, schemes: list[str]) -> EvidenceTable:
    return search(planted_task(), schemes=schemes, margin=MARGIN, ledger=folder, effort=QUICK).evidence


def spoiled(monkeypatch: pytest.MonkeyPatch, key: tuple[str, str], change: Changed) -> None:
    """A planted fault: the screen's numbers for one layer pass through `change`."""

    def wrong(*args: object) -> Screen:
        found = screen(*args)  # type: ignore[arg-type]
        batches = {}
        for number, batch in found.batches.items():
            changes = batch.changes.copy()
            changes[found.pairs[key]] = change(changes[found.pairs[key]])
            batches[number] = replace(batch, changes=changes)
        return replace(found, batches=batches)

    monkeypatch.setattr(evidence_module, "screen", wrong)


def test_a_good_screen_is_trusted(tmp_path: Path) -> None:
    found = searched(tmp_path, ["fp8"])
    assert found.audit is not None
    assert len(found.audit.rows) == 3  # all there are
    share, lower = found.audit.share
    assert share == 1
    assert lower == pytest.approx(binomtest(3, 3, alternative="greater").proportion_ci(0.95).low)
    assert found.audit.distrusted == ()
    assert all(row.trusted for row in found.known)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: np.random.default_rng(0).permutation(c),
        lambda c: -c,
        lambda c: c * 0,
        lambda c: c * np.float32(3),
        lambda c: c / np.float32(3),
    ],
    ids=["shuffled", "wrong sign", "zero", "three times", "a third"],
)
def test_a_planted_fault_is_caught_and_the_probe_decides(
    change: Changed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, ("last.weight", "fp8"), change)
    found = searched(tmp_path, ["fp8-e5m2", "fp8"])
    assert found.audit is not None
    assert found.audit.distrusted == (("linear", (16, 64), "fp8"),)
    assert found.audit.share[0] < 1
    for row in found.known:
        assert row.trusted == ((row.layer, row.scheme) != ("last.weight", "fp8"))
        if not row.trusted:
            assert row.predicted is not None
            assert row.probed is not None
            assert row.decisive is row.probed
            assert row.probed.drop.n >= row.predicted.drop.n  # not on the few units of the audit alone


def test_the_planted_outliers_leave_the_linear_range_and_are_probed(tmp_path: Path) -> None:
    found = searched(tmp_path, ["fp8-tensor", "fp8"])
    assert found.audit is not None
    assert found.audit.distrusted == (("linear", (64, 128), "fp8-tensor"),)
    row = found.by_key()["outlier.weight", "fp8-tensor"]
    assert row.predicted is not None
    assert row.decisive is row.probed is not None
    assert row.probed is not None
    assert row.probed.drop.estimate > 3 * MARGIN
    assert found.by_key()["outlier.weight", "fp8"].trusted
