"""Each deployed layer against the emulation of what it stands for, before the model is handed out.

Invariant: inputs are made here, spread over a layer's range and beyond, so that a kernel which multiplies wrongly on this
machine is found whatever the data. What is allowed is rounding, and sums in another order.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.quantized import QuantizedLayer, quantized
from precimap.numerics.quantize import Affine
from precimap.runtime.cpu_tables import PackedTable
from precimap.runtime.fp8_experts import Fp8Experts
from precimap.runtime.fp8_linear import Fp8Linear
from precimap.runtime.int8_linear import Int8Linear
from precimap.runtime.stored_linear import StoredLinear

# Float32 sums of products of codes differ in their order only; a shorter result is rounded once more.
CHECKED_ROWS = 4096  # of each packed table
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def check_layer(name: str, module: Int8Linear | Fp8Linear) -> None:
    """Compare one kernel with the emulation of the layer it stands for."""
    layer = _on_device(module.layer, module.codes.device)
    outputs, inputs = layer.codes.shape
    plain = nn.Linear(inputs, outputs, dtype=torch.float32, device=layer.codes.device)  # of it only the bias is read
    x = _spread_inputs(layer, inputs)
    with torch.no_grad():
        plain.bias.copy_(torch.zeros(outputs, dtype=torch.float32) if module.bias is None else module.bias)
        with quantized(plain, {"weight": layer}):
            expected = plain(x)
        magnitudes = nn.functional.linear(x.abs(), layer.weight().abs(), plain.bias.abs())
        _compare(name or "the model", layer, module(x), expected, magnitudes, module.accumulation_error)


def check_experts(experts: Fp8Experts, layer: QuantizedLayer) -> None:
    """Compare the grouped kernel with the emulation of `grouped_mm`, on four inputs for each of at most four experts."""
    layer = _on_device(layer, experts.codes.device)
    plain = _Grouped(layer.codes.shape, not experts.how.inputs_first, layer.codes.device)
    used = min(len(layer.codes), 4)
    x = _spread_inputs(layer, experts.codes.shape[2])[: 4 * used].bfloat16()
    ends = torch.arange(4, 4 * len(layer.codes) + 1, 4, dtype=torch.int32, device=x.device).clamp_(max=4 * used)
    with torch.no_grad():
        with quantized(plain, {"weight": layer}):
            expected = plain(plain.weight, x, ends).float()
        decoded = layer.weight()[:used].abs().repeat_interleave(4, 0)
        by_output = decoded.transpose(1, 2) if experts.how.inputs_first else decoded
        magnitudes = torch.einsum("sk,snk->sn", x.float().abs(), by_output)
        found = plain(experts, x, ends)
        _compare(experts.how.name, layer, found, expected, magnitudes, experts.accumulation_error)


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


def _on_device(layer: QuantizedLayer, device: torch.device) -> QuantizedLayer:
    affine = Affine(layer.weight_affine.scale.to(device), None)
    return replace(layer, name="weight", codes=layer.codes.to(device), weight_affine=affine)


def _compare(
    name: str, layer: QuantizedLayer, found: Tensor, expected: Tensor, magnitudes: Tensor, accumulation: float
) -> None:
    """Raises DeployError where a kernel's results are not those of the emulation.

    A result may differ by its own rounding; and, in proportion to the sum of the magnitudes, by a float32 sum in another
    order and by the kernel's own way to add.
    """
    summed = TOLERANCE[torch.float32] + accumulation
    allowed = TOLERANCE[found.dtype] * expected.abs() + summed * magnitudes
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


def check_stored(module: StoredLinear, layers: Mapping[str, QuantizedLayer]) -> None:
    """Compare the product of a decoded weight with that of the float32 values that its codes stand for."""
    weight = layers[module.layer_name].weight()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(16, weight.shape[1], generator=generator, dtype=torch.float32).to(module.weight.dtype)
    expected = nn.functional.linear(inputs.float(), weight, None if module.bias is None else module.bias.float())
    with torch.no_grad():
        found = module(inputs)
    allowed = TOLERANCE[found.dtype] * float((inputs.float().abs() @ weight.abs().T).max())
    difference = float((found.float() - expected).abs().max())
    if not difference <= allowed:
        raise DeployError(
            f"{module.layer_name}: the decoded layer differs from its codes by {difference:.3g}, allowed are {allowed:.3g}; "
            "deploy with target='emulated' and report it"
        )


def check_table(module: PackedTable, layers: Mapping[str, QuantizedLayer]) -> None:
    """Compare rows, spread over the table, as the operator reads them with what their codes stand for."""
    expected = layers[module.layer_name].weight()
    rows = torch.linspace(0, len(expected) - 1, min(len(expected), CHECKED_ROWS), dtype=torch.float64).long()
    expected = expected[rows]
    found = module.lookup(rows, torch.arange(len(rows)))
    allowed = TOLERANCE[torch.float32] * float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise DeployError(
            f"{module.layer_name}: the operator reads rows that differ from their codes by {difference:.3g}, allowed are "
            f"{allowed:.3g}; this torch build reads packed rows otherwise. Deploy with target='emulated' and report it."
        )
