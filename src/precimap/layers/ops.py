"""The calls that contract two tensors, as a table: what each contracts, and how many FLOPs that is.

Invariant: an entry describes the call completely enough to quantise either operand along its contracted dims; a call
that is not in the table is never touched, and a weight that reaches one is named by discovery. The alternative, module
types, was not taken: ranking models and new transformers hold a large part of their weights outside `nn.Linear`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Dims = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """Which dims of the left and the right operand a call sums over; dims are counted from 0."""

    left: Dims
    right: Dims


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One kind of call.

    `left` and `right` are the slots of the two operands: an argument's position and its keyword. `contraction` maps
    the two operands and the other arguments to a Contraction. A `lookup` reads rows of a table: it has no FLOPs and
    its left operand holds indices. `positions_mixed` says that one output sums over several positions of the input
    (a convolution), so that an input scale cannot be finer than one example. `in_place` says that the call writes its
    result into its first argument; `out_of_place` is the function that computes the same and writes nothing.
    """

    name: str
    left: tuple[int, str]
    right: tuple[int, str]
    contraction: Callable[[Tensor, Tensor, "Arguments"], Contraction]
    lookup: bool = False
    positions_mixed: bool = False
    in_place: bool = False
    out_of_place: Callable[..., Any] | None = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of one call, with operands that can be read and replaced by slot."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def get(self, slot: tuple[int, str], default: Any = None) -> Any:
        position, keyword = slot
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(keyword, default)

    def replaced(self, slot: tuple[int, str], value: Any) -> "Arguments":
        position, keyword = slot
        if position < len(self.args):
            return Arguments((*self.args[:position], value, *self.args[position + 1 :]), self.kwargs)
        return Arguments(self.args, {**self.kwargs, keyword: value})


