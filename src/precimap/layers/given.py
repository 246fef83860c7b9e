"""What a call of a model is given, seen from outside: how many rows its batch has."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves


def leading_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """The first dim of the first tensor of a call that has one; None without any."""
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim():
            return int(leaf.shape[0])
    return None
