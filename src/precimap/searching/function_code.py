"""A function of the user's own, known by what Python made of it and by the plain values that it holds.

Invariant: equal source with equal values gives one text in every process of one version of Python, and nothing here can
fail. Values are plain: numbers, texts, tensors, arrays, and containers and dataclasses of them. What else a function closes
over (a model, a store, another function), and what it writes itself (a counter, a list of what it saw), is known by its
type: it may change from call to call. Names that code looks up when it runs are known as names.
"""

import dataclasses
import dis
import platform
from collections.abc import Mapping
from enum import Enum
from types import CellType, CodeType
from typing import Any

import numpy as np
from torch import Tensor, nn

from precimap.errors import PrecimapError
from precimap.fingerprints import of_value

PYTHON = ".".join(platform.python_version_tuple()[:2])  # code is another one in another version

_BINDING = {"STORE_DEREF", "DELETE_DEREF", "STORE_ATTR", "DELETE_ATTR"}
_FILLING = {"STORE_SUBSCR", "DELETE_SUBSCR"}
_FILLERS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def code_of(function: Any) -> str:
    """The text of a function, a method, a partial of one, or an object that is called."""
    if hasattr(function, "func") and hasattr(function, "keywords"):  # a partial
        plain = [_held(value) for value in (*function.args, *function.keywords.values())]
        return of_value([code_of(function.func), plain])
    code = getattr(function, "__code__", None)
    if isinstance(code, CodeType):
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        closed = {name: cell.cell_contents for name, cell in cells if cell != CellType()}  # one may be empty still
        named = getattr(function, "__kwdefaults__", None) or {}
        plain = [_held(value) for value in (*(function.__defaults__ or ()), *named.values())]
        return of_value([_instructions(code), [*_read_only(closed, code).values(), *plain]])
    name = "forward" if isinstance(function, nn.Module) else "__call__"
    code = getattr(getattr(type(function), name, None), "__code__", None)
    if not isinstance(code, CodeType):  # made in C
        return f"{type(function).__qualname__} {getattr(function, '__qualname__', '')}".rstrip()
    own = _read_only(dict(sorted(getattr(function, "__dict__", {}).items())), code)
    return of_value([type(function).__qualname__, _instructions(code), own])


def _read_only(values: Mapping[str, Any], code: CodeType) -> dict[str, str]:
    """What code holds, by name; of what it writes, the type alone: a name that it binds, a container where it fills one."""
    steps = [step for one in _nested(code) for step in dis.get_instructions(one)]
    bound = {step.argval for step in steps if step.opname in _BINDING}
    fills = any(step.opname in _FILLING for step in steps) or any(_FILLERS & {*one.co_names} for one in _nested(code))
    return {
        name: f"a {type(value).__qualname__}"
        if name in bound or (fills and isinstance(value, list | dict | set))
        else _held(value)
        for name, value in values.items()
    }


def _nested(code: CodeType) -> list[CodeType]:
    return [code, *(inner for one in code.co_consts if isinstance(one, CodeType) for inner in _nested(one))]


def _instructions(code: CodeType) -> list[Any]:
    consts = [_instructions(one) if isinstance(one, CodeType) else _constant(one) for one in code.co_consts]
    return [code.co_code, consts, list(code.co_names)]


def _constant(value: Any) -> str:
    """As `repr`, but for sets, whose order is another one in each process."""
    if isinstance(value, frozenset):
        return f"frozenset({sorted(map(_constant, value))})"
    return f"({', '.join(map(_constant, value))})" if isinstance(value, tuple) else repr(value)


def _held(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum | np.generic):
        return repr(value)
    if isinstance(value, Tensor | np.ndarray):
        try:
            return of_value(value)
        except PrecimapError:  # without values, or of objects
            return f"a {type(value).__qualname__}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_held, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_held, value)))}}}"
    if isinstance(value, Mapping):
        return f"{{{', '.join(sorted(f'{_held(key)}: {_held(item)}' for key, item in value.items()))}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__}{_held(fields)}"
    return "a function" if callable(value) else f"a {type(value).__qualname__}"
