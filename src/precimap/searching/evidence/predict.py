"""What the screen predicts of a map: its metric, by adding the changes of its layers (superposition).

Where the screen holds changes of scores, the user's own loss and metrics are evaluated on baseline scores plus changes,
for any map, without a forward pass. Where it holds changes of losses, a metric that is a loss gets their sum plus a
curvature term; any other metric is not predicted at all. What a layer loses that the screen cannot see,
or that the audit took from it, was measured by its own probe, unit by unit, and is added to what the rest is predicted to
lose. Invariant: a prediction is a `Comparison` like a measurement, made on the same units with the same statistics, but no
prediction is ever stored or shown as a measurement.

The curvature of a sum of losses is taken in proportion to sum E[change^2]: its factor is fitted on whole maps that were
measured (`fitted`), and is zero before. A factor from theory would need the second derivative of the user's loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from precimap.metrics.metric import Loss
from precimap.searching.comparison import Comparison, Differences, differences, judged
from precimap.searching.evidence.probe import Probe
from precimap.searching.evidence.screen import Screen
from precimap.searching.pairs import Key
from precimap.searching.realigner import by_output, realigning
from precimap.searching.run import Parts
from precimap.task import Scored, ScoredPart, Task, join_parts, judge_scores, to_device

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictor:
    """Predicts maps of screened layers. batches: those of the search split that were screened, by number.

    realigned: of how many outputs the scores are realigned before maps are compared; 0: they are not. probed: what the
    units lose under layers that are not in the screen, as measured one by one.
    """

    task: Task
    screen: Screen
    baseline: Parts
    batches: Mapping[int, Any]
    alpha: float
    curvature: float = 0.0
    realigned: int = 0
    probed: Mapping[Key, Differences] = field(default_factory=dict)

    @property
    def predicts_metric(self) -> bool:
        """Whether the gate itself can be predicted."""
        return bool(self.screen.batches) and (self.screen.by_scores or isinstance(self.task.metric, Loss))

    @property
    def numbers(self) -> tuple[int, ...]:
        return tuple(sorted(self.screen.batches))

    def on(self, numbers: Sequence[int]) -> "Predictor":
        """The screen on some of its batches; without what was probed, which is of all of them."""
        batches = {number: self.screen.batches[number] for number in numbers}
        return replace(self, screen=replace(self.screen, batches=batches), probed={})

    def believed(self, keys: Iterable[Key], probes: Iterable[Probe]) -> "Predictor":
        """Only `keys` are predicted by the screen; of others the probes that saw all its batches are taken."""
        kept = set(keys)
        pairs = {key: row for key, row in self.screen.pairs.items() if key in kept}
        found = {
            (probe.layer, probe.scheme): differences(self.task, self.reference, probe.scored)
            for probe in probes
            if probe.numbers == self.numbers and (probe.layer, probe.scheme) not in pairs
        }
        return replace(self, screen=replace(self.screen, pairs=pairs), probed=found)

    def tells(self, key: Key) -> bool:
        """Whether anything is known, unit by unit, of what this layer does."""
        return key in self.screen.pairs or key in self.probed

    @cached_property
    def reference(self) -> Scored:
        """The baseline on the screened units."""
        return self.baseline.only(self.numbers)

    def scored(self, keys: Sequence[Key]) -> Scored:
        """The units' predicted losses, and their predicted values of the metrics that can be predicted."""
        if self.screen.by_scores:
            return join_parts(self.task, [self._by_scores(keys, number) for number in self.numbers])
        bend = self.curvature * self._energy(keys) if self.curvature else 0.0
        losses = tuple(m for m in self.task.reported if isinstance(m, Loss))
        guards = tuple(g for g in self.task.guarded if isinstance(g.metric, Loss))
        task = replace(self.task, reported=losses, guards=guards)
        return join_parts(task, [self._by_losses(keys, number, bend) for number in self.numbers])

    def comparison(self, keys: Sequence[Key]) -> Comparison | None:
        """The predicted comparison with the baseline; None where the metric, or one of the layers, cannot be predicted."""
        if not (self.predicts_metric and all(self.tells(key) for key in keys)):
            return None
        seen = [key for key in keys if key in self.screen.pairs]
        found = differences(self.task, self.reference, self._as_served(seen))
        measured = [self.probed[key] for key in keys if key not in self.screen.pairs]
        return judged(self.task, found.plus(measured) if measured else found, self.alpha)

    def _as_served(self, keys: Sequence[Key]) -> Scored:
        if not (self.realigned and self.screen.by_scores):
            return self.scored(keys)
        found = {number: self._scores(keys, number) for number in self.numbers}
        rows = {number: by_output(scores, self.realigned) for number, scores in found.items()}
        baseline = [by_output(self.screen.batches[number].scores, self.realigned) for number in found]
        scale, shift = map(np.array, realigning(np.concatenate(list(rows.values())), np.concatenate(baseline)))
        aligned = {number: (scale * rows[number] + shift).reshape(scores.shape) for number, scores in found.items()}
        return join_parts(self.task, [self._judged(scores, number) for number, scores in aligned.items()])

    def loss_changes(self, keys: Sequence[Key]) -> Floats:
        """The predicted change of each screened unit's loss, float64 [units]."""
        changed: Floats = self.scored(keys).losses - self.reference.losses
        return changed

    def drift(self, keys: Sequence[Key]) -> float:
        """The mean change of the scores (of the losses, where those were screened): calibration breaks before order."""
        changes = np.concatenate([self.screen.change(keys, number) for number in self.numbers])
        return float(changes.mean())

    def fitted(self, keys: Sequence[Key], measured: Comparison) -> "Predictor":
        """With the curvature that makes the prediction for this map agree with its measurement on the screened units.

        Unchanged by a map with layers of which nothing is known unit by unit: what they add is not the curvature's.
        """
        if self.screen.by_scores or not self.predicts_metric or not all(self.tells(key) for key in keys):
            return self
        energy = self._energy([key for key in keys if key in self.screen.pairs])
        straight = replace(self, curvature=0.0).comparison(keys)
        if straight is None or energy == 0.0:
            return self
        return replace(self, curvature=(measured.drop.estimate - straight.drop.estimate) / energy)

    def _energy(self, keys: Sequence[Key]) -> float:
        """sum over the layers of E[change^2]."""
        rows = [self.screen.pairs[key] for key in keys]
        squares = [np.square(batch.changes[rows], dtype=np.float64).sum(0) for batch in self.screen.batches.values()]
        return float(np.concatenate(squares).mean()) if rows else 0.0

    def _by_scores(self, keys: Sequence[Key], number: int) -> ScoredPart:
        return self._judged(self._scores(keys, number), number)

    def _scores(self, keys: Sequence[Key], number: int) -> Floats:
        batch = self.screen.batches[number]
        scores: Floats = batch.scores + self.screen.change(keys, number).reshape(batch.scores.shape)
        return scores

    def _judged(self, scores: Floats, number: int) -> ScoredPart:
        on_device = torch.from_numpy(scores).float().to(self.task.device)
        with torch.no_grad():
            return judge_scores(
                self.task, on_device, to_device(self.batches[number], self.task.device), f"batch {number}"
            )

    def _by_losses(self, keys: Sequence[Key], number: int, bend: float) -> ScoredPart:
        part = self.baseline.each[number]
        change = self.screen.change(keys, number) + bend
        losses = part.losses + change
        reported = {m.name: part.reported[m.name] + change for m in self.task.reported if isinstance(m, Loss)}
        guards = {g.label: part.guards[g.label] + change for g in self.task.guarded if isinstance(g.metric, Loss)}
        values = part.values + change if isinstance(self.task.metric, Loss) else part.values
        slices = {label: rows for label, rows in part.slices.items() if label in guards}
        return ScoredPart(
            values=values,
            losses=losses,
            reported=reported,
            guards=guards,
            slices=slices,
            clusters=part.clusters,
            weights=part.weights,
        )
