"""Number formats as rows of plain numbers.

Invariant: every row is held to `ml_dtypes` and `torch.finfo` in the tests, over every code. Limits are data and not a
formula of the exponent width, because the formats of accelerators break the IEEE rule (E4M3 ends at 448, not 240).
This file imports no torch, so that planning stays plain arithmetic; `torch_dtype` is a name.

Sources: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2), OCP Microscaling Formats 1.0 (E2M1, E8M0),
Graphcore/AMD FNUZ forms as in torch and ml_dtypes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
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

E4M3 = FloatFormat("e4m3", 8, 4, 3, bias=7, maximum=448.0, torch_dtype="float8_e4m3fn")
E5M2 = FloatFormat("e5m2", 8, 5, 2, bias=15, maximum=57344.0, torch_dtype="float8_e5m2", has_infinity=True)
E4M3_FNUZ = FloatFormat(
    "e4m3-fnuz", 8, 4, 3, bias=8, maximum=240.0, torch_dtype="float8_e4m3fnuz", has_negative_zero=False
)
E5M2_FNUZ = FloatFormat(
    "e5m2-fnuz", 8, 5, 2, bias=16, maximum=57344.0, torch_dtype="float8_e5m2fnuz", has_negative_zero=False
)
E2M1 = FloatFormat("e2m1", 4, 2, 1, bias=1, maximum=6.0, torch_dtype=None)
BF16 = FloatFormat("bf16", 16, 8, 7, bias=127, maximum=3.3895313892515355e38, torch_dtype="bfloat16", has_infinity=True)
FP16 = FloatFormat("fp16", 16, 5, 10, bias=15, maximum=65504.0, torch_dtype="float16", has_infinity=True)

# Symmetric: -128 is left out, so that negating a weight never saturates (as compressed-tensors and oneDNN users do).
INT8 = IntegerFormat("int8", 8, -127, 127, "int8")
UINT8 = IntegerFormat("uint8", 8, 0, 255, "uint8")
# x86 without VNNI sums pairs of u8 x s8 products in 16 bits with saturation (vpmaddubsw): only 7-bit inputs are exact.
UINT7 = IntegerFormat("uint7", 7, 0, 127, "uint8")
UINT4 = IntegerFormat("uint4", 4, 0, 15, "uint8")  # one code in each element; packed where a kernel wants it

E8M0 = ExponentFormat("e8m0", 8, bias=127, torch_dtype="float8_e8m0fnu")

FORMATS: dict[str, Format] = {
    row.name: row for row in (E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ, E2M1, BF16, FP16, INT8, UINT8, UINT7, UINT4)
}
