"""Calls whose operands stand in a list, or in an equation: which two they contract, and how.

Invariant: what is parsed here is called again with the two operands in the places that the Op says, so that one of them can
be replaced; what is not one contraction of two operands is no such call, and the model's own call is made.
"""

from collections.abc import Callable
from typing import Any

import torch

from precimap.layers.ops import Arguments, Contraction, Op, matmul_contraction

Parsed = tuple[Op, Callable[..., Any], Arguments]


def parsed(func: Any, arguments: Arguments) -> Parsed | None:
    """The Op of one call out of `EQUATIONS`, the function to call, and its arguments in the places that the Op names.

    None where the call is no contraction of two operands.
    """
    return EQUATIONS[func](arguments)


def _dot_of_two(left: Any, right: Any) -> Any:
    return torch.linalg.multi_dot([left, right])


def _multi_dot(arguments: Arguments) -> Parsed | None:
    tensors = arguments.get((0, "tensors"))
    if not isinstance(tensors, list | tuple) or len(tensors) != 2 or arguments.kwargs.get("out") is not None:
        return None
    op = Op(name="multi_dot", left=(0, ""), right=(1, ""), contraction=matmul_contraction)
    return op, _dot_of_two, Arguments(tuple(tensors), {})


def _einsum(arguments: Arguments) -> Parsed | None:
    found = einsum_op(arguments)
    if found is None:
        return None
    op, flat = found
    return op, torch.functional.einsum, Arguments(flat.args, {})


def einsum_op(arguments: Arguments) -> tuple[Op, Arguments] | None:
    """The Op of one `torch.einsum` call of two operands, and its arguments as (equation, left, right).

    None for one or more than two operands, the sublist form, a repeated index, a sum over one operand alone or none at
    all: those are not one contraction. Nor is a sum over a single position, which torch multiplies elementwise.
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
    sizes = [tuple(t.shape[term.index(i)] for i in summed) for t, term in zip(args[1:], terms, strict=True)]
    if sizes[0] != sizes[1] or set(sizes[0]) == {1}:  # the first: one of them is broadcast, and the other summed alone
        return None
    dims = Contraction(
        tuple(left.index(i) for i in summed),
        tuple(right.index(i) for i in summed),
    )
    op = Op(name="einsum", left=(1, ""), right=(2, ""), contraction=lambda _left, _right, _arguments: dims)
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


EQUATIONS: dict[Any, Callable[[Arguments], Parsed | None]] = {
    torch.functional.einsum: _einsum,
    torch.ops.aten.einsum: _einsum,
    torch.ops.aten.einsum.default: _einsum,
    torch.linalg.multi_dot: _multi_dot,
    torch.ops.aten.linalg_multi_dot: _multi_dot,
    torch.ops.aten.linalg_multi_dot.default: _multi_dot,
}
