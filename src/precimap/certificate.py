"""What is said of a whole map: its certificate, the answers of the guards, and the lottery of its rounding grids.

Invariant: plain numbers with their n and their errors, that JSON holds to the bit; nothing here can change what a map runs.
What contradicts itself is none of these values: a certificate cannot say "certified" above its own margin.
"""

import math
import statistics
from collections.abc import Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

CERTIFIED = "certified"  # how the verdict of a certified map begins, and of no other
_SLACK = 1e-9  # of sums that are taken again


class Record(BaseModel):
    """A frozen value of a map's file: unknown and missing fields, NaN and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


LEAST_CLUSTERS = 20  # effective ones; below, neither a standard error nor a bound means much (docs/log.md)
_T = "cluster t raised for skewness, plus one cluster that nobody has seen:"
BOUND_WORST = f"{_T} it loses all that a unit can lose"
BOUND_FARTHEST = f"{_T} it loses what the worst one lost, here or on the search split"


class BlindSpot(Record):
    """Losses that no number of this certificate speaks of: so rare that the split may hold none of them.

    Of `looked_at` units or clusters (`noun`), worth `effective` of equal weight, a kind rarer than 1 in `one_in` (of the
    `rare` class, 1 in `rare_one_in`) may be missing. cost, in `unit`: what it would have to cost each to break the margin;
    None where a unit's loss has a limit, and then weight: the share of all units that would have to be of that kind.
    """

    noun: str
    looked_at: int = Field(ge=1)
    effective: float = Field(gt=0)
    one_in: float = Field(ge=1)
    rare: str
    rare_one_in: float | None
    cost: float | None
    unit: str
    weight: float | None

    def __str__(self) -> str:
        return f"Blind spot: {self.told}"

    @property
    def told(self) -> str:
        """In a sentence, without its heading."""
        if self.weight is not None:
            return (
                f"the {self.looked_at:,} {self.noun}s are of unequal weight and worth {self.effective:,.3g} of "
                f"equal weight. Kinds of {self.noun} rarer than 1 in {_counted(self.one_in)} may be missing among them; "
                f"where those hold {self.weight:.2%} of the weight, a loss in all of them breaks the margin."
            )
        rare = f" (1 {self.rare} in {_counted(self.rare_one_in)})" if self.rare_one_in is not None else ""
        number = "" if self.cost is None else _counted(self.cost) if self.cost >= 99.5 else f"{self.cost:.2g}"
        cost = f" It breaks the margin only if it costs each of them {number} {self.unit}." if number else ""
        return f"these data cannot show a loss in fewer than 1 {self.noun} in {_counted(self.one_in)}{rare}.{cost}"


def _counted(number: float) -> str:
    """Two digits of a large number: nobody needs to know that it is 5,341."""
    digits = max(0, len(str(int(number))) - 2)
    return f"{round(number, -digits):,.0f}"


class GuardAnswer(Record):
    """What the certify split says of one guard: held when `upper` is at most `margin`, at the certificate's alpha.

    drop keeps its sign, also of a two-sided metric, whose bound is that of its size. effective, needed: as in `Certificate`.
    """

    held: bool
    drop: float
    error: float = Field(ge=0)
    upper: float | None
    margin: float = Field(gt=0)
    unit: str
    baseline: float
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    effective: float = Field(gt=0)
    needed: tuple[int, int | None] | None
    blind_spot: BlindSpot | None

    @property
    def verdict(self) -> str:
        """Held, not held, or not to be told from so few units."""
        if self.held:
            return "held"
        return "cannot be told" if _within(self.drop, self.upper, self.margin) else "not held"

    def contradictions(self) -> Iterator[str]:
        """What its fields say against each other, a phrase each."""
        if self.held and not _within(self.drop, self.upper, self.margin):
            yield f"it is held, with {_bound_said(self.drop, self.upper, self.margin)}"
        yield from _sizes(self.n, self.clusters, self.effective, self.needed)


class Unrepaired(Record):
    """What a map with a realigned last logit drops without it, on the same units, and each guard; it decides nothing."""

    drop: float
    error: float = Field(ge=0)
    upper: float | None
    guards: dict[str, tuple[float, float]] = Field(default_factory=dict)


class Earlier(Record):
    """What a certify split said of the same map before (upper: None for no finite bound): several tries prove less."""

    split: str
    margin: float = Field(gt=0)
    alpha: float = Field(gt=0, lt=1)
    upper: float | None
    certified: bool


class Certificate(Record):
    """The answer of the certify split about one map.

    What is proved, with confidence 1 - alpha, is that the drop is at most `margin`: the map is certified when `upper`, the
    one-sided bound of the drop (None: there is no finite one), is at most `margin`, every guard is held, and there are
    enough units to tell. `upper` and `drop` themselves are of a map that was chosen among several because it passed: they
    are somewhat too good (docs/how-it-decides.md). `effective`: how many clusters of equal weight the clusters are worth.
    `needed`: the units that would certify a drop of this size, fewest and most as the estimate's own error allows (most
    None: no number might do); None for a map that is certified, or where no number would do. `spent_alpha`: what this
    split has given away in all, this map included. `blind_spot`: what no number here speaks of. `earlier`: the judgements
    of this map before this one, as far as they are known here. drop, error: None where the split is too small to tell, so
    that the map was not scored there, and no alpha given away.
    """

    metric: str
    unit: str = ""
    certified: bool
    verdict: str
    claim: str
    drop: float | None
    error: float | None = Field(ge=0)
    upper: float | None
    margin: float = Field(gt=0)
    alpha: float = Field(gt=0, le=0.5)
    spent_alpha: float = Field(ge=0, lt=1)
    bound: str
    baseline: float
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    changed: int = Field(ge=0)
    effective: float = Field(gt=0)
    needed: tuple[int, int | None] | None
    blind_spot: BlindSpot | None
    guards: dict[str, GuardAnswer] = Field(default_factory=dict)
    reported: dict[str, tuple[float, float]] = Field(default_factory=dict)
    unrepaired: Unrepaired | None = None
    split: str
    map: str
    earlier: tuple[Earlier, ...] = ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for contradiction in self._contradictions():
            raise ValueError(f"the certificate contradicts itself: {contradiction}")
        return self

    def _contradictions(self) -> Iterator[str]:
        """Without what one number says of another only under one bound or one metric."""
        if self.certified != self.verdict.startswith(CERTIFIED):
            yield f"certified is {str(self.certified).lower()}, and its verdict is {self.verdict!r}"
        if self.certified and self.bound not in (BOUND_WORST, BOUND_FARTHEST):
            yield f"it is certified, by a bound that no precimap has: {self.bound!r}"
        if self.certified and self.bound == BOUND_FARTHEST and self.blind_spot is None:
            yield "it is certified for a loss without a limit, and names no blind spot"
        if self.certified and (self.drop is None or self.error is None):
            yield "it is certified, and nothing was measured"
        elif self.certified and not _within(self.drop or 0.0, self.upper, self.margin):
            yield f"it is certified, with {_bound_said(self.drop or 0.0, self.upper, self.margin)}"
        for name, guard in self.guards.items():
            if self.certified and not guard.held:
                yield f"it is certified, and its guard {name} is not held"
            yield from (f"guard {name}: {found}" for found in guard.contradictions())
        if not self.changed <= self.n:
            yield f"{self.changed} of {self.n} units changed"
        yield from _sizes(self.n, self.clusters, self.effective, self.needed)
        judged: list[tuple[str, Certificate | GuardAnswer]] = [("", self)]
        for label, one in (*judged, *((f"guard {name}: ", guard) for name, guard in self.guards.items())):
            told = _proof(one.drop or 0.0, one.error or 0.0, one.upper, self.alpha, one.effective)
            yield from (f"{label}{found}" for found in told if self.certified)
        if self.certified and not self.changed and abs(self.drop or 0.0) > _SLACK:
            yield f"a drop of {self.drop:g}, and no unit changed"
        if self.drop is not None and self.alpha > self.spent_alpha + _SLACK:
            yield f"alpha {self.alpha:g} was spent, and {self.spent_alpha:g} in all"

    def __str__(self) -> str:
        history = (f"{self.history[:1].upper()}{self.history[1:]}.",) if self.earlier else ()
        said = (f"{self.verdict}: {self.statement}", *self.guard_statements, *self.blind_spots, self.claim)
        return " ".join((*said, *history))

    @property
    def statement(self) -> str:
        """The gate, in a sentence: what is proved first, the numbers behind it after it."""
        size = f"n = {self.n}{worth(self.n, self.clusters, self.effective)}"
        if self.drop is None or self.error is None:
            return f"not scored for {self.metric}, margin {self.margin:g}; {size}; alpha spent {self.spent_alpha:g}."
        confidence, upper = f"{100 * (1 - self.alpha):g} %", "none" if self.upper is None else f"{self.upper:+.5f}"
        proved = f"with {confidence} confidence the drop of {self.metric} is at most the margin {self.margin:g}"
        return (
            (f"{proved}; measured " if self.certified else f"{self.metric} drop ")
            + f"{self.drop:+.5f} ± {self.error:.5f} (standard error), {confidence} upper bound {upper}"
            + ("" if self.certified else f", margin {self.margin:g}")
            + f"; {size}, {self.changed} changed; alpha spent on this split {self.spent_alpha:g}."
        )

    @property
    def history(self) -> str:
        """How often this map was judged before, in a sentence without its full stop; empty if it never was."""
        if not self.earlier:
            return ""
        failed, count = sum(not row.certified for row in self.earlier), len(self.earlier)
        judged = f"this map was judged {'once' if count == 1 else f'{count} times'} before, and"
        if not failed:
            return f"{judged} passed{'' if count == 1 else ' each time'}"
        alpha = min(1.0, self.alpha + sum(row.alpha for row in self.earlier))
        judged += " failed" if count == 1 else f" failed {failed} of these times"
        return f"{judged}: with all tries counted, the chance of a false yes is up to {alpha:g}"

    @property
    def guard_statements(self) -> tuple[str, ...]:
        """Each guard, in a sentence."""
        return tuple(
            f"Guard {name} {g.verdict}: {g.drop:+.5f} ± {g.error:.5f}, bound "
            f"{'none' if g.upper is None else format(g.upper, '.5f')}, margin {g.margin:g}."
            for name, g in self.guards.items()
        )

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """What nothing here speaks of, a sentence for the gate and each guard that has one."""
        spots = {"": self.blind_spot, **{f" of the guard {name}": g.blind_spot for name, g in self.guards.items()}}
        return tuple(f"Blind spot{whose}: {spot.told}" for whose, spot in spots.items() if spot is not None)


def units_said(needed: tuple[int, int | None]) -> str:
    """A range of units, in words, two digits of each."""
    fewest, most = needed
    if most is None:
        return f"at least {_counted(fewest)} units"
    low, high = _counted(fewest), _counted(most)
    return f"about {low} units" if low == high else f"about {low} to {high} units"


def worth(n: int, clusters: int, effective: float) -> str:
    """In how many clusters the units lie, and what those are worth where they are of unequal weight."""
    said = f" in {clusters:,} clusters" if clusters != n else ""
    return said if effective > 0.95 * clusters else f"{said}, worth {effective:.3g} of equal weight"


class Rounding(Record):
    """The lottery of the rounding grid: the map's drop on shifted grids, on n units of the search split.

    shipped: the drop on the map's own grids there, with its error over units. mean and sd are over the draws; common is
    the part of sd that does not average out over units: what the next retrain, with other grids, is to expect. The
    certificate is about the grids that ship.
    """

    shipped: float
    error_over_units: float = Field(ge=0)
    n: int = Field(ge=1)
    drops: tuple[float, ...] = Field(min_length=2)
    mean: float
    sd: float = Field(ge=0)
    common: float = Field(ge=0)

    @model_validator(mode="after")
    def _agrees_with_its_draws(self) -> Self:
        told = {"mean": (self.mean, statistics.fmean(self.drops)), "sd": (self.sd, statistics.stdev(self.drops))}
        for what, (said, found) in told.items():
            if not math.isclose(said, found, rel_tol=_SLACK, abs_tol=1e-12):
                raise ValueError(f"the {what} of the rounding draws is {found:g}, not {said:g}")
        if self.common > self.sd * (1 + _SLACK):
            raise ValueError(
                f"of a spread of {self.sd:g} over the draws, {self.common:g} cannot be common to all units"
            )
        return self


def _sizes(n: int, clusters: int, effective: float, needed: tuple[int, int | None] | None) -> Iterator[str]:
    if clusters > n:
        yield f"{clusters} clusters of {n} units"
    if effective > clusters * (1 + _SLACK):
        yield f"{clusters} clusters that are worth {effective:g} of equal weight"
    if needed is not None and needed[1] is not None and needed[0] > needed[1]:
        yield f"it needs at least {needed[0]} units and at most {needed[1]}"


def _proof(drop: float, error: float, upper: float | None, alpha: float, effective: float) -> Iterator[str]:
    """What no bound of precimap says, whatever the data: it never lies nearer to the drop than half of a z bound."""
    if effective < LEAST_CLUSTERS * (1 - _SLACK):
        yield f"it is certified from {effective:g} clusters of equal weight, and {LEAST_CLUSTERS} are the least"
    reach = 0.5 * statistics.NormalDist().inv_cdf(1 - alpha) * error
    if upper is not None and upper < drop + reach - _SLACK * (1 + abs(drop)):
        yield f"an upper bound of {upper:g} over a drop of {drop:g} with the standard error {error:g}"


def _within(drop: float, upper: float | None, margin: float) -> bool:
    """Whether the bound is at most the margin, and the drop, of whatever sign, at most the bound."""
    return upper is not None and drop <= upper + _SLACK * (1 + abs(upper)) and upper <= margin


def _bound_said(drop: float, upper: float | None, margin: float) -> str:
    bound = "no upper bound" if upper is None else f"the upper bound {upper:g}"
    return f"a drop of {drop:g}, {bound} and the margin {margin:g}"
