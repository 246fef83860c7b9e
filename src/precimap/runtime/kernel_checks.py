"""Each deployed layer against the emulation of what it stands for, before the model is handed out.

Invariant: inputs are made here, spread over a layer's range and beyond, so that a kernel which multiplies wrongly on this
machine is found whatever the data. What is allowed is rounding, and sums in another order.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.large import row_pieces, rows_of
from precimap.numerics.quantize import storage_dtype
from precimap.runtime.nvidia.fp8 import FP8_KERNEL
from precimap.runtime.weights.emulated import EMULATED_KERNEL
from precimap.runtime.weights.half import HALF_KERNEL
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.products import CodedKernel, scales_of, turned
from precimap.runtime.x86.rows import ROWS_KERNEL, decoded
from precimap.runtime.x86.stored import STORED_KERNEL

# Float32 sums of products of codes differ in their order only; a shorter result is rounded once more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CHECKED_ROWS, CHECKED_EXPERTS = 4096, 4  # of each packed table, of each stack
CHECKED_AT_A_TIME = 1 << 18  # codes of a matrix, which are decoded


def check_weight(weight: LowWeight) -> None:
    """Compare what the weight's kernel computes with the emulation of its codes. Raises DeployError where they differ."""
    with torch.autocast(weight.device.type, enabled=False):  # what it is called under later is another matter
        _checked(weight)


def _checked(weight: LowWeight) -> None:
    kernel = weight.how.kernel
    if kernel is EMULATED_KERNEL or (kernel in (STORED_KERNEL, HALF_KERNEL) and weight.dim() != 2):
        return  # no arithmetic of its own: the model's own call, of values that were decoded as the emulation decodes
    if kernel is ROWS_KERNEL:
        _check_table(weight)
    elif kernel is FP8_KERNEL and weight.dim() == 3:
        _check_experts(weight)
    else:
        _check_matrix(_matrix(weight))


def _matrix(weight: LowWeight) -> LowWeight:
    """The weight as products read it, [N, K], wherever the dims lie that share a scale; of a stack, the first few."""
    if weight.dim() == 2:
        return turned(weight) if scales_of(weight) is None else weight
    sizes = weight.parts["scale"].shape
    outputs = [dim for dim, size in enumerate(sizes) if size > 1]
    summed = [dim for dim, size in enumerate(sizes) if size == 1]
    some = weight.narrow(0, 0, min(len(weight), CHECKED_EXPERTS)) if len(outputs) > 1 and outputs[0] == 0 else weight
    matrix = some.permute(*outputs, *summed).reshape(-1, math.prod(weight.shape[dim] for dim in summed))
    assert isinstance(matrix, LowWeight)
    return matrix


def _check_matrix(matrix: LowWeight) -> None:
    layer = replace(matrix.layer(), name="weight", keeps=False)
    outputs, inputs = layer.codes.shape
    device, kernel = layer.codes.device, matrix.how.kernel
    assert isinstance(kernel, CodedKernel)
    x = _spread_inputs(layer, inputs)
    error = kernel.accumulation_error
    if kernel is STORED_KERNEL:
        x = x.to(matrix.dtype)  # it multiplies in its own dtype, a decoded weight that is rounded to it
        error = 0.0 if matrix.dtype == torch.float32 else TOLERANCE[matrix.dtype]
    bias = torch.linspace(-1, 1, outputs, dtype=torch.float32, device=device).to(matrix.dtype)
    with torch.no_grad():
        found = kernel.rows(x, matrix, bias, matrix.dtype)
        # Decoded, the whole weight would be four times its codes.
        for piece in row_pieces(layer.codes, CHECKED_AT_A_TIME):
            part = replace(layer, codes=layer.codes[piece], weight_affine=rows_of(layer.weight_affine, piece, 2))
            added = bias[piece].float()
            plain = nn.Linear(inputs, len(added), dtype=torch.float32, device="meta")
            plain.bias = nn.Parameter(added)
            with quantized(plain, {"weight": part}):
                expected = plain(x.float())
            magnitudes = nn.functional.linear(x.float().abs(), part.weight().abs(), added.abs())
            _compare(matrix.how.name, layer, found[:, piece], expected, _slack(magnitudes, error))


