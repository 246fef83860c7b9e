"""Fit the static input ranges on the calibration split; no label is read.

Invariant: one pass serves all layers and schemes. Each layer keeps its exact smallest and largest input and an evenly
spaced sample of the rest, so that amax ranges are exact and percentile and least-error ranges come from up to 65,536
values. Histograms, the alternative, fix their bins before they know the range.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import ModelError, TaskError
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.views import parameter_names
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Scheme, scheme_key
from precimap.search.progress import Progress
from precimap.search.run import Run
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
    """Input statistics of every layer that was called on the calibration split, or the ranges that followed from them.

    seen: layer -> sample of its inputs. ranges: (layer, `scheme_key`) -> static range, known already.
    """

    seen: Mapping[str, Tensor]
    ranges: Mapping[tuple[str, str], InputRange] = field(default_factory=dict)

    def input_range(self, layer: str, scheme: Scheme) -> InputRange | None:
        """The static range of a layer under a scheme; None for schemes without one. Raises TaskError if it is unseen."""
        if not scheme.needs_calibration or scheme.input is None:
            return None
        if (layer, scheme_key(scheme)) in self.ranges:
            return self.ranges[layer, scheme_key(scheme)]
        if layer not in self.seen:
            raise TaskError(f"{layer} was never called on the calibration split; give it batches that reach the layer")
        values = self.seen[layer]
        affine = fit(values, scheme.input, tuple(range(values.dim())))
        return InputRange(float(affine.scale), 0 if affine.zero is None else int(affine.zero))


def codes(
    task: Task, inventory: Inventory, calibration: Calibration, pairs: Iterable[tuple[str, Scheme]]
) -> tuple[QuantizedLayer, ...]:
    """Codes and scales of each (layer, scheme), in the order given: what every later step computes with."""
    weights = parameter_names(task.model)
    return tuple(
        quantize_layer(
            name, weights[name], inventory.layer(name).contracted, scheme, calibration.input_range(name, scheme)
        )
        for name, scheme in pairs
    )


def calibrated(run: Run, inventory: Inventory, schemes: Sequence[Scheme]) -> Calibration:
    """The static ranges of all layers that are called, from the journal where it holds them; none for dynamic schemes."""
    static = [scheme for scheme in schemes if scheme.needs_calibration]
    names = tuple(layer.name for layer in inventory.layers if not layer.lookup)
    rows = {
        (name, scheme_key(s)): run.journal.find("calibration", name, scheme_key(s)) for name in names for s in static
    }
    if any(row is None for row in rows.values()):
        seen = calibrate(run.task, names, run.progress)
        for name in names:
            for scheme in static:
                if rows[name, scheme_key(scheme)] is None and name in seen.seen:
                    found = seen.input_range(name, scheme)
                    assert found is not None
                    run.journal.record("calibration", name, asdict(found), scheme_key(scheme))
        rows = {key: run.journal.find("calibration", *key) for key in rows}
    return Calibration({}, {key: InputRange(**row.value) for key, row in rows.items() if row is not None})


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
