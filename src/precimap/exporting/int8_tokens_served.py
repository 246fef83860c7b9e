"""Scheme `int8` in a package: its operator in a library that a server loads before the package, instead of precimap.

Invariant: the library is made of the kernel that was certified. It has a namespace of its own (`precimap_served`), so
that what is checked here, in a process with precimap, is the operator that the server will run. Not taken: the product
written out in torch's own operators, which Inductor makes 0.9 to 1.6 times as long as BF16's.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from precimap.runtime.x86 import tokens
from precimap.runtime.x86.building import built

LIBRARY = "libprecimap_int8.so"
_SOURCE = Path(__file__).with_suffix(".cpp")
_KERNEL = Path(tokens.__file__).with_name("tokens.cpp")


def serve_tokens(program: ExportedProgram) -> bytes | None:
    """Let the program call the library's operator, in place; the library, or None where it calls none.

    Raises DeployError where the library cannot be built.
    """
    calls = [node for node in program.graph.nodes if node.target is torch.ops.precimap.int8_tokens.default]
    if not calls:
        return None
    path = _loaded()
    for node in calls:
        node.target = torch.ops.precimap_served.int8_tokens.default
    program.graph_module.recompile()
    return path.read_bytes()


@functools.cache
def _loaded() -> Path:
    root = Path(torch.__file__).parent
    flags = (
        *("-std=c++20", *tokens.FLAGS, f"-I{_KERNEL.parent}"),
        *(f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"),
        *(f"-DTORCH_VERSION_OF_THE_HEADERS={torch.__version__!r}", f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"),
    )
    path = built(_SOURCE, flags, (_KERNEL, _KERNEL.with_name("tokens_rows.h")))
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    torch.library.register_fake("precimap_served::int8_tokens", _result_alike)
    return path


def _result_alike(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, phase: float, dtype: torch.dtype
) -> Any:
    return x.new_empty(*x.shape[:-1], scales.shape[0], dtype=dtype)
