"""The FLOPs of every op that torch dispatches while a model runs, by torch's own formulas and a few more.

Invariant: what is counted here is independent of the interception, which sees calls by name: it is below every Python call,
so that scripted code, fused recurrent calls and ops of other libraries are in it. An op whose arithmetic is known counts by
formula, two FLOPs for a multiplication and an addition, elementwise ops none; an op that contracts and has no formula is
named. The alternative, `FlopCounterMode` itself, passes over the fused recurrent ops of oneDNN and cuDNN, products with a
vector and grouped products, and cannot tell whose call an op was part of. Other threads are not seen by either.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from precimap.layers.storages import storages_of

_ATEN, _DEVICE = torch.ops.aten, torch.ops.prim.device.default
_PLAIN = (Tensor, nn.Parameter)
_SILENT = (
    "aten",
    "prim",
    "prims",
    "profiler",
    "inductor",
)  # whose ops without a formula are elementwise, but for these:
_CONTRACTING = ("linalg_", "_linalg_", "_fft_", "_cdist_", "cholesky", "_transformer_", "_native_multi_head", "mkldnn_")
_COPIES = (
    "aten._to_copy",
    "aten.clone",
    "aten.contiguous",
    "aten._unsafe_view",
    "aten._reshape_alias",
)  # these read nothing
_ELEMENTWISE = ("linalg_vector_norm", "linalg_cross")


@dataclass(slots=True)
class Counted:
    """FLOPs by op, and the ops that contract something and have no formula."""

    flops: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, None] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.flops.values())


class DispatchCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts while it is on. reads: storage -> the ops that read it.

    weights: by storage; only these are looked for in `reads`. outside: told of each op that is counted outside of `apart`.
    """

    supports_higher_order_operators = True

    def __init__(self, weights: Mapping[int, Any], outside: Callable[[Counted], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads: dict[int, dict[str, None]] = {}
        self._weights = weights
        self._outside = outside
        self._apart: Counted | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """It changes nothing that is computed, so code that compiles itself (flex_attention) need not refuse it."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler at the first op, to keep it out of here: seconds, where nothing is compiled."""
        return False

    @contextmanager
    def apart(self) -> Iterator[Counted]:
        """What is counted inside the block; it is then not told to `outside`."""
        before, self._apart = self._apart, Counted()
        try:
            yield self._apart
        finally:
            self._apart = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in _PLAIN for kind in types):
            return NotImplemented  # of a tensor class that is made of others: its own ops come here in turn
        if isinstance(func, torch._ops.OpOverload) and _formula(func) is None and func is not _DEVICE:
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        with torch._C.DisableTorchFunction():  # else the interception would see what a plain run hides from it
            if func is torch.ops.higher_order.cond:
                return self._taken(*args, **kwargs)
            output = func(*args, **kwargs)
        self._note(func, args, kwargs, output)
        return output

    def _taken(self, condition: Any, when_true: Any, when_false: Any, operands: Any = ()) -> Any:
        """Of `torch.cond` the branch that is taken, counted op by op."""
        with self:
            return (when_true if condition else when_false)(*operands)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = op_name(func)
        if self._weights and not getattr(func, "is_view", False) and name not in _COPIES:
            for key in storages_of((*args, *kwargs.values())):
                if key in self._weights:
                    self.reads.setdefault(key, {})[name] = None
        found = Counted()
        try:
            flops = _flops(func, args, kwargs, output)
        except (TypeError, ValueError, IndexError, AttributeError, AssertionError):
            flops = None  # arguments in a form that the formula does not know
        if flops:
            found.flops[name] = flops
        elif flops is None and (_formula(func) is not None or _contracts(func, args)):
            found.unknown[name] = None
        else:
            return
        if self._apart is None:
            self._outside(found)
            return
        self._apart.unknown |= found.unknown
        for op, more in found.flops.items():
            self._apart.flops[op] = self._apart.flops.get(op, 0) + more


def op_name(func: Any) -> str:
    """`aten.mm`, `quantized.linear_dynamic`, `flex_attention`."""
    schema = getattr(func, "_schema", None)
    return str(func if schema is None else schema.name.replace("::", "."))


def _formula(func: Any) -> Callable[..., int] | None:
    packet = getattr(func, "_overloadpacket", func)
    return FORMULAS.get(packet)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int | None:
    """The FLOPs of one op, 0 for one that is elementwise; None where that is not known."""
    formula = _formula(func)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=output))
    library, _, name = op_name(func).partition(".")
    if library in ("quantized", "onednn") and "linear" in name and isinstance(output, Tensor):
        return 2 * output.numel() * int(args[0].shape[-1])  # the packed weight has no shape
    return None


