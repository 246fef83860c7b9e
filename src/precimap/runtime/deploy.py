"""deploy(): a precision map into a running model, or an error; never a silent fallback.

Invariant: the deployed weights are the codes and scales that were measured (`quantize_map`), and the model's outputs are
compared with the emulation before it is handed out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from precimap.errors import DeployError
from precimap.fingerprints import of_weights
from precimap.layers.quantized import QuantizedLayer, quantize_map, quantized
from precimap.layers.realign import realigned
from precimap.numerics.fast import fake_quantize
from precimap.numerics.quantize import Affine
from precimap.precision_map import PrecisionMap
from precimap.runtime import emulated
from precimap.runtime.cpu_int8 import CPU_INT8
from precimap.runtime.cpu_tables import PackedTable, tables
from precimap.runtime.int8_linear import Int8Linear
from precimap.runtime.stored_linear import StoredLinear
from precimap.runtime.torchrec_tables import TORCHREC
from precimap.task import Task, first_batch

Build = Callable[[nn.Module, Mapping[str, QuantizedLayer]], nn.Module]
TARGETS: dict[str, Build] = {
    "emulated": emulated.deployed,
    CPU_INT8.name: CPU_INT8.deployed,
    TORCHREC.name: TORCHREC.deployed,
}

# Float32 sums of exact integer products differ in their order only; a BF16 result is rounded once more.
CHECKED_ROWS = 4096  # of each packed table
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


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

    precision_map: a map, or its file. target: `cpu-int8`, `torchrec` or `emulated`; by default the map's own. task: if
    given, the deployed model and the emulation score its first calibration batch, and `precimap.agreement` of the result
    holds the difference. Each kernel is compared with its emulation in any case. Raises PremiseMismatch for a map of
    other weights, DeployError for what the target cannot run or runs wrongly, MapError for a file that is no map.
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
    return deployed


def build(model: nn.Module, precision_map: PrecisionMap, layers: dict[str, QuantizedLayer], target: str) -> nn.Module:
    """Deploy given codes and scales (fresh from the weights, or from a checkpoint), and check each layer."""
    if target not in TARGETS:
        raise DeployError(f"expected a target out of {', '.join(TARGETS)}, got {target!r}")
    deployed = TARGETS[target](model, layers)
    deployed.eval()
    packed = set()
    for name, module in deployed.named_modules():
        if isinstance(module, Int8Linear):
            _check_layer(name, module, layers)
        elif isinstance(module, StoredLinear):
            _check_stored(module, layers)
        elif isinstance(module, PackedTable):
            _check_table(module, layers)
            packed.add(module.layer_name)
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


def _check_layer(name: str, module: Int8Linear, layers: Mapping[str, QuantizedLayer]) -> None:
    """Compare one kernel with the emulation on inputs spread over its range and beyond."""
    layer = next(layer for layer in layers.values() if layer.codes is module.codes)
    assert layer.scheme.input is not None and layer.input_range is not None
    scale, zero, format = layer.input_range.scale, layer.input_range.zero, layer.scheme.input.format
    low, high = (format.minimum - zero) * scale, (format.maximum - zero) * scale
    generator = torch.Generator().manual_seed(0)
    inputs = low + (high - low) * (1.2 * torch.rand(16, layer.codes.shape[1], generator=generator) - 0.1)
    rounded = fake_quantize(inputs, format, Affine(torch.tensor(scale), torch.tensor(float(zero))))
    expected = nn.functional.linear(rounded, layer.weight(), None if module.bias is None else module.bias.float())
    with torch.no_grad():
        found = module(inputs)
    allowed = TOLERANCE[found.dtype] * float((rounded.abs() @ layer.weight().abs().T).max())
    difference = float((found.float() - expected).abs().max())
    if not difference <= allowed:
        raise DeployError(
            f"{name or 'the model'}: the INT8 kernel differs from its emulation by {difference:.3g}, allowed are "
            f"{allowed:.3g}; this CPU or torch build multiplies INT8 wrongly. Deploy with target='emulated' and report it."
        )


def _check_stored(module: StoredLinear, layers: Mapping[str, QuantizedLayer]) -> None:
    """Compare the product of a decoded weight with that of the float32 values that its codes stand for."""
    weight = layers[module.layer_name].weight()
    inputs = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(module.weight.dtype)
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
