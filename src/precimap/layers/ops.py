"""The calls that contract two tensors, as a table: what each contracts, and how many FLOPs that is.

Invariant: an entry describes the call completely enough to quantise either operand along its contracted dims; a call
that is not in the table is never touched, and a weight that reaches one is named by discovery. The alternative, module
types, was not taken: ranking models and new transformers hold a large part of their weights outside `nn.Linear`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Op:
    """One kind of call.

    `left` and `right` are the slots of the two operands: an argument's position and its keyword. `contraction` maps
    the two operands and the other arguments to a Contraction. A `lookup` reads rows of a table: it has no FLOPs and
    its left operand holds indices. `positions_mixed` says that one output sums over several positions of the input
    (a convolution), so that an input scale cannot be finer than one example.
    """

    name: str
    left: tuple[int, str]
    right: tuple[int, str]
    contraction: Callable[[Tensor, Tensor, "Arguments"], Contraction]
    lookup: bool = False
    positions_mixed: bool = False


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


def _matmul(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    return Contraction((left.dim() - 1,), (max(right.dim() - 2, 0),))


def _convolution(left: Tensor, right: Tensor, _: Arguments) -> Contraction:
    batched = left.dim() == right.dim()
    return Contraction(tuple(range(1 if batched else 0, left.dim())), tuple(range(1, right.dim())))


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


def _op(name: str, left: tuple[int, str], right: tuple[int, str], contraction: Any, **traits: bool) -> Op:
    return Op(name, left, right, contraction, **traits)


_T = torch.Tensor
_FIRST, _SECOND = (0, "input"), (1, "other")

OPS: dict[Any, Op] = {
    F.linear: _op("linear", _FIRST, (1, "weight"), _linear),
    torch.matmul: _op("matmul", _FIRST, _SECOND, _matmul),
    _T.matmul: _op("matmul", (0, "self"), _SECOND, _matmul),
    _T.__matmul__: _op("matmul", (0, "self"), _SECOND, _matmul),
    _T.__rmatmul__: _op("matmul", _SECOND, (0, "self"), _matmul),
    torch.mm: _op("mm", _FIRST, (1, "mat2"), _matmul),
    _T.mm: _op("mm", (0, "self"), (1, "mat2"), _matmul),
    torch.bmm: _op("bmm", _FIRST, (1, "mat2"), _matmul),
    _T.bmm: _op("bmm", (0, "self"), (1, "mat2"), _matmul),
    torch.mv: _op("mv", _FIRST, (1, "vec"), _matmul),
    _T.mv: _op("mv", (0, "self"), (1, "vec"), _matmul),
    torch.addmm: _op("addmm", (1, "mat1"), (2, "mat2"), _matmul),
    _T.addmm: _op("addmm", (1, "mat1"), (2, "mat2"), _matmul),
    torch.addmv: _op("addmv", (1, "mat"), (2, "vec"), _matmul),
    torch.baddbmm: _op("baddbmm", (1, "batch1"), (2, "batch2"), _matmul),
    _T.baddbmm: _op("baddbmm", (1, "batch1"), (2, "batch2"), _matmul),
    torch.inner: _op("inner", _FIRST, _SECOND, _linear),
    _T.inner: _op("inner", (0, "self"), _SECOND, _linear),
    torch.functional.tensordot: _op("tensordot", (0, "a"), (1, "b"), _tensordot),
    F.conv1d: _op("conv1d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.conv2d: _op("conv2d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.conv3d: _op("conv3d", _FIRST, (1, "weight"), _convolution, positions_mixed=True),
    F.embedding: _op("embedding", _FIRST, (1, "weight"), _rows, lookup=True),
    torch.embedding: _op("embedding", (1, "indices"), (0, "weight"), _rows, lookup=True),
    F.embedding_bag: _op("embedding_bag", _FIRST, (1, "weight"), _rows, lookup=True),
    torch._grouped_mm: _op("_grouped_mm", (0, "self"), (1, "mat2"), _matmul),
}
if hasattr(F, "grouped_mm"):
    OPS[F.grouped_mm] = _op("grouped_mm", (0, "mat_a"), (1, "mat_b"), _matmul)


def einsum_op(arguments: Arguments) -> tuple[Op, Arguments] | None:
    """The Op of one `torch.einsum` call of two operands, and its arguments as (equation, left, right).

    None for one or more than two operands, the sublist form, a repeated index, a sum over one operand alone or none at
    all: those are not one contraction.
    """
    args = arguments.args
    if len(args) == 2 and isinstance(args[1], list | tuple):
        args = (args[0], *args[1])
    if len(args) != 3 or not isinstance(args[0], str):
        return None
    inputs, _, output = args[0].replace(" ", "").partition("->")
    if inputs.count(",") != 1:
        return None
    terms = [_spelled_out(term, tensor.dim()) for term, tensor in zip(inputs.split(","), args[1:], strict=True)]
    if any(len(set(term)) != len(term) for term in terms):
        return None
    left, right = terms
    kept = _kept_indices(output, left, right) if "->" in args[0] else _implicit_output(left, right)
    summed = [index for index in left if index in right and index not in kept]
    if not summed or any(index not in kept and index not in summed for index in left + right):
        return None
    dims = Contraction(
        tuple(left.index(i) for i in summed),
        tuple(right.index(i) for i in summed),
    )
    op = Op("einsum", (1, ""), (2, ""), lambda _left, _right, _arguments: dims)
    return op, Arguments(args, arguments.kwargs)


def _spelled_out(term: str, dim: int) -> list[str]:
    """The indices of one einsum term; the dims under an ellipsis count from the right as '.1', '.2', ..."""
    before, dots, after = term.partition("...")
    hidden = dim - len(before) - len(after) if dots else 0
    return [*before, *(f".{i}" for i in range(hidden, 0, -1)), *after]


def _kept_indices(output: str, left: list[str], right: list[str]) -> list[str]:
    before, dots, after = output.partition("...")
    return [*before, *after, *(i for i in (*left, *right) if dots and i.startswith("."))]


def _implicit_output(left: list[str], right: list[str]) -> list[str]:
    return [index for index in (*left, *right) if (index in left) != (index in right) or index.startswith(".")]


def product_flops(op: Op, left: Tensor, right: Tensor, contraction: Contraction, output: Tensor) -> int:
    """FLOPs of one call, a multiplication and an addition counted as two. 0 for a lookup."""
    if op.lookup:
        return 0
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
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), "transposed convolution"),
    **dict.fromkeys((F.bilinear, torch.chain_matmul, torch.linalg.multi_dot), "product of more than two"),
    **dict.fromkeys((torch.addbmm, _T.addbmm), "product summed over the batch"),
    **dict.fromkeys((torch.dot, _T.dot, torch.vdot, torch.linalg.vecdot), "product of vectors"),
}


def call_name(func: Any) -> str:
    """`transpose`, `T`, `multi_head_attention_forward`, ...: how a call is named to people."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        return str(getattr(func.__self__, "__name__", name))
    return str(name)
