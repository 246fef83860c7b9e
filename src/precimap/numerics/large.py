"""Large weights to codes and back, some rows at a time.

Invariant: the bits of `quantize` and `dequantize`, which a row's neighbours do not touch. What those need beside their
result would be several times the weight, the largest tensor of a search where one table holds most of a model. Not taken:
cutting inside of them: inputs of any size go there too, also in front of compilers, to whom a size is a symbol.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from precimap.numerics.formats import Format
from precimap.numerics.quantize import Affine, dequantize, quantize, storage_dtype

LARGEST_PART = 1 << 22  # values


def large_to_codes(weight: Tensor, format: Format, affine: Affine) -> Tensor:
    """As `quantize`."""
    return _in_parts(partial(quantize, format=format), weight, affine, storage_dtype(format))


def large_to_values(codes: Tensor, format: Format, affine: Affine) -> Tensor:
    """As `dequantize`."""
    return _in_parts(partial(dequantize, format=format), codes, affine, torch.float32)


def _in_parts(change: Callable[..., Tensor], given: Tensor, affine: Affine, dtype: torch.dtype) -> Tensor:
    if given.numel() <= LARGEST_PART or given.dim() < 2:
        return change(given, affine=affine)
    result = torch.empty_like(given, dtype=dtype)
    for piece in row_pieces(given, LARGEST_PART):
        result[piece] = change(given[piece], affine=rows_of(affine, piece, given.dim()))
    return result


def row_pieces(given: Tensor, limit: int) -> Iterator[slice]:
    """Of the rows of a tensor [rows, ...], in order, so that each piece holds at most `limit` values, or is one row."""
    count = max(1, limit // max(1, given.shape[1:].numel()))
    yield from (slice(start, start + count) for start in range(0, len(given), count))


def rows_of(affine: Affine, piece: slice, dims: int) -> Affine:
    """Of these rows; what all rows share, these share."""

    def of(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.dim() < dims or part.shape[0] == 1 else part[piece]

    scale = of(affine.scale)
    assert scale is not None
    return Affine(scale, of(affine.zero), of(affine.offset), of(affine.inverse))
