"""A model against the baseline: what the gate, the guards and the reported metrics of a task lose, with their bounds.

Invariant: predictions, probes, whole maps and certificates are compared here and nowhere else, on the same units, so that
one number means the same wherever it stands.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from precimap.metrics.guard import Guard
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import Bounded, Drop, bounded, drop_of
from precimap.metrics.sight import Sight
from precimap.precision_map import Evidence
from precimap.task import Scored, Task


@dataclass(frozen=True, slots=True)
class Guarded:
    """A guard's drop (with its sign, also of a two-sided metric), its bounds, and the margin it has to keep."""

    found: Bounded
    margin: float

    @property
    def filled(self) -> float:
        """The share of the margin up to which the bound reaches; above 1 the guard does not hold."""
        return self.found.upper / self.margin


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A model against the baseline on one split: the drop of the gate, its bounds, and the drops of reported metrics.

    The drop of a two-sided gate is its size. guards: what could be measured of them, by label, with their margins.
    sight: what these units can see of the gate's drop; None where the comparison is a prediction.
    """

    drop: Drop
    lower: float
    upper: float
    reported: dict[str, Drop]
    largest: float  # the largest |difference| of one unit
    guards: dict[str, Guarded] = field(default_factory=dict)
    sight: Sight | None = None

    def within(self, margin: float) -> bool:
        """Whether the bounds of the gate and of every guard are at most their margins."""
        return self.strictest(margin) <= margin

    def strictest(self, margin: float) -> float:
        """The bound of the gate, or that of a guard which fills more of its own margin, in units of the gate's."""
        return max([self.upper, *(margin * guard.filled for guard in self.guards.values())])

    def tightest(self, margin: float) -> str:
        """Whose bound `strictest` is: of the gate, or of a guard by its label."""
        filled = {"the gate": self.upper / margin, **{f"the guard {name}": g.filled for name, g in self.guards.items()}}
        return max(filled, key=lambda name: filled[name])

    def evidence(self) -> Evidence:
        return Evidence(
            drop=self.drop.estimate,
            error=self.drop.error,
            lower=finite(self.lower),
            upper=finite(self.upper),
            n=self.drop.n,
            clusters=self.drop.clusters,
            changed=self.drop.changed,
        )


def compare(
    task: Task, baseline: Scored, other: Scored, alpha: float, elsewhere: Comparison | None = None
) -> Comparison:
    """The paired comparison of two scorings of one split. elsewhere: the same map's on other data, for what it saw there."""
    return judged(task, differences(task, baseline, other), alpha, elsewhere)


@dataclass(frozen=True, slots=True, eq=False)
class Differences:
    """What every unit lost: for the gate, for the guards by label, for the reported metrics by name."""

    gate: PairedDrops
    guards: Mapping[str, PairedDrops]
    reported: Mapping[str, PairedDrops]

    def plus(self, others: Iterable["Differences"]) -> "Differences":
        """What the units would lose if losses added up, each at most the worst there is; of what all of them hold."""
        found = [self, *others]
        names = {name for name in self.guards if all(name in one.guards for one in found)}
        shown = {name for name in self.reported if all(name in one.reported for one in found)}
        return Differences(
            _added([one.gate for one in found]),
            {name: _added([one.guards[name] for one in found]) for name in self.guards if name in names},
            {name: _added([one.reported[name] for one in found]) for name in self.reported if name in shown},
        )


def _added(samples: Sequence[PairedDrops]) -> PairedDrops:
    first = samples[0]
    d = np.sum([sample.d for sample in samples], axis=0)
    if first.worst is not None:
        d = np.minimum(d, first.worst)
    return replace(first, d=d, changed=max(sample.changed for sample in samples))


def differences(task: Task, baseline: Scored, other: Scored) -> Differences:
    """Unit by unit; guards whose slice holds none of these units are left out."""
    guards = {}
    for guard in task.guarded:
        empty = guard.label in baseline.slices and not baseline.slices[guard.label].any()
        if guard.label in other.guards and not empty:
            (before, units), (after, _) = baseline.of_guard(guard.label), other.of_guard(guard.label)
            guards[guard.label] = guard.metric.paired(before, after, units)
    reported = {
        metric.name: metric.paired(baseline.reported[metric.name], other.reported[metric.name], baseline.units)
        for metric in task.reported
        if metric.name in other.reported
    }
    return Differences(task.metric.paired(baseline.values, other.values, baseline.units), guards, reported)


def judged(task: Task, found: Differences, alpha: float, elsewhere: Comparison | None = None) -> Comparison:
    """Drops with their bounds. A guard of which these few units cannot tell (one cluster) is left out; whole splits are
    checked first. elsewhere: as `compare` takes it."""
    far = None if elsewhere is None or elsewhere.sight is None else elsewhere.sight.farthest
    gate = bounded(found.gate, alpha, far)
    reported = {name: drop_of(sample) for name, sample in found.reported.items()}
    guards = {
        guard.label: _guarded(guard, found.guards[guard.label], alpha, elsewhere)
        for guard in task.guarded
        if guard.label in found.guards
    }
    told = {name: guarded for name, guarded in guards.items() if guarded.found.drop.clusters > 1}
    return Comparison(
        drop=gate.size,
        lower=gate.lower,
        upper=gate.upper,
        reported=reported,
        largest=gate.largest,
        guards=told,
        sight=gate.sight,
    )


def _guarded(guard: Guard, sample: PairedDrops, alpha: float, elsewhere: Comparison | None) -> Guarded:
    seen = None if elsewhere is None else elsewhere.guards.get(guard.label)
    return Guarded(bounded(sample, alpha, None if seen is None else seen.found.sight.farthest), guard.margin)


def finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
