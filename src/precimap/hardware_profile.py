"""A hardware profile: what single layers took on one machine, written down so that another machine can plan with it.

Invariant: every time stands with its quartiles, its n and the machine it was measured on; a row is one module as it
stands alone, at one number of rows, timed in turns with its low-precision forms. Between two measured numbers of rows
the logarithm of a time is interpolated linearly in the logarithm of the rows (exact for t = a * rows^b); beyond them
nothing is said. JSON, validated by pydantic, torch-free.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from precimap.certificate import Record
from precimap.durable import write_text
from precimap.errors import ProfileError

PROFILE_VERSION = 2  # 1 had no times of layers that share an input


class Device(Record):
    """Where times were measured. capability: the instructions that torch uses there, of a GPU its compute capability.
    allocator: its settings, or `default`. clock: what the seconds are of. driver: of a GPU, with its CUDA version."""

    name: str
    capability: str
    threads: int = Field(ge=1)
    allocator: str
    clock: str
    torch: str
    precimap: str
    driver: str | None = None

    def differences(self, other: "Device") -> tuple[str, ...]:
        """What is otherwise in `other`, a phrase each."""
        return tuple(
            f"{field} {getattr(self, field)}, not {getattr(other, field)}"
            for field in type(self).model_fields
            if getattr(self, field) != getattr(other, field)
        )

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        set_up = "" if self.allocator == "default" else f", {self.allocator}"
        driver = "" if self.driver is None else f", {self.driver}"
        return f"{self.name}, {self.capability}, {threads}{set_up}{driver}, torch {self.torch}, {self.clock}"


class Times(Record):
    """Median and quartiles of n measurements: seconds, or a ratio of two times that were taken in one turn."""

    median: float = Field(gt=0)
    lower: float = Field(gt=0)
    upper: float = Field(gt=0)
    n: int = Field(ge=1)

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        lower, median, upper = (float(value) for value in np.percentile(np.asarray(values), (25, 50, 75)))
        return cls(median=median, lower=lower, upper=upper, n=len(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.lower:.2f}, {self.upper:.2f}]"


class LowTimes(Record):
    """A module's form under a scheme: seconds, and the ratio to the base form within each turn.

    shared: the ratio of the form whose input a sibling has quantised before; None for forms that share nothing.
    """

    seconds: Times
    ratio: Times
    shared: Times | None


class Row(Record):
    """One module at one number of rows.

    module: as torch prints it, which names its kind, its widths, its bias and its mode. each: ids that one row of a bag
    holds, 1 elsewhere. low: by the name of the scheme.
    """

    module: str
    dtype: str
    each: int = Field(ge=1)
    rows: int = Field(ge=1)
    base: Times
    low: dict[str, LowTimes]


@dataclass(frozen=True, slots=True)
class Point:
    """What a profile says of a module at some rows. ratios: low over base, by scheme; shared: the same of forms whose input
    a sibling has quantised. between: the measured rows that it was interpolated from, or None where it was measured."""

    base: Times
    ratios: Mapping[str, Times]
    shared: Mapping[str, Times]
    between: tuple[int, int] | None


class HardwareProfile(Record):
    """Times of layers on one machine. Make one with `precimap bench-device`, read it with `HardwareProfile.load`.

    batch_sizes: units, for which it was made. schemes: what the names in the rows stand for, without range rules.
    """

    version: int = PROFILE_VERSION
    target: str
    device: Device
    batch_sizes: tuple[int, ...]
    schemes: dict[str, dict[str, Any]]
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        return f"HardwareProfile({self.target} on {self.device.name!r}, {len(self.rows)} rows)"

    __str__ = __repr__

    @field_validator("version")
    @classmethod
    def _version_fits(cls, version: int) -> int:
        if version != PROFILE_VERSION:
            raise ValueError(
                f"expected version {PROFILE_VERSION}, got {version}; measure again with precimap bench-device"
            )
        return version

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        keys = [(row.module, row.dtype, row.each, row.rows) for row in self.rows]
        if len(set(keys)) != len(keys):
            raise ValueError("a module stands twice with the same number of rows")
        unknown = {name for row in self.rows for name in row.low} - set(self.schemes)
        if unknown:
            raise ValueError(f"times under {', '.join(sorted(unknown))}, which is not among the profile's schemes")
        return self

    def at(self, module: str, dtype: str, each: int, rows: int, schemes: Sequence[str]) -> Point:
        """Times of a module at `rows` rows, under each of the schemes.

        Measured there, or interpolated between the nearest measured numbers of rows. Raises ProfileError, which says
        what is missing, for a module or scheme that was not measured and for rows outside the measured range.
        """
        found = {row.rows: row for row in self.rows if (row.module, row.dtype, row.each) == (module, dtype, each)}
        if not found:
            ids = "" if each == 1 else f" with {each} ids a bag"
            raise ProfileError(f"{module} in {dtype}{ids} was not measured")
        holding = sorted(size for size, row in found.items() if all(name in row.low for name in schemes))
        if not holding:
            raise ProfileError(f"{module} was not measured under {', '.join(schemes)}")
        if not holding[0] <= rows <= holding[-1]:
            measured = f"{holding[0]:,}" if len(holding) == 1 else f"{holding[0]:,} to {holding[-1]:,}"
            raise ProfileError(f"{module} was measured at {measured} rows, not at {rows:,}")
        upper = holding[bisect_left(holding, rows)]
        if upper == rows:
            return _point(found[rows], schemes)
        lower = holding[bisect_left(holding, rows) - 1]
        a, b = _point(found[lower], schemes), _point(found[upper], schemes)
        share = (math.log(rows) - math.log(lower)) / (math.log(upper) - math.log(lower))
        ratios = {name: _between(a.ratios[name], b.ratios[name], share) for name in schemes}
        shared = {name: _between(a.shared[name], b.shared[name], share) for name in a.shared if name in b.shared}
        return Point(_between(a.base, b.base, share), ratios, shared, (lower, upper))

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON; on any failure what was there before survives. Raises SaveError."""
        write_text(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "HardwareProfile":
        """Read a profile. Raises ProfileError that names the first thing which is wrong with the file."""
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ProfileError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise ProfileError(
                f"{path}: not a hardware profile of version {PROFILE_VERSION}: {where}: {first['msg']}"
            ) from error


def _point(row: Row, schemes: Sequence[str]) -> Point:
    low = {name: row.low[name] for name in schemes}
    shared = {name: times.shared for name, times in low.items() if times.shared is not None}
    return Point(row.base, {name: times.ratio for name, times in low.items()}, shared, None)


def _between(a: Times, b: Times, share: float) -> Times:
    """`share` of the way from a to b, in logarithms."""
    median, lower, upper = (
        math.exp((1 - share) * math.log(getattr(a, name)) + share * math.log(getattr(b, name)))
        for name in ("median", "lower", "upper")
    )
    return Times(median=median, lower=lower, upper=upper, n=min(a.n, b.n))
