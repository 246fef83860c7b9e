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
    if scheme.rows is not None:
        return _rows_refusal(layer, scheme)
    if not scheme.computes_low:
        return None
    if layer.table:
        return "a lookup has no input to quantise; weight-only schemes apply"
    if layer.outputs == 1:
        return "one output column: a dot product, nothing to gain"
    if scheme.result is not None and layer.dtype not in ("float32", "float64"):
        return f"the layer is in {layer.dtype} already, which is no longer than {scheme.name}"
    if scheme.weight.format.bits == 8 and isinstance(scheme.weight.format, FloatFormat):
        return _fp8_refusal(layer)
    return None


def _rows_refusal(layer: Layer, scheme: Scheme) -> str | None:
    """Packed rows are read by lookups and by nothing else, and are made to be smaller."""
    if not layer.lookup:
        return "packed rows are for embedding tables: no matrix product reads them"
    if layer.flops:
        return f"the table is also multiplied ({', '.join(layer.ops)}), and no matrix product reads packed rows"
    if layer.contracted != (len(layer.shape) - 1,):
        return "its rows do not lie along the last dim of the weight, as packed rows do"
    if layer.shape[-1] * scheme.weight_bits % 8:
        return f"two 4-bit codes share a byte, so a row needs an even width; its width is {layer.shape[-1]}"
    packed = scheme.stored_bytes(layer.shape, layer.contracted)
    if packed >= layer.bytes:
        return f"with a scale and an offset for each row it takes {packed:,} bytes, no fewer than its {layer.bytes:,}"
    return None


def _fp8_refusal(layer: Layer) -> str | None:
    if layer.positions_mixed:
        return "FP8 kernels are matrix products; there is none for a convolution"
    for width, what in ((layer.inputs, "contracted"), (layer.outputs, "output")):
        if width is not None and width % FP8_MULTIPLE:
            return f"FP8 kernels take widths that are multiples of {FP8_MULTIPLE}; its {what} width is {width}"
    return None
