"""A weight in low precision that stands where its parameter stood: a tensor, not another module.

It answers shape, dtype and device as the parameter did, and gives the calls that multiply it, or look its rows up, to the
kernel of its target. So modules, hooks, methods, names and ties of a model stay the user's own, and whatever spelling of a
product the model uses is served: the mirror of `layers/interception.py`, which finds a weight wherever it is read.

Invariant: `parts` are the codes and scales that were measured; whatever is made from them (oneDNN's packed weight) is a
cache, left out of copies, files and compilers and made again at the next call. A view of it is one of the codes and of
the scales. A read that is no product gets the values that the codes stand for, or those of the parameter itself where
the map keeps it for such readers; a write is refused, but that of another weight in the same scheme
(`load_state_dict`).

Two of torch's protocols meet here. `__torch_dispatch__` gets every call, however it is spelled, after torch has taken
it apart into a few operators; from C++ and from compilers, too. `__torch_function__` is a short cut for the most
frequent calls (`Kernel.shortcuts`), some microseconds faster. Not taken: other modules in place of the user's, which
lose hooks, methods, `.weight` and whatever else reads them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_iter, tree_map_only

from precimap.errors import DeployError
from precimap.layers.interception import unfolded_attention
from precimap.layers.quantized import InputRange, QuantizedLayer
from precimap.numerics.quantize import Affine
from precimap.numerics.schemes import Scheme, scheme_from_row
from precimap.runtime.weights.memory import MEMORY
from precimap.runtime.weights.tracing import TRACED, compiling, freezing

Parts = dict[str, Tensor]
Made = TypeVar("Made")
Row = tuple[str, tuple[str, dict[str, object]], tuple[float, int] | None, float, str]
_KERNELS = "x86.int8 x86.tokens x86.stored x86.rows nvidia.fp8 weights.half weights.emulated".split()
# Canonical, in this order; a weight has some of them. `wide`: the parameter itself, for readers that are no products.
PARTS = ("codes", "scale", "zero", "offset", "rows", "wide")
AFFINE = ("scale", "zero", "offset")


class Kernel(Protocol):
    """What computes with a low-precision weight on one target. One object each; equal to itself alone."""

    @property
    def name(self) -> str:
        """Of the one object, in the module of its class."""

    @property
    def needs_frozen(self) -> bool:
        """A compiler finds its product only in weights that are constants; elsewhere its calls stay out of the graph."""

    def shape(self, how: "How", parts: Parts) -> tuple[torch.Size, tuple[int, ...], int]:
        """Shape, strides and storage offset of the weight that the parts stand for."""

    def derived(self, how: "How", parts: Parts, dtype: torch.dtype) -> Parts:
        """Further parts, made from the canonical ones, that every call reads."""

    def values(self, weight: "LowWeight") -> Tensor:
        """What the codes stand for, float32, in the weight's shape."""

    def layer(self, weight: "LowWeight") -> QuantizedLayer:
        """Codes and scales as they were measured."""

    @property
    def shortcuts(self) -> Mapping[Any, Callable[..., Any]]:
        """For calls whose arguments begin with an input and the weight: what returns their result, of real tensors, or
        NotImplemented."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator returns that is given the weight; NotImplemented for one that reads nothing but its values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """What does not depend on values. name: of the parameter; the rest as in `QuantizedLayer`."""

    name: str
    scheme: Scheme
    input_range: InputRange | None
    input_phase: float
    kernel: Kernel

    def row(self) -> Row:
        """In numbers and texts alone, as a file holds it."""
        static = None if self.input_range is None else (self.input_range.scale, self.input_range.zero)
        kernel, scheme = f"{type(self.kernel).__module__}:{self.kernel.name}", (self.scheme.name, self.scheme.row())
        return self.name, scheme, static, self.input_phase, kernel


class LowWeight(Tensor):
    """See the module. parts: by the names in `PARTS`, and what the kernel derives. root: no view of another one. once:
    the matrix that this one repeats, along dims before its own.
    outward: its dtype, for kernels: `.dtype` and `.shape` of a tensor that gets calls from torch take two microseconds each.
    """

    outward: torch.dtype
    traced: bool  # inside a compiler, where tensors have no values
    shortcuts: Mapping[Any, Callable[..., Any]]  # the kernel's
    parts: Parts
    how: How
    cache: dict[Any, Any]
    root: bool
    once: "LowWeight | None" = None

    @staticmethod
    def __new__(
        cls, parts: Parts, how: How, dtype: torch.dtype, cache: dict[Any, Any] | None = None, root: bool = True
    ) -> "LowWeight":
        shape, strides, offset = how.kernel.shape(how, parts)
        some = next(iter(parts.values()))
        made: LowWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, storage_offset=offset, dtype=dtype, device=some.device
        )
        made.parts, made.how, made.root, made.outward = parts, how, root, dtype
        made.cache = {} if cache is None else cache
        made.traced, made.shortcuts = type(some) is not Tensor, how.kernel.shortcuts
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def codes(self) -> Tensor:
        return self.parts["codes"]

    @property
    def affine(self) -> Affine:
        return Affine(self.parts["scale"], self.parts.get("zero"), self.parts.get("offset"))

    def prepared(self, what: str, make: Callable[["LowWeight"], Made]) -> Made:
        """What a kernel makes of this view of the weight, once for as long as the codes are what they are."""
        key: Any = what
        if not self.root:
            some = next(iter(self.parts.values()))
            key = what, some.storage_offset(), some.shape, some.stride()
        found = self.cache.get(key)
        if found is None:
            found = self.cache[key] = make(self)
        made: Made = found
        return made

    def layer(self) -> QuantizedLayer:
        """Codes and scales as they were measured."""
        return self.how.kernel.layer(self)

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, float32."""
        return self.how.kernel.values(self)

    def read(self, by: Any = None) -> Tensor:
        """What a reader that is no product gets, in the weight's dtype: the parameter itself if it is kept. by: which."""
        wide = self.parts.get("wide")
        if self.traced and wide is None:
            TRACED.read(self.how, by)
        return self.dequantize().to(self.outward) if wide is None else wide

    def canonical(self) -> Parts:
        return {name: self.parts[name] for name in PARTS if name in self.parts}

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [f"_{name}" for name in self.parts], (self.how, self.outward, self.root)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "LowWeight":
        how, dtype, root = context
        return LowWeight({name.removeprefix("_"): part for name, part in inner.items()}, how, dtype, root=root)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._is_tracing():
            raise DeployError(
                "a model with low-precision weights is not traced by TorchScript; take torch.export or compile it"
            )
        if not torch.compiler.is_dynamo_compiling():
            # Written out, as it is for each call of each layer.
            short = args[1].shortcuts.get(func) if len(args) > 1 and type(args[1]) is LowWeight else None
            if short is not None and not args[1].root and torch.compiler.is_exporting():
                short = None  # an exporter knows the parts of parameters alone, not those of their views
            if short is not None and ((type(args[0]) is Tensor and not args[1].traced) or compiling()):
                found = short(*args, **kwargs)
                if found is not NotImplemented:
                    return found
        if func is F.multi_head_attention_forward:
            return unfolded_attention(*args, **kwargs)
        if func in MEMORY and isinstance(args[0], LowWeight):
            return MEMORY[func](*args, **kwargs)
        traced = compiling()
        if traced and _stays_out(func, args, kwargs):
            return _apart(func, args, kwargs)
        if getattr(func, "__name__", "") in _PRODUCTS and not traced and torch.is_autocast_enabled(_device(args)):
            return _autocast(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = next(leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, LowWeight))
        result = given.how.kernel.call(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if composite(func):
            # Its own parts, also where an exporter keeps such operators whole.
            return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        refuse_writes(func, args, kwargs)
        args, kwargs = tree_map_only(LowWeight, lambda weight: weight.read(func), (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LowWeight({self.how.name}, {self.how.scheme.name}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> "LowWeight":
        if id(self) not in memo:
            parts = {name: part.detach().clone() for name, part in self.canonical().items()}
            memo[id(self)] = low_weight(parts, self.how, self.outward, isinstance(self, nn.Parameter))
        made: LowWeight = memo[id(self)]
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As bytes: pickle does not know the storages of float8.
        raw = {
            name: (part.detach().view(torch.uint8), part.dtype) if part.dtype.itemsize == 1 else (part.detach(), None)
            for name, part in self.canonical().items()
        }
        return _unpickled, (raw, self.how.row(), self.outward, isinstance(self, nn.Parameter))


# As compilers and exporters ask for the parts, by the names that `__tensor_flatten__` gives.
for _part in (*PARTS, "decoded"):
    setattr(LowWeight, f"_{_part}", property(lambda weight, name=_part: weight.parts[name]))  # type: ignore[misc]


def composite(func: Any) -> bool:
    """Whether an operator is made of others, and of nothing else."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def low_weight(parts: Parts, how: How, dtype: torch.dtype, parameter: bool = True) -> LowWeight:
    """A weight from its canonical parts; by default a parameter, as a module holds it."""
    global _apart
    if how.kernel.needs_frozen and _apart is None:  # no sooner, for torch imports its compiler to say so
        _apart = torch.compiler.disable(_run, reason="INT8 in the graph needs precimap.compiled")  # type: ignore[no-untyped-call]
    ordered = {name: parts[name] for name in PARTS if name in parts}
    made = LowWeight(ordered | how.kernel.derived(how, ordered, dtype), how, dtype)
    if parameter:
        made = nn.Parameter(made, requires_grad=False)  # type: ignore[assignment]
    return made


def _unpickled(raw: dict[str, tuple[Tensor, torch.dtype | None]], row: Row, dtype: torch.dtype, parameter: bool) -> Any:
    parts = {name: part if kind is None else part.view(kind) for name, (part, kind) in raw.items()}
    name, scheme, range_, phase, kernel = row
    module, _, attribute = kernel.partition(":")
    if module.removeprefix("precimap.runtime.") not in _KERNELS:
        raise DeployError(f"{name}: expected a kernel in one of {', '.join(_KERNELS)}, got {kernel}")
    static, by = None if range_ is None else InputRange(*range_), getattr(import_module(module), attribute)
    how = How(name=name, scheme=scheme_from_row(*scheme), input_range=static, input_phase=phase, kernel=by)
    return low_weight(parts, how, dtype, parameter)


torch.serialization.add_safe_globals([_unpickled])  # of what it takes none is code


def _device(args: Any) -> str:
    device: str = next(leaf.device.type for leaf in tree_iter(args) if isinstance(leaf, Tensor))
    return device


# Calls that autocast gives a dtype of its own. With float32 operands they are one rounding away, as in the emulation.
_PRODUCTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ mm bmm mv addmm addmv baddbmm inner einsum tensordot conv1d conv2d conv3d "
    "_grouped_mm grouped_mm".split()
)


def _autocast(func: Any, args: Any, kwargs: Any) -> Any:
    device = _device(args)
    with torch.autocast(device, enabled=False), torch._C.DisableTorchFunctionSubclass():
        output = func(*args, **kwargs)
    return output.to(torch.get_autocast_dtype(device)) if isinstance(output, Tensor) else output


def _stays_out(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a compiler that traces this call would multiply in base precision without a word."""
    if torch.compiler.is_exporting() or freezing() or getattr(func, "__name__", "") == "__get__":
        return False
    return any(isinstance(leaf, LowWeight) and leaf.how.kernel.needs_frozen for leaf in tree_iter((args, kwargs)))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    weight = args[1] if len(args) > 1 else None
    if type(weight) is LowWeight and func in weight.shortcuts and type(args[0]) is Tensor:
        found = weight.shortcuts[func](*args, **kwargs)
        if found is not NotImplemented:
            return found
    with torch._C.DisableTorchFunctionSubclass():  # here, too, torch says that it is compiling
        return func(*args, **kwargs)


# `_run` between the graphs that torch.compile makes where its weights are not frozen.
_apart: Any = None


def refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Raises DeployError for an operator that would write into the weight."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        if argument.is_write and isinstance(value, LowWeight):
            raise DeployError(
                f"{value.how.name}: its codes cannot be written by {func}; a weight in low precision takes only those of "
                "another deployed model (load_state_dict)"
            )
