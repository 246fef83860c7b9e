"""What a scheme saves of the time of a model's layers, by the times of a hardware profile.

Invariant: a difference inside the spread is no gain: quartiles of the ratio within a turn decide, not its median. A
layer's share is of the sum over all layers that a module of their own reads: what runs between them (attention, norms,
activations) is in neither side. Rows are taken to grow with the batch, and every batch size counts alike.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from precimap.errors import ProfileError
from precimap.hardware_profile import Device, HardwareProfile, Point
from precimap.layers.inventory import Inventory, Layer
from precimap.numerics.schemes import Scheme
from precimap.search.evidence.screen_plan import Key

NAMED_AT_MOST = 3


@dataclass(frozen=True, slots=True)
class Work:
    """What is timed once, whichever layers do it."""

    module: str
    dtype: str
    each: int
    rows: int

    def __str__(self) -> str:
        return f"{self.module} {self.dtype} {self.rows}x{self.each}"


def works(inventory: Inventory, layer: Layer, size: int) -> list[Work]:
    """The calls of a layer in a batch of `size` units."""
    if layer.module is None:
        return []
    each_batch, in_bags = size / inventory.units, "embedding_bag" in layer.ops
    return [
        Work(layer.module, layer.dtype, read.each if in_bags else 1, max(1, round(read.rows * each_batch)))
        for read in layer.reads
    ]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a layer saves under a scheme, as a share of the seconds of all timed layers, and its time low / base.

    lower, upper: from the quartiles over n turns. They are added up over calls and batch sizes as if they moved together,
    which is never too narrow.
    """

    share: float
    lower: float
    upper: float
    ratio: float
    ratio_lower: float
    ratio_upper: float
    n: int

    @property
    def counted(self) -> float:
        """The share, or 0 where it is inside its spread."""
        return self.share if self.lower > 0 or self.upper < 0 else 0.0

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.ratio_lower:.2f}, {self.ratio_upper:.2f}]"


@dataclass(frozen=True, slots=True)
class Latency:
    """What planning knows of time. seconds: of all timed layers in base precision, by batch size. base: each layer's
    share of them. slower: why a pair is no candidate. notes: what a reader has to know of where the times are from."""

    device: Device
    batch_sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    base: Mapping[str, float]
    saved: Mapping[Key, Saved]
    slower: Mapping[Key, str]
    notes: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "device": str(self.device),
            "n": min((saved.n for saved in self.saved.values()), default=0),
            "batch_sizes": list(self.batch_sizes),
            "seconds": list(self.seconds),
            "base": dict(self.base),
            "saved": [[*key, asdict(saved)] for key, saved in self.saved.items()],
        }

    def total(self, pairs: Iterable[Key]) -> tuple[float, float, float]:
        """The share of the time that these pairs save together, and its quartiles as if all moved as one."""
        chosen = [self.saved[key] for key in pairs]
        return sum(s.share for s in chosen), sum(s.lower for s in chosen), sum(s.upper for s in chosen)

    def verdict(self) -> str:
        """Said when no layer gains."""
        (layer, scheme), best = min(self.saved.items(), key=lambda pair: pair[1].ratio)
        return (
            f"not worth it on this hardware ({self.device}): of {len({key[0] for key in self.saved})} layers none gains "
            f"time beyond its spread; the best, {layer} under {scheme}, takes {best} times as long as "
            f"base precision (n = {best.n} turns)"
        )


def planned(
    inventory: Inventory,
    pairs: Sequence[tuple[str, Scheme]],
    profile: HardwareProfile,
    sizes: tuple[int, ...],
    notes: tuple[str, ...],
) -> Latency:
    schemes: dict[str, list[str]] = defaultdict(list)
    for name, scheme in pairs:
        schemes[name].append(scheme.name)
    points: dict[str, list[list[Point]]] = {}  # by layer, batch size and call
    lacking = {
        name: f"{name}: no module of its own reads it" for name in schemes if inventory.layer(name).module is None
    }
    between: list[str] = []
    for layer in (layer for layer in inventory.layers if layer.module is not None):
        try:
            points[layer.name] = [
                [profile.at(w.module, w.dtype, w.each, w.rows, schemes[layer.name]) for w in works(inventory, layer, b)]
                for b in sizes
            ]
        except ProfileError as error:
            lacking[layer.name] = f"{layer.name}: {error}"
        else:
            between += [layer.name for calls in points[layer.name] for point in calls if point.between is not None]
    if lacking:
        named = "; ".join(list(lacking.values())[:NAMED_AT_MOST])
        more = f" (and {len(lacking) - NAMED_AT_MOST} more)" if len(lacking) > NAMED_AT_MOST else ""
        raise ProfileError(
            f"the profile has no times for {named}{more}. Make one of this task with precimap bench-device, or choose "
            "batch sizes between those that were measured"
        )
    if between:
        notes = (*notes, f"times of {len(set(between))} layers are interpolated between measured batch sizes")
    seconds = tuple(sum(p.base.median for found in points.values() for p in found[at]) for at in range(len(sizes)))
    base = {name: _share(found, seconds) for name, found in points.items()}
    saved = {(name, scheme.name): _saved(points[name], scheme.name, seconds) for name, scheme in pairs}
    slower = _slower(inventory, pairs, saved, base)
    return Latency(profile.device, sizes, seconds, base, saved, slower, notes)


def _share(found: Sequence[Sequence[Point]], seconds: Sequence[float]) -> float:
    return sum(p.base.median / total for calls, total in zip(found, seconds, strict=True) for p in calls) / len(seconds)


def _saved(found: Sequence[Sequence[Point]], scheme: str, seconds: Sequence[float]) -> Saved:
    """Each batch size counts alike, whatever it takes."""
    weighed = [
        (point.base.median / total / len(seconds), point.ratios[scheme])
        for calls, total in zip(found, seconds, strict=True)
        for point in calls
    ]
    base = sum(weight for weight, _ in weighed)
    median, lower, upper = (
        sum(weight * getattr(ratio, name) for weight, ratio in weighed) for name in ("median", "lower", "upper")
    )
    n = min(ratio.n for _, ratio in weighed)
    return Saved(base - median, base - upper, base - lower, median / base, lower / base, upper / base, n)


def _slower(
    inventory: Inventory, pairs: Sequence[tuple[str, Scheme]], saved: Mapping[Key, Saved], base: Mapping[str, float]
) -> dict[Key, str]:
    """Why pairs are no candidates; what engines fuse is judged as one.

    Schemes that only store low are made to save bytes: their time counts, for or against them, and excludes nothing.
    """
    together: dict[Key, list[str]] = defaultdict(list)
    for name, scheme in pairs:
        if scheme.computes_low:
            together[inventory.layer(name).fused or name, scheme.name].append(name)
    found = {}
    for (group, scheme_name), names in together.items():
        each = [saved[name, scheme_name] for name in names]
        if sum(one.lower for one in each) > 0:
            continue
        weight = sum(base[name] for name in names)
        ratio, low, high = (
            1 - sum(getattr(one, what) for one in each) / weight for what in ("share", "upper", "lower")
        )
        what = scheme_name if len(names) == 1 else f"{scheme_name} for all of {group}"
        why = f"{what} takes {ratio:.2f} [{low:.2f}, {high:.2f}] times as long as base precision"
        inside = ", no gain beyond its spread" if low <= 1 else ""
        why += f"{inside} (n = {min(one.n for one in each)} turns)"
        found.update({(name, scheme_name): why for name in names})
    return found
