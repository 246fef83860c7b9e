"""Rows of embedding tables: the scale and the offset that torch and FBGEMM give to a row, to the bit.

    x ~ q * scale + offset, one scale and one offset for each row

Two layouts, told apart by the float that holds the two parameters (`schemes.FusedRows`):

    float32  "fused 8-bit row-wise": torch's quantized::embedding_bag_byte_prepack, FBGEMM's
             FloatToFused8BitRowwiseQuantized. offset = min, scale = (max - min) / 255, and codes are made with
             255 / (max - min + 1e-8) and not with 1 / scale.
    float16  "fused N-bit row-wise": torch's quantized::embedding_bag_4bit_prepack, FBGEMM's
             FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf (4 bits; with 8 bits it is what torchrec's tables hold).
             offset = half(min), scale = half((max - offset) / maximum), codes with 1 / scale; scale is 1 where it
             would be 0 or its reciprocal infinite.

Source: FBGEMM, src/QuantUtils.cc (FloatOrHalfToFused8BitRowwiseQuantizedSBFloatRef and
FloatOrHalfToFusedNBitRowwiseQuantizedSBHalfRef). The tests hold both to the operators of both libraries, which agree with
each other; but FBGEMM's own 4-bit quantiser takes only widths that are multiples of 4, torch's every even one.

Invariant: nothing of a layout is approximated. The alternative, a whole-number zero as in `Affine.zero`, gives other
codes in most rows, and the operators would then not return what was measured.
"""

import torch
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.formats import Format
from precimap.numerics.quantize import Affine
from precimap.numerics.schemes import FusedRows

_EPSILON = 1e-8  # FBGEMM's kEpsilon: keeps the inverse of a constant row finite


def row_affine(low: Tensor, high: Tensor, format: Format, layout: FusedRows) -> Affine:
    """Scale, offset and inverse of rows whose values reach from `low` to `high` (float32, one shape, one device).

    The scale of a float16 layout is negative where the rounded minimum lies above a constant row: that is what the
    operators hold, and it gives the constant back. Raises SchemeError for a row that the parameters cannot hold.
    """
    # Tensors on both sides: with a number, torch multiplies by a reciprocal here and there, which rounds twice.
    codes = torch.full_like(low, format.maximum)
    if layout.parameters == "float32":
        reach = high - low
        affine = Affine(reach / codes, None, low, codes / (reach + _EPSILON))
    else:
        affine = _half_affine(low, high, codes)
    finite = torch.isfinite(affine.scale) & torch.isfinite(low if affine.offset is None else affine.offset)
    if not finite.all():
        row = int((~finite).flatten().nonzero()[0])
        raise SchemeError(
            f"row {row} reaches from {low.flatten()[row]:g} to {high.flatten()[row]:g}, beyond what {layout.parameters} "
            "holds, in which this layout keeps a row's scale and offset; keep this table in base precision"
        )
    return affine


def _half_affine(low: Tensor, high: Tensor, codes: Tensor) -> Affine:
    offset = low.half().float()
    reach = high - offset
    scale = torch.where(reach == 0, 1.0, reach / codes).half().float()
    scale = torch.where((scale == 0) | scale.reciprocal().isinf(), 1.0, scale)
    return Affine(scale, None, offset)


def pack_rows(codes: Tensor, affine: Affine, format: Format, layout: FusedRows) -> Tensor:
    """Rows as the operators read them: uint8 [rows, bytes], contiguous. codes: uint8 [rows, width].

    The codes of a row, of 4-bit codes the even columns in the low half of each byte, then its scale and its offset as
    little-endian floats of the layout. Raises SchemeError for 4-bit rows of an odd width and rows without an offset.
    """
    if format.bits == 4:
        if codes.shape[1] % 2:
            raise SchemeError(f"two 4-bit codes share a byte, so a row needs an even width, got {codes.shape[1]}")
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    if affine.offset is None:
        raise SchemeError("packed rows hold an offset for each row, got an affine without one")
    scale, offset = (
        part.to(getattr(torch, layout.parameters)).view(torch.uint8) for part in (affine.scale, affine.offset)
    )
    return torch.cat([codes, scale, offset], dim=1)


def unpack_rows(rows: Tensor, format: Format, layout: FusedRows) -> tuple[Tensor, Affine]:
    """The codes uint8 [rows, width] and their scale and offset [rows, 1]: the inverse of `pack_rows`."""
    codes, parameters = rows[:, : -layout.bytes], rows[:, -layout.bytes :].contiguous()
    if format.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=2).flatten(1)
    floats = parameters.view(getattr(torch, layout.parameters)).float()
    return codes.contiguous(), Affine(floats[:, :1].contiguous(), None, floats[:, 1:].contiguous())
