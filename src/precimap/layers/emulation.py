"""A model that computes as a map says, without being changed.

Invariant: an emulated layer multiplies codes, or where it cannot (`code_products.py`) dequantised values in float32, and
rounds the result once to the model's dtype, which is what a matrix unit does that multiplies codes and accumulates in
float32 (the order of the sum differs). Emulating in the model's own BF16 would add a rounding of every product's factors
that no kernel makes. A scheme with a `result` is a call in that format: what is added there and what comes out are
rounded to it, too.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import MapError
from precimap.layers.code_products import (
    CodedInput,
    CodedWeight,
    Operand,
    in_range,
    multiplies_codes,
    multiply,
    result_scale,
)
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.ops import Arguments
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.same_bytes import same_bytes
from precimap.layers.views import parameter_names
from precimap.numerics.fast import code_values, fake_quantize
from precimap.numerics.large import large_to_values
from precimap.numerics.quantize import Affine, storage_dtype
from precimap.numerics.ranges import fit


class Emulation(Interception):
    """Computes the given layers as if in low precision; `operands` are their weights as `operand` makes them."""

    def __init__(
        self, weights: Mapping[str, Tensor], layers: Mapping[str, QuantizedLayer], operands: Mapping[str, Operand]
    ) -> None:
        super().__init__({name: weights[name] for name in layers})
        self._layers = layers
        self._operands = operands
        self._inputs = SharedInputs()

    def on_weight(self, call: WeightCall) -> Any:
        name = call.view.name
        return call.written(emulate(call, self._layers[name], self._operands[name], self._inputs))


class SharedInputs:
    """The last input that was rounded: layers that read the same tensor under the same rounding share the result.

    While its values are the same, which is looked at: a version does not tell of writes through `x.data` or by others.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, tuple[object, ...], Tensor, Any] | None = None

    def rounded(self, call: WeightCall, layer: QuantizedLayer) -> Tensor:
        """The float32 values that the input's codes stand for; the input itself under a scheme without one."""
        rounding = layer.scheme.input
        if rounding is None:
            return call.input
        found: Tensor = self._shared(
            call, layer, fake_quantize, lambda x: fake_quantize(x, rounding.format, input_affine(x, call, layer))
        )
        return found

    def coded(self, call: WeightCall, layer: QuantizedLayer) -> CodedInput | None:
        """The input's codes, and their scale; None where it is too far from 1 to go on a result."""
        found: CodedInput | None = self._shared(call, layer, code_values, lambda x: _coded(x, call, layer))
        return found

    def _shared(self, call: WeightCall, layer: QuantizedLayer, form: object, made: Callable[[Tensor], Any]) -> Any:
        x = call.input
        how = (form, layer.scheme.input, layer.input_range, layer.input_phase, call.input_contracted)
        if self._last is not None and self._last[0] is x and self._last[1] == how and same_bytes(self._last[2], x):
            return self._last[3]
        result = made(x.detach().float())
        self._last = (x, how, x.detach().clone(), result)
        return result


def _coded(x: Tensor, call: WeightCall, layer: QuantizedLayer) -> CodedInput | None:
    assert layer.scheme.input is not None
    affine = input_affine(x, call, layer)
    if not in_range(affine.scale):
        return None
    return CodedInput(code_values(x, layer.scheme.input.format, affine), affine.scale)


def emulate(call: WeightCall, layer: QuantizedLayer, weight: Operand, inputs: SharedInputs) -> Any:
    """What the call computes with its layer in low precision; `weight` is the layer's, as float32 values or as codes.

    Nothing is written: a call that writes its result somewhere is given it by `WeightCall.written`.
    """
    if call.op.lookup and layer.scheme.computes_low:
        return call.run()  # a tied table: the lookup itself stays in base precision, the product does not
    if layer.scheme.result is None:
        return _emulated(call, layer, weight, inputs)
    dtype = storage_dtype(layer.scheme.result)
    output = _emulated(_with_addends_in(call, dtype), layer, weight, inputs)
    return output.to(dtype).to(output.dtype) if isinstance(output, Tensor) else output


def _emulated(call: WeightCall, layer: QuantizedLayer, weight: Operand, inputs: SharedInputs) -> Any:
    if isinstance(weight, CodedWeight):
        output = _by_codes(call, layer, weight, inputs)
        if output is not None:
            return output
        weight = weight.dequantized()
    values = call.view.rebuild(weight)
    if call.op.lookup:
        return _lookup_in_float32(call, values)
    return _in_float32(call, values, inputs.rounded(call, layer))


