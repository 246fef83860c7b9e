"""What a model's own 16 bits make of any change: results rounded anew from one layer on, and nothing else.

In a model that computes in BF16 or FP16 a change of one layer sends every rounding after it another way. What that does to
a score comes on top of what the layer itself does, and no first-order prediction knows of it; in a language model, whose
logits are themselves 16 bits, it is several times as large. Here the 16-bit results of the layer and of all that are
called after it move by one unit in their last place, so that nothing but this is seen.

Invariant: results of another dtype are those of the model, so that a float32 model shows no change at all. Not taken: the
layer in BF16 codes (`BF16_FLOOR`), which gives the same bits in a BF16 model; the layer's results alone, which a sum with a
larger number swallows; a pass in float32, which a model that was written for BF16 need not allow.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from precimap.layers.contents import kind_of
from precimap.layers.interception import WeightCall
from precimap.layers.recording import Recording
from precimap.layers.replay import Replay
from precimap.layers.views import WeightViews

# Two roundings to the nearest differ by 2/12 of a squared unit in the last place; so do two numbers of which a sixth moved.
MOVED = 1 / 6


class Nudged(Replay):
    """Moves the 16-bit results of `layer`, or of the first that is called, and of every layer called after it.

    What was before is answered from the recording. weights: of the model, by name; `seed` says which results move, and
    where to. Use it as `Replay`.
    """

    def __init__(self, weights: Mapping[str, Tensor], layer: str | None, recording: Recording, seed: int) -> None:
        super().__init__(weights, {}, {}, recording)
        self.views = WeightViews(weights)
        self._changes = True
        self._layer = layer
        self._reached = False
        self._generator = torch.Generator().manual_seed(seed)

    def on_weight(self, call: WeightCall) -> Any:
        args, kwargs = call.arguments.args, call.arguments.kwargs
        output = self.on_other(call.func, args, kwargs)
        if call.op.lookup:  # rows are not rounded
            return output
        self._reached |= self._layer in (None, call.view.name)
        if not (self._reached and isinstance(output, Tensor) and output.dtype in (torch.bfloat16, torch.float16)):
            return output
        moved = partial(call.written, nudged(output, self._generator))
        return self._computed(self._run(call.func, kind_of(call.func), args, kwargs, moved), None)


def nudged(values: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of BF16 or FP16 values, of which a random sixth is one unit in the last place larger or smaller.

    Zeros, infinities, NaN and the largest number stay.
    """
    draws = torch.rand(values.shape, generator=generator).to(values.device)
    step = (draws < MOVED / 2).to(torch.int16) - (draws > 1 - MOVED / 2).to(torch.int16)
    stays = (values == 0) | ~(values.abs() < torch.finfo(values.dtype).max)
    bits = values.contiguous().view(torch.int16) + step.masked_fill(stays, 0)
    return bits.view(values.dtype)
