"""A scheme: the formats, granularities and range rules of one layer's weight and input.

Invariant: a scheme is a value. Two schemes with equal fields are the same scheme, and `Scheme.row()` written to a map
and read back by `scheme_from_row` is equal to it. Composed of two small records instead of a class per combination; a
name is only a short way to write one down. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from precimap.errors import InputError, SchemeError
from precimap.numerics.formats import (
    BF16,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    FORMATS,
    FP16,
    INT8,
    UINT4,
    UINT7,
    UINT8,
    FloatFormat,
    Format,
    IntegerFormat,
)

SCALE_BYTES = 4  # float32


class Granularity(StrEnum):
    """How many values share one scale."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"  # weights: one scale for each output of the op
    PER_TOKEN = "per-token"  # inputs: one scale for each row that the op contracts


@dataclass(frozen=True, slots=True)
class Amax:
    """The range reaches the largest absolute value (or the smallest and the largest): nothing saturates."""

    def row(self) -> str:
        return "amax"


@dataclass(frozen=True, slots=True)
class Percentile:
    """The range reaches this percentile (50 < percentile < 100) of the absolute values; the rest saturates."""

    percentile: float

    def row(self) -> str:
        return f"percentile:{self.percentile!r}"


@dataclass(frozen=True, slots=True)
class MinimumError:
    """The clipped range with the least mean squared error, of `steps` shrunken copies of the amax range."""

    steps: int = 40

    def row(self) -> str:
        return f"mse:{self.steps}"


@dataclass(frozen=True, slots=True)
class FusedRows:
    """The range is a row's own minimum to maximum, with an offset: the packed rows that torch and FBGEMM read.

    `parameters`: the float format in which each row keeps its scale and its offset, `float32` (fused 8-bit row-wise) or
    `float16` (fused N-bit row-wise). The formulas are in `rows`.
    """

    parameters: str

    def row(self) -> str:
        return f"rows:{self.parameters}"

    @property
    def bytes(self) -> int:
        """Of the scale and the offset of one row."""
        return 8 if self.parameters == "float32" else 4


RangeRule = Amax | Percentile | MinimumError | FusedRows


def range_rule_from_row(text: str) -> RangeRule:
    """`amax`, `percentile:99.9`, `mse` or `mse:40`, `rows:float32` or `rows:float16`. Raises SchemeError for others."""
    kind, _, number = text.partition(":")
    try:
        if kind == "amax" and not number:
            return Amax()
        if kind == "percentile" and 50 < float(number) < 100:
            return Percentile(float(number))
        if kind == "mse" and (not number or 2 <= int(number) <= 1000):
            return MinimumError(int(number)) if number else MinimumError()
        if kind == "rows" and number in ("float32", "float16"):
            return FusedRows(number)
    except ValueError:
        pass
    raise SchemeError(f"expected a range rule amax, percentile:P (50 < P < 100) or mse:STEPS (2 to 1000), got {text!r}")


