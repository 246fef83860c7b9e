"""What a map and a run are bound to: short hashes of weights, architecture and data, by content alone.

Invariant: equal content gives equal fingerprints on every machine; one changed bit changes them. Values are hashed, not
files, object identities or what `repr` shows of them: a `repr` shortens long arrays and holds addresses. What has no
content that can be read is refused, never hashed by its name. Every piece is framed by its type and its length, so that
("ab", "c") is not ("a", "bc"). Sixteen hex digits: enough to tell contents apart by accident, not meant against an
adversary. Not taken: `pickle`, whose bytes depend on what else is shared and on the version of a library.

What counts as equal: mappings in any order of their keys, sets in any order; a list is not a tuple, and a tensor is not
an array, because a forward may treat them differently. NaN is known by its bits. Padding inside records is no content.
"""

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from precimap.content import Contents, raw_bytes
from precimap.errors import FAILURES
from precimap.layers.views import plain_name

_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_VALUES = re.compile(r"tensor\((?:[^()]|\([^()]*\))*\)")
_DEVICE = re.compile(r"device=(?:device\([^()]*\)|[^\s,()]+)")


def of_value(value: Any, where: str = "the value") -> str:
    """Any nesting of tensors, arrays, numbers, texts, containers, dataclasses and objects that can be copied.

    where: how messages call it. Raises TaskError that names the place and the type of what has no readable content.
    """
    return Contents(where).of(value).hex()[:16]


def of_weights(model: nn.Module) -> str:
    """All parameters and buffers of a model: names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            digest.update(plain_name(name).encode())
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor.layout is not torch.strided or tensor.is_nested:
                digest.update(Contents(name).of(tensor.detach()))
            elif tensor.numel():
                digest.update(raw_bytes(tensor).data)
    return digest.hexdigest()[:16]


def of_architecture(model: nn.Module) -> str:
    """The tree of modules: each one's name, type and what it prints of itself, which holds no weight.

    A class is known by its name, not by its code: what a changed `forward` does shows in the scores.
    """
    digest = hashlib.sha256()
    for name, module in _own_modules(model):
        said = _ADDRESS.sub("", module.extra_repr())
        for text in (name, type(module).__qualname__, said):
            digest.update(f"{len(text)}:{text}".encode())
    return digest.hexdigest()[:16]


def modules_of(model: nn.Module) -> dict[str, str]:
    """The tree of modules by name, each as torch prints it, without its parts: `Linear(in_features=16, ...)`.

    Unlike `of_architecture`, which tells one run from another on one machine, it is the same wherever a map is taken: a
    class has its name alone, whichever file it stands in; values and devices that a module prints of itself are left out, so
    that a tree without weights, on the meta device too, is the same one. One that cannot print itself there has its class.
    """
    found = {}
    for name, module in _own_modules(model):
        try:
            said = f"({_VALUES.sub('', _DEVICE.sub('', _ADDRESS.sub('', module.extra_repr())))})"
        except FAILURES:  # a module may want values to print itself
            said = ""
        found[name] = f"{type(module).__name__}{said}"
    return found


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module and its name, without what torch.compile puts around it."""
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "_orig_mod", None), nn.Module):
            yield ".".join(part for part in name.split(".") if part != "_orig_mod"), module
