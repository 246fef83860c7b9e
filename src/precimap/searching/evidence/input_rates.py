"""What low precision does to each layer's input: how far it reaches, what saturates, what becomes zero.

For people: a layer that loses much is often one that saturates (a static range too small) or underflows (one scale for
values of very different size). Nothing is decided by it. One batch, one pass for all layers and schemes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precimap.layers.emulation import input_affine
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.numerics.fast import fake_quantize
from precimap.numerics.quantize import Affine
from precimap.task import Task, to_device
from precimap.user_code import called

ROWS = 64  # of each input: rates are for people, two digits will do


@dataclass(frozen=True, slots=True)
class InputRates:
    """Of the first rows of a batch. amax: largest |input|. saturated: share of inputs beyond the range; underflowed: share
    of those not zero that became zero."""

    amax: float
    saturated: float
    underflowed: float


class _Rates(Interception):
    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, Sequence[QuantizedLayer]]) -> None:
        super().__init__({name: weights[name] for name in layers})
        self._layers = layers
        self.sums: dict[tuple[str, str], list[float]] = {}  # amax, saturated, underflowed, not zero, inputs

    def on_weight(self, call: WeightCall) -> Any:
        if call.op.lookup or not call.input.numel():
            return call.run()
        x = call.input.detach()[:ROWS].float()
        for layer in self._layers[call.view.name]:
            rounding = layer.scheme.input
            if rounding is None:
                continue
            affine = _narrowed(input_affine(call.input.detach().float(), call, layer), len(x))
            zero = 0.0 if affine.zero is None else affine.zero
            low = (rounding.format.minimum - zero) * affine.scale
            high = (rounding.format.maximum - zero) * affine.scale
            # A step of slack: at an exact end of the range the scale's own rounding is no saturation.
            beyond = (x > high * (1 + 1e-5)) | (x < low * (1 + 1e-5))
            gone = (fake_quantize(x, rounding.format, affine) == 0) & (x != 0)
            sums = self.sums.setdefault((layer.name, layer.scheme.name), [0.0] * 5)
            sums[0] = max(sums[0], float(x.abs().max()))
            for at, counted in enumerate((beyond, gone, x != 0), start=1):
                sums[at] += int(counted.sum())
            sums[4] += x.numel()
        return call.run()


def _narrowed(affine: Affine, rows: int) -> Affine:
    """The scales of the first rows, where each row has its own."""
    if not affine.scale.dim() or affine.scale.shape[0] == 1:
        return affine
    return Affine(affine.scale[:rows], None if affine.zero is None else affine.zero[:rows])


def input_rates(task: Task, layers: Sequence[QuantizedLayer], batch: Any) -> dict[tuple[str, str], InputRates]:
    """(layer, scheme name) -> rates on one batch; weight-only schemes, lookups and layers not called have none."""
    by_name: dict[str, list[QuantizedLayer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    mode = _Rates(parameter_names(task.model), by_name)
    with torch.no_grad(), mode, called("forward", "a batch of the search split"):
        task.forward(task.model, to_device(batch, task.device))
    return {
        key: InputRates(amax, beyond / inputs, gone / max(1.0, nonzero))
        for key, (amax, beyond, gone, nonzero, inputs) in mode.sums.items()
    }
