"""Which tensors are a weight, or a view of one, while a model runs.

Invariant: a view remembers how it came from its parameter, so that the same steps applied to a quantised parameter give
the operand that the call would have read; and which dims of the parameter each of its dims walks, so that "per channel"
means the same in the call and in the stored codes. Tensors are known by identity; weak keys let go of them as the
model does.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from precimap.layers.ops import call_name
from precimap.layers.storages import memory_of

Walk = frozenset[int] | None  # the parameter's dims that one dim of a view walks; None where that is not known


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that holds values of one parameter and nothing else.

    `rebuild` repeats the steps from the parameter to this tensor on another tensor of the parameter's shape.
    """

    name: str
    walks: tuple[Walk, ...]
    rebuild: Callable[[Tensor], Tensor]

    def parameter_dims(self, dims: tuple[int, ...]) -> frozenset[int] | None:
        """The parameter's dims that these dims of the view walk, or None where that is not known."""
        found: frozenset[int] = frozenset()
        for dim in dims:
            walk = self.walks[dim]
            if walk is None:
                return None
            found |= walk
        return found


VIEW_CALLS = frozenset(
    "t transpose permute movedim swapaxes swapdims T mT H mH adjoint chunk split split_with_sizes tensor_split unbind "
    "__getitem__ select narrow view reshape flatten unflatten squeeze unsqueeze expand expand_as view_as reshape_as "
    "contiguous to type type_as float half bfloat16 double detach clone data index_select requires_grad_ cuda cpu "
    "_to_copy _unsafe_view slice lift_fresh alias".split()
)


def parameter_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its first fully qualified name; the wrapper names of torch.compile are left out."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each parameter, the other names under which its storage is known."""
    by_storage: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        memory = memory_of(parameter)
        by_storage.setdefault(id(parameter) if memory is None else memory, []).append(plain_name(name))
    tied: dict[str, tuple[str, ...]] = {}
    for names in by_storage.values():
        for name in names:
            tied[name] = tuple(other for other in dict.fromkeys(names) if other != name)
    return tied


def plain_name(name: str) -> str:
    """A fully qualified name as the uncompiled model has it."""
    return name.replace("_orig_mod.", "")


class WeightViews:
    """Finds and follows the weights it was given, by tensor identity."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._views: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._ids: set[int] = set()  # of every view there ever was: what is not in it need not be looked up
        for name, weight in weights.items():
            walks = tuple(frozenset({dim}) for dim in range(weight.dim()))
            self._add(weight, View(name, walks, rebuild=lambda quantised: quantised))

    def find(self, value: Any) -> View | None:
        if id(value) not in self._ids or not isinstance(value, Tensor):
            return None
        view: View | None = self._views.get(value)  # type: ignore[no-untyped-call]
        return view

    def _add(self, tensor: Tensor, view: View) -> None:
        self._views[tensor] = view
        self._ids.add(id(tensor))

    @staticmethod
    def is_view_call(func: Any) -> bool:
        return call_name(func) in VIEW_CALLS

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Remember the outputs of a view call whose first argument is a known weight."""
        parent = self.find(args[0]) if args else None
        if parent is None or not self.is_view_call(func):
            return
        source, rest = args[0], args[1:]
        for index, out in _tensors_of(output):
            if out is source:
                continue
            if out.dtype != source.dtype:  # a cast: codes are what they are in any dtype of the model
                self._add(out, View(parent.name, _walks(source, parent.walks, out), parent.rebuild))
                continue

            def rebuild(quantised: Tensor, index: int | None = index) -> Tensor:
                again = func(parent.rebuild(quantised), *rest, **kwargs)
                result: Tensor = again if index is None else again[index]
                return result

            walks = _walks(source, parent.walks, out)
            self._add(out, View(parent.name, walks, rebuild))


def _tensors_of(output: Any) -> Iterator[tuple[int | None, Tensor]]:
    if isinstance(output, Tensor):
        yield None, output
    elif isinstance(output, tuple | list):
        yield from ((i, item) for i, item in enumerate(output) if isinstance(item, Tensor))


def _walks(source: Tensor, known: tuple[Walk, ...], out: Tensor) -> tuple[Walk, ...]:
    """Which parameter dims each dim of `out` walks, one step after `source`, whose dims walk `known`."""
    memory = memory_of(out)
    if memory is None or memory != memory_of(source):
        same_order = out.dim() == source.dim() and out.shape[1:] == source.shape[1:]
        return known if same_order else (None,) * out.dim()
    return tuple(_walk(source, known, out.stride(dim), out.size(dim)) for dim in range(out.dim()))


def _walk(source: Tensor, known: tuple[Walk, ...], stride: int, size: int) -> Walk:
    """The source dims that `size` steps of `stride` elements pass through, by the strides of a shared storage."""
    if size == 1 or stride == 0:
        return frozenset()
    passed = [
        dim
        for dim in range(source.dim())
        if source.size(dim) > 1
        and source.stride(dim) < stride * size
        and stride < source.stride(dim) * source.size(dim)
    ]
    found: frozenset[int] = frozenset()
    for dim in passed:
        walk = known[dim]
        if walk is None:
            return None
        found |= walk
    return found if passed else None
