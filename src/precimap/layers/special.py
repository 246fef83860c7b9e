"""Parameters for which no precision can be chosen because of what they are, and models that cannot be looked into.

Invariant: what stops everything is refused before anything runs, with the name of the tensor or module and what to give
instead; what concerns one weight alone keeps that weight from being a layer, and the rest of the model is searched.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from precimap.errors import ModelError
from precimap.layers.storages import is_made_of_others
from precimap.numerics.fast import all_finite

_WEIGHTS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_visible(model: nn.Module) -> None:
    """Raises ModelError for what runs outside Python, where no call can be seen, and for weights without their values."""
    for sentence in _refusals(model):
        raise ModelError(sentence)


def why_no_layer(weight: Tensor) -> str | None:
    """Why no precision is chosen for a weight of this kind, whatever reads it; or None."""
    if weight.layout is not torch.strided or weight.is_nested:
        return f"a {str(weight.layout).removeprefix('torch.')} tensor; precision is chosen for dense ones"
    if weight.dtype not in _WEIGHTS:
        return f"its dtype is {str(weight.dtype).removeprefix('torch.')}; layers are real numbers of 16 bits or more"
    return None


def is_finite(weight: Tensor) -> bool:
    """Whether a weight of any kind holds neither NaN nor infinity."""
    with torch.no_grad():
        values = _values(weight)
        # Of float8 nothing can be asked.
        return all_finite(values.float() if values.is_floating_point() and values.itemsize == 1 else values)


def is_exported(model: nn.Module) -> bool:
    """Whether it is what `ExportedProgram.module()` gives: its mode is that of its graph, and `eval()` is not for it."""
    return any(kind.__module__ == "torch.export._unlift" for kind in type(model).__mro__)


def _values(weight: Tensor) -> Tensor:
    if weight.is_nested:
        return torch.cat([one.reshape(-1) for one in weight.unbind()])
    if weight.layout is torch.sparse_coo:
        return weight._values()
    return weight if weight.layout is torch.strided else weight.values()


def _refusals(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        where = f"{name or 'the model itself'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            yield (
                f"expected an eager nn.Module, got TorchScript in {where}; nothing inside it can be seen. Give the original "
                "Python module."
            )
        if type(module).__name__ == "FullyShardedDataParallel":
            yield f"expected whole weights, got shards of them in {where}; give the model before it was wrapped"
    for name, parameter in model.named_parameters():
        yield from _of_parameter(name, parameter)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type == "meta":
            yield (
                f"expected a model with its values, got {name} on the meta device; load them first "
                "(`model.to_empty(device='cpu')`, then `load_state_dict`)"
            )


def _of_parameter(name: str, tensor: Tensor) -> Iterator[str]:
    kind = type(tensor)
    if nn.parameter.is_lazy(tensor):
        yield f"expected initialised weights, got {name} ({kind.__name__}); run one batch through the model first"
    elif kind.__name__ == "DTensor":
        yield (
            f"expected whole weights, got {name}, a DTensor that is spread over a mesh; give a model whose parameters are "
            "their `full_tensor()`"
        )
    elif not tensor.is_nested and is_made_of_others(tensor):
        yield (
            f"expected plain tensors, got {name}, a {kind.__name__}: it is quantised or wrapped already, and what its "
            "products compute cannot be seen. Give the model as it was before"
        )
    elif tensor.is_quantized:
        yield f"expected weights in floating point, got {name} in {tensor.dtype}; give the model before it was quantised"
