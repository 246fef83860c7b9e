"""The fast twins of the quantiser: straight to the rounded float32 values, and to codes; what is looked at beside it.

Invariant: `fake_quantize(x, f, a)` has the bits of `dequantize(quantize(x, f, a), f, a)` for every x without NaN, and
`unsigned_codes(x, f, scale, zero)` the codes of `quantize` for every x.
Why they exist: decoding float8 on a CPU runs at about 1 GB/s, element by element, and a search does little else; and
seven passes over an input to be multiplied in INT8 take longer than the product. The
alternatives not taken: torch.compile of the plain cast, and a kernel of our own; each needs a C++ compiler on the
machine of the user.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.formats import FloatFormat, Format, IntegerFormat
from precimap.numerics.quantize import Affine, refuse_zero, storage_dtype, with_offset

# Elements for each thread: few enough that the buffers of one part stay in the cache, and enough that starting an
# operation costs little against running it.
_PART = 1 << 16
_CODED_PART = 1 << 17  # the same where there is one buffer beside the input, and both are to stay in the cache

# 1.5 * 2**23: a sum with it rounds to a whole number, ties to even, whose two's complement is in the last bits of the sum.
_WHOLE = 12_582_912.0

_SUMMED = (torch.float32, torch.bfloat16, torch.float16)  # where a sum is several times as fast as looking

_EXPONENT_BITS = torch.tensor(0x7F800000, dtype=torch.int32)


def fake_quantize(x: Tensor, format: Format, affine: Affine) -> Tensor:
    """`x` (any float dtype and device, taken as float32) rounded to `format`: contiguous float32 of the shape of `x`.

    Bit for bit what `dequantize(quantize(x))` gives: ties to even, subnormals, the sign of zero, saturation. A NaN
    stays NaN in every format, so that a search sees it; the codes of integers and E2M1 could not hold it. The inputs
    are detached: no gradient flows through. Raises SchemeError for a float format with a zero.
    """
    if affine.offset is None:
        return _rounded(x, format, affine, scaled=True)
    refuse_zero(format, affine)
    x = x.detach()
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    limit = _PART * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    assert isinstance(format, IntegerFormat)
    for part, values, reciprocal, scale, offset in parts(
        [x, result, affine.reciprocal, affine.scale, affine.offset], limit
    ):
        torch.sub(part.to(torch.float32), offset, out=values)
        _round_to_integer_(values.mul_(reciprocal), format)
        values.add_(0.0)  # a code has no sign of zero
        values.copy_(with_offset(values, scale, offset))
    return result


def code_values(x: Tensor, format: Format, affine: Affine) -> Tensor:
    """The codes of `x` less their zero as float32 numbers, contiguous, of the shape of `x`: what products multiply.

    Equal to the codes of `quantize`, but for the sign of zero, which no sum can see. A NaN stays NaN in every format.
    For an affine without an offset; raises SchemeError for a float format with a zero.
    """
    return _rounded(x, format, affine, scaled=False)


def _rounded(x: Tensor, format: Format, affine: Affine, scaled: bool) -> Tensor:
    """The codes less their zero, or what they stand for, with the sign of zero, which costs as much as the scaling."""
    refuse_zero(format, affine)
    x = x.detach()
    result = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    limit = _PART * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    scratch = _scratch(format, min(x.numel(), limit), x.device)
    one = affine.zero is None or affine.zero.numel() == 1
    shift = float(affine.zero) if affine.zero is not None and one else 0.0
    tensors = [x, result, affine.reciprocal, affine.scale] + ([] if affine.zero is None or one else [affine.zero])
    for part, values, reciprocal, scale, *zero in parts(tensors, limit):
        given = part.to(torch.float32)
        torch.mul(given, reciprocal, out=values)
        if isinstance(format, IntegerFormat):
            _round_to_integer_(values, format, shift, *zero)
            if scaled:  # a code has no sign of zero: adding 0 turns -0 into +0
                values.add_(0.0)
        else:
            _round_to_float_(values, format, scratch[: values.numel()].view(values.shape))
            if scaled and format.has_negative_zero:  # what the arithmetic rounds to zero has lost its sign
                values.copysign_(given)
        if scaled:
            values.mul_(scale)
    return result


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite. A sum tells in one pass; only where it overflows each value is looked at."""
    x = x.detach()
    return (x.dtype in _SUMMED and bool(x.sum().isfinite())) or bool(x.isfinite().all())


