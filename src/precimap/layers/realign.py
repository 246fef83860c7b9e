"""Scale and bias of the last logit, folded into the layer that makes it.

Invariant: realigning changes the weights of one layer *before* anything is quantised, in a tree of its own; so search,
certificate, deployment and checkpoint need to know nothing of it but this function, and it costs nothing at run time. An op
behind the model, the alternative, would have to be served by every engine.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import InputError, MapError
from precimap.layers.copying import shared_copy
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.inventory import Inventory
from precimap.layers.owners import module_of
from precimap.layers.views import parameter_names
from precimap.precision_map import Realignment

_SHIFT, _TOLERANCE = 0.25, 1e-4


def realigned(model: nn.Module, realignment: Realignment | None) -> nn.Module:
    """The model with the realignment folded in, over the same tensors otherwise; the model itself where there is none.

    Of each output: weight * scale, bias * scale + shift, rounded once to their own dtype. Raises MapError for a model
    without that layer or with another number of outputs, DeployError for one that cannot be copied.
    """
    if realignment is None:
        return model
    copied = shared_copy(model)
    try:
        owner = module_of(copied, realignment.layer)
    except KeyError:
        owner = None
    if type(owner) is not nn.Linear:
        raise MapError(
            f"the map realigns {realignment.layer}, expected as the weight of an nn.Linear; the model has none"
        )
    weight = owner.weight.detach()
    if len(weight) != len(realignment.scale):
        raise MapError(
            f"the map realigns {len(realignment.scale)} outputs of {realignment.layer}, it has {len(weight)}"
        )
    scale, shift = (torch.tensor(of, dtype=torch.float64) for of in (realignment.scale, realignment.shift))
    given: Tensor | None = owner.bias
    bias = weight.new_zeros(len(weight)) if given is None else given.detach()
    scaled = (weight.double() * scale.unsqueeze(1).to(weight.device)).to(weight.dtype)
    moved = (bias.double() * scale.to(weight.device) + shift.to(weight.device)).to(weight.dtype)
    owner.weight, owner.bias = (nn.Parameter(value, requires_grad=False) for value in (scaled, moved))
    return copied


class _Outputs(Interception):
    """Notes which layers return as many values as there are scores; moves the result of one of them."""

    def __init__(self, weights: Mapping[str, Tensor], moved: str | None) -> None:
        super().__init__(weights)
        self.sizes: dict[str, list[int]] = {}
        self._moved = moved

    def on_weight(self, call: WeightCall) -> Any:
        output = call.run()
        if isinstance(output, Tensor):
            self.sizes.setdefault(call.view.name, []).append(output.numel())
            if call.view.name == self._moved:
                return output * _scales(output.shape[-1]).to(output) + _SHIFT
        return output


def _scales(outputs: int) -> Tensor:
    """Another one for each output: that they lie along the last dim of the scores is part of the question."""
    return 1.5 + torch.arange(outputs, dtype=torch.float32) / outputs


def score_layer(model: nn.Module, forward: Callable[[Any, Any], Tensor], inventory: Inventory, batch: Any) -> str:
    """The layer whose result *is* the scores, but for their shape: moved by a scale and a shift, it moves them alike.

    Raises InputError when there is none: scores that are sums of parts, cosines, or made by a raw parameter.
    """
    weights = parameter_names(model)
    with torch.no_grad():
        with _Outputs(weights, None) as seen:
            scores = forward(model, batch)
        free = {layer.name for layer in inventory.layers if layer.in_linear_module and not layer.tied}
        fitting = [name for name, sizes in seen.sizes.items() if sizes == [scores.numel()] and name in free]
        for name in reversed(fitting):
            with _Outputs(weights, name):
                moved = forward(model, batch)
            scales = _scales(len(weights[name])).to(scores)
            expected = (scores.reshape(-1, len(scales)) * scales + _SHIFT).reshape(scores.shape)
            if torch.allclose(moved, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
                return name
    raise InputError(
        "expected a last nn.Linear whose result is the score itself, got none: a scale and a bias of the scores cannot be "
        "folded into this model (its scores are put together from several layers, as heads side by side or a sum, are a "
        "cosine, or made by a raw or tied weight); leave realigning off"
    )