def _contracts(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op without a formula may well hold products."""
    library, _, name = op_name(func).partition(".")
    if library in _SILENT:
        return name.startswith(_CONTRACTING) and name not in _ELEMENTWISE
    flat = [item for value in args for item in (value if isinstance(value, tuple | list) else (value,))]
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in flat)


def _matrix(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    return 2 * first.numel() * int(second.shape[-1] if second.dim() > 1 else 1)


def _added_matrix(_: Any, first: Tensor, second: Tensor, *__: Any, **___: Any) -> int:
    return _matrix(first, second)


def _sparse(_: Any, first: Tensor, second: Tensor, *__: Any, **___: Any) -> int:
    """Only what a sparse factor holds is multiplied."""
    if first.layout is torch.strided:
        return 2 * int(second._nnz()) * int(first.shape[0])
    return 2 * int(first._nnz()) * int(second.shape[-1])


def _by_rows(first: Tensor, rows: Tensor, *_: Any, **__: Any) -> int:
    return 2 * first.numel() * int(rows.shape[0])


def _grouped(first: Tensor, second: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Each row or group meets one group of the other; of two matrices it is the sum that is cut into groups."""
    groups = out_val.shape[0] if first.dim() == second.dim() == 2 else 1
    return 2 * out_val.numel() * int(first.shape[-1]) // int(groups)


def _recurrent_layer(input: Tensor, weight0: Tensor, weight1: Tensor, *_: Any, **__: Any) -> int:
    """One layer in one direction: both matrices (of 4, 3 or 1 gates) meet each step of each sequence."""
    return 2 * math.prod(input.shape[:-1]) * (weight0.numel() + weight1.numel())


def _recurrent(input: Tensor, weight: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * math.prod(input.shape[:-1]) * sum(w.numel() for w in weight if w.dim() == 2)


def _trilinear(*args: Any, **_: Any) -> int:
    """Two multiplications and an addition for each product of three."""
    shapes = []
    for tensor, places in zip(args[:3], args[3:6], strict=True):
        shape = list(tensor.shape)
        for place in sorted(places):
            shape.insert(place, 1)
        shapes.append(shape)
    return 3 * math.prod(int(max(sizes)) for sizes in zip(*shapes, strict=True))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Each head of the queries meets a head of the keys and one of the values, which several of them may share.

    torch 2.11 has no formula for shared heads, nor for `flex_attention`.
    """
    return 2 * math.prod(query.shape[:-1]) * int(key.shape[-2]) * (int(query.shape[-1]) + int(value.shape[-1]))


_MORE: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("mv", "dot", "vdot", "_int_mm"), _matrix),
    **dict.fromkeys(("addmv", "addmv_", "addmm_", "baddbmm_", "addbmm", "addbmm_", "_addmm_activation"), _added_matrix),
    **dict.fromkeys(("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "mkldnn_linear"), _by_rows),
    **dict.fromkeys(("_grouped_mm", "_scaled_grouped_mm"), _grouped),
    **dict.fromkeys(("_cudnn_rnn", "miopen_rnn"), _recurrent),
    "mkldnn_rnn_layer": _recurrent_layer,
    "_sparse_addmm": _sparse,
    "_trilinear": _trilinear,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_fused_attention_overrideable",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_cudnn_attention",
        ),
        _attention,
    ),
}
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.higher_order.flex_attention: _attention,
    **{getattr(_ATEN, name): formula for name, formula in _MORE.items() if hasattr(_ATEN, name)},
}
