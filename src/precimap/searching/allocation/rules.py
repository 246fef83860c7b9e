"""How a chain of maps is made of what is known: the knapsack, or the plain threshold.

Both are values with one method, so that a search is told its rule by being given it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from precimap.errors import InputError
from precimap.layers.inventory import Inventory
from precimap.metrics.metric import Metric
from precimap.numerics.schemes import Scheme
from precimap.searching.allocation.knapsack import UNCONSTRAINED, Constraints, Step, bytes_at, chain
from precimap.searching.allocation.ladders import settled, total_gain
from precimap.searching.allocation.threshold import Candidate, default_cutoff, threshold
from precimap.searching.evidence.known import BYTES_WORTH, Known, gain, options, price
from precimap.searching.latency.savings import Savings
from precimap.searching.limits import Limits


class Rule(Protocol):
    """Makes a nested chain of maps, safest first; `accepts` tells whether another map would be an answer, too."""

    @property
    def bytes_worth(self) -> float:
        """What saving all bytes is worth in a gain, beside the time of all FLOPs."""

    def accepts(self, inventory: Inventory, step: Step) -> bool: ...

    def limits(self, inventory: Inventory) -> Constraints:
        """What every map has to keep beside its quality."""

    def may_add(self, found: Known, cutoff: float) -> bool:
        """Whether a map that passed may be tried with this layer, too."""

    def wants(self, gain: float) -> bool:
        """Whether it would take a layer for this gain alone."""

    def steps(
        self,
        inventory: Inventory,
        metric: Metric,
        known: Sequence[Known],
        schemes: Mapping[str, Scheme],
        margin: float,
        cutoff: float,
    ) -> tuple[Step, ...]:
        """margin: of the gate. cutoff: the drop of a single layer up to which it is called tolerant."""


@dataclass(frozen=True, slots=True)
class Knapsack:
    """The most time and bytes saved for what a map costs; see `knapsack.chain`. The cutoff plays no part in it.

    effective_bits: limit of the average bits of a layer's weights, their scales included, another way to say
    `constraints.maximum_bytes`. bytes_worth: what saving all bytes is worth, where saving the time of all FLOPs is worth
    1; the default only breaks ties, so that the tables of a ranking model (most bytes, no FLOPs) hardly count.
    Raises InputError for a worth that is negative or not finite.
    """

    constraints: Constraints = UNCONSTRAINED
    effective_bits: float | None = None
    bytes_worth: float = BYTES_WORTH

    def __post_init__(self) -> None:
        if not 0 <= self.bytes_worth < math.inf:
            raise InputError(
                "bytes_worth is what saving all bytes is worth beside the time of all FLOPs, 0 or more; "
                f"got {self.bytes_worth}"
            )

    def limits(self, inventory: Inventory) -> Constraints:
        """The constraints in bytes, for this model."""
        if self.effective_bits is None:
            return self.constraints
        size = bytes_at(self.effective_bits, {layer.name: layer.numel for layer in inventory.layers})
        given = self.constraints.maximum_bytes
        return replace(self.constraints, maximum_bytes=size if given is None else min(given, size))

    def may_add(self, found: Known, cutoff: float) -> bool:
        return True

    def wants(self, gain: float) -> bool:
        return gain > 0

    def accepts(self, inventory: Inventory, step: Step) -> bool:
        limits = self.limits(inventory)
        fits = limits.maximum_bytes is None or step.bytes <= limits.maximum_bytes
        return fits and step.gain >= limits.minimum_gain

    def steps(
        self,
        inventory: Inventory,
        metric: Metric,
        known: Sequence[Known],
        schemes: Mapping[str, Scheme],
        margin: float,
        cutoff: float,
    ) -> tuple[Step, ...]:
        rows = options(inventory, known, schemes, price(metric, known, margin), self.bytes_worth)
        base = {layer.name: layer.bytes for layer in inventory.layers}
        return chain(rows, base, self.limits(inventory)) if rows else ()


KNAPSACK = Knapsack()


@dataclass(frozen=True, slots=True)
class Threshold:
    """The plain rule: a layer is in when the upper bound of its own drop is below the cutoff; see `allocate`."""

    @property
    def bytes_worth(self) -> float:
        """No choice rests on it: a tolerant layer is in, unless it only saves beside siblings that are not."""
        return BYTES_WORTH

    def wants(self, gain: float) -> bool:
        return True

    def accepts(self, inventory: Inventory, step: Step) -> bool:
        return True

    def limits(self, inventory: Inventory) -> Constraints:
        return UNCONSTRAINED

    def may_add(self, found: Known, cutoff: float) -> bool:
        """A sensitive layer is never in, whatever the others gain."""
        return found.decisive is not None and found.decisive.lower <= cutoff

    def steps(
        self,
        inventory: Inventory,
        metric: Metric,
        known: Sequence[Known],
        schemes: Mapping[str, Scheme],
        margin: float,
        cutoff: float,
    ) -> tuple[Step, ...]:
        found = options(inventory, known, schemes, price(metric, known, margin))
        rows = {(row.layer, row.scheme): row for row in found}
        sizes = {layer.name: layer.bytes for layer in inventory.layers}
        made: list[Step] = []
        for step in threshold(candidates(inventory, known, margin), list(schemes), cutoff):
            choice = settled(found, step.choice)
            low = [rows[pair] for pair in choice.items()]
            size = sum((sizes | {row.layer: row.bytes for row in low}).values())
            if choice and (not made or made[-1].choice != choice):
                made.append(Step(choice, total_gain(low), sum(row.cost for row in low), size))
        return tuple(made)


def candidates(inventory: Inventory, known: Sequence[Known], margin: float) -> list[Candidate]:
    """What the threshold rule reads: bounds of the gate, or of a guard that comes nearer to its margin.

    Layers of which nothing is known in the metric itself are left out.
    """
    groups = {layer.name: layer.fused for layer in inventory.layers}
    return [
        Candidate(
            found.layer, found.scheme, found.decisive.lower, found.decisive.strictest(margin), groups[found.layer]
        )
        for found in known
        if found.decisive is not None
    ]


def kept_for_time(
    rule: Rule, inventory: Inventory, known: Sequence[Known], schemes: Sequence[Scheme], savings: Savings | None
) -> dict[str, str]:
    """Tables that take longer under each of their schemes than saving their bytes is worth to the rule, and the reason.

    None where nothing was timed.
    """
    if savings is None:
        return {}
    by_name = {scheme.name: scheme for scheme in schemes}
    unwanted: dict[str, list[Known]] = {}
    wanted: set[str] = set()
    for found in known:
        scheme = by_name[found.scheme]
        worth = gain(inventory, found.layer, scheme, rule.bytes_worth, found.saved)
        if scheme.computes_low or rule.wants(worth) or found.saved is None or found.saved >= 0:
            wanted.add(found.layer)
        unwanted.setdefault(found.layer, []).append(found)
    reasons = {}
    for layer, rows in unwanted.items():
        if layer not in wanted:
            times = [(row.scheme, savings.alone[layer, row.scheme]) for row in rows]
            said = "; ".join(
                f"{name} takes {time} times as long as base precision (n = {time.n})" for name, time in times
            )
            reasons[layer] = f"{said}, more than its bytes are worth"
    return reasons


def cutoff_of(limits: Limits, inventory: Inventory, known: Sequence[Known]) -> float:
    """The drop of a single layer up to which it is called tolerant: the user's, or the margin shared by all candidates."""
    return limits.cutoff or default_cutoff(limits.margin, candidates(inventory, known, limits.margin))
