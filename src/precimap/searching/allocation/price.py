"""What a layer costs the metric, in the currency that the metric is budgeted in.

Invariant: a cost is never negative: that a layer seems to improve the metric is no credit for another one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from precimap.metrics.guard import Head
from precimap.metrics.metric import Metric
from precimap.metrics.paired import Drop
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.pairs import Key

# Below about 1,000 units an order metric's own drops are noise, from about 2,000 on they are not (docs/how-it-decides.md).
UNITS_FOR_ORDER = 2000


class Currency(StrEnum):
    """In what costs are counted."""

    MEAN = "mean drop + its error"
    VARIANCE = "E[(change of the loss)^2]"


@dataclass(frozen=True, slots=True)
class Price:
    """How a layer's cost is counted. margin: of the gate; guards are converted by it, each at its own margin."""

    currency: Currency
    margin: float


def price(metric: Metric, known: Sequence[LayerEvidence], margin: float) -> Price:
    """A loss is budgeted by its mean; a metric of order by variance, until there are units enough to see its mean.

    A variance-type score never budgets a mean on its own: on an overconfident model it has the wrong sign.
    """
    units = [found.decisive.drop.n for found in known if found.decisive is not None]
    enough = len(units) == len(known) and bool(units) and min(units) >= UNITS_FOR_ORDER
    plain = metric.metric if isinstance(metric, Head) else metric
    # A loss stays one where its owner declares the worst of it: then the class knows none.
    is_loss = plain.worst is None or getattr(type(plain), "worst", None) is None
    return Price(Currency.MEAN if is_loss or enough else Currency.VARIANCE, margin)


def cost(found: LayerEvidence, counted: Price) -> float:
    """What the layer takes from the budget, at least 0; infinite where nothing is known in this currency.

    Of a mean drop: from the gate's budget, or from that of the guard of which it takes the larger share.
    """
    if counted.currency is Currency.VARIANCE:
        return found.loss_square if found.trusted or found.probed is not None else float("inf")
    drops = _drops(found, counted)
    return max((rate * (max(0.0, drop.estimate) + drop.error) for drop, rate in drops), default=float("inf"))


def mean_cost(found: LayerEvidence, counted: Price) -> float | None:
    """The mean drop alone, of the gate or of the guard that loses more of its margin: negative where the layer improves all.

    None where nothing is known, or means are not what is counted.
    """
    if counted.currency is Currency.VARIANCE:
        return None
    return max((rate * drop.estimate for drop, rate in _drops(found, counted)), default=None)


def _drops(found: LayerEvidence, counted: Price) -> list[tuple[Drop, float]]:
    """The drop of the gate and of each guard, and what one of its own is worth in the gate's; none where none is known."""
    decisive = found.decisive
    if decisive is None or not np.isfinite(decisive.drop.error):
        return []
    guards = [(guard.found.size, counted.margin / guard.margin) for guard in decisive.guards.values()]
    return [(decisive.drop, 1.0), *((drop, rate) for drop, rate in guards if np.isfinite(drop.error))]


def costs_of(known: Sequence[LayerEvidence], counted: Price) -> dict[Key, float]:
    """(layer, scheme) -> cost."""
    return {found.key: cost(found, counted) for found in known}
