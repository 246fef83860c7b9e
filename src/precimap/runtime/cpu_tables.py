"""Embedding tables in packed rows on the CPU: torch's own operators look them up.

    int8-row  fused 8-bit row-wise: D codes, float32 scale, float32 offset; quantized::embedding_bag_byte_rowwise_offsets
    int4-row  fused 4-bit row-wise: D / 2 bytes of codes, float16 scale and offset;
              quantized::embedding_bag_4bit_rowwise_offsets

Invariant: the rows hold the codes, scales and offsets that were measured, and nothing is kept beside them: what a table
saves is its memory. `quantized::embedding_byte` was not taken for lookups: it takes a packed object that makes offsets
from rounded zeros, and calls the same kernel with bags of one row.

The operators add rows up, with weights for each sample. A mean is their sum divided by its count; a padding index weighs
nothing. What they cannot do (mode max, max_norm) is refused by `layers/owners.py`.
"""

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.owners import why_not_packed
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.rows import pack_rows, unpack_rows
from precimap.numerics.schemes import Scheme


class PackedTable(nn.Module):
    """Packed rows uint8 [rows, bytes] that stand for a float table [rows, width]; `lookup` reads them.

    The rows are the canonical form: they travel in the state dict, and `unpacked` gives codes and scales back.
    """

    rows: Tensor
    layer_name: str

    def __init__(self, layer: QuantizedLayer, output_dtype: torch.dtype) -> None:
        super().__init__()
        layout, format = layer.scheme.rows, layer.scheme.weight.format
        reason = _scheme_refusal(layer.scheme)
        if layout is None or reason is not None:
            raise DeployError(f"{layer.name}: {reason or f'{layer.scheme.name} has no packed rows'}")
        self.num_embeddings, self.embedding_dim = layer.codes.shape
        self.register_buffer("rows", pack_rows(layer.codes, layer.weight_affine, format, layout))
        self.layer_name, self._scheme, self._output_dtype = layer.name, layer.scheme, output_dtype

    def lookup(self, indices: Tensor, offsets: Tensor, weights: Tensor | None = None, last: bool = False) -> Tensor:
        """Sums of rows, float32 [bags, width]. indices, offsets: whole numbers [n], [bags]; weights: floats [n]."""
        # Named here and not kept: a module that holds an operator cannot be pickled.
        byte, four = "embedding_bag_byte_rowwise_offsets", "embedding_bag_4bit_rowwise_offsets"
        summed: Tensor = getattr(torch.ops.quantized, byte if self._scheme.weight_bits == 8 else four)(
            self.rows,
            indices.contiguous(),
            offsets.contiguous(),
            per_sample_weights=None if weights is None else weights.float().contiguous(),
            include_last_offset=last,
        )
        return summed

    def unpacked(self) -> QuantizedLayer:
        """The layer as it was measured: its codes, one in each byte, and its scales and offsets."""
        assert self._scheme.rows is not None
        codes, affine = unpack_rows(self.rows, self._scheme.weight.format, self._scheme.rows)
        return QuantizedLayer(self.layer_name, self._scheme, codes, affine, None)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self._scheme.name}, {self.rows.shape[1]} bytes a row"


class PackedEmbedding(PackedTable):
    """In place of an nn.Embedding: indices of any shape -> [*shape, width] in the table's base precision."""

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1)
        found = self.lookup(flat, torch.arange(flat.numel(), dtype=flat.dtype, device=flat.device))
        return found.to(self._output_dtype).reshape(*input.shape, self.embedding_dim)


class PackedEmbeddingBag(PackedTable):
    """In place of an nn.EmbeddingBag in mode sum or mean: [bags, width] in the table's base precision.

    The modes, arguments and their checks are those of `F.embedding_bag`; a bag without rows is zero.
    """

    def __init__(self, layer: QuantizedLayer, bag: nn.EmbeddingBag) -> None:
        super().__init__(layer, bag.weight.dtype)
        self.mode, self.include_last_offset, self.padding_idx = bag.mode, bag.include_last_offset, bag.padding_idx

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """input: [bags, n], or [n] with offsets [bags] (one more with include_last_offset); as nn.EmbeddingBag."""
        _check(input, offsets, per_sample_weights, self.mode)
        last = self.include_last_offset
        if offsets is None:
            bags, each = input.shape
            offsets, last = torch.arange(bags + 1, dtype=input.dtype, device=input.device) * each, True
        indices = input.reshape(-1)
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
        if self.padding_idx is not None:
            real = (indices != self.padding_idx).float()
            weights = real if weights is None else weights * real
        summed = self.lookup(indices, offsets, weights, last)
        if self.mode == "mean":
            summed = summed / _counts(indices, offsets, weights, last).clamp(min=1).unsqueeze(1)
        return summed.to(self._output_dtype)


def _counts(indices: Tensor, offsets: Tensor, real: Tensor | None, last: bool) -> Tensor:
    """How many rows that are not padding each bag has, float32 [bags]."""
    if not last:
        offsets = torch.cat([offsets, offsets.new_tensor([indices.numel()])])
    if real is None:
        return offsets.diff().float()
    before = torch.cat([real.new_zeros(1, dtype=torch.float64), real.double().cumsum(0)])
    return before[offsets.long()].diff().float()


def _check(input: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: str) -> None:
    """What the operators do not check and would answer with other numbers; the errors of `F.embedding_bag`."""
    if (input.dim() == 2) != (offsets is None) or input.dim() not in (1, 2):
        raise ValueError(f"expected 2 dims without offsets or 1 dim with them, got {input.dim()} dims")
    if weights is not None and (mode != "sum" or weights.shape != input.shape):
        raise ValueError(
            f"expected per_sample_weights in mode sum and of the shape of the input, got mode {mode} and "
            f"{tuple(weights.shape)} beside {tuple(input.shape)}"
        )
    if offsets is not None and not torch.compiler.is_compiling() and offsets.numel() and int(offsets[0]) != 0:
        raise ValueError(f"expected the first offset to be 0, got {int(offsets[0])}")


def packed_table(layer: QuantizedLayer, module: nn.Module | None) -> PackedTable:
    """What takes the place of `module`. Raises DeployError for a module that packed rows cannot stand for."""
    reason = why_not_packed(module)
    if reason is not None:
        raise DeployError(f"{layer.name}: {reason}; keep it in the map")
    if isinstance(module, nn.EmbeddingBag):
        return PackedEmbeddingBag(layer, module)
    assert isinstance(module, nn.Embedding)
    return PackedEmbedding(layer, module.weight.dtype)


def table_refusal(layer: Layer, scheme: Scheme) -> str | None:
    """Why this CPU cannot look the table up in the scheme, or None."""
    if layer.tied:
        return f"tied to {', '.join(layer.tied)}; packed rows would untie them"
    return _scheme_refusal(scheme) or layer.not_packed


def _scheme_refusal(scheme: Scheme) -> str | None:
    if scheme.rows is not None and scheme.weight_bits == 8 and scheme.rows.parameters != "float32":
        return "torch's 8-bit operators read float32 scales and offsets; use int8-row (int8-row-half is torchrec's)"
    return None


def tables(deployed: nn.Module) -> dict[str, QuantizedLayer]:
    """Codes and scales of all packed tables of a model, by the name of the weight they stand for."""
    return {m.layer_name: m.unpacked() for m in deployed.modules() if isinstance(m, PackedTable)}
