"""Find every layer of a model by watching a batch run, and others where the first does not reach all of it.

Invariant: each parameter ends up in the inventory, in one place, and each FLOP that torch counts. What cannot be a layer is
named with its reason: read by an op that contracts nothing, hidden in a fused recurrent call, computed from others
(parametrised), read where nobody sees it, never read. Looking at module types instead would miss raw parameters, which hold
most FLOPs of some ranking models.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import ModelError, TaskError
from precimap.layers.groups import fused_by_engines
from precimap.layers.influence import confirmed_dead
from precimap.layers.inventory import ActivationProduct, Inventory, Layer, OtherParameter
from precimap.layers.owners import Owners, owners, why_not_packed
from precimap.layers.special import check_visible
from precimap.layers.unread import NEVER_READ, told_apart
from precimap.layers.views import parameter_names, tied_names
from precimap.layers.watching import Seen, Watching
from precimap.user_code import called

Forward = Callable[[Any, Any], Tensor]
FURTHEST = 16  # batches after the first, where that leaves a weight unread


@dataclass(frozen=True, slots=True)
class _Watched:
    """One batch as it was seen. layers: of all weights that it reached."""

    mode: Watching
    output: Tensor
    layers: Mapping[str, Layer]

    @property
    def units(self) -> int:
        return self.output.shape[0] if self.output.dim() else 1

    def reaches(self, name: str) -> bool:
        return name in self.layers or name in self.mode.hidden or name in self.mode.readers


def discover(model: nn.Module, forward: Forward, batch: Any, further: Iterable[Any] = ()) -> Inventory:
    """The inventory of `model` as `forward(model, batch)` runs it.

    further: batches that are looked at, in their order and at most `FURTHEST`, while a weight is not read by those before
    (an expert that no row of the first one was sent to); what they cost and count is otherwise the first batch's. Runs each
    once, the first once more where no call was seen to read some parameter, once for each layer that seems to be dead, and
    again where it loads torch's compiler.
    The model is not modified: where a parameter is changed to see whether it is read, it is put back.
    Raises ModelError for models that cannot be looked into and for a forward that returns no tensor, TaskError for one that
    fails.
    """
    check_visible(model)
    weights = parameter_names(model)
    first = _watched(model, forward, batch, weights, "the first batch")
    tied = tied_names(model)
    unread = {name: weight for name, weight in weights.items() if not first.reaches(name)}
    alone = {name: weight for name, weight in unread.items() if not any(map(first.reaches, tied.get(name, ())))}
    said = dict.fromkeys(unread, "never read by this name; its memory is that of another parameter, which is")
    with torch.no_grad():
        said |= told_apart(model, forward, batch, first.output, alone)
    missing = {name: weight for name, weight in unread.items() if said[name] == NEVER_READ}
    later = list(_further(model, forward, further, weights, missing))
    layers = _all_layers(first, later, weights)
    others = [
        OtherParameter(
            name=name,
            shape=tuple(weight.shape),
            reason=_reason(name, (first, *later), said),
            tied=tied.get(name, ()),
            element_bytes=weight.element_size(),
        )
        for name, weight in weights.items()
        if name not in layers
    ]
    products = [
        ActivationProduct(op=op, left=left, right=right, calls=calls, flops=flops)
        for (op, left, right), (calls, flops) in first.mode.products.items()
    ]
    products.sort(key=lambda product: -product.flops)
    return Inventory(
        layers=tuple(replace(layer, tied=tied.get(layer.name, ())) for layer in layers.values()),
        others=tuple(others),
        units=first.units,
        hidden_flops=tuple(sorted(first.mode.hidden_flops.items(), key=lambda hidden: (-hidden[1], hidden[0]))),
        products=tuple(products),
        uncounted=tuple(first.mode.uncounted),
    )


def _watched(
    model: nn.Module, forward: Forward, batch: Any, weights: Mapping[str, nn.Parameter], place: str
) -> _Watched:
    compiling = "torch._dynamo" in sys.modules
    try:
        found = _run(model, forward, batch, weights, place)
    except TaskError:
        if compiling or "torch._dynamo" not in sys.modules:
            raise
    if not compiling and "torch._dynamo" in sys.modules:
        # The forward loaded the compiler while it was watched, and it traced the watching; now it is off from the start.
        found = _run(model, forward, batch, weights, place)
    mode, output, owned = found
    if not isinstance(output, Tensor):
        raise ModelError(f"expected the forward to return one tensor of scores, got {type(output).__name__}")
    mode.settle()
    dead = confirmed_dead(model, forward, batch, mode.trace.without_influence(output, mode.seen), weights)
    # A copy: a model may return memory of its own, which the next call writes.
    return _Watched(mode, output.detach().clone(), _layers(mode, weights, dead, owned))


def _run(
    model: nn.Module, forward: Forward, batch: Any, weights: Mapping[str, nn.Parameter], place: str
) -> tuple[Watching, Any, Owners]:
    with owners(model) as owned:
        mode = Watching(weights, list(model.buffers()), owned)
        with torch.no_grad(), mode, called("forward", place):
            return mode, forward(model, batch), owned


def _further(
    model: nn.Module,
    forward: Forward,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    missing: Mapping[str, Tensor],
) -> Iterator[_Watched]:
    """More batches, while a matrix is missing. What is left of `missing` then is small, or read by no batch."""
    left = {name for name, weight in missing.items() if weight.dim() > 1}
    if not left:
        return
    for number, batch in enumerate(islice(batches, FURTHEST)):
        found = _watched(
            model, forward, batch, weights, f"further batch {number} (a search takes them from the calibration split)"
        )
        yield found
        left -= {name for name in left if found.reaches(name)}
        if not left:
            return


def _all_layers(first: _Watched, later: list[_Watched], weights: Mapping[str, nn.Parameter]) -> dict[str, Layer]:
    """The layers of the first batch, and those that it reaches in no way, as the first batch that does shows them."""
    found = dict(first.layers)
    for watched in later:
        for name, layer in watched.layers.items():
            if name not in found and not first.reaches(name):
                found[name] = _scaled(layer, first, watched, later)
    fused = fused_by_engines(found)
    return {name: replace(found[name], fused=fused.get(name)) for name in weights if name in found}


def _scaled(layer: Layer, first: _Watched, watched: _Watched, later: list[_Watched]) -> Layer:
    """The layer with FLOPs and rows for as many units as the first batch has; FLOPs are the mean over all batches."""
    batches = (first, *later)
    flops = sum(one.layers[layer.name].flops for one in batches if layer.name in one.layers)
    mean = round(flops * first.units / sum(one.units for one in batches))
    rows = first.units / watched.units
    reads = layer.reads if layer.lookup else [replace(r, rows=max(1, round(r.rows * rows))) for r in layer.reads]
    return replace(layer, flops=mean, reads=tuple(reads))


def _layers(
    mode: Watching,
    weights: Mapping[str, nn.Parameter],
    dead: dict[str, str],
    owned: Owners,
) -> dict[str, Layer]:
    siblings = _siblings(mode.seen)
    layers = {}
    for name, weight in weights.items():
        if name not in mode.seen:
            continue
        seen = mode.seen[name]
        contracted = next(iter(seen.contracted)) if len(seen.contracted) == 1 else None
        inputs, outputs = next(iter(seen.widths)) if len(seen.widths) == 1 else (None, None)
        owner = None if mode.readers.get(name) else owned.alone(name, seen.calls)
        layers[name] = Layer(
            name=name,
            shape=tuple(weight.shape),
            dtype=str(weight.dtype).removeprefix("torch."),
            element_bytes=weight.element_size(),
            ops=tuple(dict.fromkeys(seen.ops)),
            calls=seen.calls,
            flops=seen.flops,
            contracted=None if contracted is None else tuple(sorted(contracted)),
            inputs=inputs,
            outputs=outputs,
            lookup=seen.lookup,
            positions_mixed=seen.positions_mixed,
            normalised=seen.normalised,
            in_linear_module=type(owner) is nn.Linear,
            not_packed=why_not_packed(owner),
            siblings=siblings.get(name),
            dead=dead.get(name),
            also_read_by=tuple(dict.fromkeys(mode.readers.get(name, ()))),
            module=None if owner is None else str(owner),
            reads=tuple(seen.reads),
        )
    return layers


def _siblings(seen: Mapping[str, Seen]) -> dict[str, str]:
    """Layers that read the very same tensors, in all their calls; named after the first of them."""
    readers: dict[frozenset[tuple[Any, ...]], list[str]] = defaultdict(list)
    for name, record in seen.items():
        if record.inputs:
            readers[frozenset(record.inputs)].append(name)
    return {name: f"input of {names[0]}" for names in readers.values() if len(names) > 1 for name in names}


def _reason(name: str, batches: tuple[_Watched, ...], said: Mapping[str, str]) -> str:
    for mode in (watched.mode for watched in batches):
        if name in mode.hidden:
            return mode.hidden[name]
        if name in mode.readers:
            return f"read by {', '.join(dict.fromkeys(mode.readers[name]))}, which contract nothing with it"
    more = f", nor of {len(batches) - 1} after it" if said[name] == NEVER_READ and len(batches) > 1 else ""
    return said[name] + more
