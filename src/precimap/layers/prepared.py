"""What runs a map: the model, realigned and cast as the map says, and the codes of its layers.

Invariant: whole maps, certificate, rounding draws, timing and deployment all get both from here. Codes are made of the
model's own values, not of those that a cast has rounded.
"""

from torch import nn

from precimap.layers.casting import cast
from precimap.layers.quantized import QuantizedLayer, quantize_map
from precimap.layers.realign import realigned
from precimap.numerics.grid_shift import GridShift
from precimap.precision_map import PrecisionMap


def prepared(
    model: nn.Module, precision_map: PrecisionMap, shift: GridShift | None = None
) -> tuple[nn.Module, dict[str, QuantizedLayer]]:
    """The model that the layers go into, and the layers; shift: of a rounding draw.

    The model itself where the map neither realigns nor casts it. Raises what `realigned`, `cast` and `quantize_map` do.
    """
    repaired = realigned(model, precision_map.realignment)
    return cast(repaired, precision_map.cast), quantize_map(repaired, precision_map, shift)


def architecture(model: nn.Module, precision_map: PrecisionMap) -> nn.Module:
    """The model that the layers go into, without them."""
    return cast(realigned(model, precision_map.realignment), precision_map.cast)
