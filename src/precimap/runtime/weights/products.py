"""Which operators multiply a weight or look its rows up, and what a kernel is asked for each.

Invariant: every product becomes `rows`: inputs [M, K] with a weight [N, K] that has one scale, or one for each of N. What
torch makes of the spellings that models use (linear, matmul on either side, einsum, addmm, experts in a bmm or a grouped
product, projections cut out of one parameter, 1x1 convolutions) are a handful of operators, and each of them is one or
several such products. A product along dims that share no scale, which no map asks for, is one of the decoded values.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.quantize import dequantize
from precimap.runtime.weights.low_weight import AFFINE, How, LowWeight, Parts
from precimap.runtime.weights.structure import ANSWERS

_aten = torch.ops.aten
# As discovery names the calls. A convolution is one only over single positions.
SERVED = frozenset(
    "linear matmul mm bmm mv addmm addmv baddbmm inner einsum tensordot _grouped_mm grouped_mm embedding".split()
)
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})


def product_refusal(layer: Layer) -> str | None:
    """Why no kernel multiplies the layer as it is read, or None."""
    convolved = CONVOLUTIONS.intersection(layer.ops)
    if convolved and (max(layer.shape[2:], default=1) > 1 or _grouped_convolution(layer)):
        return "a convolution over more than single positions, or in groups, is no matrix product"
    return unserved(layer)


def unserved(layer: Layer) -> str | None:
    """What reads the layer and is not in the table below, or None."""
    others = [op for op in layer.ops if op not in SERVED | CONVOLUTIONS]
    return f"read by {', '.join(others)}, which no kernel here multiplies" if others else None


def _grouped_convolution(layer: Layer) -> bool:
    """By the channels of its inputs, with or without a batch before them."""
    return any(read.input[-len(layer.shape) + 1] != layer.shape[1] for read in layer.reads)


class CodedKernel(ABC):
    """A kernel over codes that lie as the parameter did, beside scales that broadcast against them."""

    needs_frozen = False
    # Of the sum of |input * weight|, what the kernel's own way to add may put to a float32 sum.
    accumulation_error = 0.0
    name: str

    def __init__(self) -> None:
        self.shortcuts: dict[Any, Callable[..., Any]] = {F.linear: self.linear}

    def __reduce__(self) -> str:
        return self.name  # one object, also after it was copied or read from a file

    def shape(self, how: How, parts: Parts) -> tuple[torch.Size, tuple[int, ...], int]:
        codes = parts["codes"]
        return codes.shape, codes.stride(), int(codes.storage_offset())

    def derived(self, how: How, parts: Parts, dtype: torch.dtype) -> Parts:
        return {}

    def values(self, weight: LowWeight) -> Tensor:
        return dequantize(weight.codes, weight.how.scheme.weight.format, weight.affine)

    def layer(self, weight: LowWeight) -> QuantizedLayer:
        how = weight.how
        return QuantizedLayer(
            name=how.name,
            scheme=how.scheme,
            codes=weight.codes,
            weight_affine=weight.affine,
            input_range=how.input_range,
            input_phase=how.input_phase,
            keeps="wide" in weight.parts,
        )

    def linear(self, x: Tensor, weight: LowWeight, bias: Tensor | None = None) -> Tensor:
        """In the weight's dtype, or in that of autocast."""
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            return self.rows(x, weight, bias, torch.get_autocast_dtype(x.device.type))
        return self.rows(x, weight, bias, weight.outward)

    @abstractmethod
    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [.., K] times weight [N, K] that `scales_of` has scales for, plus bias [N] -> [.., N] in `dtype`."""

    def grouped(self, x: Tensor, weight: LowWeight, ends: Tensor) -> Tensor:
        """x [S, K] sorted by expert, weight [E, K, N], int32 ends [E] -> [S, N] in the weight's dtype."""
        pieces, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            pieces.append(self.rows(x[start:end], turned(weight.select(0, expert)), None, weight.outward))
            start = end
        missing = x.new_zeros(len(x) - start, weight.shape[2], dtype=weight.outward)
        return torch.cat([*pieces, missing])

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        structural = ANSWERS.get(func)
        if structural is not None and isinstance(args[0], LowWeight):
            return structural(func, *args, **kwargs)
        return self.product(func, args, kwargs)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As `call`, of operators that multiply the weight or look its rows up."""
        found = CALLS.get(func)
        return NotImplemented if found is None else found(self, *args, **kwargs)


def scales_of(weight: LowWeight) -> Tensor | None:
    """The scales of a weight [N, K], float32 [N]; None where they differ along K."""
    scale, (outputs, inputs) = weight.parts["scale"], weight.codes.shape
    if scale.shape == (outputs, 1):
        return scale.reshape(-1)
    if scale.numel() == 1:
        return scale.reshape(1).repeat(outputs)
    spread = scale.expand(outputs, inputs)
    return spread.select(1, 0).contiguous() if inputs == 1 or spread.stride(1) == 0 else None


def turned(weight: Tensor) -> LowWeight:
    """[K, N] -> [N, K], or the other way."""
    found = weight.t()
    assert isinstance(found, LowWeight)
    return found


def _product(kernel: CodedKernel, x: Any, weight: Any, bias: Any) -> Any:
    """x [M, K] times weight [K, N]; NotImplemented where this is no product of an input with one low weight."""
    if not isinstance(weight, LowWeight) or isinstance(x, LowWeight) or isinstance(bias, LowWeight):
        return NotImplemented
    matrix = turned(weight)
    return NotImplemented if scales_of(matrix) is None else kernel.rows(x, matrix, bias, weight.outward)


def _mm(kernel: CodedKernel, left: Any, right: Any) -> Any:
    if isinstance(right, LowWeight):
        return _product(kernel, left, right, None)
    product = _product(kernel, right.t(), left.t(), None)
    return product if product is NotImplemented else product.t()


def _added(product: Any, bias: Tensor, beta: Any, alpha: Any) -> Any:
    if product is NotImplemented:
        return product
    return beta * bias + alpha * product if beta != 0 else alpha * product


def _addmm(kernel: CodedKernel, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    if isinstance(bias, LowWeight):
        return NotImplemented
    simple = beta == 1 and alpha == 1 and isinstance(right, LowWeight) and bias.shape == right.shape[1:]
    if simple:
        return _product(kernel, left, right, bias)
    return _added(_mm(kernel, left, right), bias, beta, alpha)


def _mv(kernel: CodedKernel, matrix: Any, vector: Any) -> Any:
    """With a weight on either side; the other one is a single row."""
    if isinstance(vector, LowWeight):
        product = _product(kernel, matrix, vector.unsqueeze(1), None)
        return product if product is NotImplemented else product.squeeze(1)
    product = _product(kernel, vector.unsqueeze(0), matrix.t(), None)
    return product if product is NotImplemented else product.squeeze(0)


def _addmv(kernel: CodedKernel, bias: Any, matrix: Any, vector: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return NotImplemented if isinstance(bias, LowWeight) else _added(_mv(kernel, matrix, vector), bias, beta, alpha)


def _bmm(kernel: CodedKernel, left: Any, right: Any) -> Any:
    """One product where all of the batch have the same weight, else one for each: experts."""
    if isinstance(left, LowWeight):
        if isinstance(right, LowWeight):
            return NotImplemented
        product = _bmm(kernel, right.transpose(1, 2), left.transpose(1, 2))
        return product if product is NotImplemented else product.transpose(1, 2)
    batch, rows, _ = left.shape
    once = right.once  # not a part of what was repeated: to a compiler for any batch that is no constant
    if once is not None or batch == 1 or right.codes.stride(0) == 0:
        same = right.select(0, 0) if once is None else once
        product = _product(kernel, left.reshape(batch * rows, left.shape[2]), same, None)
        return product if product is NotImplemented else product.view(batch, rows, product.shape[1])
    products = [_product(kernel, *pair, None) for pair in zip(left.unbind(), right.unbind(), strict=True)]
    return NotImplemented if any(product is NotImplemented for product in products) else torch.stack(products)


def _baddbmm(kernel: CodedKernel, bias: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return NotImplemented if isinstance(bias, LowWeight) else _added(_bmm(kernel, left, right), bias, beta, alpha)


def _convolution(
    kernel: CodedKernel,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    """A convolution over single positions is a product of what stands at each of them."""
    pointwise = not transposed and groups == 1 and set(weight.shape[2:]) <= {1} and not any(padding)
    if not isinstance(weight, LowWeight) or isinstance(x, LowWeight) or not pointwise:
        return NotImplemented
    steps = tuple(slice(None, None, step) for step in stride)
    positions = x[(slice(None), slice(None), *steps)].movedim(1, -1)
    product = _product(kernel, positions.reshape(-1, x.shape[1]), weight.reshape(weight.shape[:2]).t(), bias)
    if product is NotImplemented:
        return product
    return product.view(*positions.shape[:-1], product.shape[1]).movedim(-1, 1).contiguous()


def _grouped(
    kernel: CodedKernel, x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    if not isinstance(weight, LowWeight) or isinstance(x, LowWeight) or offs is None or bias is not None:
        return NotImplemented
    if x.dim() != 2 or weight.dim() != 3 or out_dtype not in (None, weight.outward):
        return NotImplemented
    if any(part.expand(weight.shape).stride(1) for name, part in weight.parts.items() if name in AFFINE):
        return NotImplemented
    return kernel.grouped(x, weight, offs)


def _rows_at(weight: LowWeight, ids: Tensor) -> Parts:
    """Codes and scales of the rows of a weight [rows, ..] at ids [n]."""
    return {
        name: part if name in AFFINE and part.shape[0] == 1 else part.index_select(0, ids)
        for name, part in weight.canonical().items()
        if name != "wide"
    }


def _gathered(weight: LowWeight, ids: Tensor) -> Tensor:
    """The rows of a weight [rows, ..] at ids [n], float32 (of kept ones: in their own dtype)."""
    if weight.how.scheme.computes_low and "wide" in weight.parts:
        return weight.parts["wide"].index_select(0, ids)
    return LowWeight(_rows_at(weight, ids), weight.how, weight.outward).dequantize()


def _embedding(kernel: CodedKernel, weight: Any, indices: Tensor, *_: Any, **__: Any) -> Any:
    if not isinstance(weight, LowWeight):
        return NotImplemented
    found = _gathered(weight, indices.reshape(-1)).to(weight.outward)
    return found.reshape(*indices.shape, *weight.shape[1:])


def _index_select(kernel: CodedKernel, weight: Any, dim: int, ids: Tensor) -> Any:
    """Rows that a product reads later stay low; it is not known here what reads them, and a product is served anyway."""
    if not isinstance(weight, LowWeight) or dim % weight.dim() or "wide" in weight.parts:
        return NotImplemented
    shape = weight.shape
    parts = {
        name: part.expand(len(ids), *shape[1:]) if name in AFFINE else part
        for name, part in _rows_at(weight, ids).items()
    }
    return LowWeight(parts, weight.how, weight.outward, root=False)


def _index(kernel: CodedKernel, weight: Any, indices: Any) -> Any:
    single = isinstance(weight, LowWeight) and len(indices) == 1 and isinstance(indices[0], Tensor)
    if not single or indices[0].dim() != 1 or indices[0].dtype == torch.bool:
        return NotImplemented
    return _index_select(kernel, weight, 0, indices[0] % weight.shape[0])


def _embedding_bag(
    kernel: CodedKernel,
    weight: Any,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Any:
    """Over a table of the rows that are read, decoded to float32; sums are float32, as those of the operators for packed
    rows."""
    if not isinstance(weight, LowWeight):
        return NotImplemented
    ids, places = torch.unique(indices, return_inverse=True)
    if padding_idx >= 0:
        padding = (ids == padding_idx).nonzero()
        padding_idx = int(padding[0]) if len(padding) else -1
    weights = None if per_sample_weights is None else per_sample_weights.float()
    table, places = _gathered(weight, ids).float(), places.to(indices.dtype)
    output, *rest = _aten._embedding_bag_forward_only(
        table, places, offsets, False, mode, False, weights, include_last_offset, padding_idx
    )
    return output.to(weight.outward), *rest


GATHERS = frozenset({_aten.index_select.default, _aten.index.Tensor})
CALLS: dict[Any, Callable[..., Any]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.mv.default: _mv,
    _aten.addmv.default: _addmv,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
    _aten.convolution.default: _convolution,
    _aten._grouped_mm.default: _grouped,
    _aten.embedding.default: _embedding,
    _aten.index_select.default: _index_select,
    _aten.index.Tensor: _index,
    _aten._embedding_bag.default: _embedding_bag,
    _aten._embedding_bag_forward_only.default: _embedding_bag,
}
