"""From decisions to a PrecisionMap: total, with the reason of every layer.

Invariant: the map holds the very scales that were measured; nothing is fitted again after this point.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

import torch

from precimap.decisions import Cast
from precimap.fingerprints import modules_of
from precimap.layers.inventory import Inventory, Layer
from precimap.metrics.power import units_needed
from precimap.precision_map import Decision, OfModel, PrecisionMap, Premise, Verdict
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.table import Table
from precimap.searching.comparison import Comparison
from precimap.searching.pairs import Key
from precimap.searching.splits.three_splits import SplitPrints
from precimap.searching.subject import Subject
from precimap.task import Task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MapWriter:
    """All that is known before the maps of the chain are written down. realign: what is done to each, if anything.

    alpha: of the question. cutoff: the drop of a single layer up to which it is called tolerant. kept_for_time: tables that
    no map takes because of their time, and why.
    """

    subject: Subject
    table: Table
    premise: Premise
    alpha: float
    cutoff: float
    realign: Callable[[PrecisionMap], PrecisionMap] = lambda made: made
    kept_for_time: Mapping[str, str] = field(default_factory=dict)
    _needed: dict[Key, int | None] = field(default_factory=dict)  # every map of a chain asks again

    def needed(self, known: LayerEvidence, found: Comparison) -> int | None:
        """The units that would tell a drop like this one from the cutoff; None where no number would."""
        if known.key not in self._needed:
            self._needed[known.key] = units_needed(found.drop, self.cutoff, self.alpha, worst=found.largest or None)
        return self._needed[known.key]

    def written(self, choice: Mapping[str, str], cast: Cast | None = None) -> PrecisionMap:
        """The map of a choice, realigned if maps are; cast: the dtype that all else is cast to."""
        return self.realign(assemble(self, choice, cast))


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


def assemble(writer: MapWriter, choice: Mapping[str, str], cast: Cast | None = None) -> PrecisionMap:
    """The map that gives `choice` (layer -> scheme name) to its layers, and to all others base precision, or the cast's."""
    subject, known = writer.subject, defaultdict[str, list[LayerEvidence]](list)
    for found in writer.table.known:
        known[found.layer].append(found)
    return PrecisionMap(
        target=subject.target.name,
        schemes={scheme.name: scheme.row() for scheme in subject.schemes},
        layers={
            layer.name: _decision(writer, layer, choice.get(layer.name), known[layer.name], cast)
            for layer in subject.inventory.layers
        },
        premise=writer.premise,
        cast=cast,
        of_model=_of_model(subject.inventory),
    )


def _of_model(inventory: Inventory) -> OfModel:
    return OfModel(
        weights_share=inventory.weight_flops / inventory.flops if inventory.flops else 1.0, bytes=inventory.bytes
    )


def _decision(
    writer: MapWriter, layer: Layer, chosen: str | None, known: Sequence[LayerEvidence], cast: Cast | None
) -> Decision:
    subject, (verdict, reason) = writer.subject, _judged(writer, layer, chosen, known)
    scheme = None if chosen is None else subject.by_name[chosen]
    found = None if scheme is None else subject.calibration.input_range(layer.name, scheme)
    flops = subject.inventory.weight_flops
    return Decision(
        scheme=chosen,
        verdict=verdict,
        reason=reason + _fate(verdict, chosen, cast),
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


def _judged(writer: MapWriter, layer: Layer, chosen: str | None, known: Sequence[LayerEvidence]) -> tuple[Verdict, str]:
    cutoff, eligible = writer.cutoff, writer.subject.eligibility
    if layer.name in eligible.pinned:
        return Verdict.PINNED, "kept by the user"
    if not known and eligible.is_slower(layer.name):
        return Verdict.SLOWER, "; ".join(eligible.reasons(layer.name))
    if not known and any(name == layer.name for name, _ in eligible.open_pairs()):
        return Verdict.UNDECIDED, "it was not measured: the search ended before"
    if not known:
        return Verdict.INELIGIBLE, "; ".join(eligible.reasons(layer.name))
    if chosen is None and layer.name in writer.kept_for_time:
        return Verdict.SLOWER, writer.kept_for_time[layer.name]
    told = [found for found in known if found.decisive is not None and chosen in (None, found.scheme)]
    if not told:
        return Verdict.UNDECIDED, "its own drop cannot be predicted in this metric"
    found = min(told, key=lambda found: found.decisive.upper if found.decisive is not None else float("inf"))
    best = found.decisive
    assert best is not None
    how = f"({_how(found)}, n = {best.drop.n})"
    if best.upper <= cutoff:
        return Verdict.TOLERANT, f"its own drop is at most {best.upper:.2g}, below the cutoff {cutoff:.2g} {how}"
    if best.lower > cutoff and chosen is None:
        return Verdict.SENSITIVE, f"its own drop is at least {best.lower:.2g}, above the cutoff {cutoff:.2g} {how}"
    drop, n = best.drop, writer.needed(found, best)
    told_apart = f"its own drop {drop.estimate:+.2g} ± {drop.error:.2g} {how}"
    asks = f"is within the noise of the cutoff {cutoff:.2g}" + ("" if n is None else f" (about {n:,} units would tell)")
    return Verdict.UNDECIDED, f"{told_apart} {asks}"


def _how(found: LayerEvidence) -> str:
    if found.decisive is found.probed:
        return "probed"
    return "predicted" if found.correction is None else "predicted, corrected by a probe"


def _fate(verdict: Verdict, chosen: str | None, cast: Cast | None) -> str:
    """What became of the layer, where its verdict does not say it."""
    if chosen is None and cast is not None:
        return f"; it runs in {cast}, as all else does"
    if verdict is Verdict.TOLERANT and chosen is None:
        return "; kept all the same: no map with it was certified"
    if verdict is Verdict.UNDECIDED:
        return f"; {'no map with it was certified' if chosen is None else 'the certificate of the whole map covers it'}"
    return ""
