"""Find every layer of a model by watching one batch run.

Invariant: each parameter ends up in the inventory, in one place. What cannot be a layer is named with its reason: read
by an op that contracts nothing, hidden in a fused recurrent call, computed from others (parametrised), never read.
Looking at module types instead would miss raw parameters, which hold most FLOPs of some ranking models.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precimap.errors import FAILURES, ModelError, first_line
from precimap.layers.contents import version_of
from precimap.layers.equations import EQUATIONS, parsed
from precimap.layers.groups import fused_by_engines
from precimap.layers.influence import InfluenceTrace, confirmed_dead
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.inventory import ActivationProduct, Inventory, Layer, OtherParameter, Read
from precimap.layers.ops import OPS, Arguments, attention_products, call_name, product_flops, unsupported
from precimap.layers.owners import Owners, owners, why_not_packed
from precimap.layers.views import check_visible, parameter_names, tied_names
from precimap.user_code import called

Forward = Callable[[Any, Any], Tensor]
Shape = tuple[int, ...]


@dataclass(slots=True)
class _Seen:
    """What was seen of one layer so far."""

    ops: list[str] = field(default_factory=list)
    contracted: set[frozenset[int] | None] = field(default_factory=set)
    widths: set[tuple[int, int]] = field(default_factory=set)
    flops: int = 0
    calls: int = 0
    lookup: bool = False
    positions_mixed: bool = False
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)


class _Discovery(Interception):
    def __init__(self, weights: dict[str, nn.Parameter], buffers: set[int]) -> None:
        super().__init__(weights)
        self.seen: dict[str, _Seen] = defaultdict(_Seen)
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.computed_from: dict[int, tuple[Tensor, frozenset[str], str]] = {}
        self.hidden: dict[str, str] = {}
        self.undescribed: set[str] = set()
        self.hidden_flops: dict[str, int] = defaultdict(int)
        self.products: dict[tuple[str, Shape, Shape], tuple[int, int]] = {}  # calls, FLOPs
        self.trace = InfluenceTrace()
        self._buffers = buffers
        self._kept_alive: list[Tensor] = []

    def on_weight(self, call: WeightCall) -> Any:
        output = call.run()
        name = call.view.name
        if name not in self.undescribed:
            try:
                self._describe(call, output)
            except FAILURES as error:
                self.undescribed.add(name)
                self.seen.pop(name, None)
                self.hidden[name] = f"a call of {call.op.name} on it could not be described ({first_line(error)})"
        self._note_readers(call.func, _without_operand(call))
        self.trace.after(call.func, call.arguments, output, layer=name)
        return output

    def _describe(self, call: WeightCall, output: Any) -> None:
        seen = self.seen[call.view.name]
        seen.ops.append(call.op.name)
        seen.calls += 1
        seen.lookup |= call.op.lookup
        seen.positions_mixed |= call.op.positions_mixed
        seen.contracted.add(call.view.parameter_dims(call.weight_contracted))
        seen.widths.add(_widths(call))
        left, right = call.arguments.get(call.op.left), call.arguments.get(call.op.right)
        output = output[0] if isinstance(output, tuple) and output else output
        if isinstance(output, Tensor):
            seen.flops += product_flops(call.op, left, right, call.contraction, output)
            seen.reads.append(Read(tuple(call.input.shape), math.prod(output.shape[:-1])))
        if not call.op.lookup:
            self._kept_alive.append(call.input)  # so that its storage is not taken by a later tensor of this batch
            seen.inputs.append(_identity(call.input))

    def on_other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = super().on_other(func, args, kwargs)
        arguments = Arguments(args, kwargs)
        self.trace.after(func, arguments, output, layer=None)
        if not _holds_tensor(output):
            return output
        self._note_readers(func, _tensors(arguments))
        self._note_computed(func, arguments, output)
        self._count_flops(func, arguments, output)
        return output

    def _note_readers(self, func: Any, tensors: list[Tensor]) -> None:
        """Remember who reads a weight otherwise than as the operand of a contraction."""
        from_view = [view for tensor in tensors if (view := self.views.find(tensor)) is not None]
        for view in from_view:
            if self.views.is_view_call(func):
                continue
            self.readers[view.name].append(call_name(func))
            kind = unsupported(func)
            if kind is not None:
                what = f"{kind} {call_name(func)}"
                self.hidden[view.name] = f"inside the {what}, which is not supported"

    def _note_computed(self, func: Any, arguments: Arguments, output: Any) -> None:
        """Follow tensors that are computed from parameters alone, such as a weight under weight_norm."""
        if not isinstance(output, Tensor) or self.views.find(output) is not None:
            return
        sources: set[str] = set()
        for tensor in _tensors(arguments):
            view, computed = self.views.find(tensor), self.computed_from.get(id(tensor))
            if view is not None:
                sources.add(view.name)
            elif computed is not None:
                sources |= computed[1]
            elif id(tensor) not in self._buffers:
                return
        if sources:
            # The tensor is held, so that its id stays its own.
            self.computed_from[id(output)] = (output, frozenset(sources), call_name(func))

    def _count_flops(self, func: Any, arguments: Arguments, output: Any) -> None:
        if func is F.scaled_dot_product_attention:
            query, key, value = (arguments.get((i, k)) for i, k in enumerate(("query", "key", "value")))
            for left, right, flops in attention_products(query, key, value):
                self._add_product(call_name(func), left, right, flops)
            return
        op = OPS.get(func)
        if func in EQUATIONS and (found := parsed(func, arguments)) is not None:
            op, _, arguments = found
        if op is None or not isinstance(output, Tensor):
            return
        left, right = arguments.get(op.left), arguments.get(op.right)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return
        flops = product_flops(op, left, right, op.contraction(left, right, arguments), output)
        sources = [self.computed_from[id(t)] for t in (left, right) if id(t) in self.computed_from]
        both_weights = self.views.find(left) is not None and self.views.find(right) is not None
        if not sources and not both_weights:
            self._add_product(op.name, tuple(left.shape), tuple(right.shape), flops)
            return
        for _, names, through in sources:
            for name in names:
                self.hidden[name] = f"{op.name} reads a tensor computed from it by {through}"
        reason = f"computed by {sources[0][2]} before {op.name}" if sources else f"{op.name} of two weights"
        self.hidden_flops[reason] += flops

    def _add_product(self, op: str, left: Shape, right: Shape, flops: int) -> None:
        calls, before = self.products.get((op, left, right), (0, 0))
        self.products[op, left, right] = (calls + 1, before + flops)


def discover(model: nn.Module, forward: Forward, batch: Any) -> Inventory:
    """The inventory of `model` as `forward(model, batch)` runs it.

    Runs the batch once, and once more for each layer that seems to be dead. The model is not modified.
    Raises ModelError for TorchScript and for a forward that returns no tensor, TaskError for one that fails.
    """
    check_visible(model)
    weights = parameter_names(model)
    mode = _Discovery(weights, {id(buffer) for buffer in model.buffers()})
    with owners(model) as owned, torch.no_grad(), mode, called("forward", "the first batch"):
        output = forward(model, batch)
    if not isinstance(output, Tensor):
        raise ModelError(f"expected the forward to return one tensor of scores, got {type(output).__name__}")
    dead = confirmed_dead(model, forward, batch, mode.trace.without_influence(output, mode.seen), weights)
    tied = tied_names(model)
    layers = _layers(mode, weights, tied, dead, owned)
    known = {layer.name for layer in layers}
    others = tuple(
        OtherParameter(name, tuple(parameter.shape), _reason(name, mode), tied.get(name, ()))
        for name, parameter in weights.items()
        if name not in known
    )
    units = output.shape[0] if output.dim() else 1
    products = [ActivationProduct(*what, *counted) for what, counted in mode.products.items()]
    products.sort(key=lambda product: -product.flops)
    return Inventory(layers, others, units, tuple(sorted(mode.hidden_flops.items())), tuple(products))


def _layers(
    mode: _Discovery,
    weights: dict[str, nn.Parameter],
    tied: dict[str, tuple[str, ...]],
    dead: dict[str, str],
    owned: Owners,
) -> tuple[Layer, ...]:
    siblings = _siblings(mode.seen)
    fused = fused_by_engines(mode.seen)
    layers = []
    for name, weight in weights.items():
        if name not in mode.seen:
            continue
        seen = mode.seen[name]
        contracted = next(iter(seen.contracted)) if len(seen.contracted) == 1 else None
        inputs, outputs = next(iter(seen.widths)) if len(seen.widths) == 1 else (None, None)
        owner = None if mode.readers.get(name) else owned.alone(name, seen.calls)
        layers.append(
            Layer(
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
                in_linear_module=type(owner) is nn.Linear,
                not_packed=why_not_packed(owner),
                tied=tied.get(name, ()),
                siblings=siblings.get(name),
                fused=fused.get(name),
                dead=dead.get(name),
                also_read_by=tuple(dict.fromkeys(mode.readers.get(name, ()))),
                module=None if owner is None else str(owner),
                reads=tuple(seen.reads),
            )
        )
    return tuple(layers)


def _siblings(seen: dict[str, _Seen]) -> dict[str, str]:
    """Layers that read the very same tensors, in all their calls; named after the first of them."""
    readers: dict[frozenset[tuple[Any, ...]], list[str]] = defaultdict(list)
    for name, record in seen.items():
        if record.inputs:
            readers[frozenset(record.inputs)].append(name)
    return {name: f"input of {names[0]}" for names in readers.values() if len(names) > 1 for name in names}


def _reason(name: str, mode: _Discovery) -> str:
    if name in mode.hidden:
        return mode.hidden[name]
    readers = tuple(dict.fromkeys(mode.readers.get(name, ())))
    if readers:
        return f"read by {', '.join(readers)}, which contract nothing with it"
    return "never read: no call of this batch used it"


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same values, as two reshapes of one input are."""
    return (
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.numel(),
        tensor.dtype,
        version_of(tensor),
    )


def _widths(call: WeightCall) -> tuple[int, int]:
    """(contracted, output) width of one product of the call, per group or expert."""
    shape = call.weight.shape
    contracted, outputs = 1, 1
    batch_dims = shape[:-2] if call.op.name in ("matmul", "bmm", "baddbmm", "_grouped_mm", "grouped_mm") else ()
    for dim, size in enumerate(shape):
        if dim in call.weight_contracted:
            contracted *= size
        elif dim >= len(batch_dims):
            outputs *= size
    return contracted, outputs


def _tensors(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*arguments.args, *arguments.kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def _without_operand(call: WeightCall) -> list[Tensor]:
    return [tensor for tensor in _tensors(call.arguments) if tensor is not call.weight]


def _holds_tensor(output: Any) -> bool:
    return isinstance(output, Tensor) or (
        isinstance(output, tuple | list) and any(isinstance(item, Tensor) for item in output)
    )
