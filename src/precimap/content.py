"""The bytes that a value is made of, framed by type and length, under one hash.

Invariant: two values have one hash only if they have one content; see `fingerprints` for what counts as equal. What is
not known here is taken apart as `copy` would take it (`__reduce_ex__`): into what it is made from. So dates, paths,
decimals, deques and classes of the user's own are known by their content, and what cannot be copied (generators, open
files, locks) is refused, as is what has code and no content (functions).
"""

import copyreg
import dataclasses
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap.errors import TaskError
from precimap.jagged import jagged

_PROTOCOL = 4  # of __reduce_ex__: the first with which every part comes as a plain value
_ADVICE = (
    "data are known by their content; give tensors, NumPy arrays, numbers, texts, or containers and dataclasses of them, "
    "and leave out of the batch what only makes it"
)


class Contents:
    """Hashes values; `where` is how messages call what it is given."""

    def __init__(self, where: str) -> None:
        self._place: list[str] = [where]
        self._inside: set[int] = set()

    def of(self, value: Any) -> bytes:
        """32 bytes. Raises TaskError for what has no readable content, naming where it stands."""
        digest = hashlib.sha256()
        try:
            self._add(digest, value)
        except RecursionError as error:
            raise TaskError(f"{self._place[0]} is nested too deeply; {_ADVICE}") from error
        return digest.digest()

    def _add(self, into: Any, value: Any) -> None:
        if (plain := _plain(value)) is not None:
            _frame(into, *plain)
            return
        if isinstance(value, Tensor):
            self._tensor(into, value)
            return
        if isinstance(value, np.ndarray | np.generic):
            self._array(into, value)
            return
        if id(value) in self._inside:
            raise self._refused(value, "it contains itself")
        self._inside.add(id(value))
        self._structure(into, value)
        self._inside.discard(id(value))

    def _structure(self, into: Any, value: Any) -> None:
        if isinstance(value, Mapping):
            self._unordered(into, "mapping", ((key, value[key]) for key in value))
        elif isinstance(value, set | frozenset):
            self._unordered(into, "set", ((item, None) for item in value))
        elif isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else "tuple"
            named = f" {type(value).__qualname__}" if hasattr(value, "_fields") else ""
            self._sequence(into, kind + named, value)
        elif isinstance(value, type):
            _frame(into, "class", f"{value.__module__}.{value.__qualname__}".encode())
        elif (parts := jagged(value)) is not None:
            self._sequence(into, "jagged", [parts.keys, parts.values, parts.lengths, parts.weights])
        elif dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            self._fields(into, value, {name: getattr(value, name) for name in names if hasattr(value, name)})
        elif (table := _table(value)) is not None:
            self._sequence(into, f"table {type(value).__qualname__}", table)
        else:
            self._object(into, value)

    def _sequence(self, into: Any, kind: str, items: Any) -> None:
        _frame(into, kind, str(len(items)).encode())
        for number, item in enumerate(items):
            self._part(into, f"[{number}]", item)

    def _unordered(self, into: Any, kind: str, pairs: Iterator[tuple[Any, Any]]) -> None:
        """Keys and values in the order of their own hashes, which no order of insertion changes."""
        found = []
        for key, item in pairs:
            digest = hashlib.sha256()
            self._part(digest, f" key {key!r:.40}", key)
            self._part(digest, f"[{key!r:.40}]", item)
            found.append(digest.digest())
        _frame(into, kind, b"".join(sorted(found)))

    def _fields(self, into: Any, value: Any, fields: Mapping[str, Any]) -> None:
        _frame(into, f"object {type(value).__qualname__}", str(len(fields)).encode())
        for name, item in fields.items():
            _frame(into, "field", name.encode())
            self._part(into, f".{name}", item)

    def _part(self, into: Any, place: str, value: Any) -> None:
        self._place.append(place)
        self._add(into, value)
        self._place.pop()

    def _object(self, into: Any, value: Any) -> None:
        """By what a copy of it would be made from."""
        if callable(value):
            raise self._refused(value, "it is code")
        try:
            known = copyreg.dispatch_table.get(type(value))
            made = known(value) if known is not None else value.__reduce_ex__(_PROTOCOL)
            if isinstance(made, str):
                raise TypeError("it is known by its name alone")
            maker, arguments, state, items, pairs = (*made, None, None, None)[:5]
            parts = [arguments, state, None if items is None else list(items), None if pairs is None else list(pairs)]
        except Exception as error:  # a stranger's class may raise anything here
            raise self._refused(value, str(error)) from error
        _frame(into, f"object {type(value).__qualname__}", getattr(maker, "__qualname__", "?").encode())
        for name, part in zip(("", "", " items", " pairs"), parts, strict=True):
            self._part(into, name, part)

    def _tensor(self, into: Any, tensor: Tensor) -> None:
        shape = "nested" if tensor.is_nested else str(tuple(tensor.shape))
        _frame(into, f"tensor {tensor.dtype} {tensor.layout}", shape.encode())
        if tensor.device.type == "meta":
            raise self._refused(tensor, "it is on the meta device, where tensors have no values")
        if tensor.is_nested:
            self._sequence(into, "rows", list(tensor.unbind()))
        elif tensor.is_quantized:
            self._sequence(into, "codes", [str(tensor.qscheme()), tensor.int_repr(), *_affine(tensor)])
        elif tensor.layout == torch.sparse_coo:
            known = tensor.coalesce()
            self._sequence(into, "sparse", [known.indices(), known.values()])
        elif tensor.layout != torch.strided:
            self._sequence(into, "sparse", _compressed(tensor))
        elif tensor.numel():
            into.update(raw_bytes(tensor))

    def _array(self, into: Any, given: Any) -> None:
        array = np.asanyarray(given)
        kind = "array" if isinstance(given, np.ndarray) else "number"
        _frame(into, f"{kind} {array.dtype.str}", str(array.shape).encode())
        if isinstance(array, np.ma.MaskedArray):
            self._sequence(into, "masked", [np.ma.getmaskarray(array), array.filled(array.dtype.type())])
        elif array.dtype.names is not None:
            self._fields(into, array, {name: np.asarray(array[name]) for name in array.dtype.names})
        elif array.dtype.hasobject or array.dtype.kind == "T":
            self._sequence(into, "objects", array.reshape(-1).tolist())
        elif array.nbytes:
            into.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))

    def _refused(self, value: Any, why: str) -> TaskError:
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        return TaskError(
            f"{''.join(self._place)} is a {kind}, which has no content that can be read ({why:.100}); {_ADVICE}"
        )


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bits of a dense tensor with at least one element, flat."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _plain(value: Any) -> tuple[str, bytes] | None:
    """The kind and the bytes of a value without parts; None for one with parts."""
    if isinstance(value, Enum):
        return f"enum {type(value).__qualname__}", value.name.encode()
    if isinstance(value, np.generic):
        return None
    if value is None or isinstance(value, bool | torch.dtype | torch.device):
        return type(value).__name__, str(value).encode()
    if isinstance(value, int):
        return "int", format(int(value), "x").encode()
    if isinstance(value, float):
        return "float", struct.pack(">d", value)
    if isinstance(value, complex):
        return "complex", struct.pack(">dd", value.real, value.imag)
    if isinstance(value, str):
        return "str", value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes | bytearray | memoryview):
        return type(value).__name__, bytes(value)
    return None


