"""Calls that want the memory of a low-precision weight, which torch's dispatcher is never given.

Invariant: the weight has no memory of its own, only its parts have. What would share it shares theirs; who wants the values
in another library's form gets those that a reader gets; what would give it other memory is a write, and is one of another
weight in the same scheme or is refused. Left to torch, sharing ends the process, and other memory is taken without being
computed with.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from precimap.errors import DeployError


def _shared(weight: Any) -> Any:
    for part in weight.parts.values():
        part.share_memory_()
    return weight


def _is_shared(weight: Any) -> bool:
    return all(part.is_shared() for part in weight.parts.values())


def _set(weight: Any, value: Tensor) -> None:
    weight.detach().copy_(value)


def _no_storage(weight: Any) -> Any:
    raise DeployError(
        f"{weight.how.name}: a weight in {weight.how.scheme.name} has no memory of its own, only its codes and scales have; "
        "to write the model to a file take precimap.save_deployed or torch.save, to hand on the values "
        "weight.dequantize()"
    )


def _read_by(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda weight, *args, **kwargs: call(weight.read(), *args, **kwargs)


_READS = (Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__)
MEMORY: dict[Any, Callable[..., Any]] = {
    Tensor.share_memory_: _shared,
    Tensor.is_shared: _is_shared,
    Tensor.storage: _no_storage,  # safetensors asks for it in the end; exporters need `untyped_storage`
    Tensor.data.__set__: _set,  # type: ignore[attr-defined]
    **{call: _read_by(call) for call in _READS},
}
