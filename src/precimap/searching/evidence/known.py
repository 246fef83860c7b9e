"""What is known of each layer under each scheme before a map is chosen: predicted, probed, and what it costs.

Invariant: *predicted* and *probed* stand side by side and are never mixed in one number; `decisive` says which of the
two decides. A cost is never negative: that a layer seems to improve the metric is no credit for another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from precimap.decisions import keeps_parameter
from precimap.layers.inventory import Inventory, Layer
from precimap.metrics.guard import Head
from precimap.metrics.metric import Metric
from precimap.metrics.paired import Drop
from precimap.numerics.schemes import Scheme
from precimap.searching.allocation.ladders import Option
from precimap.searching.evidence.probe import Comparison
from precimap.searching.evidence.screen_plan import Key

# Below about 1,000 units an order metric's own drops are noise, from about 2,000 on they are not (docs/how-it-decides.md).
UNITS_FOR_ORDER = 2000
# Where FLOPs stand in for time, sharing an input breaks ties, as do bytes unless the user says what they are worth.
SHARED_INPUT, BYTES_WORTH = 0.01, 1e-3


@dataclass(frozen=True, slots=True)
class Known:
    """One layer under one scheme.

    predicted: of the screen; None where it cannot tell this metric. probed: of the direct probe; None where none was
    made. loss_square: E[(change of a unit's loss)^2]. output_error: E|change of a unit's scores|^2 and its error.
    drift: mean change of the scores, or of the losses. trusted: whether the audit left the screen in charge.
    correction: mean of probed - predicted over the units that both saw, in the metric, and its error.
    saved: share of the time of all timed layers that it saves alone, see `Savings.counted`; None where nothing was timed.
    shared: what it saves beside that when a sibling has quantised its input under the same scheme.
    """

    layer: str
    scheme: str
    predicted: Comparison | None
    probed: Comparison | None
    loss_square: float
    output_error: tuple[float, float] | None
    drift: float | None
    trusted: bool
    correction: tuple[float, float] | None = None
    saved: float | None = None
    shared: float = 0.0

    @property
    def decisive(self) -> Comparison | None:
        """What decides: the probe alone where the screen is not trusted or blind, otherwise the prediction.

        None where that probe is missing (time ran out): what is not believed decides nothing.
        A probe of a trusted layer corrects the prediction (the screen is its control variate): the difference between
        the two varies so little over units that a few of them tell it.
        """
        if self.predicted is None or not self.trusted:
            return self.probed
        return self.predicted if self.correction is None else _shifted(self.predicted, *self.correction)


def _shifted(found: Comparison, by: float, error: float) -> Comparison:
    drop = replace(found.drop, estimate=found.drop.estimate + by, error=float(np.hypot(found.drop.error, error)))
    return replace(found, drop=drop, lower=found.lower + by - 2 * error, upper=found.upper + by + 2 * error)


class Currency(StrEnum):
    """In what costs are counted."""

    MEAN = "mean drop + its error"
    VARIANCE = "E[(change of the loss)^2]"


@dataclass(frozen=True, slots=True)
class Price:
    """How a layer's cost is counted. margin: of the gate; guards are converted by it, each at its own margin."""

    currency: Currency
    margin: float


def price(metric: Metric, known: Sequence[Known], margin: float) -> Price:
    """A loss is budgeted by its mean; a metric of order by variance, until there are units enough to see its mean.

    A variance-type score never budgets a mean on its own: on an overconfident model it has the wrong sign.
    """
    units = [found.decisive.drop.n for found in known if found.decisive is not None]
    enough = len(units) == len(known) and bool(units) and min(units) >= UNITS_FOR_ORDER
    plain = metric.metric if isinstance(metric, Head) else metric
    # A loss stays one where its owner declares the worst of it: then the class knows none.
    is_loss = plain.worst is None or getattr(type(plain), "worst", None) is None
    return Price(Currency.MEAN if is_loss or enough else Currency.VARIANCE, margin)


def cost(found: Known, counted: Price) -> float:
    """What the layer takes from the budget, at least 0; infinite where nothing is known in this currency.

    Of a mean drop: from the gate's budget, or from that of the guard of which it takes the larger share.
    """
    if counted.currency is Currency.VARIANCE:
        return found.loss_square if found.trusted or found.probed is not None else float("inf")
    drops = _drops(found, counted)
    return max((rate * (max(0.0, drop.estimate) + drop.error) for drop, rate in drops), default=float("inf"))


def mean_cost(found: Known, counted: Price) -> float | None:
    """The mean drop alone, of the gate or of the guard that loses more of its margin: negative where the layer improves all.

    None where nothing is known, or means are not what is counted.
    """
    if counted.currency is Currency.VARIANCE:
        return None
    return max((rate * drop.estimate for drop, rate in _drops(found, counted)), default=None)


def _drops(found: Known, counted: Price) -> list[tuple[Drop, float]]:
    """The drop of the gate and of each guard, and what one of its own is worth in the gate's; none where none is known."""
    decisive = found.decisive
    if decisive is None or not np.isfinite(decisive.drop.error):
        return []
    guards = [(guard.found.size, counted.margin / guard.margin) for guard in decisive.guards.values()]
    return [(decisive.drop, 1.0), *((drop, rate) for drop, rate in guards if np.isfinite(drop.error))]


def gain(
    inventory: Inventory,
    layer: str,
    scheme: Scheme,
    bytes_worth: float = BYTES_WORTH,
    saved: float | None = None,
) -> float:
    """What low precision saves of the layers' time, and bytes. Negative for a scheme that takes more time than bytes pay.

    saved: share of the time of all timed layers, as measured. Without it the share of the model's weight FLOPs stands
    in, 8 bits taking half the time of 16. bytes_worth: what saving the bytes of all layers is worth, where saving all
    of that time is worth 1. The scale and offset of packed rows count, a good part of a narrow row. Scales of products
    do not: a few bytes would set one granularity above another, whatever it costs. A parameter that stays beside its codes
    saves none.
    """
    found = inventory.layer(layer)
    if saved is None:
        flops = found.flops / inventory.weight_flops if inventory.weight_flops and scheme.computes_low else 0.0
        saved = max(0.0, 1 - scheme.weight_bits / 16) * flops
    codes = found.numel * scheme.weight_bits / 8
    stored = codes if scheme.rows is None else scheme.stored_bytes(found.shape, found.contracted)
    stored += _kept(found, scheme)
    return saved + bytes_worth * max(0.0, found.bytes - stored) / inventory.layer_bytes


def _kept(layer: Layer, scheme: Scheme) -> int:
    """Bytes of the parameter, where it stays beside its codes."""
    return layer.bytes if keeps_parameter(layer.ops, layer.also_read_by, scheme) else 0


def options(
    inventory: Inventory,
    known: Sequence[Known],
    schemes: Mapping[str, Scheme],
    counted: Price,
    bytes_worth: float = BYTES_WORTH,
) -> tuple[Option, ...]:
    """The table that a knapsack is filled from; `bytes_worth` as in `gain`."""
    rows = []
    for found in known:
        layer, scheme = inventory.layer(found.layer), schemes[found.scheme]
        rows.append(
            Option(
                layer=found.layer,
                scheme=found.scheme,
                gain=gain(inventory, found.layer, scheme, bytes_worth, found.saved),
                cost=cost(found, counted),
                bytes=scheme.stored_bytes(layer.shape, layer.contracted) + _kept(layer, scheme),
                fused=layer.fused,
                siblings=layer.siblings,
                shared=found.shared,
            )
        )
    return tuple(rows) if any(found.saved is not None for found in known) else _tied(rows, schemes)


def _tied(rows: Sequence[Option], schemes: Mapping[str, Scheme]) -> tuple[Option, ...]:
    """Where nothing was timed, sharing a quantised input is worth a hundredth of what the largest reader gains."""
    best: dict[tuple[str | None, str], float] = {}
    for row in rows:
        if row.siblings is not None and schemes[row.scheme].input is not None:
            best[row.siblings, row.scheme] = max(best.get((row.siblings, row.scheme), 0.0), SHARED_INPUT * row.gain)
    return tuple(replace(row, shared=best.get((row.siblings, row.scheme), 0.0)) for row in rows)


def costs_of(known: Sequence[Known], counted: Price) -> dict[Key, float]:
    """(layer, scheme) -> cost."""
    return {(found.layer, found.scheme): cost(found, counted) for found in known}