def _frame(into: Any, kind: str, payload: bytes) -> None:
    head = kind.encode()
    into.update(b"%d:%s%d:" % (len(head), head, len(payload)))
    into.update(payload)


def _affine(tensor: Tensor) -> list[Any]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.q_scale(), tensor.q_zero_point()]
    return [tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), tensor.q_per_channel_axis()]


def _compressed(tensor: Tensor) -> list[Tensor]:
    by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    if by_row:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]


def _table(value: Any) -> list[Any] | None:
    """The parts of a table or column of pyarrow, pandas or polars, or of a sparse matrix of scipy; None for others.

    By what stands in the rows: how they are cut into chunks, slices and buffers is no content. Libraries are known by
    the name of the module that a class is from; none is imported.
    """
    read = _READERS.get(type(value).__module__.split(".")[0])
    return None if read is None else read(value)


def _arrow(value: Any) -> list[Any] | None:
    if hasattr(value, "column_names") and hasattr(value, "columns"):
        return [list(value.column_names), *value.columns]
    if hasattr(value, "to_pylist") and hasattr(value, "null_count"):
        kind = str(value.type)
        if value.null_count == 0 and getattr(value.type, "num_fields", 0) == 0:
            found = np.asarray(value)
            return [kind, found] if not found.dtype.hasobject else [kind, found.tolist()]
        return [kind, value.to_pylist()]
    return [str(value.type), value.as_py()] if hasattr(value, "as_py") else None


def _frame_of_columns(value: Any) -> list[Any] | None:
    if hasattr(value, "iter_columns"):
        return [list(value.columns), *value.iter_columns()]
    if hasattr(value, "columns") and hasattr(value, "items"):
        pairs = list(value.items())
        return [[name for name, _ in pairs], *(column for _, column in pairs), value.index]
    if hasattr(value, "to_numpy") and hasattr(value, "dtype"):
        return [str(value.dtype), getattr(value, "name", None), value.to_numpy(), _index_of(value)]
    return [] if type(value).__name__ in ("NAType", "NaTType") else None  # what is missing: one of each kind


def _index_of(value: Any) -> Any:
    """The labels of a column of pandas, as an array; None for an index itself, and where there are none."""
    index: Any = getattr(value, "index", None)
    return index.to_numpy() if hasattr(index, "to_numpy") else None


def _scipy(value: Any) -> list[Any] | None:
    if not hasattr(value, "tocoo"):
        return None
    known = value.tocsr(copy=True)
    known.sum_duplicates()  # sorts, too
    return [tuple(known.shape), known.indptr, known.indices, known.data]


_READERS: Mapping[str, Callable[[Any], list[Any] | None]] = {
    "pyarrow": _arrow,
    "pandas": _frame_of_columns,
    "polars": _frame_of_columns,
    "scipy": _scipy,
}