def _linear(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    return Contraction((left.dim() - 1,), (right.dim() - 1,))


def matmul_contraction(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    return Contraction((left.dim() - 1,), (max(right.dim() - 2, 0),))


def _convolution(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    batched = left.dim() == right.dim()
    return Contraction(tuple(range(1 if batched else 0, left.dim())), tuple(range(1, right.dim())))


def _transposed(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    """Weights are [inputs, outputs / groups, ...]: a sum over the inputs, and over the positions that spread to one."""
    batched = left.dim() == right.dim()
    return Contraction(tuple(range(1 if batched else 0, left.dim())), (0, *range(2, right.dim())))


def _either_way(left: Tensor, right: Tensor, arguments: Arguments) -> Contraction:
    rule = _transposed if arguments.get((6, "transposed")) else _convolution
    return rule(left, right, arguments)


def _rows(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    return Contraction((), (right.dim() - 1,))


def _tensordot(left: Tensor, right: Tensor, arguments: Arguments) -> Contraction:
    dims = arguments.get((2, "dims"), 2)
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        return Contraction(tuple(range(left.dim() - dims, left.dim())), tuple(range(dims)))
    first, second = ([d] if isinstance(d, int) else list(d) for d in dims)
    return Contraction(tuple(d % left.dim() for d in first), tuple(d % right.dim() for d in second))


def _by_lists(left: Tensor, right: Tensor, arguments: Arguments) -> Contraction:
    first, second = arguments.get((2, "dims_self")), arguments.get((3, "dims_other"))
    return Contraction(tuple(d % left.dim() for d in first), tuple(d % right.dim() for d in second))


def _op(name: str, left: tuple[int, str], right: tuple[int, str], contraction: Any, **traits: Any) -> Op:
    return Op(name=name, left=left, right=right, contraction=contraction, **traits)


_T, _ATEN = torch.Tensor, torch.ops.aten
_FIRST, _SECOND, _SELF = (0, "input"), (1, "other"), (0, "self")
_TABLE, _INDICES = (0, "weight"), (1, "indices")

OPS: dict[Any, Op] = {
    F.linear: _op("linear", _FIRST, (1, "weight"), _linear),
    torch.matmul: _op("matmul", _FIRST, _SECOND, matmul_contraction),
    torch.linalg.matmul: _op("matmul", _FIRST, _SECOND, matmul_contraction),
    _T.matmul: _op("matmul", _SELF, _SECOND, matmul_contraction),
    _T.__matmul__: _op("matmul", _SELF, _SECOND, matmul_contraction),
    _T.__rmatmul__: _op("matmul", _SECOND, _SELF, matmul_contraction),
    torch.mm: _op("mm", _FIRST, (1, "mat2"), matmul_contraction),
    _T.mm: _op("mm", _SELF, (1, "mat2"), matmul_contraction),
    torch.bmm: _op("bmm", _FIRST, (1, "mat2"), matmul_contraction),
    _T.bmm: _op("bmm", _SELF, (1, "mat2"), matmul_contraction),
    torch.mv: _op("mv", _FIRST, (1, "vec"), matmul_contraction),
    _T.mv: _op("mv", _SELF, (1, "vec"), matmul_contraction),
    torch.addmm: _op("addmm", (1, "mat1"), (2, "mat2"), matmul_contraction),
    _T.addmm: _op("addmm", (1, "mat1"), (2, "mat2"), matmul_contraction),
    _T.addmm_: _op("addmm", (1, "mat1"), (2, "mat2"), matmul_contraction, in_place=True, out_of_place=_T.addmm),
    torch.addmv: _op("addmv", (1, "mat"), (2, "vec"), matmul_contraction),
    _T.addmv: _op("addmv", (1, "mat"), (2, "vec"), matmul_contraction),
    _T.addmv_: _op("addmv", (1, "mat"), (2, "vec"), matmul_contraction, in_place=True, out_of_place=_T.addmv),
    torch.addmv_: _op("addmv", (1, "mat"), (2, "vec"), matmul_contraction, in_place=True, out_of_place=torch.addmv),
    torch.baddbmm: _op("baddbmm", (1, "batch1"), (2, "batch2"), matmul_contraction),
    _T.baddbmm: _op("baddbmm", (1, "batch1"), (2, "batch2"), matmul_contraction),
    _T.baddbmm_: _op(
        "baddbmm", (1, "batch1"), (2, "batch2"), matmul_contraction, in_place=True, out_of_place=_T.baddbmm
    ),
    torch.inner: _op("inner", _FIRST, _SECOND, _linear),
    _T.inner: _op("inner", _SELF, _SECOND, _linear),
    torch.functional.tensordot: _op("tensordot", (0, "a"), (1, "b"), _tensordot),
    F.conv1d: _op("conv1d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.conv2d: _op("conv2d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.conv3d: _op("conv3d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.conv_transpose1d: _op("conv_transpose1d", _FIRST, (1, "weight"), _transposed, positions_mixed=True),
    F.conv_transpose2d: _op("conv_transpose2d", _FIRST, (1, "weight"), _transposed, positions_mixed=True),
    F.conv_transpose3d: _op("conv_transpose3d", _FIRST, (1, "weight"), _transposed, positions_mixed=True),
    torch.convolution: _op("convolution", _FIRST, (1, "weight"), _either_way, positions_mixed=True),
    F.embedding: _op("embedding", _FIRST, (1, "weight"), _rows, lookup=True),
    torch.embedding: _op("embedding", _INDICES, _TABLE, _rows, lookup=True),
    F.embedding_bag: _op("embedding_bag", _FIRST, (1, "weight"), _rows, lookup=True),
    torch.embedding_bag: _op("embedding_bag", _INDICES, _TABLE, _rows, lookup=True),
    torch._grouped_mm: _op("_grouped_mm", _SELF, (1, "mat2"), matmul_contraction),
}
if hasattr(F, "grouped_mm"):
    OPS[F.grouped_mm] = _op("grouped_mm", (0, "mat_a"), (1, "mat_b"), matmul_contraction)

# The same as ATen names them, for code that calls them so: exported programs, and whoever writes `torch.ops.aten`.
_IN_ATEN: tuple[tuple[str, Op], ...] = (
    *((name, OPS[getattr(torch, name)]) for name in ("addmm", "addmv", "baddbmm", "embedding", "embedding_bag")),
    *((name, OPS[getattr(_T, name)]) for name in ("mm", "bmm", "mv", "matmul", "inner")),
    *((name, OPS[getattr(F, name)]) for name in ("linear", "conv1d", "conv2d", "conv3d")),
    *((name, OPS[getattr(F, name)]) for name in ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")),
    ("linalg_matmul", OPS[_T.matmul]),
    ("convolution", OPS[torch.convolution]),
    ("_convolution", OPS[torch.convolution]),
    ("_embedding_bag", OPS[torch.embedding_bag]),
    ("_embedding_bag_forward_only", OPS[torch.embedding_bag]),
    ("_grouped_mm", OPS[torch._grouped_mm]),
    ("tensordot", _op("tensordot", _SELF, _SECOND, _by_lists)),
    *((name, OPS[getattr(_T, name)]) for name in ("addmm_", "addmv_", "baddbmm_")),
)


def _aten_table() -> dict[Any, Op]:
    """Each packet and its overloads; those that write are told by what computes the same and writes nothing."""
    table: dict[Any, Op] = {}
    for name, op in _IN_ATEN:
        packet, plain = getattr(_ATEN, name), replace(op, out_of_place=getattr(_ATEN, name.rstrip("_")))
        table[packet] = plain if op.in_place else op
        for overload in packet.overloads():
            table[getattr(packet, overload)] = plain if op.in_place or "out" in overload else op
    return table


OPS.update(_aten_table())


def product_flops(op: Op, left: Tensor, right: Tensor, contraction: Contraction, output: Tensor) -> int:
    """FLOPs of one call, a multiplication and an addition counted as two. 0 for a lookup."""
    if op.lookup:
        return 0
    if (
        op.positions_mixed and 0 in contraction.right
    ):  # transposed: each value of the input meets its part of the weight
        return 2 * left.numel() * math.prod(right.shape[1:])
    operand, dims = (right, contraction.right) if right.dim() else (left, contraction.left)
    return 2 * output.numel() * math.prod(operand.shape[d] for d in dims)


def attention_products(query: Tensor, key: Tensor, value: Tensor) -> tuple[tuple[Dims, Dims, int], ...]:
    """The two products inside scaled dot-product attention, each as (left shape, right shape, FLOPs).

    Scores: query [..., L, E] x key [..., S, E]; sum: weights [..., L, S] x value [..., S, Ev]. The softmax between them
    is not counted.
    """
    weights = (*query.shape[:-1], key.shape[-2])
    each = 2 * math.prod(weights)
    return (
        (tuple(query.shape), tuple(key.shape), each * query.shape[-1]),
        (weights, tuple(value.shape), each * value.shape[-1]),
    )


# These contract what they read, in a form that the table has no entry for. The fused recurrent calls take a list of
# weights and hide every product inside.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
UNSUPPORTED_CALLS: dict[Any, str] = {
    **dict.fromkeys((getattr(torch, name) for name in _RECURRENT), "fused recurrent call"),
    **dict.fromkeys((F.bilinear, torch.chain_matmul, torch.linalg.multi_dot), "product of more than two"),
    **dict.fromkeys((torch.sparse.mm, torch.sparse.addmm, torch.hspmm, torch.smm), "sparse product"),
    **dict.fromkeys((torch.addbmm, _T.addbmm), "product summed over the batch"),
    **dict.fromkeys((torch.dot, _T.dot, torch.vdot, torch.linalg.vecdot), "product of vectors"),
}


_BY_NAME = {func.__name__: kind for func, kind in UNSUPPORTED_CALLS.items()}


def unsupported(func: Any) -> str | None:
    """What kind of contraction a call is that the table has no entry for, or None."""
    if isinstance(func, _ATEN_CALLS):
        return _BY_NAME.get(call_name(func))
    return UNSUPPORTED_CALLS.get(func)


_ATEN_CALLS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def call_name(func: Any) -> str:
    """`transpose`, `T`, `multi_head_attention_forward`, ...: how a call is named to people.

    A call by `torch.ops.aten` has the name of the function that it is; one of another library has that library's before it.
    """
    if isinstance(func, _ATEN_CALLS):
        said = func._schema.name if isinstance(func, torch._ops.OpOverload) else func._qualified_op_name
        library, _, name = said.partition("::")
        return name if library == "aten" else f"{library}.{name}"
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return str(getattr(func.__self__, "__name__", name))
    return str(name)
