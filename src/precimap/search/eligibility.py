"""Which (layer, scheme) pairs may be tried at all, and why the others may not.

Invariant: every pair of the inventory and the schemes has an answer; a refusal is a sentence that ends up in the map.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from precimap.errors import InputError
from precimap.layers.inventory import Inventory, Layer
from precimap.layers.refusals import refusal
from precimap.layers.target import Target
from precimap.numerics.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Eligibility:
    """(layer, scheme) -> reason why not, or None; and the layers that the user keeps."""

    refusals: dict[tuple[str, str], str | None]
    pinned: frozenset[str]

    def open_pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs that may be tried."""
        return tuple(pair for pair, reason in self.refusals.items() if reason is None and pair[0] not in self.pinned)

    def reasons(self, layer: str) -> tuple[str, ...]:
        """Why the layer cannot take its schemes, each reason once."""
        found = [reason for (name, _), reason in self.refusals.items() if name == layer and reason is not None]
        return tuple(dict.fromkeys(found))


def eligibility(inventory: Inventory, schemes: Sequence[Scheme], target: Target, pinned: Sequence[str]) -> Eligibility:
    """Ask the rules of all hardware, the target's, the user's pins (shell patterns of layer names), and fused groups.

    Raises InputError for a pattern that matches no layer.
    """
    names = [layer.name for layer in inventory.layers]
    kept: set[str] = set()
    for pattern in pinned:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise InputError(
                f"expected a pinned pattern that matches a layer, got {pattern!r}; `precimap layers` lists them"
            )
        kept.update(matched)
    refusals = {
        (layer.name, scheme.name): refusal(layer, scheme) or target.refusal(layer, scheme)
        for layer in inventory.layers
        for scheme in schemes
    }
    for layer in inventory.layers:
        for scheme in schemes:
            if refusals[layer.name, scheme.name] is None:
                refusals[layer.name, scheme.name] = _refused_with(layer, scheme, inventory, refusals, kept)
    return Eligibility(refusals, frozenset(kept))


def _refused_with(
    layer: Layer,
    scheme: Scheme,
    inventory: Inventory,
    refusals: dict[tuple[str, str], str | None],
    kept: set[str],
) -> str | None:
    """A layer of a fused group is out when another member is: engines give the group one scheme."""
    if layer.fused is None or layer.name in kept:
        return None
    for other in inventory.layers:
        if other.fused == layer.fused and (refusals[other.name, scheme.name] is not None or other.name in kept):
            return f"engines fuse it with {other.name}, which stays in base precision"
    return None
