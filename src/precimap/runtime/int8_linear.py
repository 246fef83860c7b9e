"""One linear layer through oneDNN's INT8 product, and the quantised inputs that layers share.

Invariant: the codes are those of `numerics.quantize`, for the weight and, at run time, for the input; oneDNN only
multiplies them. What is traced, by `torch.compile` and `torch.export`, is quantise and dequantise around `F.linear`, in the
ops that Inductor turns into the same product, its activation and the next layer's quantising fused; the packed weight
of the eager form is opaque and can be neither exported nor compiled. Where Inductor would multiply in base precision
without a word, its weights not being frozen, the graph ends at the layer, and its eager form runs.

Not taken: one wide product for layers that read one input. On the machine it was measured on (docs/log.md) it saves 0 to
10 % of the product and costs a copy wherever a part must be contiguous.
"""

import functools
import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap.errors import DeployError
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.fast import unsigned_codes
from precimap.numerics.formats import INT8, IntegerFormat

MOST_KEPT = 4  # inputs: towers that read one go on to inputs of their own before the next tower reads it again

_Kept = tuple[weakref.ref[Tensor], tuple[object, ...], Tensor]


class SharedCodes:
    """The inputs that were quantised last: layers that read the same values under the same scale share their codes.

    One for all layers of a model. A tensor is held weakly and its codes go with it. The same values are the same part of one
    tensor, through any views of it. Threads may share it: what is kept is replaced as a whole, and a thread that does not
    find its input quantises it.
    """

    def __init__(self) -> None:
        self._kept: tuple[_Kept, ...] = ()  # the last one first

    def codes(self, x: Tensor, format: IntegerFormat, scale: float, zero: int) -> Tensor:
        """As `unsigned_codes`. Not shared is what may change without a word: inference tensors, which have no version, and
        memory that is not torch's alone, such as an array of NumPy."""
        if x.is_inference() or not x.is_contiguous() or not x.untyped_storage().resizable():
            return unsigned_codes(x, format, scale, zero)
        owner = x if x._base is None else x._base  # views count versions with their base, `x.data` does not
        how = (format, scale, zero, x._version, x.dtype, x.storage_offset(), x.numel())
        for held, same, codes in self._kept:
            if same == how and held() is owner:
                return codes if codes.shape == x.shape else codes.view(x.shape)
        codes = unsigned_codes(x, format, scale, zero)
        kept = tuple(one for one in self._kept if one[0]() is not None)
        self._kept = ((weakref.ref(owner, self._forget), how, codes), *kept[: MOST_KEPT - 1])
        return codes

    def drop(self, *_: object) -> None:
        """Keep nothing beyond a call of the model: between two calls others may write where versions do not count."""
        if not torch.compiler.is_compiling():
            self._kept = ()

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        self._kept = tuple(one for one in self._kept if one[0] is not gone)


class Int8Linear(nn.Module):
    """A linear layer [.., K] -> [.., N] with INT8 codes [N, K], float32 scales [N] and a static input scale and zero.

    The codes are canonical and travel in the state dict; oneDNN's packed form is made from them here and cannot travel.
    `layer` is what this computes, for whoever compares it with its emulation.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    accumulation_error = 0.0  # of the sum of |input * weight|: sums of whole numbers are exact

    def __init__(
        self, layer: QuantizedLayer, bias: Tensor | None, output_dtype: torch.dtype, shared: SharedCodes
    ) -> None:
        super().__init__()
        if layer.scheme.input is None or layer.input_range is None:
            raise DeployError(f"{layer.name}: expected a static input scale, got scheme {layer.scheme.name}")
        assert isinstance(layer.scheme.input.format, IntegerFormat)
        self.layer = layer
        self.register_buffer("codes", layer.codes)
        self.register_buffer("scales", layer.weight_affine.scale.reshape(-1))
        self.register_buffer("bias", bias)
        self.register_buffer("_zeros", torch.zeros(layer.codes.shape[0], dtype=torch.int32), persistent=False)
        self._format = layer.scheme.input.format
        self._scale, self._zero = layer.input_range.scale, layer.input_range.zero
        self._output_dtype = output_dtype
        self._packed = torch.ops.onednn.qlinear_prepack(layer.codes, None)
        self._wide_bias = None if bias is None else bias.float()
        self._shared = shared
        _prepare_tracing()
        # Between the graphs that torch.compile makes where its weights are not frozen.
        self._apart = torch.compiler.disable(self._product, reason="INT8 in the graph needs precimap.compiled")  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] in any float dtype -> [.., N] in the layer's base precision."""
        if torch.compiler.is_exporting() or (torch.compiler.is_compiling() and _freezing()):
            return self._traced(input)
        output: Tensor = self._apart(input) if torch.compiler.is_compiling() else self._product(input)
        return output

    def _product(self, input: Tensor) -> Tensor:
        codes = self._shared.codes(input, self._format, self._scale, self._zero)
        output: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes.reshape(-1, codes.shape[-1]),
            self._scale,
            self._zero,
            self._packed,
            self.scales,
            self._zeros,
            self._wide_bias,
            1.0,
            0,
            self._output_dtype,
            "none",
            [],
            "",
        )
        return output.reshape(*input.shape[:-1], output.shape[-1])

    def _traced(self, input: Tensor) -> Tensor:
        """The same in ops that compilers know; the packed weight is made by them."""
        quantised = torch.ops.quantized_decomposed
        limits = (self._scale, self._zero, self._format.minimum, self._format.maximum, torch.uint8)
        codes = quantised.quantize_per_tensor(input, *limits)
        values = quantised.dequantize_per_tensor(codes, *limits)
        weight = quantised.dequantize_per_channel(
            self.codes, self.scales, self._zeros, 0, INT8.minimum, INT8.maximum, torch.int8
        )
        if self._output_dtype == torch.bfloat16:
            values, weight = values.to(torch.bfloat16), weight.to(torch.bfloat16)
        return F.linear(values, weight, self.bias)

    def extra_repr(self) -> str:
        n, k = self.codes.shape
        return f"in_features={k}, out_features={n}, input={self._format.name}, scale={self._scale:g}, zero={self._zero}"


def _freezing() -> bool:
    return bool(torch._inductor.config.freezing)


@functools.cache
def _prepare_tracing() -> None:
    """What tracing needs, imported no sooner than there is a layer: it takes as long as the rest of precimap."""
    import torch._inductor.config
    import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed

    # Otherwise the setting is a guard of the code, and calls without it compile again.
    torch.compiler.assume_constant_result(_freezing)  # type: ignore[no-untyped-call]
