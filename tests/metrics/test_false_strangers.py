"""The promise on inputs that nobody here thought of at first: rare events, heavy tails, uneven clusters, few positives.

The cells and the judging are those of `bench/false_certificates.py`, which runs all of them with more draws. Every
certificate of a cell is false, for the margin is its true drop. A cell keeps the promise where at most alpha of its draws
are certified, the others being refused, or saying in their blind spot that just such a population would escape them.
"""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest

from precimap.metrics.paired import bounded, paired_drop
from precimap.metrics.units import Units
from tasks.false_cells import ALPHA, Cell, Outcome, click_cells, cluster_cells, differences, independent_cells, outcome

DRAWS = 200
ALLOWED = ALPHA + 3 * np.sqrt(ALPHA * (1 - ALPHA) / DRAWS)  # 0.096


@cache
def cells(kind: str) -> dict[str, Cell]:
    makers = {"independent": independent_cells, "clusters": cluster_cells, "clicks": lambda: click_cells((0.02,))}
    return {cell.name: cell for cell in makers[kind]()}


def judged(kind: str, clusters: int) -> Iterator[tuple[Cell, Outcome]]:
    for cell in cells(kind).values():
        yield cell, outcome(cell, clusters, DRAWS)


@pytest.mark.parametrize(("kind", "clusters"), [("independent", 200), ("clusters", 100), ("clicks", 2000)])
def test_what_is_certified_falsely_is_warned_of(kind: str, clusters: int) -> None:
    for cell, found in judged(kind, clusters):
        assert found.unwarned <= ALLOWED, cell.name
        if cell.ordinary:
            assert found.false <= ALLOWED, cell.name
            assert found.power >= found.power_alone - 0.08, "it costs 5 points at most, and 200 draws tell 3"


def test_the_worst_unit_of_the_search_split_keeps_back_what_the_certify_split_does_not_hold() -> None:
    """About one event in a split: where the certify split holds none, every second search split does."""
    rng = np.random.default_rng(0)
    d = 0.005 * rng.standard_normal(400_000) + (rng.random(400_000) < 1 / 2000) * 2.0
    cell = differences("an event", d, worst=None, ordinary=False)
    alone = with_search = 0
    for _ in range(DRAWS):
        here, there = cell.draw(rng, 2000), cell.draw(rng, 2000)
        alone += bounded(here, ALPHA).upper <= cell.true
        with_search += bounded(here, ALPHA, bounded(there, ALPHA).sight.farthest).upper <= cell.true
    assert alone / DRAWS > 0.25
    assert with_search / DRAWS < 0.55 * alone / DRAWS


def test_an_ordinary_population_lies_in_no_blind_spot() -> None:
    """Else the sentence would excuse everything: the worst units of a normal drop do not break the margin by themselves."""
    cell = cells("independent")["normal"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        found = bounded(cell.draw(rng, 500), ALPHA)
        margin = found.upper  # as tight as a certificate can be
        spot = found.sight.blind_spot(found.size.estimate, margin, ALPHA)
        assert spot is not None
        assert cell.of_the_worst(1 / spot.one_in) < margin - found.size.estimate


def test_auc_bounds_what_its_rows_can_lose() -> None:
    """Some rows fall from the top to the bottom; the linearised bound with the worst of a row is never too small."""
    cell = cells("clicks")["AUC at 0.02, rare -4"]
    rng = np.random.default_rng(0)
    for _ in range(50):
        sample = cell.draw(rng, 3000)
        assert sample.limits is not None
        assert (sample.d <= sample.limits + 1e-9).all()
        assert sample.worst == sample.limits.max()
        assert bounded(sample, ALPHA).upper > cell.true
    with_positives = Units(n=cell.whole.units.n)
    assert paired_drop(cell.whole.d, with_positives).estimate == pytest.approx(cell.true)
