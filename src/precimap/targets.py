"""The targets that a map can be made for, by name: the same list for Python, the command line and map files.

Invariant: a target is imported when it is asked for, so that the names cost nothing, and choosing and running stay apart:
no step of a search imports what runs a model on hardware. Not taken: a table of the objects themselves, which one
module would have to import for all the others.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from precimap.errors import InputError

if TYPE_CHECKING:
    from precimap.layers.target import Target

TARGETS: Mapping[str, str] = {  # name -> module:object
    "emulated": "precimap.layers.target:EMULATED",
    "cpu-int8": "precimap.runtime.x86.target:CPU_INT8",
    "cpu-int8-compiled": "precimap.runtime.compiling.target:CPU_INT8_COMPILED",
    "cuda-fp8": "precimap.runtime.nvidia.target:CUDA_FP8",
    "cuda-fp8-compiled": "precimap.runtime.compiling.target:CUDA_FP8_COMPILED",
    "torchrec": "precimap.runtime.torchrec_tables:TORCHREC",
}


def target_of(given: "Target | str") -> "Target":
    """The target of that name, or the one that is given. Raises InputError for a name that none has."""
    if not isinstance(given, str):
        return given
    if given not in TARGETS:
        raise InputError(f"expected a target out of {', '.join(TARGETS)}, got {given!r}")
    module, _, name = TARGETS[given].partition(":")
    found: Any = getattr(import_module(module), name)
    target: Target = found
    return target