def _with_addends_in(call: WeightCall, dtype: torch.dtype) -> WeightCall:
    """The call with its floating-point tensors but the two operands rounded to `dtype`, held as they were."""
    operands = {call.op.left, call.op.right}
    places, names = {place for place, _ in operands}, {name for _, name in operands} | {"out"}
    given = call.arguments
    args = tuple(value if place in places else _through(value, dtype) for place, value in enumerate(given.args))
    kwargs = {name: value if name in names else _through(value, dtype) for name, value in given.kwargs.items()}
    return replace(call, arguments=Arguments(args, kwargs))


def _through(value: Any, dtype: torch.dtype) -> Any:
    held = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(dtype).to(value.dtype) if held else value


def _by_codes(call: WeightCall, layer: QuantizedLayer, weight: CodedWeight, inputs: SharedInputs) -> Tensor | None:
    """The call as a product of codes, or None where it is none."""
    scale = result_scale(call, weight)
    coded = None if scale is None else inputs.coded(call, layer)
    if scale is None or coded is None:
        return None
    expected = _expected_dtype(call)
    with torch.autocast(call.input.device.type, enabled=False):
        return multiply(call, coded, weight, scale, expected)


def input_affine(x: Tensor, call: WeightCall, layer: QuantizedLayer) -> Affine:
    """The scales under which a layer's input is rounded in this call; `x` is the call's input, or its first rows."""
    rounding, input_range = layer.scheme.input, layer.input_range
    assert rounding is not None
    if input_range is None:
        fitted = fit(x, rounding, call.input_contracted)
        return Affine(fitted.scale * layer.input_phase, fitted.zero)
    scale = torch.full([1] * x.dim(), input_range.scale, dtype=torch.float32, device=x.device)
    zero = None if rounding.symmetric else torch.full_like(scale, float(input_range.zero))
    return Affine(scale, zero)


def _expected_dtype(call: WeightCall) -> torch.dtype:
    """Of the result that the model expects."""
    device = call.input.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else call.input.dtype


def _in_float32(call: WeightCall, weight: Tensor, input: Tensor) -> Any:
    """The call on float32 operands, its result in the dtype that the model expects of it."""
    expected = _expected_dtype(call)
    with torch.autocast(call.input.device.type, enabled=False):
        output = _widened(call.replacing(weight.float(), input.float())).computed()
    return output.to(expected) if isinstance(output, Tensor) else output


def _lookup_in_float32(call: WeightCall, weight: Tensor) -> Any:
    """The lookup on a float32 table (bags are summed in float32, as the operators for packed rows do)."""
    slot = call.op.left if call.weight_on_left else call.op.right
    in_float32 = _widened(replace(call, arguments=call.arguments.replaced(slot, weight)))
    found, dtype = in_float32.run(), call.weight.dtype
    if isinstance(found, tuple):  # of `torch.embedding_bag`: the rows, and what its backward pass would read
        return (found[0].to(dtype), *found[1:])
    return found.to(dtype)


def _widened(call: WeightCall) -> WeightCall:
    """The call with all its floating-point arguments in float32."""
    floats = tuple(_as_float32(value) for value in call.arguments.args)
    named = {key: _as_float32(value) for key, value in call.arguments.kwargs.items()}
    return replace(call, arguments=Arguments(floats, named))


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
    with Emulation(weights, layers, operands(layers)):
        yield


def operands(layers: Mapping[str, QuantizedLayer]) -> dict[str, Operand]:
    """The weights of the layers as the emulation multiplies them, decoded once: that costs as much as a product on a CPU."""
    return {name: operand(layer) for name, layer in layers.items()}


def operand(layer: QuantizedLayer) -> Operand:
    """A layer's weight as codes where a product of its scheme is one of codes, else as float32 values."""
    affine = layer.weight_affine
    if affine.offset is not None or not multiplies_codes(layer.scheme, affine.scale):
        return layer.weight()
    ones = Affine(torch.ones_like(affine.scale), affine.zero)
    return CodedWeight(large_to_values(layer.codes, layer.scheme.weight.format, ones), affine.scale)
