"""Which (layer, scheme) pairs may be tried at all, and why the others may not.

Invariant: every pair of the inventory and the schemes has an answer; a refusal is a sentence that ends up in the map.
"""

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from precimap.errors import InputError
from precimap.layers.inventory import Inventory, Layer
from precimap.layers.refusals import refusal
from precimap.layers.target import Target
from precimap.numerics.schemes import Scheme

NO_PATTERNS: Mapping[str, Sequence[str]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Eligibility:
    """(layer, scheme) -> reason why not, or None; and the layers that the user keeps.

    slower: why pairs that could be tried save no time, once layers are timed.
    """

    refusals: dict[tuple[str, str], str | None]
    pinned: frozenset[str]
    slower: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def open_pairs(self) -> tuple[tuple[str, str], ...]:
        """The pairs that may be tried."""
        return tuple(
            pair
            for pair, reason in self.refusals.items()
            if reason is None and pair[0] not in self.pinned and pair not in self.slower
        )

    def reasons(self, layer: str) -> tuple[str, ...]:
        """Why the layer cannot take its schemes, each reason once."""
        told = (*self.slower.items(), *self.refusals.items())
        return tuple(dict.fromkeys(reason for (name, _), reason in told if name == layer and reason is not None))

    def is_slower(self, layer: str) -> bool:
        """Whether time keeps the layer from a scheme that nothing else keeps it from."""
        return any(name == layer for name, _ in self.slower)

    def idle(self) -> tuple[str, ...]:
        """A sentence for each scheme that no layer can take."""
        reasons: dict[str, Counter[str]] = defaultdict(Counter)
        for (layer, scheme), reason in self.refusals.items():
            reasons[scheme][("kept by the user" if layer in self.pinned else reason) or ""] += 1
        return tuple(
            f"no layer can take {scheme}: " + "; ".join(f"{reason} ({count})" for reason, count in found.most_common(3))
            for scheme, found in reasons.items()
            if "" not in found
        )


def open_pairs(allowed: Eligibility, schemes: Sequence[Scheme]) -> list[tuple[str, Scheme]]:
    """The pairs that may be tried, with their schemes."""
    by_name = {scheme.name: scheme for scheme in schemes}
    return [(layer, by_name[name]) for layer, name in allowed.open_pairs()]


def eligibility(
    inventory: Inventory,
    schemes: Sequence[Scheme],
    target: Target,
    pinned: Sequence[str],
    allowed: Mapping[str, Sequence[str]] = NO_PATTERNS,
) -> Eligibility:
    """Ask the rules of all hardware, the target's, the user's own, and fused groups.

    pinned: names or shell patterns of layers to keep. allowed: name or pattern -> the only schemes of those layers.
    Raises InputError for one that matches no layer, or a scheme that is not searched.
    """
    kept = {name for pattern in pinned for name in _matching(inventory, pattern)}
    only = _only(inventory, schemes, allowed)
    refusals = {
        (layer.name, scheme.name): refusal(layer, scheme)
        or target.refusal(layer, scheme)
        or only.get((layer.name, scheme.name))
        for layer in inventory.layers
        for scheme in schemes
    }
    return Eligibility(_with_fused(inventory, schemes, refusals, kept), frozenset(kept))


def refusing(
    allowed: Eligibility, failed: Mapping[tuple[str, str], str], inventory: Inventory, schemes: Sequence[Scheme]
) -> Eligibility:
    """Without the pairs of which it was found out that they cannot be computed, and those that engines fuse with them."""
    refusals = {pair: reason or failed.get(pair) for pair, reason in allowed.refusals.items()}
    return replace(allowed, refusals=_with_fused(inventory, schemes, refusals, allowed.pinned))


def _with_fused(
    inventory: Inventory, schemes: Sequence[Scheme], refusals: dict[tuple[str, str], str | None], kept: Set[str]
) -> dict[tuple[str, str], str | None]:
    found = dict(refusals)
    for layer in inventory.layers:
        for scheme in schemes:
            if found[layer.name, scheme.name] is None:
                found[layer.name, scheme.name] = _refused_with(layer, scheme, inventory, found, kept)
    return found


def _matching(inventory: Inventory, asked: str) -> list[str]:
    """The layers that are asked for: the one of that very name, or else those that match it as a shell pattern.

    A name goes first, since names may hold [ ] * ? (features do): as a pattern one would miss itself and match others.
    """
    names = [layer.name for layer in inventory.layers]
    # Tables show names without `.weight`; what is shown can be asked for.
    exact = [name for name in (asked, f"{asked}.weight") if name in names]
    if exact:
        return exact[:1]
    matched = [n for n in names if fnmatch.fnmatch(n, asked) or fnmatch.fnmatch(n.removesuffix(".weight"), asked)]
    if not matched:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise InputError(f"expected a name or a pattern that matches a layer ({some}), got {asked!r}")
    return matched


def _only(
    inventory: Inventory, schemes: Sequence[Scheme], allowed: Mapping[str, Sequence[str]]
) -> dict[tuple[str, str], str]:
    """The refusals that the user's own list of schemes means."""
    searched = [scheme.name for scheme in schemes]
    found = {}
    for pattern, names in allowed.items():
        unknown = sorted(set(names) - set(searched))
        if unknown:
            raise InputError(f"expected schemes out of {', '.join(searched)} for {pattern!r}, got {', '.join(unknown)}")
        for layer in _matching(inventory, pattern):
            for name in set(searched) - set(names):
                found[layer, name] = f"the user allows only {', '.join(names) or 'base precision'} for {pattern}"
    return found


def _refused_with(
    layer: Layer,
    scheme: Scheme,
    inventory: Inventory,
    refusals: dict[tuple[str, str], str | None],
    kept: Set[str],
) -> str | None:
    """A layer of a fused group is out when another member is: engines give the group one scheme."""
    if layer.fused is None or layer.name in kept:
        return None
    for other in inventory.layers:
        if other.fused == layer.fused and (refusals[other.name, scheme.name] is not None or other.name in kept):
            return f"engines fuse it with {other.name}, which stays in base precision"
    return None
