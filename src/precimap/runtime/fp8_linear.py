"""One linear layer through torch's scaled FP8 product, in plain torch ops and no Python branch on data.

Invariant: the codes are those of `numerics`, which a dynamic input runs itself (`fit`, `quantize`); `torch._scaled_mm`
only multiplies them. So torch.compile sees the whole layer in one graph, and Inductor fuses the quantising into whatever
made the input. Compiled, a fused producer may hand over values that were not rounded to the base precision first, and
Triton divides to two units in the last place: a code moves now and then, as it does between two GPUs.

Layers that read one input write the same ops down, and a compiler that removes common subexpressions keeps one of them;
Inductor does so where weights are frozen (`precimap.compiled`). Not taken: sharing codes between eager layers, as INT8
does; on a GPU the eager form is bound by launches anyway.

    scales      result     how
    tensorwise  BF16 FP16  `_scaled_mm`, bias inside
    tensorwise  FP32       the same, bias after it: cuBLASLt adds none to a float32 result
    row-wise    BF16       `_scaled_mm` with scales [M, 1] and [1, N], bias inside
    row-wise    FP16 FP32  `_scaled_mm` under scales of 1 to float32; scales and bias after it

The last row because only cuBLASLt on SM90 with CUDA 12.9 or newer has row-wise scales with a float32 result, and CUTLASS,
which serves the rest, wrote BF16 where FP16 was asked without a bias until pytorch/pytorch#187569. torchao multiplies by
row scales after a tensorwise product for another reason (pytorch/ao#1325).

Partial sums stay in the matrix unit (`use_fast_accum`): on Hopper they keep about 14 bits there (DeepSeek-V3 Technical
Report, arXiv 2412.19437, section 3.3.2) instead of being added up in float32 now and then. torchao's inference does the
same by default; without it products take 1.1 to 1.2 times as long (pytorch/ao#2377), and CUTLASS's row-wise ones longer
still. A certificate that is measured with this layer holds that error; the emulation's does not.
"""

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.formats import E4M3
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Granularity, Rounding, Scheme

FAST_ACCUMULATION = True
MULTIPLE = 16  # of both widths: `_scaled_mm` and `_scaled_grouped_mm` take no others
RESULTS = (torch.bfloat16, torch.float16, torch.float32)


def scheme_refusal(scheme: Scheme) -> str | None:
    """Why torch's FP8 products cannot run the scheme, or None."""
    if scheme.input is None:
        return "it only stores the weight low: a product would have to decode it first, which takes longer than BF16"
    if scheme.weight.format != E4M3 or scheme.input.format != E4M3:
        return "the GPU's FP8 products are used with E4M3 weights and inputs (cuBLASLt has none of E5M2 with E5M2)"
    return None


def width_refusal(inputs: int, outputs: int) -> str | None:
    """Why widths cannot be multiplied, or None.

    Not padded: a padded input is a copy on every call, which costs about what the product saves.
    """
    wrong = [str(width) for width in (inputs, outputs) if width % MULTIPLE]
    return f"FP8 products take widths that are multiples of {MULTIPLE}, not {' and '.join(wrong)}" if wrong else None


