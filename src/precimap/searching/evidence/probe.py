"""The direct probe: quantise one layer, leave the rest, score. The literal micro-benchmark, by replay.

Invariant: a probe is a paired comparison with the baseline on the same units, scored on the same path, so that an
unquantised model probes to exactly zero; replayed and plain probes agree to the bit. The outer loop is over batches, so
that the recorded results of one batch at a time are held.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from precimap.errors import FAILURES, first_line
from precimap.layers.code_products import Operand
from precimap.layers.emulation import operand, quantized
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.replay import Recording, Replay
from precimap.layers.views import parameter_names
from precimap.metrics.guard import Guard
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import Bounded, Drop, bounded, drop_of
from precimap.metrics.sight import Sight
from precimap.numerics.schemes import Scheme, scheme_key
from precimap.precision_map import Evidence
from precimap.searching.calibrate import Calibration, codes
from precimap.searching.evidence.screen_plan import Pair
from precimap.searching.run import Parts, Run, batch_subject, part_of, record_part
from precimap.task import Scored, Task, join_parts, score_batch, to_device

FAILED = "probe failed"  # the kind of what could not be probed, in the journal


@dataclass(frozen=True, slots=True)
class Guarded:
    """A guard's drop (with its sign, also of a two-sided metric), its bounds, and the margin it has to keep."""

    found: Bounded
    margin: float

    @property
    def filled(self) -> float:
        """The share of the margin up to which the bound reaches; above 1 the guard does not hold."""
        return self.found.upper / self.margin


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """One layer under one scheme, the rest at base precision, on the batches `numbers` of the search split."""

    layer: str
    scheme: str
    comparison: Comparison
    numbers: tuple[int, ...]
    scored: Scored
    seconds: float


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
    return Comparison(gate.size, gate.lower, gate.upper, reported, gate.largest, told, gate.sight)


def _guarded(guard: Guard, sample: PairedDrops, alpha: float, elsewhere: Comparison | None) -> Guarded:
    seen = None if elsewhere is None else elsewhere.guards.get(guard.label)
    return Guarded(bounded(sample, alpha, None if seen is None else seen.found.sight.farthest), guard.margin)


def prepare(
    task: Task, inventory: Inventory, calibration: Calibration, choice: Mapping[str, Scheme]
) -> dict[str, QuantizedLayer]:
    """Codes and scales of the chosen layers: what every later step computes with."""
    return {layer.name: layer for layer in codes(task, inventory, calibration, choice.items())}


def probe(
    run: Run,
    inventory: Inventory,
    calibration: Calibration,
    baseline: Parts,
    pairs: Sequence[Pair],
    numbers: Sequence[int],
    alpha: float,
    replay_memory: int,
) -> tuple[Probe, ...]:
    """Measure each pair on the batches `numbers` of the search split; those that the journal holds are read from it.

    replay_memory: bytes of recorded results that may be held, and a quarter of it of decoded weights. When the run is
    out of time, the batches that all pairs have seen are used; pairs that have seen none are left out, and so are those
    that fail where the model itself does not (`failures` says why).
    """
    codes: dict[Pair, tuple[QuantizedLayer, Operand | None]] = {}
    room = replay_memory // 4  # for decoded weights: decoding one takes as long as its product with a small batch
    complete: list[int] = []
    for number, batch in enumerate(run.task.splits.search):
        if number not in numbers:
            continue
        run.progress("probe", len(complete), len(numbers))
        missing = [
            pair
            for pair in _without_failures(run, pairs)
            if run.journal.find("probe", batch_subject(pair[0], number), scheme_key(pair[1])) is None
        ]
        for pair in missing:
            if pair not in codes:
                layer = prepare(run.task, inventory, calibration, dict([pair]))[pair[0]]
                fits = 4 * layer.codes.numel() <= room
                codes[pair] = layer, operand(layer) if fits else None
                room -= 4 * layer.codes.numel() if fits else 0
        if missing and not _probe_batch(run, batch, number, [(p, codes[p]) for p in missing], replay_memory):
            break
        complete.append(number)
    run.progress("probe", len(numbers), len(numbers))
    if not complete:
        return ()
    return tuple(_joined(run, baseline, pair, tuple(complete), alpha) for pair in _without_failures(run, pairs))


def _without_failures(run: Run, pairs: Sequence[Pair]) -> list[Pair]:
    failed = failures(run, pairs)
    return [(name, scheme) for name, scheme in pairs if (name, scheme.name) not in failed]


def failures(run: Run, pairs: Sequence[Pair]) -> dict[tuple[str, str], str]:
    """Which of the pairs cannot be probed, and why."""
    rows = {(row.subject, row.scheme): str(row.value["reason"]) for row in run.journal.measurements(FAILED)}
    return {
        (name, scheme.name): rows[name, scheme_key(scheme)]
        for name, scheme in pairs
        if (name, scheme_key(scheme)) in rows
    }


def _probe_batch(
    run: Run,
    batch: object,
    number: int,
    layers: Sequence[tuple[Pair, tuple[QuantizedLayer, Operand | None]]],
    replay_memory: int,
) -> bool:
    """Probe one batch under each layer. False when time ran out before the last."""
    task, weights = run.task, parameter_names(run.task.model)
    batch, place = to_device(batch, task.device), f"batch {number} of the search split"
    recording = Recording(replay_memory)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            score_batch(task, task.model, batch, place)
        for (name, scheme), (layer, decoded) in layers:
            if run.out_of_time:
                return False
            started = time.perf_counter()
            weight = operand(layer) if decoded is None else decoded
            try:
                with Replay(weights, {name: layer}, {name: weight}, recording):
                    part = score_batch(task, task.model, batch, place)
            except FAILURES as error:
                with quantized(task.model, {}):  # if this fails, too, it is not the layer
                    score_batch(task, task.model, batch, place)
                reason = f"in {scheme.name} it cannot be probed: {first_line(error)}"
                run.journal.record(FAILED, name, {"reason": reason}, scheme_key(scheme))
                continue
            subject, seconds = batch_subject(name, number), time.perf_counter() - started
            record_part(run.journal, "probe", subject, part, seconds, scheme_key(scheme))
    return True


def _joined(run: Run, baseline: Parts, pair: Pair, numbers: tuple[int, ...], alpha: float) -> Probe:
    name, scheme = pair
    rows = [run.journal.find("probe", batch_subject(name, number), scheme_key(scheme)) for number in numbers]
    found = [row for row in rows if row is not None]
    whole = join_parts(run.task, [part_of(row) for row in found])
    comparison = compare(run.task, baseline.only(numbers), whole, alpha)
    return Probe(name, scheme.name, comparison, numbers, whole, sum(float(row.value["seconds"]) for row in found))


def finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
