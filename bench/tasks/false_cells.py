"""Populations with a known drop, from which certificates are drawn that are all false: the margin is the true drop.

Invariant: what judges is the bound that certifies, with the worst unit of a search split of the same size, the floors and
the blind spot; nothing here knows its formulas. A cell says what the worst share of its clusters adds to the drop, so that
a blind spot that was stated can be held against the population: it warned where those clusters alone break the margin.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from precimap.metrics import AUC, NE, Calibration, LogLoss, Metric, PairedDrops
from precimap.metrics.paired import bounded, paired_drop
from precimap.metrics.totals import summed
from precimap.metrics.units import Floats, Units

ALPHA = 0.05
POPULATION = 200_000
IDEAL = 2.4865  # z(0.95) + z(0.8): a margin so many standard errors above the drop would pass a z test 80 % of the time


@dataclass(frozen=True, eq=False)
class Cell:
    """One population. kept: what a metric keeps of each unit under both models; clusters: of each unit, or None.

    ordinary: nothing in it is rare, heavy or uneven, so that the bound has to be powerful there as well as true.
    """

    name: str
    metric: Metric
    kept: tuple[Floats, Floats]
    units: Units
    ordinary: bool = False

    @cached_property
    def whole(self) -> PairedDrops:
        return self.metric.paired(*self.kept, self.units)

    @cached_property
    def true(self) -> float:
        drop = paired_drop(self.whole.d, self.whole.units)
        return abs(drop.estimate) if self.whole.two_sided else drop.estimate

    @cached_property
    def spread(self) -> float:
        """Standard error of a sample times the root of its clusters."""
        drop = paired_drop(self.whole.d, self.whole.units)
        return drop.error * float(np.sqrt(drop.clusters))

    @cached_property
    def _members(self) -> list[NDArray[np.int64]] | None:
        if self.units.clusters is None:
            return None
        order = np.argsort(self.units.clusters, kind="stable")
        edges = np.flatnonzero(np.diff(self.units.clusters[order])) + 1
        return np.split(order, edges)

    @cached_property
    def _worst_first(self) -> Floats:
        """What the worst clusters add to the drop together, the worst one first, as a sum over the population."""
        side = -1.0 if self.whole.two_sided and paired_drop(self.whole.d, self.whole.units).estimate < 0 else 1.0
        weights = self.whole.units.known_weights
        totals = summed(side * weights * self.whole.d, self.whole.units)
        return np.cumsum(np.sort(totals)[::-1]) / weights.sum()

    def of_the_worst(self, share: float) -> float:
        """What the worst `share` of all clusters adds to the drop."""
        return float(self._worst_first[max(0, min(len(self._worst_first), round(share * len(self._worst_first))) - 1)])

    def draw(self, rng: np.random.Generator, clusters: int) -> PairedDrops:
        """A split of so many clusters, drawn with replacement."""
        if self._members is None:
            rows = rng.integers(0, self.units.n, clusters)
            units = self.units.only(rows)
        else:
            taken = [self._members[number] for number in rng.integers(0, len(self._members), clusters)]
            rows = np.concatenate(taken)
            names = np.repeat(np.arange(clusters), [len(part) for part in taken])
            weights = None if self.units.weights is None else self.units.weights[rows]
            units = Units(n=len(rows), clusters=names, weights=weights)
        return self.metric.paired(self.kept[0][rows], self.kept[1][rows], units)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of many draws of a cell, as shares. false: certified although the drop is the margin; warned: of these, those whose
    blind spot the cell lies in; refused: too few units for any certificate. power: certified at a margin that a z test
    would pass 80 % of the time; power_alone: without the search split.
    """

    false: float
    warned: float
    refused: float
    power: float
    power_alone: float

    @property
    def unwarned(self) -> float:
        return self.false - self.warned


def outcome(cell: Cell, clusters: int, draws: int) -> Outcome:
    """Draw splits of a cell and judge each, at the true drop and at a margin that power is counted at."""
    rng = np.random.default_rng(clusters)
    generous = cell.true + IDEAL * cell.spread / np.sqrt(clusters)
    counts = np.zeros(5)
    for _ in range(draws):
        here, there = cell.draw(rng, clusters), cell.draw(rng, clusters)
        alone = bounded(here, ALPHA)
        found = bounded(here, ALPHA, bounded(there, ALPHA).sight.farthest)
        false = found.proves(cell.true)
        room = cell.true - max(0.0, found.size.estimate)
        spot = found.sight.blind_spot(found.size.estimate, cell.true, ALPHA) if false else None
        warned = spot is not None and cell.of_the_worst(1 / spot.one_in) >= room
        refused = found.sight.shortage is not None
        counts += (false, warned, refused, found.proves(generous), alone.proves(generous))
    return Outcome(*(float(share) for share in counts / draws))


def differences(name: str, d: Floats, units: Units | None = None, *, worst: float | None, ordinary: bool) -> Cell:
    """A cell of a loss (worst None) or of a metric that a unit loses at most `worst` of, from the drops themselves."""
    metric = _Given(worst)
    return Cell(name, metric, (np.zeros(len(d)), d), Units(n=len(d)) if units is None else units, ordinary)


@dataclass(frozen=True)
class _Given(LogLoss):
    """A metric that keeps the drops as they are."""

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        return PairedDrops(d=other - baseline, units=units, rows=units.n, changed=units.n, worst=self.worst)