def unsigned_codes(x: Tensor, format: IntegerFormat, scale: float, zero: int) -> tuple[Tensor, bool]:
    """The codes of `quantize` under one scale and one zero: uint8, contiguous, of the shape of `x` (any float dtype).

    And whether a value is NaN or infinite, in units of the scale; no code stands for it: NaN gets the smallest one, infinity
    saturates. Limits before it rounds, which is the same because the limits are whole, and adds the zero to the codes,
    where it is one byte wide. Raises SchemeError for formats other than unsigned ones of at most 8 bits.
    """
    if format.minimum != 0 or format.bits > 8:
        raise SchemeError(f"expected an unsigned format of at most 8 bits, got {format.name}")
    reciprocal, low, high = _reciprocal(scale), float(-zero), float(format.maximum - zero)
    part = _CODED_PART * torch.get_num_threads()
    if x.numel() <= part:  # most inputs, and for small ones every call of torch counts
        given = x.detach()
        scaled = torch.mul(given, reciprocal) if given.dtype == torch.float32 else given.float().mul_(reciprocal)
        spoiled = _limit_(scaled, low, high)
        whole = scaled.add_(_WHOLE).contiguous().view(torch.int32)
        return whole.to(torch.uint8).add_(zero), spoiled
    given, spoiled = x.detach().reshape(-1), False
    result = torch.empty(given.shape, dtype=torch.uint8, device=x.device)
    scratch = torch.empty(part, dtype=torch.float32, device=x.device)
    for values, codes in zip(torch.split(given, part), torch.split(result, part), strict=True):
        scaled = scratch[: len(values)]
        if values.dtype == torch.float32:
            torch.mul(values, reciprocal, out=scaled)
        else:
            scaled.copy_(values).mul_(reciprocal)
        spoiled |= _limit_(scaled, low, high)
        codes.copy_(scaled.add_(_WHOLE).view(torch.int32))
    return result.add_(zero).view(x.shape), spoiled


def _limit_(scaled: Tensor, low: float, high: float) -> bool:
    """Keep the values within the limits, NaN at the lower one; whether one of them was not finite.

    One sum tells where all are: one that is not finite makes it so. Where it is not, it may have overflowed, too.
    """
    if math.isfinite(scaled.sum().item()):
        scaled.clamp_(low, high)
        return False
    spoiled = not bool(scaled.isfinite().all())
    scaled.nan_to_num_(nan=low).clamp_(low, high)
    return spoiled


@functools.lru_cache(maxsize=4096)
def _reciprocal(scale: float) -> float:
    """1 / scale as float32 arithmetic rounds it."""
    return float(torch.tensor(scale, dtype=torch.float32).reciprocal())


def _round_to_integer_(scaled: Tensor, format: IntegerFormat, shift: float = 0.0, zero: Tensor | None = None) -> None:
    """q - zero, in place, but for the sign of zero. shift: the one zero of all values, where `zero` does not give many.

    Limits less the zero are whole and saturate alike, which saves two passes.
    """
    if zero is None:
        scaled.round_().clamp_(format.minimum - shift, format.maximum - shift)
    else:
        scaled.round_().add_(zero).clamp_(format.minimum, format.maximum).sub_(zero)


def _round_to_float_(scaled: Tensor, format: FloatFormat, scratch: Tensor) -> None:
    """Saturate and round to the format, in place, but for the sign of zero. `scratch` has the same shape.

    Formats of 16 bits are converted there and back, which torch does with vector instructions. The others add and take
    away 1.5 * 2**(23 - mantissa_bits) times the power of two in each value: the sum keeps `mantissa_bits` bits below
    that power, and the addition itself rounds, ties to even. The power is not less than the smallest normal, which makes
    the equal steps of the subnormals; 1.5 and not 1 so that a negative value does not leave the binade. The product is
    exact, so a fused multiply-add changes nothing.
    """
    scaled.clamp_(format.minimum, format.maximum)
    if format.bits == 16:
        scaled.copy_(scratch.copy_(scaled))
        return
    bits = scratch.view(torch.int32)
    torch.bitwise_and(scaled.view(torch.int32), _EXPONENT_BITS, out=bits)
    bits.clamp_(min=(128 - format.bias) << 23)  # the smallest normal, 2**(1 - bias), as float32 bits
    reach = 1.5 * 2.0 ** (23 - format.mantissa_bits)
    scaled.add_(scratch, alpha=reach).sub_(scratch, alpha=reach)


def _scratch(format: Format, part: int, device: torch.device) -> Tensor:
    """What rounding one part needs: the codes where it is a conversion, float32 where it is arithmetic.

    Allocated once for all parts: fresh pages cost as much as the arithmetic.
    """
    if isinstance(format, IntegerFormat):
        return torch.empty(0, device=device)
    return torch.empty(part, dtype=storage_dtype(format) if format.bits == 16 else torch.float32, device=device)


def parts(tensors: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    """Tensors that broadcast to the first, cut along its first dims into views where it has at most `limit` elements."""
    shape = tensors[0].shape
    if shape.numel() <= limit:
        yield tensors
        return
    rows = max(1, limit // shape[1:].numel())
    alike = [each.expand(shape) for each in tensors]
    cuts = [torch.split(each, rows) if rows > 1 else each.unbind() for each in alike]
    for pieces in zip(*cuts, strict=True):
        yield from parts(pieces, limit)