class Fp8Linear(nn.Module):
    """A linear layer [.., K] -> [.., N] with E4M3 codes [N, K] and float32 scales [1, 1] or [1, N].

    The codes are canonical and travel in the state dict; their transpose is the column-major operand. `layer` is what this
    computes, for whoever compares it with its emulation. Raises DeployError for schemes, widths and dtypes that it
    cannot multiply.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None
    _input_scale: Tensor
    _one: Tensor

    # Of the sum of |input * weight|: what 14 bits in the matrix unit may add to a float32 sum. An allowance, not a bound;
    # 2 % of a result of K = 4096 (as in the report above) is a quarter of it.
    accumulation_error = 2.0**-9

    def __init__(
        self, layer: QuantizedLayer, bias: Tensor | None, output_dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        outputs, inputs = layer.codes.shape
        reason = scheme_refusal(layer.scheme) or width_refusal(inputs, outputs)
        if reason is None and output_dtype not in RESULTS:
            reason = f"FP8 products give bfloat16, float16 or float32, not {output_dtype}"
        if reason is not None or layer.scheme.input is None:
            raise DeployError(f"{layer.name}: {reason}")
        self.layer = layer
        self._rounding = layer.scheme.input
        self._tensorwise = (
            layer.scheme.weight.granularity is Granularity.PER_TENSOR
            and self._rounding.granularity is Granularity.PER_TENSOR
        )
        scales = layer.weight_affine.scale.reshape(1, -1).to(device)
        self.register_buffer("codes", layer.codes.to(device))
        self.register_buffer("scales", scales if self._tensorwise else scales.expand(1, outputs).contiguous())
        self.register_buffer("bias", bias)
        # Kept, so that no call has to fill them: of a static input, its scale; and a scale that does nothing.
        self._static = None if layer.input_range is None else StaticScale(layer.input_range.scale)
        fixed = 1.0 if layer.input_range is None else layer.input_range.scale
        self.register_buffer(
            "_input_scale", torch.full((1, 1), fixed, dtype=torch.float32, device=device), persistent=False
        )
        self.register_buffer("_one", torch.ones((1, 1), dtype=torch.float32, device=device), persistent=False)
        self._output_dtype = output_dtype
        self._phase = layer.input_phase

    def forward(self, input: Tensor) -> Tensor:
        """[.., K] in any float dtype -> [.., N] in the layer's base precision."""
        rows = input.reshape(-1, input.shape[-1])
        if self._static is None:
            codes, scales = dynamic_codes(rows, self._rounding, self._phase)
        else:
            codes, scales = self._static.codes(rows), self._input_scale
        output = self._product(codes, scales)
        return output.reshape(*input.shape[:-1], output.shape[-1])

    def _product(self, codes: Tensor, scales: Tensor) -> Tensor:
        """codes [M, K], scales [1, 1] or [M, 1] -> [M, N]."""
        if not self._tensorwise:
            scales = scales.reshape(-1).expand(codes.shape[0]).contiguous().unsqueeze(1)  # strides as the op asks for
            if self._output_dtype != torch.bfloat16:
                return self._scaled_after(codes, scales)
        inside = None if self._output_dtype == torch.float32 else self.bias
        output = scaled_mm(codes, self.codes, scales, self.scales, inside, self._output_dtype)
        return output if inside is self.bias or self.bias is None else output + self.bias

    def _scaled_after(self, codes: Tensor, scales: Tensor) -> Tensor:
        output = scaled_mm(codes, self.codes, self._one, self._one, None, torch.float32) * scales * self.scales
        return (output if self.bias is None else output + self.bias).to(self._output_dtype)

    def extra_repr(self) -> str:
        n, k = self.codes.shape
        return f"in_features={k}, out_features={n}, scheme={self.layer.scheme.name}"


class StaticScale:
    """A calibrated scale, as a plain number: equal scales of two layers are one to a compiler, two buffers are not."""

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._reciprocal = float(torch.tensor(scale, dtype=torch.float32).reciprocal())

    def codes(self, x: Tensor) -> Tensor:
        """The codes of `numerics.quantize` under this scale, E4M3 of the shape of `x`."""
        scaled = x.detach().to(torch.float32) * self._reciprocal
        return scaled.clamp(E4M3.minimum, E4M3.maximum).to(torch.float8_e4m3fn)


def dynamic_codes(rows: Tensor, rounding: Rounding, phase: float) -> tuple[Tensor, Tensor]:
    """E4M3 codes of rows [M, K] under scales of their own, [M, 1] or [1, 1]; `phase` as in `QuantizedLayer`."""
    affine = fit(rows, rounding, (1,))
    if phase != 1.0:
        affine = Affine(affine.scale * phase, None)
    return quantize(rows, rounding.format, affine), affine.scale


def scaled_mm(
    codes: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """codes [M, K] times weight [N, K] transposed: the only call of the kernel."""
    output: Tensor = torch._scaled_mm(
        codes,
        weight.t(),
        scale_a=scales,
        scale_b=weight_scales,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return output
