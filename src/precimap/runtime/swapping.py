"""A model with other modules in place of those that own the given weights.

Invariant: the user's model is not touched; the tree is a copy over the same tensors. One walk for all targets that swap
modules, so that they agree on names, on a model that is itself one layer, and on torch's fused encoder layers.
"""

from collections.abc import Callable, Mapping

from torch import nn

from precimap.layers.copying import shared_copy
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import plain_name

Place = Callable[[QuantizedLayer, nn.Module | None], nn.Module]


def with_modules(model: nn.Module, layers: Mapping[str, QuantizedLayer], place: Place) -> nn.Module:
    """A copy of the model's tree in which `place(layer, owner)` stands for each layer's owner.

    owner: the module whose `weight` the layer is, or None where there is none; `place` refuses what it cannot stand for.
    Raises DeployError for a model that cannot be copied, and what `place` raises.
    """
    copied = shared_copy(model)
    owners = {plain_name(f"{name}.weight".lstrip(".")): (name, module) for name, module in copied.named_modules()}
    for name, layer in layers.items():
        path, module = owners.get(name, ("", None))
        replacement = place(layer, module)
        parent, _, attribute = path.rpartition(".")
        if not path:
            return replacement
        setattr(copied.get_submodule(parent), attribute, replacement)
    for module in copied.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            # Its fused path reads weights past their modules; this attribute is how the layer itself rules it out.
            module.activation_relu_or_gelu = 0
    return copied


def parameter_owner(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that holds a parameter of that name, and what it calls it; None where there is none."""
    for path, module in model.named_modules():
        for attribute in module._parameters:
            if plain_name(f"{path}.{attribute}".lstrip(".")) == name:
                return module, attribute
    return None
