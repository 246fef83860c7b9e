"""The kernel of x86 CPUs: inputs [M, K] quantised to unsigned codes, times INT8 codes [N, K], through oneDNN.

Invariant: two forms of one product over the same codes. Eager, oneDNN's own operator over a packed weight, which is made
once. Traced, quantise and dequantise around the float product, in the operators that Inductor turns into the same one, its
activation and the next layer's quantising fused; the packed form is opaque to compilers and exporters. Where Inductor would
multiply in base precision without a word, its weights not being frozen, the call stays out of the graph (`needs_frozen`).

A row with NaN or infinity in it gives NaN: as codes they would be numbers. Compiled, inputs of the model are looked at
instead (`runtime/compiling/compiled.py`), for a look at each layer's would undo the fusing.

Not taken: one wide product for layers that read one input. On the machine it was measured on (docs/log.md) it saves 0 to
10 % of the product and costs a copy wherever a part must be contiguous.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from precimap.errors import DeployError
from precimap.layers.quantized import InputRange
from precimap.numerics.formats import INT8, IntegerFormat
from precimap.runtime.shared_codes import SHARED
from precimap.runtime.weights.low_weight import How, LowWeight, Parts
from precimap.runtime.weights.products import CodedKernel, scales_of
from precimap.runtime.weights.tracing import TRACED, freezing


@dataclass(frozen=True, slots=True)
class _Packed:
    weight: Tensor
    scales: Tensor
    zeros: Tensor


class Int8Kernel(CodedKernel):
    """INT8 weights with a scale a channel, unsigned inputs with one static scale."""

    name = "INT8_KERNEL"
    needs_frozen = True

    def __init__(self) -> None:
        super().__init__()
        self.shortcuts |= dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _of_stack)

    def derived(self, how: How, parts: Parts, dtype: torch.dtype) -> Parts:
        if how.input_range is None or how.scheme.input is None:
            raise DeployError(f"{how.name}: expected a static input scale, got scheme {how.scheme.name}")
        _prepare_tracing()
        return {}

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        if weight.traced:
            return _traced(x, weight, bias, dtype)
        packed, (format, static) = weight.prepared("int8", _packed), _input_of(weight)
        codes, spoiled = SHARED.codes(x, format, static.scale, static.zero, id(weight.cache))
        given = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.reshape(-1, codes.shape[-1]),
            static.scale,
            static.zero,
            packed.weight,
            packed.scales,
            packed.zeros,
            bias if bias is None or bias.dtype == torch.float32 else bias.float(),
            1.0,
            0,
            given,
            "none",
            [],
            "",
        )
        output = output.reshape(*x.shape[:-1], output.shape[-1])
        if spoiled:
            output[~x.isfinite().all(-1)] = torch.nan
        return output if given == dtype else output.to(dtype)


def _of_stack(x: Tensor, weight: LowWeight, **more: Any) -> Any:
    """`matmul` of inputs [.., E, M, K] with a stack [E, K, N]: all rows of each weight in one product.

    torch would repeat the stack for the batch, and each of its copies would be packed in each call.
    """
    if more or weight.dim() != 3 or x.dim() < 4 or x.shape[-3] not in (1, weight.shape[0]):
        return NotImplemented
    rows = x.expand(*x.shape[:-3], weight.shape[0], *x.shape[-2:]).movedim(-3, 0)
    product = torch.bmm(rows.reshape(len(rows), -1, rows.shape[-1]), weight)
    return product.view(*rows.shape[:-1], product.shape[-1]).movedim(0, -3).contiguous()


INT8_KERNEL = Int8Kernel()


def _input_of(weight: LowWeight) -> tuple[IntegerFormat, InputRange]:
    """What `derived` has seen to be there."""
    static, rounding = weight.how.input_range, weight.how.scheme.input
    assert static is not None
    assert rounding is not None
    assert isinstance(rounding.format, IntegerFormat)
    return rounding.format, static


def _packed(weight: LowWeight) -> _Packed:
    scales = scales_of(weight)
    if scales is None:
        raise DeployError(f"{weight.how.name}: expected one scale for each output")
    zeros = torch.zeros(len(scales), dtype=torch.int32)
    return _Packed(torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None), scales, zeros)


def _traced(x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same in operators that compilers know; the packed weight is made by them."""
    quantised, (format, static) = torch.ops.quantized_decomposed, _input_of(weight)
    if TRACED.names is not None:
        TRACED.names.add((weight.how.name, weight.codes.storage_offset(), tuple(weight.codes.shape)))
    limits = (static.scale, static.zero, format.minimum, format.maximum, torch.uint8)
    codes = quantised.quantize_per_tensor(x, *limits)
    if x.dim() > 2 and not x.is_contiguous():
        # Or the product is one over a batch, which Inductor looks for among fixed sizes alone, and fails where they vary.
        codes = codes.contiguous()
    values = quantised.dequantize_per_tensor(codes, *limits)
    # As the product reads them: Inductor takes a transposed constant for the weight itself.
    held, scales = weight.codes.contiguous(), scales_of(weight)
    assert scales is not None
    zeros = torch.zeros(held.shape[0], dtype=torch.int32, device=held.device)
    wide = quantised.dequantize_per_channel(held, scales, zeros, 0, INT8.minimum, INT8.maximum, torch.int8)
    if dtype != torch.float32:
        values, wide = values.to(dtype), wide.to(dtype)
    return F.linear(values, wide, bias)


@functools.cache
def _prepare_tracing() -> None:
    """What tracing needs, imported no sooner than there is a layer: it takes as long as the rest of precimap."""
    import torch._inductor.config
    import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed

    # Otherwise the setting is a guard of the code, and calls without it compile again.
    torch.compiler.assume_constant_result(freezing)  # type: ignore[no-untyped-call]
