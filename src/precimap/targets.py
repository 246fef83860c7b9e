"""The targets that a map can be made for, by name: the same list for Python, the command line and map files.

`cpu` and `cuda` are hardware, the others are what a map is made for: an emulation, or one form of a model on one hardware.

Invariant: a target is imported when it is asked for, so that the names cost nothing, and choosing and running stay apart:
no step of a search imports what runs a model on hardware. Not taken: a table of the objects themselves, which one
module would have to import for all the others.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from precimap.errors import InputError

if TYPE_CHECKING:
    from precimap.layers.target import Hardware, Target

TARGETS: Mapping[str, str] = {  # name -> module:object
    "emulated": "precimap.layers.target:EMULATED",
    "cpu": "precimap.runtime.compiling.target:CPU",
    "cuda": "precimap.runtime.compiling.target:CUDA",
    "cpu-int8": "precimap.runtime.x86.target:CPU_INT8",
    "cpu-int8-compiled": "precimap.runtime.compiling.target:CPU_INT8_COMPILED",
    "cuda-fp8": "precimap.runtime.nvidia.target:CUDA_FP8",
    "cuda-fp8-compiled": "precimap.runtime.compiling.target:CUDA_FP8_COMPILED",
    "cuda-fp8-graphs": "precimap.runtime.compiling.target:CUDA_FP8_GRAPHS",
    "torchrec": "precimap.runtime.torchrec_tables:TORCHREC",
}


def hardware_of(given: "Target | Hardware | str") -> "Target | Hardware":
    """What has that name, or is given. Raises InputError for a name that nothing has."""
    if not isinstance(given, str):
        return given
    if given not in TARGETS:
        raise InputError(f"expected a target out of {', '.join(TARGETS)}, got {given!r}")
    module, _, name = TARGETS[given].partition(":")
    found: Target | Hardware = getattr(import_module(module), name)
    return found


def target_of(given: "Target | Hardware | str", made_for: str | None = None) -> "Target":
    """The target of that name, or the one that is given.

    made_for: the target of a map, which tells the form of `cpu` and `cuda`. Raises InputError for a name that none has, and
    where the form is not told.
    """
    from precimap.layers.target import Hardware  # here, for it brings torch, and the names alone do not

    found = hardware_of(given)
    if not isinstance(found, Hardware):
        return found
    if made_for is None:
        names = " or ".join(form.name for form in found.forms.values())
        raise InputError(f"expected one form of {found.name}, {names}; a search alone finds the fastest by itself")
    return found.of_map(made_for)
