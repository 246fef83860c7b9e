"""What is said of a whole map: its certificate, the answers of the guards, and the lottery of its rounding grids.

Invariant: plain numbers with their n and their errors, that JSON holds to the bit; nothing here can change what a map runs.
"""

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A frozen value of a map's file: unknown and missing fields, NaN and infinities are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class GuardAnswer(Record):
    """What the certify split says of one guard: held when `upper` is at most `margin`, at the certificate's alpha.

    drop keeps its sign, also of a two-sided metric, whose bound is that of its size. value: of the baseline.
    """

    held: bool
    drop: float
    error: float
    upper: float | None
    margin: float = Field(gt=0)
    unit: str
    baseline: float
    n: int = Field(ge=1)
    clusters: int = Field(ge=1)
    needed: int | None


class Unrepaired(Record):
    """What a map with a realigned last logit drops without it, on the same units; it decides nothing.

    guards: drop and error of each.
    """

    drop: float
    error: float
    upper: float | None
    guards: dict[str, tuple[float, float]] = Field(default_factory=dict)


class Earlier(Record):
    """What a certify split said of the same map before: one of several tries makes a weaker proof than the only one.

    upper: None where there was no finite bound.
    """

    split: str
    margin: float = Field(gt=0)
    alpha: float = Field(gt=0, lt=1)
    upper: float | None
    certified: bool


class Certificate(Record):
    """The answer of the certify split about one map.

    `upper` is the one-sided bound of the drop at confidence 1 - alpha (None: there is no finite one); the map is
    certified when it is at most `margin` and every guard is held. `spent_alpha` is what this split has given away in
    all, this map included. `earlier` are the judgements of this map before this one, as far as they are known here.
    """

    metric: str
    unit: str = ""
    certified: bool
    verdict: str
    claim: str
    drop: float
    error: float
    upper: float | None
    margin: float = Field(gt=0)
    alpha: float = Field(gt=0, lt=1)
    spent_alpha: float = Field(gt=0)
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
    earlier: tuple[Earlier, ...] = ()

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
            + (f" {self.history}." if self.earlier else "")
        )

    @property
    def history(self) -> str:
        """How often this map was judged before, in a sentence without its full stop; empty if it never was."""
        if not self.earlier:
            return ""
        said_no = sum(not row.certified for row in self.earlier)
        alpha = min(1.0, self.alpha + sum(row.alpha for row in self.earlier))
        tries = "once" if len(self.earlier) == 1 else f"{len(self.earlier)} times"
        return (
            f"this map was judged {tries} before and failed {said_no} of them: counting all, the chance of a false yes "
            f"is up to {alpha:g}"
        )


class Rounding(Record):
    """The lottery of the rounding grid: the map's drop on shifted grids, on n units of the search split.

    shipped: the drop on the map's own grids there, with its error over units. mean and sd are over the draws; common is
    the part of sd that does not average out over units: what the next retrain, with other grids, is to expect. The
    certificate is about the grids that ship.
    """

    shipped: float
    error_over_units: float
    n: int = Field(ge=1)
    drops: tuple[float, ...]
    mean: float
    sd: float = Field(ge=0)
    common: float = Field(ge=0)
