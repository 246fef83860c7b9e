"""Fit the static input ranges on the calibration split; no label is read.

Invariant: one pass serves all layers and schemes. Each layer keeps its exact smallest and largest input and a sample of the
rest, so that amax ranges are exact and percentile and least-error ranges come from up to 65,536 values. The sample is
spread evenly, one value at a random place of each of many equal parts: at a fixed step it would meet the same columns again
and again wherever the step and the width have a factor in common. Histograms, the alternative, fix their bins before they
know the range. A layer without a range (no row reached it, or an input that is not finite) is refused by itself.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from precimap.decisions import keeps_parameter
from precimap.errors import FAILURES, TaskError, first_line
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.views import parameter_names
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import Scheme, scheme_key
from precimap.searching.progress import Progress
from precimap.searching.run import Run
from precimap.task import Task, to_device, units_of
from precimap.user_code import called

SAMPLE_SIZE = 65_536
SAMPLE_OF_A_CALL = 8_192
REFUSED = "refused"  # the key of a reason in the journal, in place of a range
UNREACHED = "no row of the calibration split reached it, so it has no static input range"
NOT_FINITE = "NaN or infinity in its input on the calibration split, so it has no static input range"


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
        self.refused: dict[str, str] = {}

    def on_weight(self, call: WeightCall) -> Any:
        if not call.op.lookup and call.view.name not in self.refused:
            try:
                self._look(call.view.name, call.input)
            except FAILURES as error:  # an input of another kind, such as a sparse one
                self.refused[call.view.name] = f"its input has no static range ({first_line(error)})"
        return call.run()

    def _look(self, name: str, input: Tensor) -> None:
        if not input.numel():
            return
        values = input.detach().float().reshape(-1)
        low, high = torch.aminmax(values)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            self.refused[name] = NOT_FINITE
            return
        seen = self.seen.setdefault(name, _Seen())
        seen.low, seen.high = min(seen.low, float(low)), max(seen.high, float(high))
        seen.samples.append(spread_sample(values, SAMPLE_OF_A_CALL, seed=len(seen.samples)).cpu())


def spread_sample(values: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the values [n], in their order: one at a random place of each of `count` equal parts."""
    if values.numel() <= count:
        return values
    edges = torch.arange(count + 1) * values.numel() // count
    drawn = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    places = edges[:-1] + (drawn * (edges[1:] - edges[:-1])).long()
    return values[places.to(values.device)]


@dataclass(frozen=True, slots=True, eq=False)
class InputRanges:
    """Input statistics of every layer that was called on the calibration split, or the ranges that followed from them.

    seen: layer -> sample of its inputs. ranges: (layer, `scheme_key`) -> static range, known already. refused: layer -> why
    it has none.
    """

    seen: Mapping[str, Tensor]
    ranges: Mapping[tuple[str, str], InputRange] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def input_range(self, layer: str, scheme: Scheme) -> InputRange | None:
        """The static range of a layer under a scheme; None for schemes without one. Raises TaskError for a layer without."""
        if not scheme.needs_calibration or scheme.input is None:
            return None
        if (layer, scheme_key(scheme)) in self.ranges:
            return self.ranges[layer, scheme_key(scheme)]
        if layer in self.refused or layer not in self.seen:
            raise TaskError(f"{layer}: {self.refused.get(layer, UNREACHED)}")
        values = self.seen[layer]
        affine = fit(values, scheme.input, tuple(range(values.dim())))
        return InputRange(float(affine.scale), 0 if affine.zero is None else int(affine.zero))


def codes(
    task: Task, inventory: Inventory, calibration: InputRanges, pairs: Iterable[tuple[str, Scheme]]
) -> tuple[QuantizedLayer, ...]:
    """Codes and scales of each (layer, scheme), in the order given: what every later step computes with."""
    weights = parameter_names(task.model)
    made = []
    for name, scheme in pairs:
        layer = inventory.layer(name)
        coded = quantize_layer(name, weights[name], layer.contracted, scheme, calibration.input_range(name, scheme))
        made.append(replace(coded, keeps=keeps_parameter(layer.ops, layer.also_read_by, scheme)))
    return tuple(made)


def prepare(
    task: Task, inventory: Inventory, calibration: InputRanges, choice: Mapping[str, Scheme]
) -> dict[str, QuantizedLayer]:
    """The same by layer, of a choice of layers."""
    return {layer.name: layer for layer in codes(task, inventory, calibration, choice.items())}


def calibrated(run: Run, inventory: Inventory, schemes: Sequence[Scheme]) -> InputRanges:
    """The static ranges of all layers that are called, from the journal where it holds them; none for dynamic schemes."""
    static = [scheme for scheme in schemes if scheme.needs_calibration]
    names = tuple(layer.name for layer in inventory.layers if not layer.table)
    rows = {
        (name, scheme_key(s)): run.journal.find("calibration", name, scheme_key(s)) for name in names for s in static
    }
    if any(row is None for row in rows.values()):
        seen = calibrate(run.task, names, run.progress)
        for name in names:
            for scheme in static:
                if rows[name, scheme_key(scheme)] is None:
                    run.journal.record("calibration", name, _range_row(seen, name, scheme), scheme_key(scheme))
        rows = {key: run.journal.find("calibration", *key) for key in rows}
    found = {key: row.value for key, row in rows.items() if row is not None}
    ranges = {key: InputRange(**value) for key, value in found.items() if REFUSED not in value}
    return InputRanges({}, ranges, {name: value[REFUSED] for (name, _), value in found.items() if REFUSED in value})


def _range_row(seen: InputRanges, name: str, scheme: Scheme) -> dict[str, Any]:
    """What the journal keeps of a layer: its range, or why it has none."""
    try:
        found = seen.input_range(name, scheme)
    except FAILURES as error:
        return {REFUSED: first_line(error).removeprefix(f"{name}: ")}
    assert found is not None
    return asdict(found)


def calibrate(task: Task, layers: tuple[str, ...], progress: Progress) -> InputRanges:
    """Run the calibration split once and keep what static ranges need, or why a layer has no range.

    Raises TaskError for scores that are NaN: that is more than one layer.
    """
    weights = parameter_names(task.model)
    mode = _Inputs({name: weights[name] for name in layers})
    batches = list(task.splits.calibration)
    with torch.no_grad(), mode:
        for number, batch in enumerate(batches):
            place = f"batch {number} of the calibration split"
            with called("forward", place):
                scores = task.forward(task.model, to_device(batch, task.device))
            units_of(scores, place)
            progress("calibrate", number + 1, len(batches))
    sampled = {name: _sample(seen) for name, seen in mode.seen.items() if name not in mode.refused}
    return InputRanges(sampled, refused=mode.refused)


def _sample(seen: _Seen) -> Tensor:
    values = spread_sample(torch.cat(seen.samples), SAMPLE_SIZE, seed=0)
    return torch.cat([values, torch.tensor([seen.low, seen.high], dtype=torch.float32)])
