"""The emulated deployment: a model whose low-precision weights compute by quantise-dequantise, on any device."""

from collections.abc import Mapping

from torch import Tensor, nn

from precimap.layers.quantized import QuantizedLayer
from precimap.runtime.weights.emulated import EMULATED_KERNEL
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.placing import placed, weight_of

SLOW = (
    "The target emulated computes exactly what was measured, in several times the time of the model: it is for looking. To "
    "serve, search and deploy for a target that this machine computes, such as cpu-int8."
)


def deployed(model: nn.Module, layers: Mapping[str, QuantizedLayer], *, owned: bool = False) -> nn.Module:
    """A copy of the model with the given layers emulated; owned: as of `placed`."""
    return placed(model, layers, _weight, owned=owned)


def _weight(layer: QuantizedLayer, parameter: Tensor) -> LowWeight:
    return weight_of(layer, parameter, EMULATED_KERNEL)
