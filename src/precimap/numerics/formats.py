"""Number formats as rows of plain numbers.

Invariant: every row is held to `ml_dtypes` and `torch.finfo` in the tests, over every code. Limits are data and not a
formula of the exponent width, because the formats of accelerators break the IEEE rule (E4M3 ends at 448, not 240).
This file imports no torch, so that planning stays plain arithmetic; `torch_dtype` is a name.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E8M0),
Graphcore/AMD FNUZ forms as in torch and ml_dtypes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary floating-point format with subnormals; rounding is to nearest, ties to even.

    `maximum`, `smallest_normal` and `smallest_subnormal` are values; `torch_dtype` names the storage dtype, None
    where torch has no element of that size.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    maximum: float
    torch_dtype: str | None
    has_infinity: bool = False
    has_negative_zero: bool = True

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def minimum(self) -> float:
        return -self.maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerFormat:
    """Whole numbers from `minimum` to `maximum`, stored as `torch_dtype`."""

    name: str
    bits: int
    minimum: int
    maximum: int
    torch_dtype: str


@dataclass(frozen=True, slots=True)
class ExponentFormat:
    """A power of two and nothing else: the scale format of the MX block formats. Code c means 2**(c - bias)."""

    name: str
    bits: int
    bias: int
    torch_dtype: str | None


Format = FloatFormat | IntegerFormat  # what a weight or an input may be rounded to

E4M3 = FloatFormat(
    name="e4m3", bits=8, exponent_bits=4, mantissa_bits=3, bias=7, maximum=448.0, torch_dtype="float8_e4m3fn"
)
E5M2 = FloatFormat(
    name="e5m2",
    bits=8,
    exponent_bits=5,
    mantissa_bits=2,
    bias=15,
    maximum=57344.0,
    torch_dtype="float8_e5m2",
    has_infinity=True,
)
E4M3_FNUZ = FloatFormat(
    name="e4m3-fnuz",
    bits=8,
    exponent_bits=4,
    mantissa_bits=3,
    bias=8,
    maximum=240.0,
    torch_dtype="float8_e4m3fnuz",
    has_negative_zero=False,
)
E5M2_FNUZ = FloatFormat(
    name="e5m2-fnuz",
    bits=8,
    exponent_bits=5,
    mantissa_bits=2,
    bias=16,
    maximum=57344.0,
    torch_dtype="float8_e5m2fnuz",
    has_negative_zero=False,
)
E2M1 = FloatFormat(name="e2m1", bits=4, exponent_bits=2, mantissa_bits=1, bias=1, maximum=6.0, torch_dtype=None)
BF16 = FloatFormat(
    name="bf16",
    bits=16,
    exponent_bits=8,
    mantissa_bits=7,
    bias=127,
    maximum=3.3895313892515355e38,
    torch_dtype="bfloat16",
    has_infinity=True,
)
FP16 = FloatFormat(
    name="fp16",
    bits=16,
    exponent_bits=5,
    mantissa_bits=10,
    bias=15,
    maximum=65504.0,
    torch_dtype="float16",
    has_infinity=True,
)

# Symmetric: -128 is left out, so that negating a weight never saturates (as compressed-tensors and oneDNN users do).
INT8 = IntegerFormat(name="int8", bits=8, minimum=-127, maximum=127, torch_dtype="int8")
UINT8 = IntegerFormat(name="uint8", bits=8, minimum=0, maximum=255, torch_dtype="uint8")
# x86 without VNNI sums pairs of u8 x s8 products in 16 bits with saturation (vpmaddubsw): only 7-bit inputs are exact.
UINT7 = IntegerFormat(name="uint7", bits=7, minimum=0, maximum=127, torch_dtype="uint8")
UINT4 = IntegerFormat(
    name="uint4", bits=4, minimum=0, maximum=15, torch_dtype="uint8"
)  # one code in each element; packed where a kernel wants it

E8M0 = ExponentFormat("e8m0", 8, bias=127, torch_dtype="float8_e8m0fnu")

FORMATS: dict[str, Format] = {
    row.name: row for row in (E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ, E2M1, BF16, FP16, INT8, UINT8, UINT7, UINT4)
}
