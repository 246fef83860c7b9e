"""The one quantiser: float32 values to codes and back, written to be read.

    scaled = x * (1 / scale)                  float32, the reciprocal rounded to float32 first
    q      = saturate(round(scaled) + zero)   to nearest, ties to even; zero for integers only
    x     ~= (q - zero) * scale               float32

Rows of embedding tables (`rows.py`) have an offset instead of a zero:

    scaled = (x - offset) * inverse           float32
    x     ~= q * scale + offset               rounded once to float32, as a fused multiply-add does

Invariant: every backend means this and nothing else by a scheme. It multiplies by the reciprocal, as kernels do, and
does not divide: `x / scale` differs in the last bit now and then, and so lands on the other code at some ties.
A saturating cast is chosen over the plain one of torch, which gives NaN or infinity beyond the range of the format.
`fast.fake_quantize` is the twin with the same bits that a search can afford; the tests hold both to a table of codes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.formats import FloatFormat, Format, IntegerFormat

_LARGEST_PART = 1 << 22  # values that are held in float64 at a time


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """The map between codes and values, x ~ (q - zero) * scale, or x ~ q * scale + offset.

    `scale`: float32, positive, on the device of the tensor, of a shape that broadcasts to it. `zero`: float32 whole
    numbers of the same shape for asymmetric integers, None when zero is code 0. `offset`: float32, of the same shape,
    for integers, never beside a zero. `inverse`: what values are multiplied by where a layout does not say 1 / scale.
    `ranges.fit` makes them.
    """

    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None = None
    inverse: Tensor | None = None

    @property
    def reciprocal(self) -> Tensor:
        """1 / scale in float32, or the layout's own inverse: what kernels multiply by."""
        return self.scale.reciprocal() if self.inverse is None else self.inverse


def storage_dtype(format: Format) -> torch.dtype:
    """The dtype of the codes; uint8, one code in each element, where torch has no element of that size (E2M1)."""
    dtype: torch.dtype = getattr(torch, format.torch_dtype or "uint8")
    return dtype


def quantize(x: Tensor, format: Format, affine: Affine) -> Tensor:
    """The codes of `x` (any float dtype, taken as float32) in `storage_dtype(format)`, of the shape of `x`.

    Values beyond the format saturate, infinities too: a wrap never happens, and NaN comes only from NaN. A NaN stays
    NaN where the format has one; where it has none (integers, E2M1) it becomes code 0. No gradient flows through.
    Raises SchemeError for a float format with a zero.
    """
    refuse_zero(format, affine)
    values = x.detach().to(torch.float32)
    scaled = (values if affine.offset is None else values - affine.offset) * affine.reciprocal
    if isinstance(format, IntegerFormat):
        whole = scaled.round() if affine.zero is None else scaled.round() + affine.zero
        return whole.nan_to_num(nan=0.0).clamp(format.minimum, format.maximum).to(storage_dtype(format))
    saturated = scaled.clamp(format.minimum, format.maximum)
    return _nearest_codes(saturated, format) if format.torch_dtype is None else saturated.to(storage_dtype(format))


def dequantize(codes: Tensor, format: Format, affine: Affine) -> Tensor:
    """The float32 values of codes that `quantize` made: (q - zero) * scale, or q * scale + offset rounded once.

    Raises SchemeError as `quantize` does.
    """
    refuse_zero(format, affine)
    if affine.offset is not None:
        return with_offset(codes, affine.scale, affine.offset)
    if isinstance(format, FloatFormat) and format.torch_dtype is None:
        magnitudes = torch.tensor(_magnitudes(format), dtype=torch.float32, device=codes.device)
        sign, index = codes >> (format.bits - 1), codes & (len(magnitudes) - 1)
        values = torch.where(sign == 1, -magnitudes[index.long()], magnitudes[index.long()])
    else:
        values = codes.to(torch.float32)
    return (values if affine.zero is None else values - affine.zero) * affine.scale


def with_offset(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """q * scale + offset in float32, rounded once, as the fused multiply-add of torch's and FBGEMM's operators.

    By way of float64, where the product is exact; rounding twice could differ in one of about 2**29 values. Large
    tables row by row: their float64 copy would be the largest tensor of a search.
    """
    if codes.numel() <= _LARGEST_PART or codes.dim() < 2:
        return torch.addcmul(offset.double(), codes.double(), scale.double()).float()
    rows = max(1, _LARGEST_PART // codes[0].numel())
    alike = [torch.split(each.expand(codes.shape[0], *each.shape[1:]), rows) for each in (codes, scale, offset)]
    return torch.cat([with_offset(*part) for part in zip(*alike, strict=True)])


def refuse_zero(format: Format, affine: Affine) -> None:
    """Raises SchemeError when a float format comes with a zero or an offset, which would silently do nothing."""
    if (affine.zero is not None or affine.offset is not None) and not isinstance(format, IntegerFormat):
        raise SchemeError(f"expected a zero only for an integer format, got one for {format.name}; fit it symmetric")


def sqnr_db(x: Tensor, approximation: Tensor) -> float:
    """Signal to quantisation noise in decibel, 10 log10(sum x^2 / sum (x - approximation)^2), in float64.

    Infinite when nothing was lost, minus infinity when a tensor of zeros was changed.
    """
    signal = float(x.detach().double().square().sum())
    noise = float((x.detach().double() - approximation.detach().double()).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _magnitudes(format: FloatFormat) -> list[float]:
    """The value of each code with a clear sign bit, by the definition of a binary float (no infinities, no NaN)."""
    values = []
    for code in range(2 ** (format.bits - 1)):
        exponent, fraction = divmod(code, 2**format.mantissa_bits)
        leading = 2**format.mantissa_bits if exponent else 0
        values.append((leading + fraction) * format.smallest_subnormal * 2.0 ** (max(exponent, 1) - 1))
    return values


def _nearest_codes(saturated: Tensor, format: FloatFormat) -> Tensor:
    """Nearest code of a format that torch has no element for; a tie takes the even code, whose last bit is 0."""
    values = torch.tensor(_magnitudes(format), dtype=torch.float32, device=saturated.device)
    midpoints = (values[1:] + values[:-1]) / 2
    magnitude = saturated.nan_to_num(nan=0.0).abs()
    below = torch.bucketize(magnitude, midpoints, out_int32=True)  # a tie goes down
    above = torch.bucketize(magnitude, midpoints, out_int32=True, right=True)  # a tie goes up; the same without one
    index = torch.where(below % 2 == 0, below, above)
    negative = saturated.signbit() & ~saturated.isnan()
    return (index + (negative.to(torch.int32) << (format.bits - 1))).to(torch.uint8)
