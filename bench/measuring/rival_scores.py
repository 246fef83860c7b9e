"""The scores that a ranking of layers is compared with, and the truths they are all compared to.

Invariant: nothing here comes from precimap's own screen; the rivals share with it only the quantiser and the emulation,
so that they speak of the same low precision. Every function takes the same things and walks the same batches:
(task, inventory, calibration, scheme, batches) -> {layer: score}, a higher score says that the layer suffers more.
Running the rivals' own tools was not taken: their quantisers differ, and the comparison would be of those.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from precimap.layers.emulation import Emulation, operands, quantized
from precimap.layers.interception import WeightCall
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.refusals import refusal
from precimap.layers.views import parameter_names
from precimap.metrics.paired import paired_drop
from precimap.numerics.schemes import Scheme
from precimap.searching.calibrate import InputRanges, prepare
from precimap.task import Batches, Task, score, to_device

# (layer, its output, what quantising this call changes of it) -> the output that the model goes on with.
Observe = Callable[[str, Tensor, Tensor], Tensor]


class LayerErrors(Emulation):
    """Runs the model unquantised and shows, at every call of a layer, what quantising that call alone would change."""

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLayer], observe: Observe) -> None:
        super().__init__(parameter_names(model), layers, operands(layers))
        self._observe = observe

    def on_weight(self, call: WeightCall) -> Any:
        exact = call.run()
        if call.op.lookup:
            return exact
        with torch.no_grad():
            change = super().on_weight(call) - exact
        return self._observe(call.view.name, exact, change)


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What quantising one layer alone does, measured.

    deltas: change of each unit's loss, float64 [layers, units]. mean, error: mean change and its standard error,
    clustered and weighted as the task says, [layers]. second_moment: E[(change of loss)^2], [layers]. output_error:
    E||change of the scores||^2 per unit, [layers].
    """

    layers: tuple[str, ...]
    deltas: NDArray[np.float64]
    mean: NDArray[np.float64]
    error: NDArray[np.float64]
    second_moment: NDArray[np.float64]
    output_error: NDArray[np.float64]


def eligible(inventory: Inventory, scheme: Scheme) -> tuple[str, ...]:
    """The layers that can take the scheme on any hardware, in the order of the model."""
    return tuple(layer.name for layer in inventory.layers if refusal(layer, scheme) is None)


def layer_sqnr(
    task: Task, inventory: Inventory, calibration: InputRanges, scheme: Scheme, batches: Batches
) -> dict[str, float]:
    """Relative error of the layer's own output, sum ||dY||^2 / sum ||Y||^2: 1 / SQNR, before taking decibels."""
    noise: dict[str, float] = defaultdict(float)
    signal: dict[str, float] = defaultdict(float)

    def observe(layer: str, exact: Tensor, change: Tensor) -> Tensor:
        noise[layer] += float(change.double().square().sum())
        signal[layer] += float(exact.double().square().sum())
        return exact

    layers = _all_prepared(task, inventory, calibration, scheme)
    with torch.no_grad(), LayerErrors(task.model, layers, observe):
        for batch in batches:
            task.forward(task.model, to_device(batch, task.device))
    return {layer: noise[layer] / signal[layer] if signal[layer] else 0.0 for layer in layers}


def elementwise_gradient(
    task: Task, inventory: Inventory, calibration: InputRanges, scheme: Scheme, batches: Batches
) -> dict[str, float]:
    """sum over batches and elements of clamp(g * dY, +-1e10)^2, with g = d(mean loss of the batch) / dY.

    The formula of NVIDIA's Model-Optimizer for `auto_quantize` by gradient; dY is the change of the layer's output on
    its unquantised input. Gives the parameters no gradients.
    """
    # github.com/NVIDIA/Model-Optimizer, modelopt/torch/quantization/algorithms.py, `_get_auto_quantize_score`.
    layers = _all_prepared(task, inventory, calibration, scheme)
    scores = dict.fromkeys(layers, 0.0)
    seen: list[tuple[str, Tensor, Tensor]] = []

    def observe(layer: str, exact: Tensor, change: Tensor) -> Tensor:
        # Adding zeros gives a gradient whether or not the weights take one, and what is in-place later does no harm.
        shift = torch.zeros_like(exact, requires_grad=True)
        seen.append((layer, change, shift))
        return exact + shift

    for batch in batches:
        moved = to_device(batch, task.device)
        with torch.enable_grad():
            with LayerErrors(task.model, layers, observe):
                loss = task.loss(task.forward(task.model, moved), moved).mean()
            shifts = [shift for _, _, shift in seen]
            gradients = torch.autograd.grad(loss, shifts, allow_unused=True, materialize_grads=True)
        for (layer, change, _), gradient in zip(seen, gradients, strict=True):
            scores[layer] += float((gradient.float() * change.float()).clamp(-1e10, 1e10).square().sum())
        seen.clear()
    return scores


def direct(task: Task, inventory: Inventory, calibration: InputRanges, scheme: Scheme, batches: Batches) -> Truth:
    """Quantise one layer at a time and run all batches: the plain loop, two passes more than there are layers."""
    base_scores, base_losses = _run(task, {}, batches)
    units = score(task, task.model, batches).units
    names = eligible(inventory, scheme)
    deltas, errors, drops = [], [], []
    for name in names:
        scores, losses = _run(task, prepare(task, inventory, calibration, {name: scheme}), batches)
        deltas.append(losses - base_losses)
        errors.append(_distance(scores, base_scores))
        drops.append(paired_drop(losses - base_losses, units))
    changes = np.array(deltas).reshape(len(names), len(base_losses))
    return Truth(
        names,
        changes,
        mean=np.array([drop.estimate for drop in drops]),
        error=np.array([drop.error for drop in drops]),
        second_moment=np.square(changes).mean(axis=1),
        output_error=np.array(errors),
    )


def residual_error(
    task: Task,
    inventory: Inventory,
    calibration: InputRanges,
    scheme: Scheme,
    keep: AbstractSet[str],
    batches: Batches,
) -> float:
    """E||change of the scores||^2 per unit, with every eligible layer quantised but those in `keep`.

    In the units of `Truth.output_error`, whose sum over the quantised layers it is close to.
    """
    choice = {name: scheme for name in eligible(inventory, scheme) if name not in keep}
    base_scores, _ = _run(task, {}, batches)
    scores, _ = _run(task, prepare(task, inventory, calibration, choice), batches)
    return _distance(scores, base_scores)


def _all_prepared(
    task: Task, inventory: Inventory, calibration: InputRanges, scheme: Scheme
) -> dict[str, QuantizedLayer]:
    return prepare(task, inventory, calibration, dict.fromkeys(eligible(inventory, scheme), scheme))


def _run(
    task: Task, layers: Mapping[str, QuantizedLayer], batches: Batches
) -> tuple[list[Tensor], NDArray[np.float64]]:
    """Scores of each batch and the losses of all units, float64 [units]."""
    scores, losses = [], []
    with torch.no_grad(), quantized(task.model, layers):
        for batch in batches:
            moved = to_device(batch, task.device)
            scores.append(task.forward(task.model, moved))
            losses.append(task.loss(scores[-1], moved).double().cpu())
    return scores, torch.cat(losses).numpy()


def _distance(scores: list[Tensor], base: list[Tensor]) -> float:
    """Mean over all units of the squared distance between a unit's scores and its scores in `base`."""
    changes = torch.cat([(one - other).double() for one, other in zip(scores, base, strict=True)])
    return float(changes.square().sum()) / len(changes)