def independent_cells() -> Iterator[Cell]:
    """Losses without a limit: tails of all kinds, rare flips, zeros. The mean is some standard errors above zero."""
    rng = np.random.default_rng(0)
    normal = rng.normal(0.3, 1, POPULATION)
    yield differences("normal", normal, worst=None, ordinary=True)
    yield differences("t3", 0.3 + rng.standard_t(3, POPULATION), worst=None, ordinary=True)
    yield differences("lognormal 1.5", np.exp(rng.normal(0, 1.5, POPULATION)), worst=None, ordinary=False)
    yield differences("Pareto 2.1", rng.pareto(2.1, POPULATION), worst=None, ordinary=False)
    for rate in (0.0005, 0.002, 0.01, 0.05):
        yield differences(f"flips of {rate:.2%}", (rng.random(POPULATION) < rate) * 1.0, worst=None, ordinary=False)
    zeros = (rng.random(POPULATION) < 0.01) * rng.normal(0.5, 1, POPULATION)
    yield differences("99 % zeros", zeros, worst=None, ordinary=False)
    event = 0.05 * rng.normal(0, 1, POPULATION) + (rng.random(POPULATION) < 6e-4) * 20
    yield differences("noise and an event", event, worst=None, ordinary=False)


def _sizes() -> Iterator[tuple[str, Floats]]:
    rng = np.random.default_rng(1)
    count = 20_000
    yield "lognormal 1", np.clip(np.exp(rng.normal(1.5, 1, count)).round(), 1, 400)
    yield "lognormal 1.5", np.clip(np.exp(rng.normal(0.5, 1.5, count)).round(), 1, 400)
    yield "Zipf 2", np.minimum(rng.zipf(2.0, count), 1000).astype(np.float64)


def cluster_cells() -> Iterator[Cell]:
    """Clusters of unequal size, and units of unequal weight, of which the heavy ones may lose more."""
    rng = np.random.default_rng(2)
    for kind, sizes in _sizes():
        count = len(sizes)
        clusters = np.repeat(np.arange(count), sizes.astype(np.int64))
        grows = 0.1 * np.log(sizes) / max(1.0, 0.1 * np.log(sizes.max()))
        per_cluster = {
            "drop grows with size": grows,
            "large ones flip more": (rng.random(count) < 0.02 + 0.3 * (sizes.argsort().argsort() / count) ** 8) * 1.0,
            "2 % lose all": (rng.random(count) < 0.02) * 1.0,
            "only the largest 0.1 % lose": np.clip(sizes / np.quantile(sizes, 0.999), 0, 1),
        }
        for name, d in per_cluster.items():
            for worst in (None, 1.0):
                limit = "" if worst is None else ", at most 1 each"
                units = Units(n=len(clusters), clusters=clusters)
                yield differences(f"{kind} clusters, {name}{limit}", d[clusters], units, worst=worst, ordinary=False)
    weights = np.minimum(rng.pareto(1.5, POPULATION) + 1, 1e4)
    order = weights.argsort().argsort() / POPULATION
    for name, d in {
        "drop grows with weight": 0.1 * np.log(weights),
        "heavy ones flip more": (rng.random(POPULATION) < 0.02 + 0.3 * order**8) * 1.0,
    }.items():
        units = Units(n=POPULATION, weights=weights)
        yield differences(f"Pareto 1.5 weights, {name}, at most 1 each", d, units, worst=1.0, ordinary=False)


def _models(logits: Floats, rng: np.random.Generator) -> Iterator[tuple[str, Floats, bool]]:
    little = logits + 0.01 * rng.standard_normal(len(logits))
    hit = rng.random(len(logits)) < 0.005
    yield "noise", logits + 0.15 * rng.standard_normal(len(logits)), True
    yield "rare -4", little - 4 * hit, False
    yield "rare +4", little + 4 * hit, False
    yield "head -1.5", np.where(logits > np.quantile(logits, 0.999), logits - 1.5, logits), False
    yield "head cut off", np.minimum(little, np.quantile(logits, 0.99)), False


def click_cells(rates: tuple[float, ...] = (0.3, 0.02, 0.001)) -> Iterator[Cell]:
    """NE, calibration, AUC and log-loss of a calibrated click model, at label rates from common to rare."""
    rng = np.random.default_rng(3)
    metrics: tuple[Callable[[], Metric], ...] = (NE, Calibration, AUC, LogLoss)
    for rate in rates:
        logits = rng.normal(0, 1.2, 2 * POPULATION) + np.log(rate / (1 - rate)) - 0.72 * (rate < 0.2)
        labels = (rng.random(len(logits)) < 1 / (1 + np.exp(-logits))) * 1.0
        for name, other, ordinary in _models(logits, rng):
            for metric in metrics:
                kept = [_kept(metric(), scores, labels) for scores in (logits, other)]
                units = Units(n=len(labels))
                # Power is asked for where the rows hold enough of the rarer class for an ordinary sample.
                yield Cell(f"{metric().name} at {rate:g}, {name}", metric(), (kept[0], kept[1]), units, ordinary)


def _kept(metric: Metric, scores: Floats, labels: Floats) -> Floats:
    z = torch.from_numpy(scores)
    return metric.per_unit(z, torch.from_numpy(labels), z).numpy()
