"""The emulated deployment: a module that computes a map by quantise-dequantise, on any device.

For looking at a map where its hardware is not at hand, and as the oracle of every other target. It is slower than
the model it emulates and says so; nothing here claims speed.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from precimap.layers.copying import shared_copy
from precimap.layers.quantized import Emulation, QuantizedLayer, dequantized
from precimap.layers.views import parameter_names


class EmulatedModel(nn.Module):
    """Calls of this module compute `layers` in emulated low precision. Other methods of the model are not reached."""

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
        super().__init__()
        self.model = shared_copy(model)
        self._layers = dict(layers)
        self._dequantized = dequantized(layers)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # A mode of its own for each call, so that threads can share the module.
        with Emulation(parameter_names(self.model), self._layers, self._dequantized):
            return self.model(*args, **kwargs)


def deployed(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> nn.Module:
    """The model with the given layers emulated."""
    return EmulatedModel(model, layers)
