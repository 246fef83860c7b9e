"""What a whole model took on one machine, in every form it could be served in: the base, the map, and their rivals.

Invariant: every ratio is to the deployed map in the form that is served, taken within a turn; a difference inside its
quartiles is none. The sum of what single layers save stands beside what the whole was measured to save. Torch-free.
Not taken: a model of the whole from its layers, which fusion, caches and what runs between layers make wrong.
"""

from collections.abc import Iterator

from pydantic import Field

from precimap.certificate import Record
from precimap.hardware_profile import Device, Times

BASE, MAP, BLANKET = "base", "map", "blanket"


class FormTimes(Record):
    """One precision in one form, at one batch size.

    precision: base, map, blanket (every layer that can be low is) or the dtype of a cast of the whole. seconds: of a
    batch. p99: the 99th percentile of the n turns, of fewer than 100 about the longest. ratio: to the served map, above
    1 where the map is faster. memory: peak bytes of a call, beside the weights.
    """

    precision: str
    form: str
    seconds: Times
    p99: float = Field(gt=0)
    ratio: Times
    memory: int | None = Field(ge=0)

    @property
    def name(self) -> str:
        return f"{self.precision}, {self.form}"


class SizeTimes(Record):
    """All forms on batches of `units` units. rows: of the first tensor that the model itself got, or None without any."""

    units: int = Field(ge=1)
    rows: int | None
    forms: tuple[FormTimes, ...] = Field(min_length=1)


class EndToEnd(Record):
    """A deployed map against the base model and its rivals, on one machine.

    map: its fingerprint. served: the form that was certified. refused: forms that could not be made or run, and why.
    foretold: how many times as fast the sum of single layers said, where they were timed here. flops: of one unit, in
    products. peak_flops: what utilisation is counted against, per second in base precision; measured unless peak_given.
    """

    map: str
    device: Device
    served: str
    sizes: tuple[SizeTimes, ...] = Field(min_length=1)
    refused: dict[str, str]
    foretold: Times | None
    flops: int = Field(ge=0)
    peak_flops: float = Field(gt=0)
    peak_given: bool

    def speedup(self, precision: str, form: str) -> Times | None:
        """How many times as fast the served map is; every batch size counts alike, quartiles as if all moved as one."""
        found = [f.ratio for size in self.sizes for f in size.forms if (f.precision, f.form) == (precision, form)]
        if len(found) < len(self.sizes):
            return None
        mean = [sum(getattr(one, what) for one in found) / len(found) for what in ("median", "lower", "upper")]
        return Times(median=mean[0], lower=mean[1], upper=mean[2], n=min(one.n for one in found))

    @property
    def gain(self) -> Times:
        """The served map against the base model in the same form."""
        found = self.speedup(BASE, self.served)
        assert found is not None, "the base model in the served form is always timed"
        return found

    @property
    def foretold_off(self) -> float | None:
        """By what share of the base model's time the sum of single layers is wrong, above 0 where the map takes less."""
        return None if self.foretold is None else 1 / self.foretold.median - 1 / self.gain.median

    @property
    def pays(self) -> bool:
        """Whether the gain is beyond its spread."""
        return self.gain.lower > 1

    @property
    def batches(self) -> str:
        return "batch " + ", ".join(f"{size.units:,}" for size in self.sizes)

    def faster(self) -> Iterator[tuple[str, Times]]:
        """What is surely faster than the served map, the fastest first: name, and the map's speed over it."""
        return ((name, speed) for name, speed in self._speedups() if speed.upper < 1)

    def rival(self) -> tuple[str, Times]:
        """The fastest model without a map and without blanket low precision: its name, and the map's speed over it."""
        return next((name, speed) for name, speed in self._speedups() if not name.startswith((MAP, BLANKET)))

    def _speedups(self) -> list[tuple[str, Times]]:
        """The map's speed over every form that was timed at every batch size, the fastest form first."""
        names = dict.fromkeys((form.precision, form.form) for form in self.sizes[0].forms)
        found = [(", ".join(name), speed) for name in names if (speed := self.speedup(*name)) is not None]
        return sorted(found, key=lambda pair: pair[1].median)

    def rows_measured(self) -> tuple[int, int] | None:
        """The smallest and the largest number of rows that the model was given, or None where that is not known."""
        rows = [size.rows for size in self.sizes if size.rows is not None]
        return (min(rows), max(rows)) if len(rows) == len(self.sizes) else None
