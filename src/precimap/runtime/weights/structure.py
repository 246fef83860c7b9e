"""What changes how a low-precision weight lies, where it is or whose it is, and none of its values.

Invariant: what is done to the weight is done to its codes and to its scales, which are spread over the codes' shape for
it without being copied; so a dim along which a scale is shared is one of stride 0, whatever the view. Not taken: a list
of the steps from the parameter, as discovery keeps it, to be repeated on decoded values: a product would have to find
its codes again.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from precimap.errors import DeployError
from precimap.runtime.weights.low_weight import AFFINE, LowWeight, low_weight


def _viewed(func: Any, weight: LowWeight, *args: Any, **kwargs: Any) -> Any:
    """The same view of codes and of scales; of a weight whose parts cannot be viewed so, its values."""
    if torch.is_inference_mode_enabled() and not weight.is_inference():
        with torch.inference_mode(False):  # or torch cannot make a view of what was there before
            return _viewed(func, weight, *args, **kwargs)
    if "codes" not in weight.parts:
        return func(weight.read(), *args, **kwargs)
    viewed = {}
    for name, part in weight.parts.items():
        laid = _laid(part.expand(weight.codes.shape)) if name in AFFINE else (part,)
        found = next((view for each in laid if (view := _view(func, each, *args, **kwargs)) is not None), None)
        if found is None:
            return func(weight.read().contiguous(), *args, **kwargs)
        viewed[name] = found
    if isinstance(viewed["codes"], Tensor):
        made = LowWeight(viewed, weight.how, weight.outward, weight.cache, root=False)
        made.once = _once(func, weight, made, *args)
        return made
    pieces = [dict(zip(viewed, parts, strict=True)) for parts in zip(*viewed.values(), strict=True)]
    return [LowWeight(piece, weight.how, weight.outward, weight.cache, root=False) for piece in pieces]


def _once(func: Any, weight: LowWeight, made: LowWeight, *args: Any) -> LowWeight | None:
    """The matrix that a view repeats along its first dims; None for any other view. args: of the view."""
    once: Any = weight if func is _aten.expand.default else weight.once
    if once is None or once.dim() != 2 or made.dim() <= 2 or func not in _REPEATED:
        return None
    if func is _aten.transpose.int:
        last = {made.dim() - 1, made.dim() - 2}
        once = once.t() if {dim % made.dim() for dim in args} == last else None
    # A view in which both dims are as they were holds the same matrix, row after row.
    return once if once is not None and made.shape[-2:] == once.shape else None


def _view(func: Any, part: Tensor, *args: Any, **kwargs: Any) -> Any:
    """None where torch can make no such view of a tensor that lies so."""
    try:
        return func(part, *args, **kwargs)
    except (RuntimeError, ValueError):  # the second in a compiler
        return None


def _laid(scale: Tensor) -> Iterator[Tensor]:
    """The scale as it lies, and copied along ever more of the dims that share it.

    Where one of two dims that become one shares a scale (a stack of weights that is repeated for a batch, [B, E, K, N] to
    [B * E, K, N]), it has to be copied along that one, and is shared along the others as before.
    """
    yield scale
    shared = [dim for dim in range(scale.dim()) if scale.stride(dim) == 0 and scale.size(dim) > 1]
    for count in range(1, len(shared) + 1):
        for copied in combinations(shared, count):
            kept = [dim for dim in shared if dim not in copied]
            once = scale[tuple(slice(0, 1) if dim in kept else slice(None) for dim in range(scale.dim()))]
            yield once.contiguous().expand(scale.shape)


def _same(func: Any, weight: LowWeight) -> LowWeight:
    """Of an alias: the same parts and the same cache."""
    if torch.is_inference_mode_enabled() and not weight.is_inference():
        with torch.inference_mode(False):
            return _same(func, weight)
    return LowWeight(weight.parts, weight.how, weight.outward, weight.cache, weight.root)


def _cloned(func: Any, weight: LowWeight, *, memory_format: Any = None) -> LowWeight:
    """Scales that are shared along a dim stay so: that they are is how a kernel knows it."""
    parts = {
        name: part.clone() if name not in AFFINE else (part if 0 in part.stride() else part.clone())
        for name, part in weight.parts.items()
    }
    if memory_format is torch.contiguous_format and "codes" in parts:
        parts["codes"] = parts["codes"].contiguous()
    return LowWeight(parts, weight.how, weight.outward, root=weight.root)


def _moved(
    func: Any, weight: LowWeight, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any
) -> Any:
    """To a device or a dtype: codes and scales are no floats of the model, and keep theirs."""
    wanted = weight.outward if dtype is None else dtype
    if not wanted.is_floating_point:
        return func(weight.read(), dtype=dtype, device=device, non_blocking=non_blocking)
    parts = {
        name: part.to(device=device, dtype=wanted if name == "wide" else None, non_blocking=non_blocking, copy=True)
        for name, part in weight.canonical().items()
    }
    if not weight.root:
        return LowWeight(parts, weight.how, wanted, root=False)
    return low_weight(parts, weight.how, wanted, parameter=False)


def _written(func: Any, weight: LowWeight, source: Any, non_blocking: bool = False) -> LowWeight:
    """`load_state_dict`: the codes, scales and input range of another weight in the same scheme, in place."""
    if not isinstance(source, LowWeight) or source.how.scheme != weight.how.scheme:
        what = f"one in {source.how.scheme.name}" if isinstance(source, LowWeight) else "floating-point values"
        raise DeployError(
            f"{weight.how.name}: expected a weight in {weight.how.scheme.name}, as another deployed model of the same map "
            f"has it, got {what}; deploy the other model with a map of its own instead"
        )
    own, given = weight.canonical(), source.canonical()
    if {name: part.shape for name, part in own.items()} != {name: part.shape for name, part in given.items()}:
        raise DeployError(
            f"{weight.how.name}: expected a weight of shape {tuple(weight.shape)}, with the same parts beside its codes, "
            f"got {tuple(source.shape)}"
        )
    for name, part in own.items():
        part.copy_(given[name], non_blocking)
    for name, part in weight.how.kernel.derived(source.how, own, weight.outward).items():
        weight.parts[name].copy_(part)
    weight.how = source.how
    weight.cache.clear()
    return weight


_aten = torch.ops.aten
_VIEWS = (
    *(_aten.t.default, _aten.transpose.int, _aten.permute.default, _aten.view.default, _aten._unsafe_view.default),
    *(_aten.expand.default, _aten.unsqueeze.default, _aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims),
    *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int),
    *(_aten._reshape_alias.default, _aten.diagonal.default),
)
_REPEATED = (
    *(_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten._reshape_alias.default),
    _aten.transpose.int,
)
ANSWERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_VIEWS, _viewed),
    **dict.fromkeys((_aten.detach.default, _aten.alias.default), _same),
    _aten.clone.default: _cloned,
    _aten._to_copy.default: _moved,
    _aten.copy_.default: _written,
}
