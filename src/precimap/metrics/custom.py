"""A metric of the user's own: any function of (scores, labels, groups) that returns one number.

Invariant: whatever the function is, its drop is judged by the same bound as every other metric, from values of units: here
the pseudo-values of the delete-a-block jackknife (Quenouille 1956; Shao and Wu 1989, "A general theory for jackknife
variance estimation", which covers functions that are not smooth when blocks are large). Clusters are dealt to blocks at
random, once. A bootstrap, the alternative, costs ten times the calls, and on rare losses certifies falsely more often
than the bound used here (docs/log.md).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.metric import (
    CLUSTER,
    UNIT,
    PairedDrops,
    Stakes,
    check_declared,
    check_paired,
    count_changed,
    refuse_units,
    untold,
)
from precimap.metrics.units import Floats, Units

Function = Callable[[NDArray[np.float32], Floats, NDArray[np.int64]], float]

LEAST_BLOCKS = 10
_SEED = 0


@dataclass(frozen=True)
class Custom:
    """`function(scores, labels, groups) -> float` on whole splits, for a metric that precimap does not know.

    scores: float32 [n] or [n, columns] as the forward returned them; labels: float64 [n] or [n, columns]; groups: int64
    [n], the task's clusters (the rows' numbers without). It must not depend on the order of rows nor on their number, as a
    mean does not. It is called about 2 * blocks times for each comparison: keep it vectorised. worst: the largest drop
    that one unit can suffer, where the function is thought of as a mean of units: 1.0 for a mean of values in [0, 1].
    """

    name: str
    function: Function
    higher_is_better: bool
    blocks: int = 100
    worst: float | None = None
    unit: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.blocks < LEAST_BLOCKS:
            raise TaskError(f"expected at least {LEAST_BLOCKS} blocks to tell an error from, got {self.blocks}")
        check_declared(self.name, self.worst)

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [n, 1 + columns]: how many of the columns are scores, then scores and labels."""
        y = torch.as_tensor(labels, device=scores.device)
        if scores.dim() not in (1, 2) or y.dim() not in (1, 2) or len(y) != len(scores):
            raise TaskError(
                f"{self.name} takes scores and labels [n] or [n, columns]; got {list(scores.shape)} and {list(y.shape)}"
            )
        n = len(scores)
        kept = torch.cat((scores.float().double().reshape(n, -1), y.double().reshape(n, -1)), dim=1)
        refuse_units(~torch.isfinite(kept).all(1), "a score or a label that is not finite")
        widths = torch.full((n, 1), float(scores.reshape(n, -1).shape[1]), dtype=torch.float64, device=kept.device)
        return torch.cat((widths, kept), dim=1)

    def value(self, kept: Floats, units: Units) -> float:
        """The function on all rows. Raises TaskError for a task with weights, and for a value that is no finite number."""
        if units.weights is not None:
            raise TaskError(f"{self.name} is a function without weights; use it with a task that has none")
        rows = np.arange(units.n)
        return self._called(kept, rows if units.clusters is None else units.clusters, rows)

    def paired(self, baseline: Floats, other: Floats, units: Units) -> PairedDrops:
        """One pseudo-value for each block; an infinite error for fewer clusters than 10. Raises TaskError as `value`."""
        check_paired(self.name, baseline, other, 2)
        sign = -1.0 if self.higher_is_better else 1.0
        groups = np.arange(units.n) if units.clusters is None else units.clusters
        if len(np.unique(groups)) < LEAST_BLOCKS:
            return untold(units, self.worst)
        # Rows without clusters are dealt by what they hold, so that their order makes no difference.
        names = groups if units.clusters is not None else _ranks(baseline)
        blocks, block = _dealt(names, self.blocks)
        whole = sign * (self.value(other, units) - self.value(baseline, units))
        left = np.empty(blocks)
        same = ~(baseline != other).any(1)
        for number in range(blocks):
            rows = np.flatnonzero(block != number)
            if same[rows].all():
                left[number] = 0.0
                continue
            left[number] = sign * (self._called(other, groups, rows) - self._called(baseline, groups, rows))
        # A block weighs its rows, so that what one row does to a total is the same in splits of any size.
        rows_of = np.bincount(block, minlength=blocks).astype(np.float64)
        pull = (1 - rows_of / units.n) / (rows_of / units.n)  # blocks - 1 where all are of one size
        # Centred, so that the weighted mean is the drop itself and not the drop less its estimated bias.
        d = pull * (whole - left)
        d += whole - float(d @ rows_of) / units.n
        sizes = np.unique(groups, return_counts=True)[1].astype(np.float64)
        noun = UNIT if units.clusters is None else CLUSTER
        stakes = Stakes(unit=f"of {self.name}", noun=noun, within=sizes)
        of_blocks = Units(n=blocks, weights=rows_of)
        return PairedDrops(
            d=d, units=of_blocks, rows=units.n, changed=count_changed(baseline, other), worst=self.worst, stakes=stakes
        )

    def _called(self, kept: Floats, groups: NDArray[np.int64], rows: NDArray[np.int64]) -> float:
        width = 1 + int(kept[0, 0])
        scores, labels = kept[rows, 1:width], kept[rows, width:]
        narrow = [part[:, 0] if part.shape[1] == 1 else part for part in (scores, labels)]
        value = float(self.function(narrow[0].astype(np.float32), narrow[1], groups[rows]))
        if not np.isfinite(value):
            raise TaskError(
                f"{self.name} returned {value} on {len(rows)} of {len(kept)} rows; it must be defined there"
            )
        return value


def _ranks(kept: Floats) -> NDArray[np.int64]:
    """The place of each row when rows are sorted by all that they hold; equal rows are alike in any order."""
    ranks = np.empty(len(kept), np.int64)
    ranks[np.lexsort(kept.T[::-1])] = np.arange(len(kept))
    return ranks


def _dealt(groups: NDArray[np.int64], blocks: int) -> tuple[int, NDArray[np.int64]]:
    """How many blocks, and the block of each row: clusters in a shuffled order, dealt like cards."""
    names, of_row = np.unique(groups, return_inverse=True)
    blocks = min(blocks, len(names))
    dealt = np.random.default_rng(_SEED).permutation(len(names)) % blocks
    return blocks, dealt[of_row]
