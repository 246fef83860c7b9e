"""Is the screen to be believed? A random audit by direct probes, and the probes that a decision hangs on.

Invariant: screen and probe are compared on the same units, so that what differs is the screen's approximation and
nothing else. A *kind* of layer (its op and shape, under one scheme) of which an audited layer disagrees is not decided
by the screen any more: all of its layers are probed. Trusting a screen that agrees on average, the alternative, would
let one saturating kind of layer through.

In a model of 16 bits a probe holds the model's own rounding beside the layer (`own_rounding.py`), which no screen
foretells. A layer agrees, too, where that explains what the screen missed: a probe would tell less there, not more.

Two questions, for one does not answer the other: does each layer's change agree unit by unit (`Audited`), and do the mean
drops agree, which are what is budgeted (`means.py`)? A screen may follow every unit and miss their common shift.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter
from scipy.special import betaincinv, fdtri  # scipy.stats has the same, and takes long to import

from precimap.layers.inventory import Inventory
from precimap.searching.evidence.means import Kind, MeanAgreement, kind_of, means_of, said_of, wrong_kinds
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import Probe
from precimap.searching.pairs import Key, Pair

LEAST_AUDITED = 8
MOST_AUDITED = 16
LEAST_CORRELATION = 0.9
LARGEST_RATIO = 2.0
NOISE_LEVEL = 0.95  # of the ratio of two mean squares, up to which the model's own rounding explains a difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One audited layer: how its predicted and its probed change of the units' losses agree.

    missed, foretold, rounding: mean squares over units, of probed - predicted, of the prediction, and of what the model's
    own 16 bits do when results are rounded anew from this layer on (0 where it has none).
    """

    layer: str
    scheme: str
    correlation: float
    ratio: float  # of the root mean squares over units, predicted to probed: a correlation does not see a wrong scale
    predicted: float  # mean change of the loss
    probed: float
    error: float  # standard error of `predicted` over units
    n: int
    missed: float = 0.0
    foretold: float = 0.0
    rounding: float = 0.0

    @property
    def agrees(self) -> bool:
        if self.correlation >= LEAST_CORRELATION and 1 / LARGEST_RATIO <= self.ratio <= LARGEST_RATIO:
            return True
        explained = float(fdtri(self.n, self.n, NOISE_LEVEL)) * self.rounding
        # What a correlation of `LEAST_CORRELATION` would miss is allowed on top: 1 - r^2 of the prediction.
        return self.rounding > 0 and self.missed <= explained + (1 - LEAST_CORRELATION**2) * self.foretold


@dataclass(frozen=True, slots=True)
class Audit:
    """The audit as a whole. `distrusted` kinds are for the probe. means: of kinds and of schemes, see `means.py`."""

    rows: tuple[Audited, ...]
    distrusted: tuple[Kind, ...]
    means: tuple[MeanAgreement, ...] = ()

    @property
    def share(self) -> tuple[float, float]:
        """The share of audited layers that agree, and its one-sided 95 % lower bound (Clopper and Pearson 1934)."""
        n, agreeing = len(self.rows), sum(row.agrees for row in self.rows)
        if not n:
            return 1.0, 0.0
        return agreeing / n, float(betaincinv(agreeing, n - agreeing + 1, 0.05)) if agreeing else 0.0

    @property
    def approximation(self) -> float:
        """|probed - predicted| of a mean as a share of |predicted| + its error: root mean square over the audit."""
        if not self.rows:
            return 0.0
        return float(np.sqrt(np.mean([_relative(row) ** 2 for row in self.rows])))

    def row(self) -> dict[str, object]:
        """For the journal."""
        share, lower = self.share
        return {
            "rows": [{**asdict(row), "agrees": row.agrees} for row in self.rows],
            "share": share,
            "share_at_least": lower,
            "means": [{**asdict(found), "agrees": found.agrees} for found in self.means],
            "distrusted": [said_of(kind) for kind in self.distrusted],
            "distrusted_kinds": self.distrusted,
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Audit":
        """What `row` made, read back."""
        return _READER.validate_python(
            {"rows": row["rows"], "distrusted": row["distrusted_kinds"], "means": row["means"]}
        )


_READER = TypeAdapter(Audit)


def _relative(row: Audited) -> float:
    scale = abs(row.predicted) + row.error
    return abs(row.probed - row.predicted) / scale if scale > 0 else 0.0


def to_audit(inventory: Inventory, pairs: Sequence[Pair], seed: int) -> tuple[Pair, ...]:
    """A random sample of the screened pairs: at least 8, each kind once up to 16, the rest at random."""
    order = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))]
    firsts: dict[Kind, Pair] = {}
    for name, scheme in order:
        firsts.setdefault(kind_of(inventory, (name, scheme.name)), (name, scheme))
    chosen = list(firsts.values())[:MOST_AUDITED]
    chosen += [pair for pair in order if pair not in chosen][: max(0, LEAST_AUDITED - len(chosen))]
    return tuple(chosen)


