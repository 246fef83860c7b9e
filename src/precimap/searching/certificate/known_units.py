"""A sketch of a split's units, by which data are known again in whatever batches they come.

Invariant: of two splits, the smallest prints of each are a sample of its different units that both draw alike (bottom-k
sampling: Broder 1997, "On the resemblance and containment of documents"), so that what they share can be counted without
the data. Up to `kept` different units the sketch is the set itself and the count is exact; beyond, a share p is known with a
standard error of about sqrt(p (1 - p) / the units compared).
"""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from precimap.searching.splits.rows import Prints

IN_LEDGER = 1 << 16  # prints, 8 bytes each
IN_MAP = 1 << 9


@dataclass(frozen=True, slots=True, eq=False)
class Sketch:
    """prints: the smallest of the units' prints, ascending, uint64; n: how many different units there are."""

    prints: Prints
    n: int

    @classmethod
    def of(cls, prints: Prints, kept: int) -> Self:
        """prints: of all units, in any order."""
        distinct = np.unique(prints)
        return cls(distinct[:kept], len(distinct))

    @classmethod
    def parse(cls, text: str, n: int) -> Self:
        """What `text` wrote. Raises ValueError for anything else."""
        try:
            raw = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"prints that are no base64: {error}") from error
        if len(raw) % 8 or n < len(raw) // 8 or (n > 0 and not raw):
            raise ValueError(f"{len(raw)} bytes are no prints of {n} units")
        prints = np.frombuffer(raw, "<u8").astype(np.uint64)
        if (prints[1:] <= prints[:-1]).any():
            raise ValueError("prints that are not in order")
        return cls(prints, n)

    def text(self) -> str:
        """The prints as base64, for a file."""
        return base64.b64encode(self.prints.astype("<u8").tobytes()).decode("ascii")

    def share_of(self, prints: Prints) -> float:
        """Of the units with these prints, the share that this sketch's split holds, repeated units counted as they stand."""
        if not len(prints) or not self.n:
            return 0.0
        # Of the units up to the sketch's last print it is known whether they are in the split.
        told = prints if self.n == len(self.prints) else prints[prints <= self.prints[-1]]
        return float(np.isin(told, self.prints).mean()) if len(told) else 0.0


def shared_units(known: Sequence[Sketch], views: Sequence[Prints]) -> float:
    """The largest share of a split's units, in any view of them, that any view of a known split holds."""
    return max((sketch.share_of(view) for sketch in known for view in views), default=0.0)