@dataclass(frozen=True, slots=True)
class Rounding:
    """How one tensor becomes low precision: format, granularity, static or dynamic, and how its range is chosen.

    `dynamic`: the scale is computed from the tensor at run time (inputs only). `symmetric`: zero is code 0; otherwise
    x ~ (q - zero) * scale with one whole-number zero per scale (integer formats only), or, with the range `FusedRows`,
    x ~ q * scale + offset.
    """

    format: Format
    granularity: Granularity
    dynamic: bool = False
    symmetric: bool = True
    range: RangeRule = Amax()

    @property
    def has_scales(self) -> bool:
        """False for formats of 16 bits, which hold the range that a model already has: their scale is 1."""
        return self.format.bits < 16

    def row(self) -> dict[str, object]:
        return {
            "format": self.format.name,
            "granularity": self.granularity.value,
            "dynamic": self.dynamic,
            "symmetric": self.symmetric,
            "range": self.range.row(),
        }


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one layer does with its weight and, unless it is weight-only, with its input (`input` is None then).

    result: the format that the other operands of the call (a bias) and its result are rounded to, as where the call is
    made in that format; sums are float32 all the same. None: they stay in the model's own dtype.
    """

    name: str
    weight: Rounding
    input: Rounding | None
    result: FloatFormat | None = None

    @property
    def weight_bits(self) -> int:
        return self.weight.format.bits

    @property
    def computes_low(self) -> bool:
        """True when the matrix product itself runs in low precision, not only the storage."""
        return self.input is not None

    @property
    def rows(self) -> FusedRows | None:
        """The layout of a table's packed rows; None for a scheme of any other weight."""
        return self.weight.range if isinstance(self.weight.range, FusedRows) else None

    def stored_bytes(self, shape: tuple[int, ...], contracted: tuple[int, ...] | None) -> int:
        """Bytes of a weight's packed codes and of all its scales (float32, and the offsets of rows).

        `contracted`: the dims that one scale per channel is shared over.
        """
        values = math.prod(shape)
        per_tensor = self.weight.granularity is Granularity.PER_TENSOR
        if not self.weight.has_scales:
            return values * self.weight_bits // 8
        scales = 1 if per_tensor else values // max(1, math.prod(shape[dim] for dim in contracted or ()))
        return -(-values * self.weight_bits // 8) + scales * (SCALE_BYTES if self.rows is None else self.rows.bytes)

    @property
    def needs_calibration(self) -> bool:
        return self.input is not None and not self.input.dynamic

    def with_range(self, rule: RangeRule) -> "Scheme":
        """The same scheme whose static input ranges follow `rule`. Raises SchemeError when there is none."""
        if isinstance(rule, FusedRows):
            raise SchemeError(f"{rule.row()} is how rows of a table are stored; an input takes amax, percentile or mse")
        if not self.needs_calibration or self.input is None:
            raise SchemeError(f"scheme {self.name} has no static input range that a range rule could choose")
        return replace(self, input=replace(self.input, range=rule))

    def row(self) -> dict[str, object]:
        row: dict[str, object] = {
            "weight": self.weight.row(),
            "input": None if self.input is None else self.input.row(),
        }
        return row if self.result is None else {**row, "result": self.result.name}


_CHANNEL, _TENSOR, _TOKEN = Granularity.PER_CHANNEL, Granularity.PER_TENSOR, Granularity.PER_TOKEN

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8", Rounding(E4M3, _CHANNEL), Rounding(E4M3, _TOKEN, dynamic=True)),
        Scheme("fp8-tensor", Rounding(E4M3, _TENSOR), Rounding(E4M3, _TENSOR, dynamic=True)),
        Scheme("fp8-static", Rounding(E4M3, _TENSOR), Rounding(E4M3, _TENSOR)),
        # Schemes of their own and not what fp8 is on some devices: a map is of codes, and these are others.
        Scheme("fp8-fnuz", Rounding(E4M3_FNUZ, _CHANNEL), Rounding(E4M3_FNUZ, _TOKEN, dynamic=True)),
        Scheme("fp8-fnuz-tensor", Rounding(E4M3_FNUZ, _TENSOR), Rounding(E4M3_FNUZ, _TENSOR, dynamic=True)),
        Scheme("fp8-fnuz-static", Rounding(E4M3_FNUZ, _TENSOR), Rounding(E4M3_FNUZ, _TENSOR)),
        Scheme("fp8-e5m2", Rounding(E5M2, _CHANNEL), Rounding(E5M2, _TOKEN, dynamic=True)),
        Scheme("fp8-weight", Rounding(E4M3, _CHANNEL), None),
        Scheme("int8", Rounding(INT8, _CHANNEL), Rounding(INT8, _TOKEN, dynamic=True)),
        Scheme("int8-static", Rounding(INT8, _CHANNEL), Rounding(UINT8, _TENSOR, symmetric=False)),
        Scheme("int8-static-u7", Rounding(INT8, _CHANNEL), Rounding(UINT7, _TENSOR, symmetric=False)),
        Scheme("int8-weight", Rounding(INT8, _CHANNEL), None),
        Scheme("int8-row", Rounding(UINT8, _CHANNEL, symmetric=False, range=FusedRows("float32")), None),
        Scheme("int8-row-half", Rounding(UINT8, _CHANNEL, symmetric=False, range=FusedRows("float16")), None),
        Scheme("int4-row", Rounding(UINT4, _CHANNEL, symmetric=False, range=FusedRows("float16")), None),
        Scheme("bf16", Rounding(BF16, _TENSOR), Rounding(BF16, _TENSOR, dynamic=True), result=BF16),
        Scheme("fp16", Rounding(FP16, _TENSOR), Rounding(FP16, _TENSOR, dynamic=True), result=FP16),
    )
}

