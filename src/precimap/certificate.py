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


class GuardAnswer(Record):
    """What the certify split says of one guard: held when `upper` is at most `margin`, at the certificate's alpha.

    drop keeps its sign, also of a two-sided metric, whose bound is that of its size. value: of the baseline.
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
    needed: int | None

    def contradictions(self) -> Iterator[str]:
        """What its fields say against each other, a phrase each."""
        if self.held and not _within(self.drop, self.upper, self.margin):
            yield f"it is held, with {_bound_said(self.drop, self.upper, self.margin)}"
        if self.clusters > self.n:
            yield f"{self.clusters} clusters of {self.n} units"


class Unrepaired(Record):
    """What a map with a realigned last logit drops without it, on the same units; it decides nothing.

    guards: drop and error of each.
    """

    drop: float
    error: float = Field(ge=0)
    upper: float | None
    guards: dict[str, tuple[float, float]] = Field(default_factory=dict)


class Certificate(Record):
    """The answer of the certify split about one map.

    `upper` is the one-sided bound of the drop at confidence 1 - alpha (None: there is no finite one); the map is
    certified when it is at most `margin` and every guard is held. `spent_alpha` is what this split has given away in
    all, this map included.
    """

    metric: str
    unit: str = ""
    certified: bool
    verdict: str
    claim: str
    drop: float
    error: float = Field(ge=0)
    upper: float | None
    margin: float = Field(gt=0)
    alpha: float = Field(gt=0, le=0.5)
    spent_alpha: float = Field(gt=0, lt=1)
    bound: str
    baseline: float
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    changed: int = Field(ge=0)
    needed: int | None
    guards: dict[str, GuardAnswer] = Field(default_factory=dict)
    reported: dict[str, tuple[float, float]] = Field(default_factory=dict)
    unrepaired: Unrepaired | None = None
    split: str
    map: str

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for contradiction in self._contradictions():
            raise ValueError(f"the certificate contradicts itself: {contradiction}")
        return self

    def _contradictions(self) -> Iterator[str]:
        """Without what one number says of another only under one bound or one metric."""
        if self.certified != self.verdict.startswith(CERTIFIED):
            yield f"certified is {str(self.certified).lower()}, and its verdict is {self.verdict!r}"
        if self.certified and not _within(self.drop, self.upper, self.margin):
            yield f"it is certified, with {_bound_said(self.drop, self.upper, self.margin)}"
        for name, guard in self.guards.items():
            if self.certified and not guard.held:
                yield f"it is certified, and its guard {name} is not held"
            yield from (f"guard {name}: {found}" for found in guard.contradictions())
        if not self.changed <= self.n:
            yield f"{self.changed} of {self.n} units changed"
        if self.clusters > self.n:
            yield f"{self.clusters} clusters of {self.n} units"
        if self.alpha > self.spent_alpha + _SLACK:
            yield f"alpha {self.alpha:g} was spent, and {self.spent_alpha:g} in all"

    def __str__(self) -> str:
        upper = "none" if self.upper is None else f"{self.upper:+.5f}"
        return (
            f"{self.verdict}: {self.metric} drop {self.drop:+.5f} +- {self.error:.5f} (standard error), "
            f"{100 * (1 - self.alpha):g} % upper bound {upper}, margin {self.margin:g}; n = {self.n}"
            + (f" in {self.clusters} clusters" if self.clusters != self.n else "")
            + f", {self.changed} changed."
            + "".join(
                f" Guard {name} {'held' if g.held else 'not held'}: {g.drop:+.5f} +- {g.error:.5f}, bound "
                f"{'none' if g.upper is None else format(g.upper, '.5f')}, margin {g.margin:g}."
                for name, g in self.guards.items()
            )
            + f" {self.claim}"
        )


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


def _within(drop: float, upper: float | None, margin: float) -> bool:
    """Whether the bound is at most the margin, and the drop, of whatever sign, at most the bound."""
    return upper is not None and drop <= upper + _SLACK * (1 + abs(upper)) and upper <= margin


def _bound_said(drop: float, upper: float | None, margin: float) -> str:
    bound = "no upper bound" if upper is None else f"the upper bound {upper:g}"
    return f"a drop of {drop:g}, {bound} and the margin {margin:g}"
