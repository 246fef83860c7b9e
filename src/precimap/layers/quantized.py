"""One layer's codes and scales.

Invariant: search, certificate, deployment and export all get a layer's codes and scales from `quantize_layer`; nothing else
quantises a weight. What a model computes with them is `emulation.py`, and on hardware `runtime/weights`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import MapError, ModelError, SchemeError
from precimap.layers.views import parameter_names
from precimap.numerics.fast import all_finite
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
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

    shift: a rounding draw, on grids other than those that ship; formats of 16 bits have one grid alone, and stay on it.
    Raises ModelError for a weight that is not finite, SchemeError for a static scheme without a range.
    """
    shift = shift if scheme.weight.has_scales else None
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
    layer = QuantizedLayer(
        name=name, scheme=scheme, codes=codes, weight_affine=affine, input_range=own_range, input_phase=own_phase
    )
    if kept is not None and codes.element_size() == 1:  # those of 16 bits are made as fast as they are read
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