# Not a choice but a yardstick: what rounding weights and inputs to BF16 alone does to the metric.
BF16_FLOOR = Scheme("bf16-operands", Rounding(BF16, _TENSOR), Rounding(BF16, _TENSOR, dynamic=True))


def scheme(name: str) -> Scheme:
    """The scheme of that name. Raises SchemeError with the names there are."""
    if name not in SCHEMES:
        raise SchemeError(f"expected a scheme out of {', '.join(SCHEMES)}, got {name!r}")
    return SCHEMES[name]


def scheme_key(scheme: Scheme) -> str:
    """The scheme's name, with its fields where they are not those that the name stands for."""
    return scheme.name if SCHEMES.get(scheme.name) == scheme else f"{scheme.name} {scheme.row()}"


def rounding_from_row(row: dict[str, object]) -> Rounding:
    """The inverse of `Rounding.row`. Raises SchemeError for a format, granularity or combination there is not."""
    if not isinstance(row.get("dynamic"), bool) or not isinstance(row.get("symmetric"), bool):
        raise SchemeError(f"expected dynamic and symmetric to be true or false, got {row!r}")
    try:
        rounding = Rounding(
            FORMATS[str(row["format"])],
            Granularity(str(row["granularity"])),
            dynamic=bool(row["dynamic"]),
            symmetric=bool(row["symmetric"]),
            range=range_rule_from_row(str(row["range"])),
        )
    except (KeyError, ValueError) as error:
        raise SchemeError(f"expected the fields and names of a rounding, got {row!r} ({error})") from error
    if not rounding.symmetric and not isinstance(rounding.format, IntegerFormat):
        raise SchemeError(f"a zero point needs an integer format, got {rounding.format.name}")
    if isinstance(rounding.range, FusedRows):
        _check_rows(rounding, rounding.range)
    return rounding


def _check_rows(rounding: Rounding, rows: FusedRows) -> None:
    """Raises SchemeError for packed rows that no operator reads."""
    layouts = {(UINT8, "float32"), (UINT8, "float16"), (UINT4, "float16")}
    plain = rounding.granularity is _CHANNEL and not rounding.symmetric and not rounding.dynamic
    if not plain or (rounding.format, rows.parameters) not in layouts:
        raise SchemeError(
            "packed rows are uint8 codes with float32 or float16 parameters or uint4 codes with float16 ones, per "
            f"channel, asymmetric and not dynamic; got {rounding.row()!r}"
        )


def scheme_from_row(name: str, row: dict[str, object]) -> Scheme:
    """The inverse of `Scheme.row`."""
    weight, given = row.get("weight"), row.get("input")
    if not isinstance(weight, dict) or not (given is None or isinstance(given, dict)):
        raise SchemeError(f"scheme {name}: expected weight and input, got {row!r}")
    result = FORMATS.get(str(row["result"])) if "result" in row else None
    if "result" in row and not (isinstance(result, FloatFormat) and result.bits == 16):
        raise SchemeError(f"scheme {name}: expected a result of bf16 or fp16, got {row['result']!r}")
    read = Scheme(
        name,
        rounding_from_row(weight),
        None if given is None else rounding_from_row(given),
        result if isinstance(result, FloatFormat) else None,
    )
    if read.input is not None and (read.rows is not None or isinstance(read.input.range, FusedRows)):
        raise SchemeError(f"scheme {name}: packed rows are a weight's alone, of a scheme without an input, got {row!r}")
    return read


def schemes_of(given: str | Scheme | Sequence[str | Scheme]) -> tuple[Scheme, ...]:
    """One scheme or several, as objects or by name. Raises InputError for none, SchemeError for an unknown name."""
    several = (given,) if isinstance(given, str | Scheme) else tuple(given)
    if not several:
        raise InputError("expected at least one scheme, such as 'fp8', got none")
    return tuple(scheme(one) if isinstance(one, str) else one for one in several)
