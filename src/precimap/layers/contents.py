"""What each tensor holds, known without reading it: a number for every content of every storage.

Invariant: two tensors with the same description hold the same bits in the same layout. Contents are numbered by how
they came about, as in hash-consing: a result's number belongs to the call and the numbers of what it read. So a call
needs no place in a program to be found again, and control flow that diverges finds nothing. The alternatives not taken:
hashing the values, which reads every tensor again, and counting calls, which a diverging branch shifts.

Storages are known by address. A weak reference keeps the address (not the memory) from being used again.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from precimap.layers.ops import call_name


class Kind(Enum):
    """What a call does to tensors, as far as its function tells."""

    PURE = "returns new tensors, or views"
    READ = "returns no tensor and changes none"
    VIEW = "returns other views of the same values"
    WRITE = "changes its first argument, or `out`"
    WRITE_ANY = "may change any argument"
    STATISTICS = "changes running statistics, while training, and does not raise their version"
    LEAK = "hands out the memory, so that it can change unseen"
    UNSET = "returns memory without values"
    OPAQUE = "depends on, or does, more than its arguments tell"


_NAMES = {
    Kind.READ: "shape size dim ndim ndimension numel nelement stride dtype device layout item tolist get_device is_cuda "
    "is_floating_point is_complex is_contiguous is_sparse is_quantized is_nested is_leaf is_meta requires_grad grad_fn "
    "storage_offset element_size itemsize nbytes names is_inference __bool__ __len__ __int__ __float__ __index__ "
    "__repr__ __format__ __hash__ __contains__",
    Kind.VIEW: "t transpose permute movedim moveaxis swapaxes swapdims T mT H mH adjoint chunk split split_with_sizes "
    "tensor_split unbind select narrow view unflatten squeeze unsqueeze expand expand_as view_as as_strided diagonal "
    "unfold detach alias data grad real imag",
    Kind.LEAK: "numpy __array__ __dlpack__ __cuda_array_interface__ data_ptr untyped_storage storage typed_storage "
    "_typed_storage share_memory_",
    Kind.STATISTICS: "batch_norm instance_norm native_batch_norm",
    Kind.UNSET: "empty empty_like empty_strided empty_permuted new_empty new_empty_strided new resize_as",
    Kind.OPAQUE: "__deepcopy__ __reduce_ex__ __setstate__",
    Kind.WRITE: "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __idiv__ __imod__ __ipow__ __iand__ "
    "__ior__ __ixor__ __ilshift__ __irshift__",
}
_KIND_OF_NAME = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_BUILTIN = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.GetSetDescriptorType,
)
_KNOWN: dict[Any, Kind] = {}


def kind_of(func: Any) -> Kind:
    """The kind of a function that a mode was given, by its name or, for `torch.ops`, by its schema."""
    kind = _KNOWN.get(func)
    if kind is None:
        kind = _KNOWN[func] = _kind(func)
    return kind


def _kind(func: Any) -> Kind:
    if isinstance(func, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return _kind_by_schema(func)
    name = call_name(func)
    if getattr(func, "__name__", "") == "__set__" or (name.endswith("_") and not name.endswith("__")):
        return Kind.LEAK if _KIND_OF_NAME.get(name) is Kind.LEAK else Kind.WRITE
    # What another library lets a mode see may keep a state of its own; torch's functions keep none.
    ours = isinstance(func, _BUILTIN) or str(getattr(func, "__module__", "")).split(".")[0] == "torch"
    return _KIND_OF_NAME.get(name, Kind.PURE) if ours else Kind.OPAQUE


def _kind_by_schema(func: Any) -> Kind:
    one = isinstance(func, torch._ops.OpOverload)
    overloads = [func] if one else [getattr(func, name) for name in func.overloads()]
    if torch.Tag.nondeterministic_seeded in {tag for overload in overloads for tag in overload.tags}:
        return Kind.OPAQUE
    # A packet's `out` overloads do not count: that argument is seen by its name.
    writes = any(o._schema.is_mutable and (one or "out" not in o._schema.overload_name) for o in overloads)
    return Kind.WRITE_ANY if writes else Kind.PURE


@dataclass(frozen=True, slots=True)
class Content:
    """What a storage held at one version; number None: nothing that was recorded."""

    number: int | None
    version: int
    storage: StorageWeakRef


Fresh = Callable[[], int | None]
_LEAKED = -1
_PLAIN_TENSORS = (Tensor, nn.Parameter)
_QUANTISED = frozenset({torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4})
_STRIDED = torch.strided
_NUMBERS = (int, bool, float, complex)
_NAMED = (str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, type(Ellipsis))


_UNKNOWN = object()


class _Unkeyed(Exception):
    """Somewhere in an argument is a content that is not known, or a value that cannot be described."""


class Contents:
    """The content of each storage that was seen, during one pass or (as `before`) during the passes before it.

    fresh: the number of a content that nothing is known of: a new one while recording, None in a replay, so that
    nothing recorded is found for it.
    """

    def __init__(self, fresh: Fresh, before: Mapping[int, Content]) -> None:
        self._fresh = fresh
        self._before = before
        self.here: dict[int, Content] = {}

    def number(self, tensor: Tensor) -> int | None:
        """The number of what the tensor's storage holds now; a version that moved unseen makes it unknown."""
        if tensor.is_inference():  # has no version: a change could pass unseen
            return None
        address = tensor.untyped_storage()._cdata
        content = self.here.get(address) or self._before.get(address)
        if content is not None:
            if content.number == _LEAKED:
                return self._fresh()
            if content.version == tensor._version:
                return content.number
        number = self._fresh()
        if number is not None:
            self.write(tensor, number)
        return number

    def write(self, tensor: Tensor, number: int | None) -> None:
        """The tensor's storage holds the content `number` from now on."""
        content = self.here.get(address_of(tensor)) or self._before.get(address_of(tensor))
        if content is None or content.number != _LEAKED:
            self._note(tensor, number)

    def forget(self, tensor: Tensor) -> None:
        """The tensor's storage holds something that nothing is known of."""
        self.write(tensor, self._fresh())

    def leak(self, tensor: Tensor) -> None:
        """The storage can change unseen: its content is never known again."""
        self._note(tensor, _LEAKED)

    def _note(self, tensor: Tensor, number: int | None) -> None:
        storage = tensor.untyped_storage()
        self.here[storage._cdata] = Content(number, version_of(tensor), StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    def drop_freed(self) -> None:
        """Let go of the storages that are gone."""
        self.here = {address: c for address, c in self.here.items() if not c.storage.expired()}  # type: ignore[no-untyped-call]

    def key(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """A hashable description of the call: equal for two calls only where both compute the same bits.

        None where an argument's content is not known or cannot be described.
        """
        described: list[Any] = [func]
        try:
            for value in args:
                one = self._tensor(value) if type(value) in _PLAIN_TENSORS else self._described(value)
                if one is _UNKNOWN:  # most calls of a probe end here, which an exception would make dear
                    return None
                described.append(one)
            if kwargs:
                described.append(_UNKNOWN)  # f("x", 1) is not f(x=1)
                for name, value in kwargs.items():
                    described += (name, self._described(value))
        except _Unkeyed:
            return None
        described += _surroundings()
        return tuple(described)

    def _tensor(self, tensor: Tensor) -> Any:
        if not is_plain(tensor):
            return _UNKNOWN
        number = self.number(tensor)
        if number is None:
            return _UNKNOWN
        bits = (tensor.is_conj(), tensor.is_neg())
        return (number, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride(), bits)

    def _described(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN_TENSORS:
            found = self._tensor(value)
            if found is _UNKNOWN:
                raise _Unkeyed
            return found
        if kind in _NUMBERS:  # 1, 1.0 and True are equal and compute different things; so do 0.0 and -0.0
            return (kind, value) if value else (kind, repr(value))
        if kind in _NAMED:
            return value
        if kind is slice:
            return (kind, *map(self._described, (value.start, value.stop, value.step)))
        if isinstance(value, tuple | list):
            return (kind, *[self._described(item) for item in value])
        if kind is dict:
            return (kind, *[(self._described(key), self._described(item)) for key, item in value.items()])
        raise _Unkeyed


def _surroundings() -> tuple[Any, ...]:
    """What changes results without being an argument."""
    return (
        torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


def is_plain(tensor: Tensor) -> bool:
    """A strided tensor without a class or a quantiser of its own: its storage and layout are all there is."""
    return (
        type(tensor) in _PLAIN_TENSORS
        and tensor.layout is _STRIDED
        and not tensor.is_nested
        and tensor.dtype not in _QUANTISED
    )


def address_of(tensor: Tensor) -> int:
    """The address of a plain tensor's storage."""
    address: int = tensor.untyped_storage()._cdata
    return address


def version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Every tensor in the values, nested tuples, lists, dicts and slices included, in order."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) in _NUMBERS:
            continue
        elif isinstance(value, tuple | list):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
        elif isinstance(value, slice):
            found += tensors_in((value.start, value.stop, value.step))
    return found
