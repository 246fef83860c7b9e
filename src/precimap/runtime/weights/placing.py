"""A copy of a model with low-precision weights in the places of its parameters.

Invariant: the user's model is not touched, and nothing of the copy can touch it: modules, parameters and buffers are
the copy's own. Wherever the model knows a parameter by, under two names, in a list, as an attribute beside its
registration, there the copy has the same low-precision weight. Modules keep their types, hooks and methods.

A copy that serves has values of its own as well (`owned`). One that a search runs for a moment shares the model's
storage: it would be held several times otherwise, and nobody writes into it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.copying import copied
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.runtime.weights.low_weight import How, Kernel, LowWeight, Parts, low_weight

Place = Callable[[QuantizedLayer, Tensor], LowWeight]


def placed(model: nn.Module, layers: Mapping[str, QuantizedLayer], place: Place, *, owned: bool = False) -> nn.Module:
    """The copy, in which `place` makes what stands for the parameter of each layer.

    Raises DeployError for a model that cannot be copied and for a layer that it does not have, and what `place` raises.
    """
    parameters = parameter_names(model)
    unknown = sorted(layers.keys() - parameters.keys())
    if unknown:
        raise DeployError(f"{unknown[0]}: the model has no such parameter")
    stands_in: dict[int, Any] = {}
    for name, parameter in parameters.items():
        layer = layers.get(name)
        kept = _own(parameter, owned, parameter=True) if layer is None or layer.keeps else parameter
        stands_in[id(parameter)] = kept if layer is None else place(layer, kept)
    for buffer in model.buffers():
        stands_in[id(buffer)] = _own(buffer, owned, parameter=False)
    made = copied(model, stands_in)
    for module in made.modules():
        if isinstance(module, nn.TransformerEncoder) and low_weights(module):
            # Padded batches would become nested tensors, in which no kernel multiplies.
            module.use_nested_tensor = False
    return made


def _own(tensor: Tensor, owned: bool, parameter: bool) -> Tensor:
    """What the copy has of a tensor that stays; never the tensor itself, which `.half()` or `.to()` would change."""
    values = tensor.detach().clone() if owned else tensor.detach()
    return nn.Parameter(values, requires_grad=False) if parameter else values


def weight_of(layer: QuantizedLayer, parameter: Tensor, kernel: Kernel, parts: Parts | None = None) -> LowWeight:
    """What stands for a parameter. parts: codes in another form than the layer's own."""
    if parts is None:
        affine = {
            "scale": layer.weight_affine.scale,
            "zero": layer.weight_affine.zero,
            "offset": layer.weight_affine.offset,
        }
        parts = {"codes": layer.codes, **{name: part for name, part in affine.items() if part is not None}}
    if layer.keeps:
        parts = {**parts, "wide": parameter.detach()}
    parts = {name: part.to(parameter.device) for name, part in parts.items()}
    how = How(
        name=layer.name,
        scheme=layer.scheme,
        input_range=layer.input_range,
        input_phase=layer.input_phase,
        kernel=kernel,
    )
    return low_weight(parts, how, parameter.dtype)


def low_weights(model: nn.Module) -> dict[str, LowWeight]:
    """The low-precision weights of a model, by the first name of each."""
    return {name: weight for name, weight in parameter_names(model).items() if isinstance(weight, LowWeight)}


def on_cpu(parameter: Tensor, name: str) -> Tensor:
    """Raises DeployError for a parameter elsewhere."""
    if parameter.device != torch.device("cpu"):
        raise DeployError(
            f"{name}: expected a model on the CPU, got one on {parameter.device}; move it and its batches there"
        )
    return parameter