def audit(
    predictor: Predictor,
    probes: Sequence[Probe],
    kinds: Mapping[Key, Kind],
    margin: float,
    rounding: Mapping[str, float],
) -> Audit:
    """Compare probes with the screen on the batches that both have seen: unit by unit, and in the mean.

    kinds: of all pairs that the probed ones are a sample of. margin: of the gate. rounding: of the model's own, by layer.
    """
    rows = tuple(_audited(predictor, probe, rounding.get(probe.layer, 0.0)) for probe in probes)
    wrong = [kinds[row.layer, row.scheme] for row in rows if not row.agrees]
    means = means_of(predictor, probes, kinds, wrong, margin)
    biased = wrong_kinds(means, kinds.values())
    return Audit(rows, tuple(dict.fromkeys([*wrong, *biased])), means)


def _audited(predictor: Predictor, probe: Probe, rounding: float) -> Audited:
    on = predictor.on(probe.numbers)
    predicted = on.loss_changes([(probe.layer, probe.scheme)])
    probed = probe.scored.losses - on.reference.losses
    return Audited(
        layer=probe.layer,
        scheme=probe.scheme,
        correlation=_correlation(predicted, probed),
        ratio=_ratio(predicted, probed),
        predicted=float(predicted.mean()),
        probed=float(probed.mean()),
        error=float(predicted.std()) / len(predicted) ** 0.5,
        n=len(probed),
        missed=float(np.mean((probed - predicted) ** 2)),
        foretold=float(np.mean(predicted**2)),
        rounding=rounding,
    )


def _correlation(predicted: np.ndarray, probed: np.ndarray) -> float:
    """Of two columns about zero, not about their means: a common shift is a part of what is predicted."""
    if not np.any(predicted) and not np.any(probed):
        return 1.0
    norms = float(np.linalg.norm(predicted) * np.linalg.norm(probed))
    return float(predicted @ probed) / norms if norms else 0.0


def _ratio(predicted: np.ndarray, probed: np.ndarray) -> float:
    """|predicted| / |probed|; 1 where both are zero, a large number where only the probe is: JSON has no infinity."""
    norm = float(np.linalg.norm(probed))
    if norm:
        return float(np.linalg.norm(predicted)) / norm
    return 1.0 if not np.any(predicted) else 1e9


def ambiguous(
    costs: Mapping[Key, float], gains: Mapping[Key, float], chosen: Mapping[str, str], error: float, most: int
) -> tuple[Key, ...]:
    """The pairs whose membership in the chosen map flips within `error` of their cost, the nearest first.

    A knapsack takes what costs least per gain: the boundary is between the dearest pair inside and the cheapest
    outside. `error` is a share of the cost, what the audit showed of the screen's approximation: a probe of the same
    units can remove that and no more, for both share the error over units. At most `most` pairs.
    """
    prices = {key: costs[key] / gains[key] for key in costs if gains[key] > 0 and np.isfinite(costs[key])}
    inside = [price for (layer, scheme), price in prices.items() if chosen.get(layer) == scheme]
    outside = [price for (layer, _), price in prices.items() if layer not in chosen]
    if not inside or not outside:
        return ()
    low, high = min(max(inside), min(outside)), max(max(inside), min(outside))
    near = {key: max(low - price, price - high, 0.0) / price for key, price in prices.items() if price > 0}
    flipping = [key for key, distance in near.items() if distance <= error]
    return tuple(sorted(flipping, key=lambda key: (near[key], key)))[:most]
