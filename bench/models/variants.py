"""One ranking task served in several ways: as given, in BF16, all in FP8, under a certified map.

Invariant: all ways are scored on the same certify split, against the same baseline, by the very metrics that precimap
certifies with; scores are kept, so that every metric sees the same ones. The split chose none of the ways.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap import Task, discover
from precimap.errors import InputError
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.realign import realigned, score_layer
from precimap.layers.views import parameter_names
from precimap.metrics import Metric, Units
from precimap.metrics.paired import Bounded, bounded
from precimap.numerics.grid_shift import GridShift
from precimap.numerics.schemes import BF16_FLOOR, Scheme, scheme
from precimap.precision_map import PrecisionMap, Realignment
from precimap.searching.calibrate import InputRanges, calibrate
from precimap.searching.progress import silent
from precimap.searching.realigner import Realigner
from precimap.task import first_batch, to_device

BLANKET = scheme("fp8-static")
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Judge:
    """A metric and the rows it sees. flat: each candidate is a row of its own, candidate 0 the one that was clicked."""

    metric: Metric
    flat: bool = False


@dataclass(frozen=True, slots=True)
class Way:
    """One way to serve: layer -> scheme, and whether the last logit is realigned."""

    name: str
    choice: Mapping[str, Scheme]
    repaired: bool = False


BASELINE = Way("baseline", {})


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """Of the certify split: scores, labels, losses and clusters of all units."""

    scores: Tensor
    labels: Tensor
    losses: Tensor
    clusters: NDArray[np.int64] | None

    def kept(self, judge: Judge) -> tuple[NDArray[np.float64], Units]:
        """What the metric keeps of these units, and the units."""
        n = len(self.scores)
        if not judge.flat:
            kept = judge.metric.per_unit(self.scores, self.labels, self.losses)
            return kept.numpy(), Units(n=n, clusters=self.clusters)
        rows = self.scores.reshape(-1)
        clicked = torch.zeros_like(self.scores)
        clicked[:, 0] = 1
        own = np.arange(n) if self.clusters is None else self.clusters
        units = Units(n=len(rows), clusters=np.repeat(own, self.scores.shape[1]))
        return judge.metric.per_unit(rows, clicked.reshape(-1), rows).numpy(), units


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A task with what every way needs. realigner: None for a task without a layer that makes the score."""

    task: Task
    inventory: Inventory
    calibration: InputRanges
    realigner: Realigner | None

    @classmethod
    def of(cls, task: Task) -> "Subject":
        batch = first_batch(task, task.splits.search)
        inventory = discover(task.model, task.forward, batch)
        names = tuple(layer.name for layer in inventory.layers if not layer.lookup)
        try:
            realigner = Realigner(task, score_layer(task.model, task.forward, inventory, batch))
        except InputError:
            realigner = None
        return cls(task, inventory, calibrate(task, names, silent), realigner)

    def blanket(self, chosen: Scheme) -> dict[str, Scheme]:
        """Every layer with a product, also those that no kernel takes: what a tool without a choice emulates."""
        return {layer.name: chosen for layer in self.inventory.layers if not layer.lookup and layer.dead is None}

    def scored(self, way: Way, seed: int | None = None) -> Scores:
        """The certify split under a way; `seed`: on a shifted rounding grid."""
        repair = self._repair(way, seed) if way.repaired else None
        model = realigned(self.task.model, repair)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        clusters = []
        with torch.no_grad(), quantized(model, self._layers(way, model, seed)):
            for batch in self.task.splits.certify:
                batch = to_device(batch, self.task.device)
                scores = self.task.forward(model, batch)
                found.append((scores, self.task.labels(batch), self.task.loss(scores, batch)))
                if self.task.clusters is not None:
                    clusters.append(torch.as_tensor(self.task.clusters(batch)).numpy())
        return Scores(*map(torch.cat, zip(*found, strict=True)), np.concatenate(clusters) if clusters else None)

    def _layers(self, way: Way, model: torch.nn.Module, seed: int | None) -> dict[str, QuantizedLayer]:
        weights, shift = parameter_names(model), None if seed is None else GridShift(seed)
        return {
            name: quantize_layer(
                name,
                weights[name],
                self.inventory.layer(name).contracted,
                chosen,
                self.calibration.input_range(name, chosen),
                shift,
            )
            for name, chosen in way.choice.items()
        }

    def _repair(self, way: Way, seed: int | None) -> Realignment:
        """As a search does it: without labels, on the calibration split."""
        assert self.realigner is not None
        return self.realigner.fit(self._layers(way, self.task.model, seed))

    def share_of_flops(self, way: Way) -> float:
        low = [self.inventory.layer(name).flops for name, chosen in way.choice.items() if chosen.computes_low]
        return sum(low) / self.inventory.weight_flops if self.inventory.weight_flops else 0.0

    def share_of_bytes(self, way: Way) -> float:
        """Of the layers' bytes, those of layers in 8 bits or fewer."""
        low = [self.inventory.layer(name).bytes for name, chosen in way.choice.items() if chosen.weight_bits <= 8]
        return sum(low) / self.inventory.layer_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A way on the certify split. values: of each metric by name; drops: with errors over units.

    over_grids: of the first metric's drop, its standard deviation over shifted rounding grids and how many; None where
    none were drawn.
    """

    way: Way
    values: dict[str, float]
    drops: dict[str, Bounded]
    over_grids: tuple[float, int] | None
    flops: float
    bytes: float


def measured(subject: Subject, ways: Sequence[Way], judges: Sequence[Judge], grids: int) -> list[Measured]:
    """Every way, judged by every metric; the first way is the baseline."""
    baseline = subject.scored(ways[0])
    before = {judge.metric.name: baseline.kept(judge) for judge in judges}

    def drop(judge: Judge, scores: Scores) -> Bounded:
        kept, units = before[judge.metric.name]
        return bounded(judge.metric.paired(kept, scores.kept(judge)[0], units), ALPHA)

    found = []
    for way in ways:
        scores = baseline if way is ways[0] else subject.scored(way)
        values = {judge.metric.name: judge.metric.value(*scores.kept(judge)) for judge in judges}
        drops = {judge.metric.name: drop(judge, scores) for judge in judges}
        spread = None
        if grids and way.choice and all(chosen.weight_bits <= 8 for chosen in way.choice.values()):
            on_grids = [drop(judges[0], subject.scored(way, seed)).drop.estimate for seed in range(grids)]
            spread = statistics.stdev(on_grids), grids
        shares = subject.share_of_flops(way), subject.share_of_bytes(way)
        found.append(Measured(way, values, drops, spread, *shares))
    return found


def ways_of(subject: Subject, certified: PrecisionMap) -> list[Way]:
    """Baseline, BF16, blanket FP8 (and realigned, where there is a last logit), the certified map."""
    own: dict[str, Scheme] = {}
    for name in certified.low:
        chosen = certified.scheme_of(name)
        assert chosen is not None
        own[name] = chosen
    blanket = subject.blanket(BLANKET)
    return [
        BASELINE,
        Way("BF16", subject.blanket(BF16_FLOOR)),
        Way("all FP8", blanket),
        *([Way("all FP8, realigned", blanket, repaired=True)] if subject.realigner is not None else []),
        Way("certified map", own, repaired=certified.realignment is not None),
    ]


def told_apart(subject: Subject, first: Way, second: Way, judge: Judge) -> tuple[Bounded, int | None]:
    """The second way's drop against the first, and the n that would tell them apart by two errors; None if they are."""
    kept, units = subject.scored(first).kept(judge)
    between = bounded(judge.metric.paired(kept, subject.scored(second).kept(judge)[0], units), ALPHA)
    size, error = abs(between.drop.estimate), between.drop.error
    if size > 2 * error or not size:
        return between, None
    return between, math.ceil(between.drop.n * (2 * error / size) ** 2)
