"""Does a forward compute with the model that it is given, and leave it as it was?

Invariant: nothing is judged by what a forward says or returns. It is given a second module tree over the same numbers, whose
parameters are other objects, and every call is watched for parameters of either tree. A forward that closes over a model
works in a search, where layers are known by their parameters wherever they are called, and computes nothing of a deployed
model; so a certificate on a target would be of the base model. What a forward writes is seen by the version that torch
counts for each tensor, and by which tensor stands where.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from precimap.errors import DeployError, TaskError
from precimap.layers.copying import copied
from precimap.layers.emulation import quantized
from precimap.layers.views import plain_name
from precimap.task import Task

# What a stranger's forward may raise for an argument that it does not take.
USERS_ERRORS = (
    TaskError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
_SHOWN = 3
_LARGEST_COPY = 2**28  # bytes of one tensor


class Uses(TorchFunctionMode):
    """Notes which of the named tensors a call with a tensor for a result was given."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names = names
        self.seen: dict[str, None] = {}

    @classmethod
    def of(cls, model: nn.Module) -> "Uses":
        """The parameters of a model, by their names."""
        return cls({id(parameter): plain_name(name) for name, parameter in model.named_parameters()})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A dtype, a device or a shape says nothing of what was computed.
        if isinstance(result, Tensor | tuple | list):
            for value in (*args, *(kwargs or {}).values()):
                for part in value if isinstance(value, tuple | list) else (value,):
                    if id(part) in self._names:
                        self.seen[self._names[id(part)]] = None
        return result


def check_no_memory(fresh: Uses, again: Uses, another: Uses) -> None:
    """Raises TaskError for a forward that computes less when it is called again with the batch of the call before.

    fresh, again: of two calls with one batch; another: of one with another batch. What only the second left out is a result
    that was kept: a map would be scored with what the baseline computed.
    """
    kept = [name for name in fresh.seen if name not in again.seen and name in another.seen]
    if kept:
        more = f" and {len(kept) - _SHOWN} more" if len(kept) > _SHOWN else ""
        raise TaskError(
            f"forward does not compute with {', '.join(kept[:_SHOWN])}{more} when it is given the same batch again: it "
            "keeps results of the call before, and a map would be scored with those of the baseline. Switch that memory off"
        )


def check_given_model(task: Task, batch: Any) -> str | None:
    """Run the batch on a copy of the model. Returns a note where the model cannot be copied.

    Raises TaskError for a forward that computes with parameters of the Task's own model, or with none of the copy's.
    """
    own = {id(parameter): plain_name(name) for name, parameter in task.model.named_parameters()}
    if not own or any(isinstance(module, torch.jit.ScriptModule) for module in task.model.modules()):
        return None
    twin = _twin(task.model)
    if twin is None:
        return "whether forward uses the model that it is given was not checked: the model cannot be copied"
    given = {id(parameter): name for name, parameter in twin.named_parameters()}
    with torch.no_grad(), quantized(task.model, {}), Uses(own) as foreign, Uses(given) as used:
        try:
            task.forward(twin, batch)
        except USERS_ERRORS as error:
            return f"whether forward uses the model that it is given was not checked: its copy fails ({error!r:.120})"
    if foreign.seen:
        names = [*foreign.seen]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise TaskError(
            f"forward was given another model and computed with {', '.join(names[:_SHOWN])}{more} of the Task's model all "
            "the same; it must compute with the model that it is given, its first argument, or a deployed one would never "
            "be called and the certificate would be of the model as it was"
        )
    if not used.seen:
        raise TaskError(
            "forward computed with no parameter of the model that it is given, its first argument; which does it call? A "
            "deployed model would never be called, and the certificate would be of another one"
        )
    return None


def _twin(model: nn.Module) -> nn.Module | None:
    """The module tree again, with parameters that are other objects over the same memory; None if it cannot be copied."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        if type(parameter) is nn.Parameter:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        else:
            return None
    try:
        return copied(model, memo)
    except DeployError:
        return None


@dataclass(frozen=True, slots=True, eq=False)
class ModelState:
    """Which tensors a model holds, and in which version; `_kept`: copies of what may be put back."""

    model: nn.Module
    _versions: Mapping[str, tuple[Tensor, int | None]]
    _kept: Mapping[str, Tensor]
    _others: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> "ModelState":
        """Buffers of up to _LARGEST_COPY bytes are copied, and tables with a max_norm, which their own lookups write."""
        found = dict(_tensors(model))
        modules = model.modules()
        bounded = {id(m.weight) for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm}
        written = {n: t for n, t in found.items() if id(t) in bounded or not isinstance(t, nn.Parameter)}
        kept = {n: t.detach().clone() for n, t in written.items() if t.nbytes <= _LARGEST_COPY}
        return cls(model, {n: (t, _version(t)) for n, t in found.items()}, kept, _sizes(model))

    def check_unwritten(self) -> None:
        """Raises TaskError for parameters and buffers that were written since, and puts back what was copied."""
        now = dict(_tensors(self.model))
        saved = self.model.state_dict(keep_vars=True).keys()
        written = [
            name
            for name, (tensor, version) in self._versions.items()
            if name in saved and (now.get(name) is not tensor or (_version(tensor) != version and self._is_other(name)))
        ]
        written += [name for name in now if name not in self._versions and name in saved]
        if not written:
            return
        self._put_back()
        raise TaskError(
            f"forward writes {', '.join(map(plain_name, written[:_SHOWN]))} of the model: its weights are other ones after "
            "each call, so no map could be bound to them. Keep counters and caches out of parameters and buffers (or "
            "register_buffer(..., persistent=False)), and renormalise tables once (max_norm=None) before the search"
        )

    def _is_other(self, name: str) -> bool:
        """Whether a tensor that was written holds other values; a table within its max_norm is written, and does not."""
        tensor = self._versions[name][0]
        return name not in self._kept or not torch.equal(self._kept[name], tensor.detach())

    def grown(self) -> tuple[str, ...]:
        """Attributes of modules whose size changed since: caches, lists of results."""
        now = _sizes(self.model)
        return tuple(name for name, size in now.items() if self._others.get(name) != size)

    def _put_back(self) -> None:
        with torch.no_grad():
            for name, (tensor, _) in self._versions.items():
                if name not in self._kept:
                    continue
                owner, _, last = name.rpartition(".")
                tensor.copy_(self._kept[name])
                if not isinstance(tensor, nn.Parameter):
                    self.model.get_submodule(owner)._buffers[last] = tensor


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sizes(model: nn.Module) -> dict[str, int]:
    """How much stands in the containers that modules hold beside their tensors and modules."""
    return {
        f"{name}.{key}".removeprefix("."): len(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and isinstance(value, dict | list | set)
    }
