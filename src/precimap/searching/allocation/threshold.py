"""Which layer gets which scheme: a pure function of a table of numbers.

Invariant: the maps of a chain are nested, from the safest to the most aggressive, and fixed before the certify split is
looked at. Torch-free, so that it is tested on invented tables. The rule is `threshold`: a layer is in as soon as its
own upper bound is below the cutoff. Free knapsack optima do not nest and cannot be tested in a fixed order.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

LONGEST_CHAIN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One layer under one scheme: the one-sided bounds of its own drop, and the group that must share its scheme."""

    layer: str
    scheme: str
    lower: float
    upper: float
    fused: str | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One map of a chain: layer -> scheme name, and the cutoff at which it is the answer of the rule."""

    choice: dict[str, str]
    cutoff: float


@dataclass(frozen=True, slots=True)
class _Group:
    """Layers that move together, under one scheme; its bounds are those of its worst member."""

    layers: tuple[str, ...]
    scheme: str
    lower: float
    upper: float


def default_cutoff(margin: float, candidates: Iterable[Candidate]) -> float:
    """The margin divided by the number of layers that could be in: if all just pass, their sum does."""
    return margin / max(1, len({candidate.layer for candidate in candidates}))


def threshold(candidates: Sequence[Candidate], schemes: Sequence[str], cutoff: float) -> tuple[Step, ...]:
    """The chain of the threshold rule, safest map first.

    The first map holds the layers whose upper bound is at most `cutoff`. At FP8 single-layer drops are mostly smaller
    than their own error, so the rule goes on with the cutoff doubled until every layer that is not sensitive is in;
    whether such a map as a whole keeps the metric is for the search split to show and for the certify split to
    certify. A sensitive layer (lower bound above the cutoff) is never in. `schemes` in the order of preference: a layer
    takes the first scheme that passes and keeps it in all later maps.
    """
    groups = [group for group in _groups(candidates, schemes) if group.lower <= cutoff]
    chosen: dict[str, str] = {}
    steps: list[Step] = []
    level = cutoff
    while True:
        for group in groups:
            if group.upper <= level and not any(layer in chosen for layer in group.layers):
                chosen.update(dict.fromkeys(group.layers, group.scheme))
        if chosen and (not steps or steps[-1].choice != chosen):
            steps.append(Step(dict(chosen), level))
        waiting = [g.upper for g in groups if not any(layer in chosen for layer in g.layers) and g.upper < float("inf")]
        if not waiting:
            return tuple(steps)
        # Skip the doublings that change nothing; the last map of a long chain takes all that is left.
        level = max(waiting) if len(steps) == LONGEST_CHAIN - 1 else max(level * 2, min(waiting))


def _groups(candidates: Sequence[Candidate], schemes: Sequence[str]) -> list[_Group]:
    """Fused layers as one, in the order of preference of schemes, then safest first.

    A fused group takes a scheme only if all its members can, so a group with a missing member is left out for it.
    """
    members: dict[tuple[str, str], list[Candidate]] = defaultdict(list)
    everyone: dict[str, set[str]] = defaultdict(set)
    for candidate in candidates:
        key = candidate.fused or candidate.layer
        members[key, candidate.scheme].append(candidate)
        everyone[key].add(candidate.layer)
    groups = [
        _Group(tuple(c.layer for c in found), scheme, max(c.lower for c in found), max(c.upper for c in found))
        for (key, scheme), found in members.items()
        if {c.layer for c in found} == everyone[key]
    ]
    return sorted(groups, key=lambda group: (schemes.index(group.scheme), group.upper, group.layers))
