"""From decisions to a PrecisionMap: total, with the reason of every layer.

Invariant: the map holds the very scales that were measured; nothing is fitted again after this point.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from precimap.layers.inventory import Inventory, Layer
from precimap.numerics.schemes import Scheme
from precimap.precision_map import Decision, PrecisionMap, Premise, Verdict
from precimap.search.calibrate import Calibration
from precimap.search.eligibility import Eligibility
from precimap.search.preflight import SplitPrints
from precimap.search.probe import Probe
from precimap.task import Task


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known before the maps of the chain are written down."""

    inventory: Inventory
    schemes: tuple[Scheme, ...]
    eligibility: Eligibility
    calibration: Calibration
    probes: tuple[Probe, ...]
    cutoff: float
    target: str
    premise: Premise


def premise_of(task: Task, weights: str, prints: SplitPrints, version: str) -> Premise:
    """What a map of this task is bound to."""
    return Premise(
        weights=weights,
        task=task.name,
        metric=task.metric.name,
        calibration=prints.calibration.whole,
        search=prints.search.whole,
        certify=prints.certify.whole,
        base_precision=task.base_precision,
        device=str(task.device),
        precimap=version,
        torch=torch.__version__,
    )


def assemble(findings: Findings, choice: dict[str, str]) -> PrecisionMap:
    """The map that gives `choice` (layer -> scheme name) to its layers and base precision to all others."""
    probes: dict[str, list[Probe]] = defaultdict(list)
    for probe in findings.probes:
        probes[probe.layer].append(probe)
    return PrecisionMap(
        target=findings.target,
        schemes={scheme.name: scheme.row() for scheme in findings.schemes},
        layers={
            layer.name: _decision(findings, layer, choice.get(layer.name), probes[layer.name])
            for layer in findings.inventory.layers
        },
        premise=findings.premise,
    )


def _decision(findings: Findings, layer: Layer, chosen: str | None, probes: Sequence[Probe]) -> Decision:
    verdict, reason = _judged(findings, layer, chosen, probes)
    scheme = next((s for s in findings.schemes if s.name == chosen), None)
    found = None if scheme is None else findings.calibration.input_range(layer.name, scheme)
    flops = findings.inventory.weight_flops
    return Decision(
        scheme=chosen,
        verdict=verdict,
        reason=reason,
        shape=layer.shape,
        ops=layer.ops,
        contracted=layer.contracted,
        input_scale=None if found is None else found.scale,
        input_zero=None if found is None else found.zero,
        evidence={probe.scheme: probe.comparison.evidence() for probe in probes},
        flops_share=layer.flops / flops if flops else 0.0,
        bytes=layer.bytes,
    )


def _judged(findings: Findings, layer: Layer, chosen: str | None, probes: Sequence[Probe]) -> tuple[Verdict, str]:
    cutoff = findings.cutoff
    if layer.name in findings.eligibility.pinned:
        return Verdict.PINNED, "kept by the user"
    if not probes:
        return Verdict.INELIGIBLE, "; ".join(findings.eligibility.reasons(layer.name))
    best = min(probes, key=lambda probe: probe.comparison.upper)
    if chosen is not None:
        best = next(probe for probe in probes if probe.scheme == chosen)
    drop, n = best.comparison.drop, best.comparison.drop.n
    if best.comparison.upper <= cutoff:
        reason = f"its own drop is at most {best.comparison.upper:.2g}, below the cutoff {cutoff:.2g} (n = {n})"
        return Verdict.TOLERANT, reason
    if best.comparison.lower > cutoff:
        reason = f"its own drop is at least {best.comparison.lower:.2g}, above the cutoff {cutoff:.2g} (n = {n})"
        return Verdict.SENSITIVE, reason
    told = (
        f"its own drop {drop.estimate:+.2g} +- {drop.error:.2g} cannot be told from the cutoff {cutoff:.2g} (n = {n})"
    )
    if chosen is not None:
        return Verdict.UNDECIDED, f"{told}; in by the certificate of the whole map"
    return Verdict.UNDECIDED, f"{told}; no map with it was certified"
