"""deploy(): a precision map into a running model, or an error; never a silent fallback.

Invariant: the deployed weights are the codes and scales that were measured (`quantize_map`), and the model's outputs are
compared with the emulation before it is handed out.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.fingerprints import of_weights
from precimap.layers.quantized import QuantizedLayer, quantize_map, quantized
from precimap.layers.realign import realigned
from precimap.numerics.quantize import Affine
from precimap.precision_map import PrecisionMap
from precimap.runtime import emulated
from precimap.runtime.batch_watch import watch
from precimap.runtime.compiled_target import CPU_INT8_COMPILED, CUDA_FP8_COMPILED
from precimap.runtime.cpu_int8 import CPU_INT8
from precimap.runtime.cpu_tables import PackedTable, tables
from precimap.runtime.cuda_fp8 import CUDA_FP8
from precimap.runtime.fp8_experts import Fp8Experts
from precimap.runtime.fp8_linear import Fp8Linear
from precimap.runtime.int8_linear import Int8Linear
from precimap.runtime.torchrec_tables import TORCHREC
from precimap.task import Task, first_batch

Build = Callable[[nn.Module, Mapping[str, QuantizedLayer]], nn.Module]
TARGETS: dict[str, Build] = {
    "emulated": emulated.deployed,
    CPU_INT8.name: CPU_INT8.deployed,
    CPU_INT8_COMPILED.name: CPU_INT8_COMPILED.deployed,
    CUDA_FP8.name: CUDA_FP8.deployed,
    CUDA_FP8_COMPILED.name: CUDA_FP8_COMPILED.deployed,
    TORCHREC.name: TORCHREC.deployed,
}

# Float32 sums of products of codes differ in their order only; a shorter result is rounded once more.
CHECKED_ROWS = 4096  # of each packed table
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Deployed against emulated outputs of one batch: largest and root mean square difference, and the largest |output|.

    Sums that differ in their last bit now and then move an input of a later layer to the next code, so the largest
    difference of a deep model may be a fraction of what quantising itself does; the root mean square stays far below.
    """

    largest_difference: float
    rms_difference: float
    largest_output: float
    units: int

    @property
    def relative(self) -> float:
        return self.largest_difference / self.largest_output if self.largest_output else self.largest_difference


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """What a deployed model carries as `precimap`: its map, its target and the codes and scales it runs.

    layers: without those that are packed tables, whose rows are in their modules and nowhere else.
    """

    map: PrecisionMap
    target: str
    layers: dict[str, QuantizedLayer]
    agreement: Agreement | None = None


def deploy(
    model: nn.Module, precision_map: PrecisionMap | str | Path, *, target: str | None = None, task: Task | None = None
) -> nn.Module:
    """A model that computes as the map says, on this machine; `model` itself is not modified and shares its tensors.

    precision_map: a map, or its file. target: `cpu-int8`, `cpu-int8-compiled`, `cuda-fp8` (experimental: not yet measured
    on a GPU), `torchrec` or `emulated`; by default the map's own. task: if given, the deployed model and the emulation
    score its first calibration batch, and `precimap.agreement` of the result holds the difference. Each kernel is
    compared with its emulation in any case. A batch outside the sizes that the map was timed with on this target is
    answered with a BatchSizeWarning, once. Raises PremiseMismatch for a map of other weights, DeployError for what the
    target cannot run or runs wrongly, MapError for a file that is no map.
    """
    if not isinstance(precision_map, PrecisionMap):
        precision_map = PrecisionMap.load(precision_map)
    precision_map.check(weights=of_weights(model))
    model = realigned(model, precision_map.realignment)
    layers = quantize_map(model, precision_map)
    deployed = build(model, precision_map, layers, target or precision_map.target)
    if task is not None:
        found = agreement(task, model, deployed, layers)
        _carry(deployed, replace(deployment_of(deployed), agreement=found))
    _watch(deployed, precision_map)
    return deployed


def _watch(deployed: nn.Module, precision_map: PrecisionMap) -> None:
    """Let calls outside the batch sizes of the map's times be told, where they are times of what runs here."""
    times = precision_map.end_to_end
    measured = None if times is None else times.rows_measured()
    if measured is not None and deployment_of(deployed).target == precision_map.target:
        watch(deployed, *measured)


