"""Each layer in each scheme, once, by itself: what cannot be computed is refused for that layer, and ends nothing.

Invariant: after the trial every pair that is left has codes, and an op that takes them on the first search batch. One pass
serves all: each call answers as the model made it, and is computed beside it in low precision. Without the trial the first
layer that fails would end the step it fails in, for all layers; to catch it in each step is forgotten in the next.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from precimap.errors import FAILURES, first_line
from precimap.layers.emulation import SharedInputs, emulate, operand
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.numerics.fast import all_finite
from precimap.searching.pairs import Key, Pair
from precimap.searching.subject import Subject
from precimap.task import first_batch
from precimap.user_code import called


def tried(subject: Subject, pairs: Sequence[Pair]) -> dict[Key, str]:
    """Why pairs that no rule refuses cannot be computed here, a sentence each. Costs one forward of the first batch."""
    task = subject.task
    failed: dict[Key, str] = {}
    layers: dict[str, list[QuantizedLayer]] = defaultdict(list)
    for name, scheme in pairs:
        try:
            layers[name] += subject.codes([(name, scheme)])
        except FAILURES as error:
            failed[name, scheme.name] = first_line(error).removeprefix(f"{name}: ")
    mode = _Trial(parameter_names(task.model), layers)
    with torch.no_grad(), mode, called("forward", "the first batch of the search split"):
        task.forward(task.model, first_batch(task, task.splits.search))
    return failed | mode.failed


class _Trial(Interception):
    def __init__(self, weights: Mapping[str, Tensor], layers: Mapping[str, Sequence[QuantizedLayer]]) -> None:
        super().__init__({name: weights[name] for name in layers})
        self.failed: dict[Key, str] = {}
        self._layers = layers
        self._done: set[tuple[Any, ...]] = set()

    def on_weight(self, call: WeightCall) -> Any:
        output = call.run()
        kind = (call.view.name, call.op.name, tuple(call.input.shape))
        if kind not in self._done:
            self._done.add(kind)
            for layer in self._layers[call.view.name]:
                why = _why_not(call, layer, output)
                if why is not None:
                    self.failed.setdefault((layer.name, layer.scheme.name), why)
        return output


def _why_not(call: WeightCall, layer: QuantizedLayer, output: Any) -> str | None:
    try:
        if layer.scheme.input is not None and not call.op.lookup and not all_finite(call.input):
            return "NaN or infinity in its input on the first search batch, which no scale holds"
        low = emulate(call, layer, operand(layer), SharedInputs())
        if isinstance(low, Tensor) and isinstance(output, Tensor):
            return _told_apart(low, output)
    except FAILURES as error:
        return f"its {call.op.name} cannot be computed in {layer.scheme.name} ({first_line(error)})"
    return None


def _told_apart(low: Tensor, output: Tensor) -> str | None:
    if low.shape != output.shape:
        return f"its result has the shape {tuple(low.shape)} in low precision, and {tuple(output.shape)} without"
    if not all_finite(low) and (torch.isfinite(output) & ~torch.isfinite(low)).any():
        return "its result holds NaN or infinity in low precision, where the model has numbers"
    return None
