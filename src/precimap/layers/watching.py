"""One batch under watch: what each weight is read by, which products there are, and what of it no layer stands for.

Invariant: layers, products of activations and what is hidden add up to all FLOPs that torch dispatches (`counting.py`). A
call counts as what the table says of it (`ops.py`), and everything else by op and module, whoever made it.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from precimap.errors import FAILURES, first_line
from precimap.layers.constants import Constants, Origin
from precimap.layers.contents import version_of
from precimap.layers.counting import Counted, DispatchCount
from precimap.layers.equations import EQUATIONS, parsed
from precimap.layers.influence import InfluenceTrace
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.inventory import Read
from precimap.layers.ops import OPS, Arguments, attention_products, call_name, product_flops, unsupported
from precimap.layers.owners import Owners
from precimap.layers.special import why_no_layer
from precimap.layers.storages import memory_of, parts, storages_of

Shape = tuple[int, ...]


_NORMALISING, _MAX_NORM = (F.embedding, F.embedding_bag), (3, "max_norm")


@dataclass(slots=True, kw_only=True)
class Seen:
    """What was seen of one layer so far. before_batch: FLOPs of its calls that read nothing of the batch, by place."""

    ops: list[str] = field(default_factory=list)
    contracted: set[frozenset[int] | None] = field(default_factory=set)
    widths: set[tuple[int, int]] = field(default_factory=set)
    flops: int = 0
    calls: int = 0
    lookup: bool = False
    positions_mixed: bool = False
    normalised: bool = False
    inputs: list[tuple[Any, ...]] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    before_batch: list[tuple[str, int]] = field(default_factory=list)


class Watching(Interception):
    """Watches one batch; `settle` when it is over.

    seen: the layers. readers: weight -> calls that read it and contract nothing. hidden: weight -> why it is no layer
    although something was seen of it. hidden_flops: of products that no layer and no product of activations stands for, by
    module and op. uncounted: calls with products that no formula counts. products: of activations, calls and FLOPs.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], buffers: list[Tensor], owned: Owners) -> None:
        super().__init__(weights)
        self.seen: dict[str, Seen] = defaultdict(Seen)
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.hidden: dict[str, str] = {}
        self.hidden_flops: dict[str, int] = defaultdict(int)
        self.uncounted: dict[str, None] = {}
        self.products: dict[tuple[str, Shape, Shape], tuple[int, int]] = {}
        self.trace = InfluenceTrace()
        self._undescribed = {name: why for name, weight in weights.items() if (why := why_no_layer(weight)) is not None}
        self._constants = Constants(buffers)
        self._owned = owned
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, weight in weights.items():
            for key in storages_of((weight,)):
                self._names[key].append(name)
        self._count = DispatchCount(self._names, lambda counted: self._hide("", counted))
        self._kept_alive: list[Tensor] = []

    def __enter__(self) -> "Watching":
        super().__enter__()
        if len(self._surroundings) == 1:  # an attention call enters again
            self._count.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        if len(self._surroundings) == 1:
            self._count.__exit__(*exception)  # type: ignore[no-untyped-call]
        super().__exit__(*exception)

    def on_weight(self, call: WeightCall) -> Any:
        name, read = call.view.name, _without_operand(call)
        origin = None if call.op.lookup else self._origin(call.op.name, _tensors(call.arguments))
        with self._count.apart() as counted:
            output = call.run()
        if name not in self._undescribed:
            try:
                self._describe(call, output, counted, origin)
            except FAILURES as error:
                self._undescribed[name] = f"a call of {call.op.name} on it could not be described ({first_line(error)})"
                for place, flops in self._gave_up(name):
                    self.hidden_flops[place] += flops
        if name in self._undescribed:
            self.hidden[name] = self._undescribed[name]
            self._hide(call.op.name, counted)
        self._note_readers(call.func, read)
        if origin is not None:
            self._constants.add(origin, read, output)
        self.trace.after(call.func, call.arguments, output, layer=name)
        return output

    def _gave_up(self, name: str) -> list[tuple[str, int]]:
        seen = self.seen.pop(name, None)
        return [] if seen is None or not seen.flops else [(f"{self._owned.here}: {seen.ops[0]}", seen.flops)]

    def _describe(self, call: WeightCall, output: Any, counted: Counted, origin: Origin | None) -> None:
        seen = self.seen[call.view.name]
        seen.ops.append(call.op.name)
        seen.calls += 1
        seen.lookup |= call.op.lookup
        seen.positions_mixed |= call.op.positions_mixed
        seen.normalised |= call.func in _NORMALISING and call.arguments.get(_MAX_NORM) is not None
        seen.contracted.add(call.view.parameter_dims(call.weight_contracted))
        if not call.op.lookup:
            seen.widths.add(_widths(call))
        left, right = call.arguments.get(call.op.left), call.arguments.get(call.op.right)
        output = output[0] if isinstance(output, tuple) and output else output
        flops = 0
        if isinstance(output, Tensor):
            held, input = (next(iter(parts(tensor)), tensor) for tensor in (output, call.input))
            # Of a slice that `vmap` shows, or a nested tensor, torch alone knows how much there is.
            flops = product_flops(call.op, left, right, call.contraction, output) if held is output else counted.total
            width = held.shape[-1] if call.op.lookup else _widths(call)[1]
            seen.reads.append(Read(tuple(input.shape), math.prod(held.shape) // max(1, width), call.op.lookup))
        seen.flops += flops
        if origin is not None:
            seen.before_batch.append((f"{self._owned.here}: {call.op.name} with a buffer", flops))
        if not call.op.lookup:
            self._kept_alive.append(call.input)  # so that its storage is not taken by a later tensor of this batch
            seen.inputs.append(_identity(call.input))

    def on_other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = Arguments(args, kwargs)
        read = _tensors(arguments)
        origin = self._origin(call_name(func), read)
        with self._count.apart() as counted:
            output = super().on_other(func, args, kwargs)
        self.trace.after(func, arguments, output, layer=None)
        if not self._accounted(func, arguments, output):
            self._hide(call_name(func), counted)
        if _holds_tensor(output):
            self._note_readers(func, read)
            if origin is not None and not (isinstance(output, Tensor) and self.views.find(output) is not None):
                self._constants.add(origin, read, output)
        return output

    def _origin(self, through: str, read: list[Tensor]) -> Origin | None:
        """Of a call's result, where nothing of the batch is in it."""
        views = [self.views.find(tensor) for tensor in read]
        return self._constants.origin(
            [tensor if view is None else view.name for tensor, view in zip(read, views, strict=True)], through
        )

    def _note_readers(self, func: Any, tensors: list[Tensor]) -> None:
        """Remember who reads a weight otherwise than as the operand of a contraction."""
        if self.views.is_view_call(func):
            return
        kind = unsupported(func)
        for view in (view for tensor in tensors if (view := self.views.find(tensor)) is not None):
            self.readers[view.name].append(call_name(func))
            if kind is not None:
                self.hidden[view.name] = f"inside the {kind} {call_name(func)}, which is not supported"

    def _accounted(self, func: Any, arguments: Arguments, output: Any) -> bool:
        """Whether the table knows the call: then its FLOPs are a product's, or are hidden for a reason."""
        if not isinstance(output, Tensor) or not _is_itself(output):
            return False
        if func is F.scaled_dot_product_attention:
            query, key, value = (arguments.get((i, k)) for i, k in enumerate(("query", "key", "value")))
            for left, right, flops in attention_products(query, key, value):
                self._add_product(call_name(func), left, right, flops)
            return True
        op = OPS.get(func)
        if func in EQUATIONS and (found := parsed(func, arguments)) is not None:
            op, _, arguments = found
        if op is None:
            return False
        left, right = arguments.get(op.left), arguments.get(op.right)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return False
        try:
            contraction = op.contraction(left, right, arguments)
        except FAILURES:
            return False  # arguments in a form that the table does not know
        if not op.lookup and not contraction.left:
            return False
        flops = product_flops(op, left, right, contraction, output)
        origins = [known for t in (left, right) if (known := self._constants.find(t)) is not None and known.names]
        both_weights = self.views.find(left) is not None and self.views.find(right) is not None
        if not origins and not both_weights:
            self._add_product(op.name, tuple(left.shape), tuple(right.shape), flops)
            return True
        for origin in origins:
            for name in origin.names:
                self.hidden[name] = f"{op.name} reads a tensor computed from it by {origin.through}"
        reason = f"computed by {origins[0].through} before {op.name}" if origins else f"{op.name} of two weights"
        self.hidden_flops[f"{self._owned.here}: {reason}"] += flops
        return True

    def _add_product(self, op: str, left: Shape, right: Shape, flops: int) -> None:
        calls, before = self.products.get((op, left, right), (0, 0))
        self.products[op, left, right] = (calls + 1, before + flops)

    def _hide(self, through: str, counted: Counted) -> None:
        """What a call did that no layer and no product stands for; through: how the model called it, if that was seen."""
        for op, flops in counted.flops.items():
            self.hidden_flops[self._said(through, op)] += flops
        for op in counted.unknown:
            self.uncounted[self._said(through, op)] = None

    def _said(self, through: str, op: str) -> str:
        return f"{self._owned.here}: {op if through in ('', op.rpartition('.')[2], op) else f'{through} / {op}'}"

    def settle(self) -> None:
        """The batch is over: what met only buffers was computed before it; what is read below all Python calls is named."""
        for name in [name for name, seen in self.seen.items() if len(seen.before_batch) == seen.calls]:
            seen = self.seen.pop(name)
            self.hidden.setdefault(name, f"{seen.ops[0]} contracts it with a buffer, before the batch is read")
            for place, flops in seen.before_batch:
                self.hidden_flops[place] += flops
        for key, ops in self._count.reads.items():
            names = self._names[key]
            if not any(name in self.seen or name in self.hidden or name in self.readers for name in names):
                self.hidden |= dict.fromkeys(
                    names, f"read by {', '.join(ops)}, in a call that does not show the parameter"
                )
        self.hidden_flops = defaultdict(int, {place: flops for place, flops in self.hidden_flops.items() if flops})
        self._kept_alive.clear()
        self._constants = Constants(())


def _is_itself(tensor: Tensor) -> bool:
    """Whether the tensor holds its values, rather than being a slice that `vmap` shows, or made of others."""
    held = parts(tensor)
    return len(held) == 1 and held[0] is tensor


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two views of the same values, as two reshapes of one input are."""
    memory = memory_of(tensor)
    if memory is None or not _is_itself(tensor):
        return (id(tensor),)
    return (memory, tensor.storage_offset(), tensor.numel(), tensor.dtype, version_of(tensor))


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
