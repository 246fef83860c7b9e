"""The table that a map is chosen from: what each layer costs the metric under each scheme, and what it saves.

Invariant: one table serves every rule and every step that looks for a map, so that a layer is worth the same wherever it
is asked for. What was measured (`LayerEvidence`) comes in, `Option` goes out to the arithmetic, which knows no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from precimap.decisions import keeps_parameter
from precimap.layers.inventory import Inventory, Layer
from precimap.metrics.metric import Metric
from precimap.numerics.schemes import Scheme
from precimap.searching.allocation.ladders import Option
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.price import Price, cost, price
from precimap.searching.allocation.threshold import Candidate, default_cutoff
from precimap.searching.pairs import Key

# Where FLOPs stand in for time, sharing an input breaks ties, as do bytes unless the user says what they are worth.
SHARED_INPUT, BYTES_WORTH = 0.01, 1e-3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table:
    """What is known of the open pairs of a model. margin: of the gate. given_cutoff: the user's, or None.

    schemes: by name, those that come first are preferred on equal terms.
    """

    inventory: Inventory
    metric: Metric
    schemes: Mapping[str, Scheme]
    known: tuple[LayerEvidence, ...]
    margin: float
    given_cutoff: float | None = None

    @property
    def cutoff(self) -> float:
        """The drop up to which a single layer is called tolerant: the user's, or the margin shared by all candidates."""
        return self.given_cutoff or default_cutoff(self.margin, self.candidates())

    @property
    def price(self) -> Price:
        """How costs are counted."""
        return price(self.metric, self.known, self.margin)

    @property
    def base_bytes(self) -> dict[str, int]:
        """Of each layer in base precision."""
        return {layer.name: layer.bytes for layer in self.inventory.layers}

    def by_key(self) -> dict[Key, LayerEvidence]:
        return {found.key: found for found in self.known}

    def of(self, known: Sequence[LayerEvidence]) -> Self:
        """The table of some of its rows; a layer is called tolerant as in the whole."""
        return replace(self, known=tuple(known), given_cutoff=self.cutoff)

    def candidates(self) -> list[Candidate]:
        """What the threshold rule reads: bounds of the gate, or of a guard that comes nearer to its margin.

        Layers of which nothing is known in the metric itself are left out.
        """
        groups = {layer.name: layer.fused for layer in self.inventory.layers}
        return [
            Candidate(
                layer=found.layer,
                scheme=found.scheme,
                lower=found.decisive.lower,
                upper=found.decisive.strictest(self.margin),
                fused=groups[found.layer],
            )
            for found in self.known
            if found.decisive is not None
        ]

    def gain(self, found: LayerEvidence, bytes_worth: float = BYTES_WORTH) -> float:
        """What a layer saves under a scheme, as the knapsack counts it; see `gain`."""
        return gain(self.inventory, found.layer, self.schemes[found.scheme], bytes_worth, found.saved)

    def options(self, bytes_worth: float, counted: Price) -> tuple[Option, ...]:
        """The rows that a knapsack is filled from; `bytes_worth` as in `gain`."""
        rows = [self._option(found, bytes_worth, counted) for found in self.known]
        return tuple(rows) if any(found.saved is not None for found in self.known) else _tied(rows, self.schemes)

    def _option(self, found: LayerEvidence, bytes_worth: float, counted: Price) -> Option:
        layer, scheme = self.inventory.layer(found.layer), self.schemes[found.scheme]
        return Option(
            layer=found.layer,
            scheme=found.scheme,
            gain=self.gain(found, bytes_worth),
            cost=cost(found, counted),
            bytes=scheme.stored_bytes(layer.shape, layer.contracted) + _kept(layer, scheme),
            fused=layer.fused,
            siblings=layer.siblings,
            shared=found.shared,
        )


def gain(
    inventory: Inventory,
    layer: str,
    scheme: Scheme,
    bytes_worth: float = BYTES_WORTH,
    saved: float | None = None,
) -> float:
    """What low precision saves of the layers' time, and bytes. Negative for a scheme that takes more time than bytes pay.

    saved: share of the time of all timed layers, as measured. Without it the share of the model's weight FLOPs stands
    in, each taking time as its bits: 8 half as much as 16, and a quarter of what float32 takes. bytes_worth: what saving
    the bytes of all layers is worth, where saving all of that time is worth 1. The scale and offset of packed rows count, a
    good part of a narrow row. Scales of products do not: a few bytes would set one granularity above another, whatever it
    costs. A parameter that stays beside its codes saves none.
    """
    found = inventory.layer(layer)
    if saved is None:
        flops = found.flops / inventory.weight_flops if inventory.weight_flops and scheme.computes_low else 0.0
        saved = max(0.0, 1 - scheme.weight_bits / (8 * found.element_bytes)) * flops
    codes = found.numel * scheme.weight_bits / 8
    stored = codes if scheme.rows is None else scheme.stored_bytes(found.shape, found.contracted)
    stored += _kept(found, scheme)
    return saved + bytes_worth * max(0.0, found.bytes - stored) / inventory.layer_bytes


def _kept(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the parameter, where it stays beside its codes."""
    return layer.bytes if keeps_parameter(layer.ops, layer.also_read_by, scheme) else 0


def _tied(rows: Sequence[Option], schemes: Mapping[str, Scheme]) -> tuple[Option, ...]:
    """Where nothing was timed, sharing a quantised input is worth a hundredth of what the largest reader gains."""
    best: dict[tuple[str | None, str], float] = {}
    for row in rows:
        if row.siblings is not None and schemes[row.scheme].input is not None:
            best[row.siblings, row.scheme] = max(best.get((row.siblings, row.scheme), 0.0), SHARED_INPUT * row.gain)
    return tuple(replace(row, shared=best.get((row.siblings, row.scheme), 0.0)) for row in rows)