def _check_experts(experts: LowWeight) -> None:
    """Compare the grouped kernel with the emulation of `grouped_mm`, on four inputs for each of at most four experts."""
    layer = replace(experts.layer(), name="weight", keeps=False)
    inputs_first = layer.weight_affine.scale.shape[1] == 1 and layer.codes.shape[1] > 1
    plain = _Grouped(layer.codes.shape, not inputs_first, layer.codes.device)
    used = min(len(layer.codes), CHECKED_EXPERTS)
    x = _spread_inputs(layer, layer.codes.shape[1 if inputs_first else 2])[: 4 * used].bfloat16()
    ends = torch.arange(4, 4 * len(layer.codes) + 1, 4, dtype=torch.int32, device=x.device).clamp_(max=4 * used)
    with torch.no_grad():
        with quantized(plain, {"weight": layer}):
            expected = plain(plain.weight, x, ends).float()
        decoded = layer.weight()[:used].abs().repeat_interleave(4, 0)
        by_output = decoded.transpose(1, 2) if inputs_first else decoded
        magnitudes = torch.einsum("sk,snk->sn", x.float().abs(), by_output)
        slack = _slack(magnitudes, FP8_KERNEL.accumulation_error)
        _compare(experts.how.name, layer, plain(experts, x, ends), expected, slack)


class _Grouped(nn.Module):
    """A call of `grouped_mm` as models make it, and a parameter without values to emulate it with."""

    def __init__(self, shape: torch.Size, turn: bool, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros((), dtype=torch.bfloat16, device=device).expand(shape), requires_grad=False
        )
        self._turn = turn

    def forward(self, weight: Tensor, x: Tensor, ends: Tensor) -> Tensor:
        output: Tensor = torch._grouped_mm(x, weight.transpose(1, 2) if self._turn else weight, offs=ends)
        return output


def _slack(magnitudes: Tensor, accumulation: float) -> Tensor:
    """What a float32 sum in another order, and the kernel's own way to add, may change of sums of these magnitudes."""
    return (TOLERANCE[torch.float32] + accumulation) * magnitudes


def _compare(name: str, layer: QuantizedLayer, found: Tensor, expected: Tensor, slack: Tensor) -> None:
    """Raises DeployError where a kernel's results differ from the emulation by more than their own rounding and `slack`."""
    result = found.dtype if layer.scheme.result is None else storage_dtype(layer.scheme.result)
    allowed = max(TOLERANCE[found.dtype], TOLERANCE[result]) * expected.abs() + slack
    difference = (found.float() - expected).abs()
    if not bool((difference <= allowed).all()):
        worst = (difference - allowed).nan_to_num(nan=math.inf).argmax()
        raise DeployError(
            f"{name}: the kernel of {layer.scheme.name} differs from its emulation by "
            f"{float(difference.flatten()[worst]):.3g}, allowed are {float(allowed.flatten()[worst]):.3g}; this machine or "
            "torch build multiplies wrongly. Deploy with target='emulated' and report it."
        )


def _spread_inputs(layer: QuantizedLayer, inputs: int) -> Tensor:
    """Float32 [16, inputs]: over a static range and a tenth beyond it, or rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, inputs)
    if layer.input_range is None or layer.scheme.input is None:
        x = torch.randn(shape, generator=generator, dtype=torch.float32)
        x = x * 4.0 ** torch.linspace(-3, 2, 16, dtype=torch.float32)[:, None]
    else:
        scale, zero, format = layer.input_range.scale, layer.input_range.zero, layer.scheme.input.format
        low, high = (format.minimum - zero) * scale, (format.maximum - zero) * scale
        x = low + (high - low) * (1.2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 0.1)
    return x.to(layer.codes.device)


def _check_table(weight: LowWeight) -> None:
    """Compare rows, spread over the table, as the operator reads them with what their codes stand for."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), CHECKED_ROWS), dtype=torch.float64).long()
    expected = decoded(weight.how, weight.parts["rows"][rows])
    found = nn.functional.embedding_bag(rows, weight, torch.arange(len(rows)), mode="sum").float()
    allowed = TOLERANCE[weight.dtype] * float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise DeployError(
            f"{weight.how.name}: the operator reads rows that differ from their codes by {difference:.3g}, allowed are "
            f"{allowed:.3g}; this torch build reads packed rows otherwise. Deploy with target='emulated' and report it."
        )
