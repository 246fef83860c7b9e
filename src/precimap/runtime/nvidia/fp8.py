"""The kernel of NVIDIA GPUs: torch's scaled FP8 products, in plain torch ops and no Python branch on data.

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

AMD's MI300 (gfx942) is served by the same calls, for hipBLASLt takes the same operands, with codes in E4M3 FNUZ: half the
values of the same bits, to 240, no -0. It has row-wise scales for BF16 results alone, as the table has it.

The last row because only cuBLASLt on SM90 with CUDA 12.9 or newer has row-wise scales with a float32 result, and CUTLASS,
which serves the rest, wrote BF16 where FP16 was asked without a bias until pytorch/pytorch#187569. torchao multiplies by
row scales after a tensorwise product for another reason (pytorch/ao#1325). On CPUs torch 2.11 takes tensorwise scales
alone: with it `scaled_mm` writes all row-wise products as the last row, which is what newer ones compute.

Partial sums stay in the matrix unit (`use_fast_accum`): on Hopper they keep about 14 bits there (DeepSeek-V3 Technical
Report, arXiv 2412.19437, section 3.3.2) instead of being added up in float32 now and then. torchao's inference does the
same by default; without it products take 1.1 to 1.2 times as long (pytorch/ao#2377), and CUTLASS's row-wise ones longer
still. A certificate that is measured with this layer holds that error; the emulation's does not.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from precimap.errors import DeployError
from precimap.numerics.formats import E4M3, E4M3_FNUZ, Format
from precimap.numerics.quantize import Affine, quantize, storage_dtype
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Granularity, Rounding, Scheme
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.products import CodedKernel, scales_of

FAST_ACCUMULATION = True
ROW_SCALES_ON_CPU = torch.__version__ >= "2.13"  # 2.11 has none; 2.12 was not looked at
MULTIPLE = 16  # of both widths: `_scaled_mm` and `_scaled_grouped_mm` take no others
RESULTS = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = Rounding(E4M3, Granularity.PER_TOKEN, dynamic=True)
GROUPED_OPS = ("_grouped_mm", "grouped_mm")  # as discovery names them


def scheme_refusal(scheme: Scheme) -> str | None:
    """Why torch's FP8 products cannot run the scheme, or None."""
    if scheme.input is None:
        return "it only stores the weight low: a product would have to decode it first, which takes longer than BF16"
    if scheme.weight.format != scheme.input.format or scheme.weight.format not in (E4M3, E4M3_FNUZ):
        return "the GPU's FP8 products are used with E4M3 weights and inputs (cuBLASLt has none of E5M2 with E5M2)"
    return None


