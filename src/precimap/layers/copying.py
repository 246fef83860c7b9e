"""A second module tree over the same tensors.

Deployment swaps modules; it does so in a tree of its own, so that the user's model is never touched, and it shares every
parameter and buffer, so that nothing is held twice.
"""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from precimap.errors import DeployError

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def shared_copy(model: AnyModule) -> AnyModule:
    """A deep copy of the module tree whose tensors are the model's own. Raises DeployError if it cannot be copied."""
    return copied(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def copied(model: AnyModule, stands_in: Mapping[int, Any]) -> AnyModule:
    """A deep copy in which what has one of these ids is replaced. Raises DeployError if it cannot be copied."""
    try:
        return copy.deepcopy(model, dict(stands_in))
    except Exception as error:
        raise DeployError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "remove what cannot be pickled (open files, locks) from the module and build it at first use"
        ) from error
