"""One layer's codes and scales, and a model that computes as a map says, without being changed.

Invariant: search, certificate, deployment and export all get a layer's codes and scales from `quantize_layer`; nothing
else quantises a weight. The emulated layer multiplies codes, or where it cannot (`code_products.py`) dequantised values in
float32, and rounds the result once to the model's dtype, which is what a matrix unit does that multiplies codes and
accumulates in float32 (the order of the sum differs). Emulating in the model's own BF16 would add a rounding of every
product's factors that no kernel makes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import MapError, ModelError, SchemeError
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
from precimap.layers.views import parameter_names
from precimap.numerics.fast import all_finite, code_values, fake_quantize
from precimap.numerics.grid_shift import GridShift
from precimap.numerics.large import large_to_codes, large_to_values
from precimap.numerics.quantize import Affine
from precimap.numerics.ranges import affine_from_range, fit
from precimap.numerics.schemes import FusedRows, Rounding, Scheme
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
    input_range: only for static inputs. input_phase: what the scales of a dynamic input are multiplied by; 1 except in
    a rounding draw. A static range carries its shift itself, so that whatever runs a layer runs the shifted one.
    keeps: the parameter stays beside the codes, for lookups of a tied table and other readers that are no products.
    """

    name: str
    scheme: Scheme
    codes: Tensor
    weight_affine: Affine
    input_range: InputRange | None
    input_phase: float = 1.0
    keeps: bool = False

    def weight(self) -> Tensor:
        """The weight that the codes stand for, float32, in the parameter's shape."""
        return large_to_values(self.codes, self.scheme.weight.format, self.weight_affine)


def quantize_layer(
    name: str,
    weight: Tensor,
    contracted: tuple[int, ...] | None,
    scheme: Scheme,
    input_range: InputRange | None,
    shift: GridShift | None = None,
) -> QuantizedLayer:
    """Codes and scales of one layer; `contracted` are the weight's dims that its op sums over.

    shift: a rounding draw, on grids other than those that ship. Raises ModelError for a weight that is not finite,
    SchemeError for a static scheme without a range, and for a shift of a format that cannot be shifted.
    """
    kept = None if shift is not None else _KEPT.get()
    version = None if weight.is_inference() else weight._version
    key = (name, id(weight), version, contracted, scheme, input_range)
    if kept is not None and key in kept:
        return kept[key][1]
    if not all_finite(weight):
        raise ModelError(f"{name}: expected finite weights, got NaN or Inf; repair the model first")
    if scheme.needs_calibration and input_range is None:
        raise SchemeError(f"{name}: scheme {scheme.name} has a static input range, and no calibration gave one")
    values = weight.detach().float()
    affine = _weight_affine(
        name, values, contracted if contracted is not None else tuple(range(weight.dim())), scheme.weight, shift
    )
    phase = 1.0 if shift is None or scheme.input is None else shift.input_phase(name, scheme.input.format)
    codes = large_to_codes(values, scheme.weight.format, affine)
    own_range, own_phase = None, phase
    if input_range is not None and scheme.needs_calibration:
        # A float32 value, as every shipped scale.
        scale = float(torch.tensor(input_range.scale, dtype=torch.float32) * phase)
        own_range, own_phase = InputRange(scale, input_range.zero), 1.0
    layer = QuantizedLayer(name, scheme, codes, affine, own_range, own_phase)
    if kept is not None:
        kept[key] = (weight, layer)  # with the weight, so that its id stays its own
    return layer


_KEPT: ContextVar[dict[Any, tuple[Tensor, QuantizedLayer]] | None] = ContextVar("codes that are kept", default=None)


@contextmanager
def codes_kept() -> Iterator[None]:
    """Inside the block, and in its thread, each weight is quantised once under each scheme and range.

    For a search: it asks for the same codes step by step, and holds the model still. One byte a weight and scheme.
    """
    before = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(before)


def _weight_affine(
    name: str, values: Tensor, contracted: tuple[int, ...], rounding: Rounding, shift: GridShift | None
) -> Affine:
    """The scales of a weight, on its own grids or on those of a rounding draw."""
    if shift is None:
        return fit(values, rounding, contracted)
    if isinstance(rounding.range, FusedRows):
        low, high = values.amin(contracted, keepdim=True), values.amax(contracted, keepdim=True)
        return affine_from_range(*shift.row_limits(name, low, high, rounding.format), rounding)
    return shift.weight_affine(name, rounding.format, fit(values, rounding, contracted))


def shipped_range(decision: Decision) -> InputRange | None:
    """The static input range that a map ships for a layer; None for schemes without one."""
    return None if decision.input_scale is None else InputRange(decision.input_scale, decision.input_zero or 0)


def quantize_map(
    model: nn.Module, precision_map: PrecisionMap, shift: GridShift | None = None
) -> dict[str, QuantizedLayer]:
    """Codes and scales of every layer that the map puts in low precision; `shift` as in `quantize_layer`.

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
        layer = quantize_layer(name, weights[name], decision.contracted, scheme, shipped_range(decision), shift)
        quantized_layers[name] = replace(layer, keeps=decision.keeps(scheme))
    return quantized_layers


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
        if self._last is not None and self._last[0] is x and self._last[1] == how and _same_values(self._last[2], x):
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


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, compared in words of 8 bytes where they lie so:
    torch compares one element at a time. Values of another layout are compared as values, so that a NaN is unlike itself.
    """
    flat = [each.detach().reshape(-1) for each in (one, other) if each.is_contiguous()]
    if len(flat) == 2 and all((each.storage_offset() | each.numel()) * each.element_size() % 8 == 0 for each in flat):
        return torch.equal(flat[0].view(torch.int64), flat[1].view(torch.int64))
    return torch.equal(one, other)


def emulate(call: WeightCall, layer: QuantizedLayer, weight: Operand, inputs: SharedInputs) -> Any:
    """What the call computes with its layer in low precision; `weight` is the layer's, as float32 values or as codes.

    Nothing is written: a call that writes its result somewhere is given it by `WeightCall.written`.
    """
    if call.op.lookup and layer.scheme.computes_low:
        return call.run()  # a tied table: the lookup itself stays in base precision, the product does not
    if isinstance(weight, CodedWeight):
        output = _by_codes(call, layer, weight, inputs)
        if output is not None:
            return output
        weight = weight.dequantized()
    values = call.view.rebuild(weight)
    if call.op.lookup:
        return _lookup_in_float32(call, values)
    return _in_float32(call, values, inputs.rounded(call, layer))


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
