"""Embedding tables in packed rows on the CPU: torch's own operators look them up.

    int8-row  fused 8-bit row-wise: D codes, float32 scale, float32 offset; quantized::embedding_bag_byte_rowwise_offsets
    int4-row  fused 4-bit row-wise: D / 2 bytes of codes, float16 scale and offset;
              quantized::embedding_bag_4bit_rowwise_offsets

Invariant: the rows hold the codes, scales and offsets that were measured, and nothing is kept beside them: what a table
saves is its memory. `quantized::embedding_byte` was not taken for lookups: it takes a packed object that makes offsets
from rounded zeros, and calls the same kernel with bags of one row.

The operators add rows up, with weights for each sample. A mean is their sum divided by its count; a padding index weighs
nothing. For what they cannot do (mode max) the rows that are read are decoded; rows that are normalised as they are read
(max_norm) would have to be written, and are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from precimap.decisions import LOOKUPS
from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.quantize import dequantize
from precimap.numerics.rows import pack_rows, unpack_rows
from precimap.numerics.schemes import FusedRows, Scheme
from precimap.runtime.weights.low_weight import How, LowWeight, Parts
from precimap.runtime.weights.products import CALLS, CodedKernel

_aten = torch.ops.aten
_SUM, _MEAN = 0, 1
_MODES = {"sum": _SUM, "mean": _MEAN}


class RowsKernel(CodedKernel):
    """`rows`: uint8 [rows, bytes], in the place of a table [rows, width]."""

    name = "ROWS_KERNEL"

    def __init__(self) -> None:
        super().__init__()
        self.shortcuts = {F.embedding: _looked_up, F.embedding_bag: _bagged}

    def shape(self, how: How, parts: Parts) -> tuple[torch.Size, tuple[int, ...], int]:
        count, held = parts["rows"].shape
        width = (held - _layout(how).bytes) * 8 // how.scheme.weight_bits
        return torch.Size((count, width)), (width, 1), 0

    def values(self, weight: LowWeight) -> Tensor:
        return decoded(weight.how, weight.parts["rows"])

    def layer(self, weight: LowWeight) -> QuantizedLayer:
        how = weight.how
        codes, affine = unpack_rows(weight.parts["rows"], how.scheme.weight.format, _layout(how))
        return QuantizedLayer(name=how.name, scheme=how.scheme, codes=codes, weight_affine=affine, input_range=None)

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return F.linear(x, weight.read().to(dtype), bias)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = _LOOKUPS.get(func)
        return NotImplemented if found is None else found(*args, **kwargs)


def _layout(how: How) -> FusedRows:
    layout = how.scheme.rows
    if layout is None:
        raise DeployError(f"{how.name}: {how.scheme.name} has no packed rows")
    return layout


def packed_parts(layer: QuantizedLayer) -> Parts:
    """The rows of a table as the operators read them. Raises DeployError for a layout that torch has none for."""
    reason = scheme_refusal(layer.scheme)
    if layer.scheme.rows is None or reason is not None:
        raise DeployError(f"{layer.name}: {reason or f'{layer.scheme.name} has no packed rows'}")
    return {"rows": pack_rows(layer.codes, layer.weight_affine, layer.scheme.weight.format, layer.scheme.rows)}


def scheme_refusal(scheme: Scheme) -> str | None:
    if scheme.rows is not None and scheme.weight_bits == 8 and scheme.rows.parameters != "float32":
        return "torch's 8-bit operators read float32 scales and offsets; use int8-row (int8-row-half is torchrec's)"
    return None


def table_refusal(layer: Layer, scheme: Scheme) -> str | None:
    """Why this CPU cannot look the table up in the scheme, or None."""
    if not LOOKUPS.issuperset(layer.ops):
        return f"read by {', '.join(layer.ops)}; packed rows are read by embedding and embedding_bag"
    if layer.also_read_by:
        return f"also read by {', '.join(layer.also_read_by)}, which would have to unpack it"
    if layer.normalised:
        return "its rows are normalised as they are read (max_norm); packed rows cannot be written"
    return scheme_refusal(scheme)


def lookup(how: How, rows: Tensor, ids: Tensor, offsets: Tensor, weights: Tensor | None, last: bool) -> Tensor:
    """Sums of rows, float32 [bags, width]. ids, offsets: whole numbers [n], [bags]; weights: floats [n]."""
    byte, four = "embedding_bag_byte_rowwise_offsets", "embedding_bag_4bit_rowwise_offsets"
    summed: Tensor = getattr(torch.ops.quantized, byte if how.scheme.weight_bits == 8 else four)(
        rows,
        ids.contiguous(),
        offsets.contiguous(),
        per_sample_weights=None if weights is None else weights.float().contiguous(),
        include_last_offset=last,
    )
    return summed


def decoded(how: How, rows: Tensor) -> Tensor:
    """The float32 values of packed rows."""
    format = how.scheme.weight.format
    codes, affine = unpack_rows(rows, format, _layout(how))
    return dequantize(codes, format, affine)


def _looked_up(
    ids: Tensor, weight: LowWeight, padding_idx: Any = None, max_norm: float | None = None, *_: Any, **__: Any
) -> Any:
    """`F.embedding`."""
    return _embedding(weight, ids) if max_norm is None else NotImplemented


def _bagged(
    ids: Tensor,
    weight: LowWeight,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """`F.embedding_bag` of a sum or a mean; whatever else is asked, and what is asked wrongly, is left to its own code."""
    fits = (ids.dim() == 2) == (offsets is None) and ids.dim() in (1, 2) and ids.dtype in (torch.int32, torch.int64)
    weighed = per_sample_weights is None or (mode == "sum" and per_sample_weights.shape == ids.shape)
    if mode not in _MODES or max_norm is not None or not fits or not weighed:
        return NotImplemented
    if offsets is None:
        bags, each = ids.shape
        offsets = torch.arange(bags + 1, dtype=ids.dtype, device=ids.device) * each
        include_last_offset = True
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    padding = -1 if padding_idx is None else padding_idx % weight.parts["rows"].shape[0]
    given = (weight, ids.reshape(-1), offsets, False, _MODES[mode], False, weights, include_last_offset, padding)
    return _bags(*given)[0]


def _embedding(weight: LowWeight, indices: Tensor, *_: Any, **__: Any) -> Tensor:
    flat = indices.reshape(-1)
    each = torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device)
    found = lookup(weight.how, weight.parts["rows"], flat, each, None, False)
    return found.to(weight.outward).reshape(*indices.shape, found.shape[1])


def _selected(weight: LowWeight, dim: int, ids: Tensor) -> Any:
    if dim % 2:
        return NotImplemented
    return decoded(weight.how, weight.parts["rows"].index_select(0, ids)).to(weight.outward)


def _bags(
    weight: LowWeight,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """As `_embedding_bag`, whose further results nobody reads without a gradient; they are empty here."""
    if mode not in (_SUM, _MEAN):
        by_decoding = CALLS[_aten._embedding_bag_forward_only.default]
        return by_decoding(
            *(ROWS_KERNEL, weight, indices, offsets, False, mode, False),
            *(per_sample_weights, include_last_offset, padding_idx),
        )
    if not torch.compiler.is_compiling() and type(offsets) is Tensor and offsets.numel() and int(offsets[0]) != 0:
        raise ValueError(f"expected the first offset to be 0, got {int(offsets[0])}")
    weights = per_sample_weights
    if padding_idx >= 0:
        real = (indices != padding_idx).float()
        weights = real if weights is None else weights * real
    summed = lookup(weight.how, weight.parts["rows"], indices, offsets, weights, include_last_offset)
    if mode == _MEAN:
        summed = summed / _counts(indices, offsets, weights, include_last_offset).clamp(min=1).unsqueeze(1)
    nothing = indices.new_empty(0)
    return summed.to(weight.outward), nothing, nothing, nothing


def _counts(indices: Tensor, offsets: Tensor, real: Tensor | None, last: bool) -> Tensor:
    """How many rows that are not padding each bag has, float32 [bags]."""
    if not last:
        offsets = torch.cat([offsets, offsets.new_full((1,), indices.numel())])
    if real is None:
        return offsets.diff().float()
    before = torch.cat([real.new_zeros(1, dtype=torch.float64), real.double().cumsum(0)])
    return before[offsets.long()].diff().float()


_LOOKUPS: dict[Any, Any] = {
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _selected,
    _aten._embedding_bag.default: _bags,
    _aten._embedding_bag_forward_only.default: _bags,
}

ROWS_KERNEL = RowsKernel()
