"""Quantise one layer, leave the rest, score the search split: the literal micro-benchmark.

Invariant: a probe is a paired comparison with the baseline on the same units, scored on the same path, so that an
unquantised model probes to exactly zero.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer, quantize_layer, quantized
from precimap.layers.views import parameter_names
from precimap.metrics.paired import Drop, differences, lower_bound, paired_drop, upper_bound
from precimap.numerics.schemes import BF16_FLOOR, Scheme
from precimap.precision_map import Evidence
from precimap.search.calibrate import Calibration
from precimap.task import Batches, Scored, Task, score


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model against the baseline on one split: the drop of the gate, its bounds, and the drops of reported metrics."""

    drop: Drop
    lower: float
    upper: float
    reported: dict[str, Drop]
    largest: float  # the largest |difference| of one unit

    def evidence(self) -> Evidence:
        return Evidence(
            drop=self.drop.estimate,
            error=self.drop.error,
            lower=_finite(self.lower),
            upper=_finite(self.upper),
            n=self.drop.n,
            clusters=self.drop.clusters,
            changed=self.drop.changed,
        )


@dataclass(frozen=True, slots=True)
class Probe:
    """One layer under one scheme, the rest at base precision."""

    layer: str
    scheme: str
    comparison: Comparison
    seconds: float


def compare(task: Task, baseline: Scored, other: Scored, alpha: float) -> Comparison:
    """The paired comparison of two scorings of one split."""
    d = differences(task.metric, baseline.values, other.values)
    reported = {
        metric.name: paired_drop(
            differences(metric, baseline.reported[metric.name], other.reported[metric.name]), baseline.units
        )
        for metric in task.reported
    }
    return Comparison(
        paired_drop(d, baseline.units),
        lower_bound(d, baseline.units, alpha),
        upper_bound(d, baseline.units, alpha, task.metric.worst),
        reported,
        float(abs(d).max()),
    )


def score_baseline(task: Task, batches: Batches) -> Scored:
    """Score the model as given, on the path on which quantised layers are scored."""
    with quantized(task.model, {}):
        return score(task, task.model, batches)


def prepare(
    task: Task, inventory: Inventory, calibration: Calibration, choice: Mapping[str, Scheme]
) -> dict[str, QuantizedLayer]:
    """Codes and scales of the chosen layers: what every later step computes with."""
    weights = parameter_names(task.model)
    return {
        name: quantize_layer(
            name, weights[name], inventory.layer(name).contracted, scheme, calibration.input_range(name, scheme)
        )
        for name, scheme in choice.items()
    }


def probe(
    task: Task,
    inventory: Inventory,
    calibration: Calibration,
    baseline: Scored,
    layer: str,
    scheme: Scheme,
    alpha: float,
) -> Probe:
    """Measure one layer under one scheme on the search split."""
    started = time.perf_counter()
    layers = prepare(task, inventory, calibration, {layer: scheme})
    with quantized(task.model, layers):
        scored = score(task, task.model, task.splits.search)
    comparison = compare(task, baseline, scored, alpha)
    return Probe(layer, scheme.name, comparison, time.perf_counter() - started)


def rounding_floor(task: Task, inventory: Inventory, baseline: Scored, alpha: float) -> Comparison:
    """What rounding all weights and inputs of the layers to BF16 alone does to the metric: the noise floor."""
    alive = {layer.name: BF16_FLOOR for layer in inventory.layers if layer.dead is None and not layer.lookup}
    layers = prepare(task, inventory, Calibration({}), alive)
    with quantized(task.model, layers):
        scored = score(task, task.model, task.splits.search)
    return compare(task, baseline, scored, alpha)


def _finite(value: float) -> float | None:
    return value if abs(value) != float("inf") else None
