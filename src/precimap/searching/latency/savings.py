"""What layers save under a scheme, alone and beside siblings that read the same input; torch-free.

Invariant: each number is a share of the time of all timed layers with its quartiles, and a map's is made of those of its
layers in one way, `Savings.total`, for the plan, the answer and the report. Siblings under one scheme quantise their input
once: k of them save the sum of what each saves alone and (k - 1) times that quantising.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from precimap.searching.pairs import Key


@dataclass(frozen=True, slots=True, kw_only=True)
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

    def __str__(self) -> str:
        return f"{self.ratio:.2f} [{self.ratio_lower:.2f}, {self.ratio_upper:.2f}]"


@dataclass(frozen=True, slots=True)
class Quantising:
    """What quantising one input takes, as a share of the seconds of all timed layers: what each further sibling saves.

    The mean over its readers of what each takes less when a sibling has done it. Quartiles as if all moved as one.
    """

    share: float
    lower: float
    upper: float

    @classmethod
    def of(cls, readers: Iterable[tuple[Saved, Saved]]) -> "Quantising":
        """readers: (alone, with its input quantised), one pair each."""
        pairs = list(readers)
        share = sum(after.share - alone.share for alone, after in pairs) / len(pairs)
        lower = sum(after.lower - alone.upper for alone, after in pairs) / len(pairs)
        upper = sum(after.upper - alone.lower for alone, after in pairs) / len(pairs)
        return cls(share, lower, upper)


@dataclass(frozen=True, slots=True)
class Savings:
    """alone: each (layer, scheme) that quantises its own input. shared: those whose input a sibling has quantised, where
    siblings could. quantising: by (siblings, scheme), where it is surely more than nothing. siblings: of the layers in
    `shared`, the group that reads one input."""

    alone: Mapping[Key, Saved]
    shared: Mapping[Key, Saved] = field(default_factory=dict)
    quantising: Mapping[Key, Quantising] = field(default_factory=dict)
    siblings: Mapping[str, str] = field(default_factory=dict)

    def sharing(self, key: Key) -> Quantising | None:
        """What the pair saves beside what it saves alone when a sibling is in; None where nothing can be shared."""
        return self.quantising.get((self.siblings.get(key[0], ""), key[1]))

    def counted(self, key: Key) -> float:
        """What planning counts for the layer alone: 0 inside its spread, but where siblings decide it counts as measured."""
        saved = self.alone[key]
        told = saved.lower > 0 or saved.upper < 0 or self.sharing(key) is not None
        return saved.share if told else 0.0

    def total(self, pairs: Iterable[Key]) -> tuple[float, float, float]:
        """The share of the time that these pairs save together, and its quartiles as if all moved as one."""
        readers: dict[Key, list[Key]] = defaultdict(list)
        for layer, scheme in pairs:
            shares = self.sharing((layer, scheme)) is not None
            readers[self.siblings[layer] if shares else layer, scheme].append((layer, scheme))
        each = [self._together(group, keys) for group, keys in readers.items()]
        share, below, above = (sum(found[part] for found in each) for part in range(3))
        return share, share - below, share + above

    def _together(self, group: Key, keys: list[Key]) -> tuple[float, float, float]:
        """The share of those that read one input, and how far its quartiles lie below and above it."""
        if len(keys) == 1:
            alone = self.alone[keys[0]]
            return alone.share, alone.share - alone.lower, alone.upper - alone.share
        # What runs is each layer after the quantising, and the quantising once; their spreads add up.
        after, once = [self.shared[key] for key in keys], self.quantising[group]
        share = sum(self.alone[key].share for key in keys) + (len(keys) - 1) * once.share
        below = sum(s.share - s.lower for s in after) + once.upper - once.share
        above = sum(s.upper - s.share for s in after) + once.share - once.lower
        return share, below, above

    def row(self) -> dict[str, Any]:
        """For the journal."""
        return {
            "saved": [[*key, asdict(saved)] for key, saved in self.alone.items()],
            "shared": [[*key, asdict(saved)] for key, saved in self.shared.items()],
            "quantising": [[*key, asdict(once)] for key, once in self.quantising.items()],
            "siblings": dict(self.siblings),
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Savings":
        alone, shared = (
            {(layer, scheme): Saved(**found) for layer, scheme, found in row[part]} for part in ("saved", "shared")
        )
        quantising = {(group, scheme): Quantising(**found) for group, scheme, found in row["quantising"]}
        return cls(alone, shared, quantising, row["siblings"])
