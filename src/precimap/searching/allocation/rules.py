"""How a chain of maps is made of what is known: the knapsack, or the plain threshold.

Both are values with one method, so that a search is told its rule by being given it.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

from precimap.errors import InputError
from precimap.layers.inventory import Inventory
from precimap.searching.allocation.knapsack import UNCONSTRAINED, Constraints, Step, bytes_at, chain
from precimap.searching.allocation.ladders import settled, total_gain
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.table import BYTES_WORTH, Table
from precimap.searching.allocation.threshold import threshold
from precimap.searching.latency.savings import Savings


class Rule(Protocol):
    """Makes a nested chain of maps, safest first; `accepts` tells whether another map would be an answer, too."""

    @property
    def bytes_worth(self) -> float:
        """What saving all bytes is worth in a gain, beside the time of all FLOPs."""

    def accepts(self, inventory: Inventory, step: Step) -> bool: ...

    def limits(self, inventory: Inventory) -> Constraints:
        """What every map has to keep beside its quality."""

    def may_add(self, found: LayerEvidence, cutoff: float) -> bool:
        """Whether a map that passed may be tried with this layer, too."""

    def wants(self, gain: float) -> bool:
        """Whether it would take a layer for this gain alone."""

    def steps(self, table: Table) -> tuple[Step, ...]:
        """The chain of a table."""


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

    def may_add(self, found: LayerEvidence, cutoff: float) -> bool:
        return True

    def wants(self, gain: float) -> bool:
        return gain > 0

    def accepts(self, inventory: Inventory, step: Step) -> bool:
        limits = self.limits(inventory)
        fits = limits.maximum_bytes is None or step.bytes <= limits.maximum_bytes
        return fits and step.gain >= limits.minimum_gain

    def steps(self, table: Table) -> tuple[Step, ...]:
        rows = table.options(self.bytes_worth, table.price)
        return chain(rows, table.base_bytes, self.limits(table.inventory)) if rows else ()


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

    def may_add(self, found: LayerEvidence, cutoff: float) -> bool:
        """A sensitive layer is never in, whatever the others gain."""
        return found.decisive is not None and found.decisive.lower <= cutoff

    def steps(self, table: Table) -> tuple[Step, ...]:
        found = table.options(self.bytes_worth, table.price)
        rows = {(row.layer, row.scheme): row for row in found}
        sizes = table.base_bytes
        made: list[Step] = []
        for step in threshold(table.candidates(), list(table.schemes), table.cutoff):
            choice = settled(found, step.choice)
            low = [rows[pair] for pair in choice.items()]
            size = sum((sizes | {row.layer: row.bytes for row in low}).values())
            if choice and (not made or made[-1].choice != choice):
                made.append(Step(choice, total_gain(low), sum(row.cost for row in low), size))
        return tuple(made)


def kept_for_time(rule: Rule, table: Table, savings: Savings | None) -> dict[str, str]:
    """Tables that take longer under each of their schemes than saving their bytes is worth to the rule, and the reason.

    None where nothing was timed.
    """
    if savings is None:
        return {}
    unwanted: dict[str, list[LayerEvidence]] = {}
    wanted: set[str] = set()
    for found in table.known:
        worth = table.gain(found, rule.bytes_worth)
        if table.schemes[found.scheme].computes_low or rule.wants(worth) or found.saved is None or found.saved >= 0:
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
