"""Choosing scales: from a tensor, or from calibrated limits, to the `Affine` that the quantiser uses.

Invariant: all arithmetic is float32, and both ways go through `affine_from_range`, so that a static scale from
calibration and a scale from the tensor itself follow one formula. A scale is finite and at least 2**-126, so that
1 / scale is finite as well; a range of nothing but zeros has scale 1. Nothing is ignored: a NaN makes the scale that it
falls under NaN, and with it every value under that scale. An infinity takes the largest finite range, and saturates.
BF16 and FP16 hold the range that the model already has: their scale is 1, whatever the rule.

Not taken: scales rounded up to powers of two. They cost up to one bit of the format, and only block formats need them.
"""

import math

import torch
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.fast import fake_quantize
from precimap.numerics.formats import FloatFormat, IntegerFormat
from precimap.numerics.quantize import Affine
from precimap.numerics.rows import row_affine
from precimap.numerics.schemes import FusedRows, Granularity, MinimumError, Percentile, Rounding

__all__ = ["Affine", "affine_from_range", "fit"]

_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: its reciprocal is finite
_LARGEST = torch.finfo(torch.float32).max * (1 - 2.0**-23)  # one step down: a code times its rounded scale stays finite


def fit(x: Tensor, rounding: Rounding, contracted: tuple[int, ...]) -> Affine:
    """The scales that `rounding` gives to `x` (any float dtype).

    PER_TENSOR has one scale of shape [1] * x.ndim. PER_CHANNEL and PER_TOKEN share one over the `contracted` dims,
    those that the op sums over, and keep them with size 1. The range rules are those of `schemes`; an asymmetric range
    is cut at both ends by a percentile of |x|, and shrunken as a whole by the least error. FusedRows has scale and
    offset of `rows`. Raises SchemeError when there is nothing to share a scale over, for a float format with a zero, and
    for rows beyond their layout.
    """
    if rounding.granularity is not Granularity.PER_TENSOR and not contracted:
        raise SchemeError(f"{rounding.granularity} needs at least one contracted dim to share a scale over, got none")
    x = x.detach().to(torch.float32)
    dims = tuple(range(x.ndim)) if rounding.granularity is Granularity.PER_TENSOR else contracted
    if x.numel() == 0:  # an expert without tokens
        kept = x.sum(dims, keepdim=True)
        return affine_from_range(kept, kept, rounding)
    low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
    if isinstance(rounding.range, Percentile):
        reach = _percentile(x, rounding.range.percentile, dims)
        low, high = low.maximum(-reach), high.minimum(reach)
    elif isinstance(rounding.range, MinimumError):
        factor = _least_error_factor(x, (low, high), rounding, rounding.range.steps, dims)
        low, high = low * factor, high * factor
    return affine_from_range(low, high, rounding)


def affine_from_range(low: float | Tensor, high: float | Tensor, rounding: Rounding) -> Affine:
    """The scale, and the zero of an asymmetric rounding, whose codes reach from `low` to `high`.

    Numbers give 0-dim tensors on the CPU; tensors, float32 of one shape, keep their shape and device.

    Symmetric: scale = max(|low|, |high|) / maximum. Asymmetric: the range is widened to hold 0, so that 0.0 is a code;
    scale = (high - low) / (maximum - minimum), zero = round(minimum - low / scale) within the codes. After rounding the
    zero, the outermost values may saturate by half a step. FusedRows: as `rows.row_affine` says. Raises SchemeError for
    a float format with a zero, and for rows beyond their layout.
    """
    low, high = (torch.as_tensor(limit, dtype=torch.float32).detach() for limit in (low, high))
    format = rounding.format
    if isinstance(rounding.range, FusedRows):
        return row_affine(low, high, format, rounding.range)
    if not rounding.symmetric:
        if not isinstance(format, IntegerFormat):
            raise SchemeError(f"a zero point needs an integer format, got {format.name}")
        low, high = low.clamp(-_LARGEST / 2, 0.0), high.clamp(0.0, _LARGEST / 2)
        scale = _scale(high - low, format.maximum - format.minimum)
        return Affine(scale, (format.minimum - low / scale).round().clamp(format.minimum, format.maximum))
    amax = low.abs().maximum(high.abs())
    if isinstance(format, FloatFormat) and format.bits == 16:
        return Affine(torch.ones_like(amax), None)
    return Affine(_scale(amax.clamp(max=_LARGEST), format.maximum), None)


def _scale(reach: Tensor, codes: float) -> Tensor:
    """reach / codes, 1 for a reach of 0, and never so small that its reciprocal is infinite."""
    return torch.where(reach == 0, 1.0, (reach / codes).clamp(min=_SMALLEST_SCALE))


def _percentile(x: Tensor, percentile: float, dims: tuple[int, ...]) -> Tensor:
    """The percentile of |x| over `dims` (kept with size 1), linear between its two neighbours as numpy's default.

    By topk, which has no limit of size, where torch.quantile refuses more than 2**24 elements.
    """
    reduced = sorted(dim % x.ndim for dim in dims)
    kept = [dim for dim in range(x.ndim) if dim not in reduced]
    count = math.prod(x.shape[dim] for dim in reduced)
    magnitude = (
        x.abs().clamp_(max=_LARGEST).permute([*kept, *reduced]).reshape([x.shape[dim] for dim in kept] + [count])
    )
    position = percentile / 100 * (count - 1)
    rank = math.floor(position)
    largest = magnitude.topk(count - rank, dim=-1).values  # descending: the last has that rank, the one before the next
    lower, upper = largest[..., -1], largest[..., max(count - rank - 2, 0)]
    return lower.lerp(upper, position - rank).reshape([1 if dim in reduced else x.shape[dim] for dim in range(x.ndim)])


def _least_error_factor(
    x: Tensor, limits: tuple[Tensor, Tensor], rounding: Rounding, steps: int, dims: tuple[int, ...]
) -> Tensor:
    """For each scale, the factor k / steps of the range with the least sum of squared errors; ties keep the widest."""
    low, high = limits
    best = torch.ones_like(low)
    least = torch.full_like(low, math.inf, dtype=torch.float64)
    for k in range(steps, 0, -1):
        factor = k / steps
        error = fake_quantize(x, rounding.format, affine_from_range(low * factor, high * factor, rounding)).sub_(x)
        norm = torch.linalg.vector_norm(error, dim=dims, keepdim=True, dtype=torch.float64)
        best = torch.where(norm < least, factor, best)
        least = least.minimum(norm)
    return best
