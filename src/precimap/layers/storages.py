"""Which memory a tensor is in, whatever kind of tensor it is.

Invariant: a tensor that has no storage of its own (sparse, nested, one seen inside `torch.vmap`) is known by those of the
tensors that it is made of, or by none; asking never raises. Asking `untyped_storage` outright fails on all of these.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_FUNCTORCH = torch._C._functorch
_PLAIN = (Tensor, nn.Parameter)


def plainest(tensor: Tensor) -> Tensor:
    """The tensor that a transform such as `torch.vmap` shows a slice of; itself outside of any."""
    while _FUNCTORCH.is_functorch_wrapped_tensor(tensor):
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    return tensor


def is_made_of_others(tensor: Tensor) -> bool:
    """Whether its class computes for itself what torch would, as quantised, sharded and nested tensors do."""
    return type(tensor) not in _PLAIN and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The strided tensors that hold a tensor's values."""
    tensor = plainest(tensor)
    if is_made_of_others(tensor):
        flatten = getattr(tensor, "__tensor_flatten__", None)
        inner = [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]
        return tuple(part for one in inner if isinstance(one, Tensor) for part in parts(one))
    if tensor.layout is torch.strided and not tensor.is_nested:
        return (tensor,)
    return ()


def storages_of(values: Iterable[Any]) -> list[int]:
    """The storages of all tensors in the values, lists of them included, by the address of what torch keeps of each."""
    keys: list[int] = []
    for value in values:
        if type(value) is Tensor or isinstance(value, Tensor):
            keys += [part.untyped_storage()._cdata for part in parts(value) if _has_storage(part)]
        elif isinstance(value, tuple | list):
            keys += storages_of(value)
    return keys


def memory_of(tensor: Tensor) -> int | None:
    """The address of a tensor's values; None where it has none, or several."""
    held = parts(tensor)
    if len(held) != 1 or not _has_storage(held[0]):
        return None
    return held[0].untyped_storage().data_ptr() or None  # 0 where nothing is held, as in an empty tensor


def _has_storage(tensor: Tensor) -> bool:
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # of a device or a class without one
        return False
    return True
