"""One layer's codes and scales, and a model that computes as a map says, without being changed.

Invariant: search, certificate, deployment and export all get a layer's codes and scales from `quantize_layer`; nothing
else quantises a weight. The emulated layer multiplies dequantised values in float32 and rounds the result once, which
is what a matrix unit does that multiplies codes and accumulates in float32 (the order of the sum differs). Emulating in
the model's own BF16 would add a rounding of every product's factors that no kernel makes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import MapError, ModelError, SchemeError
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.views import parameter_names
from precimap.numerics.fast import fake_quantize
from precimap.numerics.quantize import Affine, dequantize, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Rounding, Scheme
from precimap.precision_map import Decision, PrecisionMap


@dataclass(frozen=True, slots=True)
class InputRange:
    """A static input's scale and zero, as plain numbers: x ~ (q - zero) * scale."""

    scale: float
    zero: int


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """A layer in low precision: what a map ships for it.

    codes: the parameter's shape, in the format's storage dtype. weight_affine: scales that broadcast against it.
    input_range: only for static inputs.
    """

    name: str
    scheme: Scheme
    codes: Tensor
    weight_affine: Affine
    input_range: InputRange | None

    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, in the parameter's shape."""
        return dequantize(self.codes, self.scheme.weight.format, self.weight_affine)


def quantize_layer(
    name: str, weight: Tensor, contracted: tuple[int, ...] | None, scheme: Scheme, input_range: InputRange | None
) -> QuantizedLayer:
    """Codes and scales of one layer; `contracted` are the weight's dims that its op sums over.

    Raises ModelError for a weight that is not finite, SchemeError for a static scheme without a range.
    """
    if not torch.isfinite(weight).all():
        raise ModelError(f"{name}: expected finite weights, got NaN or Inf; repair the model first")
    if scheme.needs_calibration and input_range is None:
        raise SchemeError(f"{name}: scheme {scheme.name} has a static input range, and no calibration gave one")
    values = weight.detach().float()
    affine = fit(values, scheme.weight, contracted if contracted is not None else tuple(range(weight.dim())))
    codes = quantize(values, scheme.weight.format, affine)
    return QuantizedLayer(name, scheme, codes, affine, input_range if scheme.needs_calibration else None)


def shipped_range(decision: Decision) -> InputRange | None:
    """The static input range that a map ships for a layer; None for schemes without one."""
    return None if decision.input_scale is None else InputRange(decision.input_scale, decision.input_zero or 0)


def quantize_map(model: nn.Module, precision_map: PrecisionMap) -> dict[str, QuantizedLayer]:
    """Codes and scales of every layer that the map puts in low precision.

    Raises MapError when the map names a layer that the model lacks, or one of another shape.
    """
    weights = parameter_names(model)
    quantized_layers = {}
    for name in precision_map.low:
        decision, scheme = precision_map.layers[name], precision_map.scheme_of(name)
        assert scheme is not None
        if name not in weights or tuple(weights[name].shape) != decision.shape:
            found = f"one of shape {tuple(weights[name].shape)}" if name in weights else "none of that name"
            raise MapError(f"the map has a layer {name} of shape {decision.shape}, the model has {found}")
        quantized_layers[name] = quantize_layer(
            name, weights[name], decision.contracted, scheme, shipped_range(decision)
        )
    return quantized_layers


class Emulation(Interception):
    """Computes the given layers as if in low precision: quantise-dequantise both operands, then the original op."""

    def __init__(
        self, weights: Mapping[str, Tensor], layers: Mapping[str, QuantizedLayer], dequantized: Mapping[str, Tensor]
    ) -> None:
        super().__init__({name: weights[name] for name in layers})
        self._layers = layers
        self._weights = dequantized

    def on_weight(self, call: WeightCall) -> Any:
        layer = self._layers[call.view.name]
        if call.op.lookup and layer.scheme.computes_low:
            return call.run()  # a tied table: the lookup itself stays in base precision, the product does not
        weight = call.view.rebuild(self._weights[layer.name])
        if call.op.lookup:
            return call.run_with(weight.to(call.weight.dtype), call.input)
        return _in_float32(call, weight, _rounded_input(call, layer))


def _rounded_input(call: WeightCall, layer: QuantizedLayer) -> Tensor:
    rounding = layer.scheme.input
    if rounding is None:
        return call.input
    affine = _input_affine(call, rounding, layer.input_range)
    return fake_quantize(call.input, rounding.format, affine)


def _input_affine(call: WeightCall, rounding: Rounding, input_range: InputRange | None) -> Affine:
    if input_range is None:
        return fit(call.input.detach().float(), rounding, call.input_contracted)
    shape = [1] * call.input.dim()
    scale = torch.full(shape, input_range.scale, dtype=torch.float32, device=call.input.device)
    zero = None if rounding.symmetric else torch.full_like(scale, float(input_range.zero))
    return Affine(scale, zero)


def _in_float32(call: WeightCall, weight: Tensor, input: Tensor) -> Any:
    """The call on float32 operands, its result in the dtype that the model expects of it."""
    device = call.input.device.type
    autocast = torch.is_autocast_enabled(device)
    expected = torch.get_autocast_dtype(device) if autocast else call.input.dtype
    arguments = call.arguments
    floats = tuple(_as_float32(value) for value in arguments.args)
    named = {key: _as_float32(value) for key, value in arguments.kwargs.items()}
    widened = WeightCall(
        call.op, call.func, type(arguments)(floats, named), call.contraction, call.view, call.weight_on_left
    )
    with torch.autocast(device, enabled=False):
        output = widened.run_with(weight.float(), input.float())
    return output.to(expected) if isinstance(output, Tensor) else output


def _as_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[None]:
    """Inside the block every call of `model` computes the given layers in emulated low precision.

    An empty mapping gives the baseline on the same path, which is what drops are measured against. The model is not
    modified. Raises MapError for a layer that the model lacks.
    """
    weights = parameter_names(model)
    missing = sorted(set(layers) - set(weights))
    if missing:
        raise MapError(f"expected layers of this model, got {', '.join(missing)}, which it does not have")
    with Emulation(weights, layers, dequantized(layers)):
        yield


def dequantized(layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """The float32 weights of the layers, decoded once: that costs as much as a product does on a CPU."""
    return {name: layer.weight() for name, layer in layers.items()}
