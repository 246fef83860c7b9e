"""deploy(): a precision map into a running model, or an error; never a silent fallback.

Invariant: the deployed weights are the codes and scales that were measured (`quantize_map`), and the model's outputs are
compared with the emulation before it is handed out.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precimap.errors import DeployError, EmulatedWarning, UncertifiedMapWarning
from precimap.fingerprints import modules_of, of_weights
from precimap.layers.emulation import quantized
from precimap.layers.prepared import prepared
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import EMULATED, Hardware, Target
from precimap.precision_map import PrecisionMap
from precimap.runtime import emulated
from precimap.runtime.batch_watch import watch
from precimap.runtime.kernel_checks import check_weight
from precimap.runtime.weights.placing import low_weights
from precimap.targets import TARGETS, target_of
from precimap.task import Task, first_batch
from precimap.user_code import called


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
    """What a deployed model carries as `precimap`: its map and its target.

    elsewhere: layers that are in a module of a library's own (torchrec's collections) and no parameter of the model; the
    codes and scales of all others are its parameters.
    """

    map: PrecisionMap
    target: str
    elsewhere: dict[str, QuantizedLayer]
    agreement: Agreement | None = None


def deploy(
    model: nn.Module,
    precision_map: PrecisionMap | str | Path,
    *,
    target: Target | Hardware | str | None = None,
    task: Task | None = None,
) -> nn.Module:
    """A model that computes as the map says, on this machine: a copy of `model`, which shares nothing with it.

    Its modules are the model's own, with their types, names, methods and hooks; parameters in low precision are tensors that
    answer as the others do (`runtime/weights`). It is in evaluation mode, and no parameter requires a gradient.

    precision_map: a map, or its file. target: an object or its name out of `precimap.targets` (those of CUDA are
    experimental: not yet measured on a GPU); by default the map's own. task: if given, the
    deployed model and the emulation score its first calibration batch, and `precimap.agreement` of the result holds the
    difference. Each kernel is compared with its emulation in any case.

    Warns with a BatchSizeWarning, once, when a batch lies outside the sizes that the map was timed with on this target; with
    an UncertifiedMapWarning of a map that is not certified; with an EmulatedWarning of the target `emulated`, which computes
    exactly what was measured and is slower than the model. Raises PremiseMismatch for a map of other weights or modules,
    DeployError for what the target cannot run or runs wrongly, MapError for a file that is no map.
    """
    if not isinstance(precision_map, PrecisionMap):
        precision_map = PrecisionMap.load(precision_map)
    precision_map.check(weights=of_weights(model), architecture=modules_of(model))
    model, layers = prepared(model, precision_map)
    name = target if isinstance(target, str) else precision_map.target if target is None else target.name
    deployed = build(model, precision_map, layers, name, owned=True)
    if task is not None:
        found = agreement(task, model, deployed, layers)
        _carry(deployed, replace(deployment_of(deployed), agreement=found))
    watch_batches(deployed)
    warn_of(precision_map)
    if name == EMULATED.name and layers:
        warnings.warn(emulated.SLOW, EmulatedWarning, stacklevel=2)
    return deployed


def warn_of(precision_map: PrecisionMap) -> None:
    """Warn the caller's caller of a map that is not certified, and say why it is not."""
    why = precision_map.not_certified
    if why is not None:
        warnings.warn(
            f"this map is not certified: {why}. Nothing bounds what it costs in {precision_map.premise.metric!r}; judge "
            "it with precimap certify before it serves",
            UncertifiedMapWarning,
            stacklevel=3,
        )


def watch_batches(deployed: nn.Module) -> None:
    """Let calls outside the batch sizes of the map's times be told, where they are times of what runs here."""
    carried = deployment_of(deployed)
    times = carried.map.end_to_end
    measured = None if times is None else times.rows_measured()
    if measured is not None and carried.target == carried.map.target:
        watch(deployed, *measured)


def build(
    model: nn.Module, precision_map: PrecisionMap, layers: dict[str, QuantizedLayer], target: str, *, owned: bool
) -> nn.Module:
    """Deploy given codes and scales (fresh from the weights, or from a checkpoint), and check each layer.

    owned: copy what stays in base precision, where somebody else has the model, too.
    """
    if target not in TARGETS:
        raise DeployError(f"expected a target out of {', '.join(TARGETS)}, got {target!r}")
    found: Any = target_of(target, precision_map.target)
    place = emulated.deployed if found is EMULATED else found.deployed  # the emulation is of no hardware
    deployed: nn.Module = place(model, layers, owned=owned)
    deployed.eval()
    weights = low_weights(deployed)
    for weight in weights.values():
        check_weight(weight)
    elsewhere = {name: layer for name, layer in layers.items() if name not in weights}
    _carry(deployed, Deployment(precision_map, found.name, elsewhere))
    return deployed


def deployed_layers(deployed: nn.Module) -> dict[str, QuantizedLayer]:
    """Codes and scales of every layer in low precision. Raises DeployError as `deployment_of`."""
    return deployment_of(deployed).elsewhere | {name: weight.layer() for name, weight in low_weights(deployed).items()}


def _carry(deployed: nn.Module, deployment: Deployment) -> None:
    """Set `deployed.precimap` as a plain attribute, outside the module's parameters, buffers and submodules."""
    object.__setattr__(deployed, "precimap", deployment)


def deployment_of(deployed: nn.Module) -> Deployment:
    """What a deployed model carries. Raises DeployError for any other model."""
    carried = vars(deployed).get("precimap")
    if not isinstance(carried, Deployment):
        raise DeployError(f"expected a model that precimap.deploy returned, got {type(deployed).__name__}")
    return carried


def agreement(task: Task, model: nn.Module, deployed: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Agreement:
    """Compare the deployed model with the emulation of `layers` in `model`, on the first calibration batch."""
    batch = first_batch(task, task.splits.calibration)
    with torch.no_grad(), called("forward", "the first batch of the calibration split"):
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
