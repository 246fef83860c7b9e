"""Fit the static input ranges on the calibration split; no label is read.

Invariant: one pass serves all layers and schemes. Each layer keeps its exact smallest and largest input and an evenly
spaced sample of the rest, so that amax ranges are exact and percentile and least-error ranges come from up to 65,536
values. Histograms, the alternative, fix their bins before they know the range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import ModelError, TaskError
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.quantized import InputRange
from precimap.layers.views import parameter_names
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Scheme
from precimap.search.progress import Progress
from precimap.task import Task, to_device

SAMPLE_SIZE = 65_536
SAMPLE_OF_A_CALL = 8_192


@dataclass(slots=True)
class _Seen:
    low: float = float("inf")
    high: float = float("-inf")
    samples: list[Tensor] = field(default_factory=list)


class _Inputs(Interception):
    """Collects what the inputs of the watched weights look like."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(weights)
        self.seen: dict[str, _Seen] = {}

    def on_weight(self, call: WeightCall) -> Any:
        if not call.op.lookup and call.input.numel():
            values = call.input.detach().float().reshape(-1)
            seen = self.seen.setdefault(call.view.name, _Seen())
            low, high = torch.aminmax(values)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise ModelError(
                    f"{call.view.name}: NaN or Inf in its input on the calibration split; repair the model"
                )
            seen.low, seen.high = min(seen.low, float(low)), max(seen.high, float(high))
            seen.samples.append(values[:: max(1, values.numel() // SAMPLE_OF_A_CALL)].cpu())
        return call.run()


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Input statistics of every layer that was called on the calibration split."""

    seen: Mapping[str, Tensor]

    def input_range(self, layer: str, scheme: Scheme) -> InputRange | None:
        """The static range of a layer under a scheme; None for schemes without one. Raises TaskError if it is unseen."""
        if not scheme.needs_calibration or scheme.input is None:
            return None
        if layer not in self.seen:
            raise TaskError(f"{layer} was never called on the calibration split; give it batches that reach the layer")
        values = self.seen[layer]
        affine = fit(values, scheme.input, tuple(range(values.dim())))
        return InputRange(float(affine.scale), 0 if affine.zero is None else int(affine.zero))


def calibrate(task: Task, layers: tuple[str, ...], progress: Progress) -> Calibration:
    """Run the calibration split once and keep what static ranges need. Raises ModelError for inputs that are not finite."""
    weights = parameter_names(task.model)
    mode = _Inputs({name: weights[name] for name in layers})
    batches = list(task.splits.calibration)
    with torch.no_grad(), mode:
        for number, batch in enumerate(batches):
            task.forward(task.model, to_device(batch, task.device))
            progress("calibrate", number + 1, len(batches))
    return Calibration({name: _sample(seen) for name, seen in mode.seen.items()})


def _sample(seen: _Seen) -> Tensor:
    values = torch.cat(seen.samples)
    step = max(1, -(-values.numel() // SAMPLE_SIZE))
    return torch.cat([values[::step], torch.tensor([seen.low, seen.high])])
