"""Why a layer cannot take a scheme, on any hardware.

A refusal is a sentence for the user, or None. It speaks of kernels in general (the shapes that FP8 matrix units take, a
lookup that has no input); what one target lacks is that target's own `refusal`. Nothing is skipped without one.
"""

from precimap.layers.inventory import Layer
from precimap.numerics.formats import FloatFormat
from precimap.numerics.schemes import Granularity, Scheme

# cuBLASLt and CUTLASS FP8 matrix products take contracted and output widths that are multiples of 16.
FP8_MULTIPLE = 16


def refusal(layer: Layer, scheme: Scheme) -> str | None:
    """The reason why `layer` cannot take `scheme`, or None."""
    if layer.dead is not None:
        return f"dead: {layer.dead}"
    if layer.contracted is None and scheme.weight.granularity is not Granularity.PER_TENSOR:
        return "its calls contract different dims of the weight: no channel that all of them share"
    if not scheme.computes_low:
        return None
    if layer.lookup:
        return "a lookup has no input to quantise; weight-only schemes apply"
    if layer.outputs == 1:
        return "one output column: a dot product, nothing to gain"
    if scheme.weight.format.bits == 8 and isinstance(scheme.weight.format, FloatFormat):
        return _fp8_refusal(layer)
    return None


def _fp8_refusal(layer: Layer) -> str | None:
    if layer.positions_mixed:
        return "FP8 kernels are matrix products; there is none for a convolution"
    for width, what in ((layer.inputs, "contracted"), (layer.outputs, "output")):
        if width is not None and width % FP8_MULTIPLE:
            return f"FP8 kernels take widths that are multiples of {FP8_MULTIPLE}; its {what} width is {width}"
    return None
