"""From decisions to a PrecisionMap: total, with the reason of every layer.

Invariant: the map holds the very scales that were measured; nothing is fitted again after this point.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch

from precimap.fingerprints import modules_of
from precimap.layers.inventory import Inventory, Layer
from precimap.metrics.power import units_needed
from precimap.numerics.schemes import Scheme
from precimap.precision_map import Decision, OfModel, PrecisionMap, Premise, Verdict
from precimap.searching.calibrate import Calibration
from precimap.searching.eligibility import Eligibility
from precimap.searching.evidence.known import Known
from precimap.searching.evidence.probe import Comparison
from precimap.searching.splits.three_splits import SplitPrints
from precimap.task import Task


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known before the maps of the chain are written down. realign: what is done to each, if anything.

    kept_for_time: tables that no map takes because of their time, and why.
    """

    inventory: Inventory
    schemes: tuple[Scheme, ...]
    eligibility: Eligibility
    calibration: Calibration
    known: tuple[Known, ...]
    cutoff: float
    target: str
    premise: Premise
    alpha: float
    realign: Callable[[PrecisionMap], PrecisionMap] = lambda made: made
    kept_for_time: Mapping[str, str] = field(default_factory=dict)
    _needed: dict[tuple[str, str], int | None] = field(default_factory=dict)  # every map of a chain asks again

    def needed(self, known: Known, found: Comparison) -> int | None:
        """The units that would tell a drop like this one from the cutoff; None where no number would."""
        key = (known.layer, known.scheme)
        if key not in self._needed:
            self._needed[key] = units_needed(found.drop, self.cutoff, self.alpha, worst=found.largest or None)
        return self._needed[key]


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
        architecture=modules_of(task.model),
    )


def assemble(findings: Findings, choice: dict[str, str]) -> PrecisionMap:
    """The map that gives `choice` (layer -> scheme name) to its layers and base precision to all others."""
    known: dict[str, list[Known]] = defaultdict(list)
    for found in findings.known:
        known[found.layer].append(found)
    return PrecisionMap(
        target=findings.target,
        schemes={scheme.name: scheme.row() for scheme in findings.schemes},
        layers={
            layer.name: _decision(findings, layer, choice.get(layer.name), known[layer.name])
            for layer in findings.inventory.layers
        },
        premise=findings.premise,
        of_model=_of_model(findings.inventory),
    )


def _of_model(inventory: Inventory) -> OfModel:
    return OfModel(
        weights_share=inventory.weight_flops / inventory.flops if inventory.flops else 1.0, bytes=inventory.bytes
    )


def _decision(findings: Findings, layer: Layer, chosen: str | None, known: Sequence[Known]) -> Decision:
    verdict, reason = _judged(findings, layer, chosen, known)
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
        evidence={found.scheme: found.probed.evidence() for found in known if _told(found.probed)},
        predicted={found.scheme: found.predicted.evidence() for found in known if _told(found.predicted)},
        flops_share=layer.flops / flops if flops else 0.0,
        bytes=layer.bytes,
        also_read_by=layer.also_read_by,
    )


def _told(found: Comparison | None) -> TypeGuard[Comparison]:
    """Whether there is one with a spread: units of one cluster have none."""
    return found is not None and math.isfinite(found.drop.error)


def _judged(findings: Findings, layer: Layer, chosen: str | None, known: Sequence[Known]) -> tuple[Verdict, str]:
    cutoff = findings.cutoff
    if layer.name in findings.eligibility.pinned:
        return Verdict.PINNED, "kept by the user"
    if not known and findings.eligibility.is_slower(layer.name):
        return Verdict.SLOWER, "; ".join(findings.eligibility.reasons(layer.name))
    if not known and any(name == layer.name for name, _ in findings.eligibility.open_pairs()):
        return Verdict.UNDECIDED, "it was not measured: the search ended before"
    if not known:
        return Verdict.INELIGIBLE, "; ".join(findings.eligibility.reasons(layer.name))
    if chosen is None and layer.name in findings.kept_for_time:
        return Verdict.SLOWER, findings.kept_for_time[layer.name]
    told = [found for found in known if found.decisive is not None and chosen in (None, found.scheme)]
    if not told:
        return Verdict.UNDECIDED, f"its own drop cannot be predicted in this metric; {_fate(chosen)}"
    found = min(told, key=lambda found: found.decisive.upper if found.decisive is not None else float("inf"))
    best = found.decisive
    assert best is not None
    how = f"({_how(found)}, n = {best.drop.n})"
    if best.upper <= cutoff:
        kept = "" if chosen is not None else f"; kept all the same: {_fate(chosen)}"
        return Verdict.TOLERANT, f"its own drop is at most {best.upper:.2g}, below the cutoff {cutoff:.2g} {how}{kept}"
    if best.lower > cutoff and chosen is None:
        return Verdict.SENSITIVE, f"its own drop is at least {best.lower:.2g}, above the cutoff {cutoff:.2g} {how}"
    drop, n = best.drop, findings.needed(found, best)
    told_apart = f"its own drop {drop.estimate:+.2g} +- {drop.error:.2g} {how}"
    asks = f"cannot be told from the cutoff {cutoff:.2g}" + ("" if n is None else f" (needs about {n:,} units)")
    return Verdict.UNDECIDED, f"{told_apart} {asks}; {_fate(chosen)}"


def _how(found: Known) -> str:
    if found.decisive is found.probed:
        return "probed"
    return "predicted" if found.correction is None else "predicted, corrected by a probe"


def _fate(chosen: str | None) -> str:
    return "no map with it was certified" if chosen is None else "in by the certificate of the whole map"