def width_refusal(inputs: int, outputs: int) -> str | None:
    """Why widths cannot be multiplied, or None.

    Not padded: a padded input is a copy on every call, which costs about what the product saves.
    """
    wrong = [str(width) for width in (inputs, outputs) if width % MULTIPLE]
    return f"FP8 products take widths that are multiples of {MULTIPLE}, not {' and '.join(wrong)}" if wrong else None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What does not change from call to call. codes: [N, K], contiguous; scales: [1, 1] or [1, N]."""

    codes: Tensor
    scales: Tensor
    input_scale: Tensor
    one: Tensor


class Fp8Kernel(CodedKernel):
    """Products of a weight [N, K] in E4M3 or its FNUZ form, with one scale or one for each output, and of experts
    [E, K, N] in E4M3 with the latter."""

    name = "FP8_KERNEL"
    # Of the sum of |input * weight|: what 14 bits in the matrix unit may add to a float32 sum. An allowance, not a bound;
    # 2 % of a result of K = 4096 (as in the report above) is a quarter of it.
    accumulation_error = 2.0**-9

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """x [.., K] in any float dtype -> [.., N]."""
        rounding, static = weight.how.scheme.input, weight.how.input_range
        assert rounding is not None
        prepared = _prepared(weight) if weight.traced else weight.prepared("fp8", _prepared)
        rows = x.reshape(-1, x.shape[-1])
        if static is None:
            codes, scales = dynamic_codes(rows, rounding, weight.how.input_phase)
        else:
            codes, scales = StaticScale(static.scale, rounding.format).codes(rows), prepared.input_scale
        if _tensorwise(weight.how.scheme):
            output = _scaled_inside(codes, scales, prepared, bias, dtype)
        else:
            scales = scales.reshape(-1).expand(codes.shape[0]).contiguous().unsqueeze(1)  # strides as the op asks for
            by_row = _scaled_inside if dtype == torch.bfloat16 else _scaled_after
            output = by_row(codes, scales, prepared, bias, dtype)
        return output.reshape(*x.shape[:-1], output.shape[-1])

    def grouped(self, x: Tensor, weight: LowWeight, ends: Tensor) -> Tensor:
        """Results behind the last end are not written."""
        scales = weight.affine.scale.expand(weight.shape).select(1, 0).contiguous()
        return scaled_experts(x, weight.codes, scales, ends, weight.how.input_phase)


FP8_KERNEL = Fp8Kernel()


def _tensorwise(scheme: Scheme) -> bool:
    assert scheme.input is not None
    return {scheme.weight.granularity, scheme.input.granularity} == {Granularity.PER_TENSOR}


def _prepared(weight: LowWeight) -> _Prepared:
    """Raises DeployError for a product that no map asks for."""
    outputs, inputs = weight.shape
    reason, scales = width_refusal(inputs, outputs), scales_of(weight)
    if reason is not None or scales is None:
        raise DeployError(f"{weight.how.name}: {reason or 'expected one scale for each output'}")
    held = scales.narrow(0, 0, 1).unsqueeze(0) if _tensorwise(weight.how.scheme) else scales.unsqueeze(0)
    static, device = weight.how.input_range, weight.codes.device
    fixed = torch.full((1, 1), 1.0 if static is None else static.scale, dtype=torch.float32, device=device)
    return _Prepared(weight.codes.contiguous(), held, fixed, torch.ones((1, 1), dtype=torch.float32, device=device))


def _scaled_inside(codes: Tensor, scales: Tensor, low: _Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """codes [M, K], scales [1, 1] or [M, 1] -> [M, N]."""
    inside = None if dtype == torch.float32 else bias
    output = scaled_mm(codes, low.codes, scales, low.scales, inside, dtype)
    return output if inside is bias or bias is None else output + bias


def _scaled_after(codes: Tensor, scales: Tensor, low: _Prepared, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    output = scaled_mm(codes, low.codes, low.one, low.one, None, torch.float32) * scales * low.scales
    return (output if bias is None else output + bias).to(dtype)


def scaled_experts(tokens: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, phase: float = 1.0) -> Tensor:
    """tokens [S, K] sorted by expert, codes [E, K, N], float32 scales [E, N], ends int32 [E] -> BF16 [S, N].

    Tokens ends[e - 1] to ends[e] belong to expert e; results behind the last end are not written. K and N are multiples
    of 16. `torch._scaled_grouped_mm` has no CPU kernel, takes E4M3, row scales and BF16 results alone, no bias, and runs on
    capability 9.0 and 10.0 (GroupedBlas.cpp in torch 2.11 and 2.13). phase: as in `QuantizedLayer`.

    Not taken: one `_scaled_mm` for each expert. How many tokens an expert gets is on the device; asking would stop the host
    and no graph could be captured.
    """
    rows, row_scales = dynamic_codes(tokens, TOKENS, phase)
    output: Tensor = torch._scaled_grouped_mm(
        rows,
        codes,
        row_scales.reshape(-1),
        scales,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return output


def experts_refusal(scheme: Scheme, dtype: str, widths: tuple[int, int]) -> str | None:
    """Why a grouped FP8 product cannot run experts of these widths in the scheme, or None."""
    if scheme.input != TOKENS or scheme.weight.granularity is not Granularity.PER_CHANNEL:
        return scheme_refusal(scheme) or "grouped FP8 products take a scale for each token and each output; use fp8"
    if dtype != "bfloat16":
        return f"grouped FP8 products give bfloat16 alone, not {dtype}"
    return scheme_refusal(scheme) or width_refusal(*widths)


class StaticScale:
    """A calibrated scale, as a plain number: equal scales of two layers are one to a compiler, two buffers are not."""

    def __init__(self, scale: float, format: Format = E4M3) -> None:
        self._format = format
        self._reciprocal = float(np.float32(1) / np.float32(scale))  # no tensor: there may be a compiler around

    def codes(self, x: Tensor) -> Tensor:
        """The codes of `numerics.quantize` under this scale, of the shape of `x`."""
        scaled = x.detach().to(torch.float32) * self._reciprocal
        return scaled.clamp(self._format.minimum, self._format.maximum).to(storage_dtype(self._format))


def dynamic_codes(rows: Tensor, rounding: Rounding, phase: float) -> tuple[Tensor, Tensor]:
    """The codes of rows [M, K] under scales of their own, [M, 1] or [1, 1]; `phase` as in `QuantizedLayer`."""
    affine = fit(rows, rounding, (1,))
    if phase != 1.0:
        affine = Affine(affine.scale * phase, None)
    return quantize(rows, rounding.format, affine), affine.scale


def scaled_mm(
    codes: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """codes [M, K] times weight [N, K] transposed: the only call of the kernel."""
    product = partial(torch._scaled_mm, codes, weight.t(), use_fast_accum=FAST_ACCUMULATION)
    tensorwise = scales.numel() == weight_scales.numel() == 1
    if tensorwise or ROW_SCALES_ON_CPU or codes.device.type != "cpu":
        output: Tensor = product(scale_a=scales, scale_b=weight_scales, bias=bias, out_dtype=dtype)
        return output
    one = torch.ones((1, 1), dtype=torch.float32)
    wide: Tensor = product(scale_a=one, scale_b=one, out_dtype=torch.float32) * scales * weight_scales
    return (wide if bias is None else wide + bias).to(dtype)
