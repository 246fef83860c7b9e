"""A model cast to 16 bits as a whole, as `model.bfloat16()` casts it; its calls take and return what they did before.

Invariant: a tree of its own, in which every floating-point parameter and buffer is cast once, so that what is tied stays
tied; the model and its tensors stay as they are. Floating-point inputs of a call of the model are cast, and results in the
cast's dtype are cast back, before hooks of the user see them. Calls of parts of the model meet the 16 bits as they are, as
they do after `model.bfloat16()`. Not taken: autocast, which decides op by op, at every call, and keeps the weights wide.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from precimap.decisions import Cast
from precimap.errors import MapError
from precimap.layers.copying import copied

CASTS: Mapping[Cast, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class _Inputs:
    """A hook before calls of the model; a class, for a function inside another one cannot be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map(self._cast, (args, kwargs))

    def _cast(self, value: Any) -> Any:
        return value.to(self.dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


class _Results:
    """A hook behind them: results in 16 bits go back to the dtype that the model had."""

    def __init__(self, dtype: torch.dtype, outward: torch.dtype) -> None:
        self.dtype, self.outward = dtype, outward

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tree_map(self._cast, output)

    def _cast(self, value: Any) -> Any:
        return value.to(self.outward) if isinstance(value, Tensor) and value.dtype == self.dtype else value


def cast(model: nn.Module, name: Cast | None) -> nn.Module:
    """The model in one of `CASTS`; None: the model itself.

    Raises MapError for a model without floating-point parameters, DeployError for one that cannot be copied.
    """
    if name is None:
        return model
    dtype, stands_in = CASTS[name], dict[int, Any]()
    floating = next((one.dtype for one in model.parameters() if one.is_floating_point()), None)
    if floating is None:
        raise MapError(f"the map casts the model to {name}, and the model has no floating-point parameter")
    for parameter in model.parameters():
        values = parameter.detach()
        stands_in[id(parameter)] = nn.Parameter(
            values.to(dtype) if values.is_floating_point() else values, requires_grad=False
        )
    for buffer in model.buffers():
        values = buffer.detach()
        stands_in[id(buffer)] = values.to(dtype) if values.is_floating_point() else values
    made = copied(model, stands_in)
    made.register_forward_pre_hook(_Inputs(dtype), with_kwargs=True)
    made.register_forward_hook(_Results(dtype, floating), prepend=True)
    return made
