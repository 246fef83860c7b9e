"""What a sample can see of a drop, and what it cannot.

Invariant: a bound speaks of losses that the sample holds, or that the metric limits. A loss without a limit which hits so
few units that none of them need be in the sample is seen by no bound at all; so the certificate of such a metric says how
rare it would have to be and what it would have to cost (`blind_spot`), and samples that hold next to nothing of what
matters are refused (`shortage`). A bound for "reasonable" tails, the alternative, would be an assumption that nobody reads.
"""

import math
from dataclasses import dataclass, replace

from precimap.certificate import LEAST_CLUSTERS, BlindSpot
from precimap.metrics.metric import CLUSTER, UNIT, PairedDrops
from precimap.metrics.totals import Farthest, Totals, summed
from precimap.metrics.units import Floats

LEAST_UNITS = 50  # effective ones, for a metric without a limit
LEAST_RARE = 20  # rows of the rarer class, for a metric of clicks
_UNEQUAL = 0.8  # clusters that are worth fewer than this share of their number may hide heavier ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What one sample can see.

    clusters: how many clusters (or units, `noun`), worth `effective` of equal weight. rare: how many of the rarer class,
    which is called `named`. limit: the largest drop of one unit, None where none is known. farthest: the cluster that
    lies farthest above its share (below, too, for a two-sided metric), in units of the mean weight of a row. unit,
    scale: `Stakes`.
    """

    noun: str
    clusters: int
    effective: float
    rare: float | None
    named: str
    limit: float | None
    farthest: Farthest
    unit: str
    scale: float

    def scaled(self, share: float) -> "Sight":
        """What a sample of the same kind can see, `share` times as large."""
        rare = None if self.rare is None else self.rare * share
        return replace(self, clusters=round(self.clusters * share), effective=self.effective * share, rare=rare)

    @property
    def least(self) -> int:
        """The effective clusters, or units, without which nothing is certified."""
        return LEAST_UNITS if self.limit is None and self.noun == UNIT else LEAST_CLUSTERS

    @property
    def shortage(self) -> str | None:
        """Why this sample is too small for any certificate; None where it is not."""
        least = self.least
        if math.floor(self.effective + 1e-9) < least:
            worth = "" if self.effective > 0.99 * self.clusters else f" are worth {self.effective:.3g} of equal weight,"
            return f"{self.clusters:,} {self.noun}s{worth} and a certificate needs at least {least}"
        if self.rare is not None and self.rare < LEAST_RARE - 1e-9:
            count = f"{self.rare:.3g} {self.named}s"
            if self.noun == CLUSTER:
                count = f"{self.named}s that are worth {self.rare:.3g} independent ones, as they lie in clusters"
            return f"{count}, and a certificate needs at least {LEAST_RARE}"
        return None

    def blind_spot(self, size: float, margin: float, alpha: float) -> BlindSpot | None:
        """What a drop of that size, certified within the margin, says nothing about; None where it speaks of everything.

        A loss that hits a share p of n clusters is in none of them with probability (1 - p)^n, which is alpha for
        p = 1 - alpha^(1 / n), about 3 / n at 5 % (the rule of three). It breaks the margin where it costs more than
        (margin - size) / p each. An improvement is no credit. Where a unit's loss has a limit but clusters are of unequal
        weight, what may be missing is a kind of cluster, of any weight.
        """
        unequal = self.effective < _UNEQUAL * self.clusters
        if self.limit is not None and not unequal:
            return None
        room = margin - max(0.0, size)
        if self.limit is not None and room >= self.limit:
            return None
        share = _unseen(self.effective, alpha)
        return BlindSpot(
            noun=self.noun,
            looked_at=self.clusters,
            effective=self.effective,
            one_in=1 / (share if self.limit is None else _unseen(self.clusters, alpha)),
            rare=self.named if self.rare is not None else "",
            rare_one_in=None if self.rare is None else 1 / _unseen(self.rare, alpha),
            cost=room / share / self.scale if self.limit is None and self.scale > 0 else None,
            unit=self.unit,
            weight=None if self.limit is None else room / self.limit,
        )


def sight_of(sample: PairedDrops, totals: Totals) -> Sight:
    """What the drops of a metric's units can see. totals: of these drops."""
    stakes, units = sample.stakes, sample.units
    per_row = totals.whole / sample.rows
    far = totals.beyond if not sample.two_sided else abs(totals.beyond)
    at = int(far.argmax())
    weights = totals.weights if stakes.within is None else stakes.within
    return Sight(
        noun=stakes.noun if units.clusters is None else CLUSTER,
        clusters=len(weights),
        effective=_worth(weights),
        rare=None if stakes.rare is None else _worth(summed(units.known_weights * stakes.rare, units)),
        named=stakes.named,
        limit=sample.worst,
        farthest=Farthest(float(far[at]) / per_row, float(totals.weights[at]) / per_row),
        unit=stakes.unit,
        scale=stakes.scale,
    )


def _worth(weights: Floats) -> float:
    """How many clusters of equal weight these are worth; those without weight are worth nothing."""
    squares = float(weights @ weights)
    return float(weights.sum()) ** 2 / squares if squares else 0.0


def _unseen(n: float, alpha: float) -> float:
    """The largest share of clusters of which n draws hold none with probability alpha or more; 1 for no draw."""
    return -math.expm1(math.log(alpha) / n) if n else 1.0