def build(model: nn.Module, precision_map: PrecisionMap, layers: dict[str, QuantizedLayer], target: str) -> nn.Module:
    """Deploy given codes and scales (fresh from the weights, or from a checkpoint), and check each layer."""
    if target not in TARGETS:
        raise DeployError(f"expected a target out of {', '.join(TARGETS)}, got {target!r}")
    deployed = TARGETS[target](model, layers)
    deployed.eval()
    packed = set()
    for name, module in deployed.named_modules():
        if isinstance(module, Int8Linear | Fp8Linear):
            _check_layer(name, module)
        elif isinstance(module, PackedTable):
            _check_table(module, layers)
            packed.add(module.layer_name)
    for parameter in deployed.parameters():
        if isinstance(parameter, Fp8Experts):
            _check_experts(parameter, layers[parameter.how.name])
    kept = {name: layer for name, layer in layers.items() if name not in packed}
    _carry(deployed, Deployment(precision_map, target, kept))
    return deployed


def deployed_layers(deployed: nn.Module) -> dict[str, QuantizedLayer]:
    """Codes and scales of every layer in low precision, packed tables included. Raises DeployError as `deployment_of`."""
    return deployment_of(deployed).layers | tables(deployed)


def _carry(deployed: nn.Module, deployment: Deployment) -> None:
    """Set `deployed.precimap` as a plain attribute, outside the module's parameters, buffers and submodules."""
    object.__setattr__(deployed, "precimap", deployment)


def deployment_of(deployed: nn.Module) -> Deployment:
    """What a deployed model carries. Raises DeployError for any other model."""
    carried = vars(deployed).get("precimap")
    if not isinstance(carried, Deployment):
        raise DeployError(f"expected a model that precimap.deploy returned, got {type(deployed).__name__}")
    return carried


def _check_layer(name: str, module: Int8Linear | Fp8Linear) -> None:
    """Compare one kernel with the emulation of the layer it stands for."""
    layer = _on_device(module.layer, module.codes.device)
    outputs, inputs = layer.codes.shape
    plain = nn.Linear(inputs, outputs, device=layer.codes.device)  # of it only the bias is read
    x = _spread_inputs(layer, inputs)
    with torch.no_grad():
        plain.bias.copy_(torch.zeros(outputs) if module.bias is None else module.bias)
        with quantized(plain, {"weight": layer}):
            expected = plain(x)
        magnitudes = nn.functional.linear(x.abs(), layer.weight().abs(), plain.bias.abs())
        _compare(name or "the model", layer, module(x), expected, magnitudes, module.accumulation_error)


def _check_experts(experts: Fp8Experts, layer: QuantizedLayer) -> None:
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
        x = torch.randn(shape, generator=generator) * 4.0 ** torch.linspace(-3, 2, 16)[:, None]
    else:
        scale, zero, format = layer.input_range.scale, layer.input_range.zero, layer.scheme.input.format
        low, high = (format.minimum - zero) * scale, (format.maximum - zero) * scale
        x = low + (high - low) * (1.2 * torch.rand(shape, generator=generator) - 0.1)
    return x.to(layer.codes.device)


def _check_table(module: PackedTable, layers: Mapping[str, QuantizedLayer]) -> None:
    """Compare rows, spread over the table, as the operator reads them with what their codes stand for."""
    expected = layers[module.layer_name].weight()
    rows = torch.linspace(0, len(expected) - 1, min(len(expected), CHECKED_ROWS)).long()
    expected = expected[rows]
    found = module.lookup(rows, torch.arange(len(rows)))
    allowed = TOLERANCE[torch.float32] * float(expected.abs().max())
    difference = float((found - expected).abs().max())
    if not difference <= allowed:
        raise DeployError(
            f"{module.layer_name}: the operator reads rows that differ from their codes by {difference:.3g}, allowed are "
            f"{allowed:.3g}; this torch build reads packed rows otherwise. Deploy with target='emulated' and report it."
        )


def agreement(task: Task, model: nn.Module, deployed: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Agreement:
    """Compare the deployed model with the emulation of `layers` in `model`, on the first calibration batch."""
    batch = first_batch(task, task.splits.calibration)
    with torch.no_grad():
        found = task.forward(deployed, batch)
        with quantized(model, layers):
            expected = task.forward(model, batch)
    difference = found.double() - expected.double()
    return Agreement(
        float(difference.abs().max()),
        float(difference.square().mean().sqrt()),
        float(expected.abs().max()),
        expected.shape[0],
    )
