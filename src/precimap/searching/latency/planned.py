"""What a scheme saves of the time of a model's layers, by the times of a hardware profile.

Invariant: a difference inside the spread is no gain: quartiles of the ratio within a turn decide, not its median. A
layer's share is of the sum over all layers that can be timed alone: what runs between them (attention, norms,
activations) is in neither side. Rows are taken to grow with the batch, and every batch size counts alike. A layer that
pays only beside siblings which read the same input stays a candidate: which of them go together is for the plan.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precimap.errors import ProfileError
from precimap.hardware_profile import Device, HardwareProfile, Point, Times
from precimap.layers.inventory import Inventory, Layer
from precimap.numerics.schemes import Scheme
from precimap.searching.latency.savings import Quantising, Saved, Savings
from precimap.searching.latency.slower import too_slow
from precimap.searching.pairs import Key

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
    module = layer.timed_as
    if module is None:
        return []
    each_batch, in_bags = size / inventory.units, "embedding_bag" in layer.ops
    found = []
    for read in layer.reads:
        if read.lookup and layer.flops:
            continue  # of a table that is multiplied, too: the lookup stays as it is
        rows = max(1, round(read.rows * each_batch / layer.stacked))
        found += [Work(module, layer.dtype, read.each if in_bags else 1, rows)] * layer.stacked
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """What planning knows of time. seconds: of all timed layers in base precision, by batch size. base: each layer's
    share of them. slower: why a pair is no candidate. notes: what a reader has to know of where the times are from. failed:
    why a pair could not be timed."""

    device: Device
    batch_sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    base: Mapping[str, float]
    savings: Savings
    slower: Mapping[Key, str]
    notes: tuple[str, ...]
    failed: Mapping[Key, str] = field(default_factory=dict)

    @property
    def saved(self) -> Mapping[Key, Saved]:
        """Of each layer alone."""
        return self.savings.alone

    def row(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "device": str(self.device),
            "n": self.n,
            "batch_sizes": list(self.batch_sizes),
            "seconds": list(self.seconds),
            "base": dict(self.base),
            **self.savings.row(),
            "where": self.device.model_dump(),
            "slower": [[*key, why] for key, why in self.slower.items()],
            "notes": list(self.notes),
            "failed": [[*key, why] for key, why in self.failed.items()],
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Latency":
        """What `row` made, read back."""
        slower, failed = ({(layer, scheme): why for layer, scheme, why in row[part]} for part in ("slower", "failed"))
        return cls(
            device=Device(**row["where"]),
            batch_sizes=tuple(row["batch_sizes"]),
            seconds=tuple(row["seconds"]),
            base=row["base"],
            savings=Savings.of_row(row),
            slower=slower,
            notes=tuple(row["notes"]),
            failed=failed,
        )

    @property
    def n(self) -> int:
        """The fewest turns of a saving."""
        return min((saved.n for saved in self.saved.values()), default=0)

    def verdict(self) -> str:
        """Said when no layer gains."""
        (layer, scheme), best = min(self.saved.items(), key=lambda pair: pair[1].ratio)
        shared = ", alone or with its siblings" if self.savings.quantising else ""
        return (
            f"not worth it on this hardware ({self.device}): of {len({key[0] for key in self.saved})} layers none gains "
            f"more time than the noise of timing{shared}; the best, {layer} under {scheme}, takes {best} times as long as "
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
        name: f"{name}: nothing that is timed stands for it"
        for name in schemes
        if inventory.layer(name).timed_as is None
    }
    between: list[str] = []
    for layer in (layer for layer in inventory.layers if layer.timed_as is not None):
        try:
            points[layer.name] = [
                [
                    profile.at(w.module, w.dtype, w.each, w.rows, schemes.get(layer.name, []))
                    for w in works(inventory, layer, b)
                ]
                for b in sizes
            ]
        except ProfileError as error:
            # Of a layer that no module of its own reads, and that is not asked about, older profiles know nothing.
            if layer.module is not None or layer.name in schemes:
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
    savings = _savings(inventory, pairs, points, seconds)
    slower = too_slow(inventory, [(name, scheme.name) for name, scheme in pairs if scheme.computes_low], savings, base)
    return Latency(
        device=profile.device,
        batch_sizes=sizes,
        seconds=seconds,
        base=base,
        savings=savings,
        slower=slower,
        notes=notes,
    )


def _share(found: Sequence[Sequence[Point]], seconds: Sequence[float]) -> float:
    return sum(p.base.median / total for calls, total in zip(found, seconds, strict=True) for p in calls) / len(seconds)


def _savings(
    inventory: Inventory,
    pairs: Sequence[tuple[str, Scheme]],
    points: Mapping[str, Sequence[Sequence[Point]]],
    seconds: Sequence[float],
) -> Savings:
    """What each pair saves alone, and beside those of its siblings that could take the same scheme."""
    alone, readers = {}, defaultdict(list)
    for name, scheme in pairs:
        alone[name, scheme.name] = _saved(
            points[name], seconds, [[p.ratios[scheme.name] for p in c] for c in points[name]]
        )
        group, called = inventory.layer(name).siblings, [point for calls in points[name] for point in calls]
        if group is not None and all(scheme.name in point.shared for point in called):
            readers[group, scheme.name].append((name, scheme.name))
    shared: dict[Key, Saved] = {}
    quantising: dict[Key, Quantising] = {}
    for key, keys in ((key, keys) for key, keys in readers.items() if len(keys) > 1):
        after = {
            pair: _saved(points[pair[0]], seconds, [[p.shared[pair[1]] for p in c] for c in points[pair[0]]])
            for pair in keys
        }
        once = Quantising.of((alone[pair], after[pair]) for pair in keys)
        if once.lower > 0:  # otherwise nothing is told of it
            shared |= after
            quantising[key] = once
    return Savings(alone, shared, quantising, {name: inventory.layer(name).siblings or "" for name, _ in shared})


def _saved(found: Sequence[Sequence[Point]], seconds: Sequence[float], ratios: Sequence[Sequence[Times]]) -> Saved:
    """By the ratios of each batch size and call. Each batch size counts alike, whatever it takes."""
    weighed = [
        (point.base.median / total / len(seconds), ratio)
        for calls, total, these in zip(found, seconds, ratios, strict=True)
        for point, ratio in zip(calls, these, strict=True)
    ]
    base = sum(weight for weight, _ in weighed)
    median, lower, upper = (
        sum(weight * getattr(ratio, name) for weight, ratio in weighed) for name in ("median", "lower", "upper")
    )
    n = min(ratio.n for _, ratio in weighed)
    return Saved(
        share=base - median,
        lower=base - upper,
        upper=base - lower,
        ratio=median / base,
        ratio_lower=lower / base,
        ratio_upper=upper / base,
        n=n,
    )
