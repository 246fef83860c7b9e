"""AOTInductor: a model compiled ahead of time into one `.pt2`, for servers that load it from Python or C++.

Invariant: the package multiplies in INT8 what the map says. Inductor lowers INT8 products of frozen weights alone, and
without freezing computes in base precision without a word; so freezing is set here, the products are counted as
`precimap.compile` counts them, and the package is loaded and compared with the certified form before it gets its name.
Nothing of precimap is needed to run it. Not taken: TorchScript, which is unmaintained.

What it does not have of `precimap.compile`: the look at each call's inputs for NaN and infinity, which codes cannot hold.
"""

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from precimap.errors import DeployError
from precimap.exporting.calls import calls_of, contiguous
from precimap.exporting.difference import reference
from precimap.exporting.exported import Exported
from precimap.exporting.int8_tokens_served import LIBRARY, serve_tokens
from precimap.exporting.shipped import Shipped
from precimap.exporting.traced import exported_program, quiet, said
from precimap.runtime.compiling.compiled import NO_CACHE, SETTINGS, no_compiler
from precimap.runtime.compiling.counted import Products, counted
from precimap.runtime.compiling.inductor import rows_pass, sums_in_own_memory
from precimap.runtime.deploy import build

PACKAGE = "model.pt2"
# Beside those of compiled calls; else the number of threads here is written into the code.
_SETTINGS: dict[str, Any] = {**SETTINGS, **NO_CACHE, "cpp.dynamic_threads": True}


def write(shipped: Shipped, folder: Path) -> Exported:
    """`model.pt2` in the folder, and what is said of it.

    Raises DeployError for a map that this CPU cannot run, for a model that torch.export cannot trace, and for a package
    that does not compute what the map says.
    """
    reason = no_compiler()
    if reason is not None:
        raise DeployError(reason)
    shipped.progress("trace", 0, 1)
    calls = calls_of(shipped.task, shipped.model)
    deployed = build(shipped.model, shipped.map, dict(shipped.layers), "cpu-int8", owned=True)
    path, products = folder / PACKAGE, Products()
    with counted(products):
        program = exported_program(deployed, calls)
        library = serve_tokens(program)
        if library is not None:
            (folder / LIBRARY).write_bytes(library)
        shipped.progress("trace", 1, 1)
        shipped.progress("compile", 0, 1)
        _compile(program, path)
    shipped.progress("compile", 1, 1)
    products.expected = max(products.expected, _int8_products(program))
    if products.lost is not None:
        raise DeployError(products.lost)
    loaded = torch._inductor.aoti_load_package(str(path))

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = contiguous((args, kwargs))
        return loaded(*args, **kwargs)

    return Exported(
        to="aoti",
        map=shipped.map.fingerprint,
        not_certified=shipped.map.not_certified,
        files=(PACKAGE,) if library is None else (PACKAGE, LIBRARY),
        layers={name: _runs(shipped, name) for name in shipped.map.layers},
        inputs=calls.said(calls.example.names),
        difference=reference(shipped, calls.batches).beside(call),
        engine={"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()},
        notes=_notes(shipped, library is not None),
    )


def _notes(shipped: Shipped, library: bool) -> tuple[str, ...]:
    """What whoever serves the package has to know."""
    notes = [
        "The package is code for CPUs with the instruction sets of this one; another may end with an illegal "
        "instruction. It needs libtorch of this version and nothing of precimap.",
        "The certificate was measured on the form that is named; this package is other code for the same codes and "
        "scales, whose sums may round to another code now and then. precimap.compare certifies the package itself.",
        "Give it contiguous tensors of the sizes above: it looks at neither (with AOTI_RUNTIME_CHECK_INPUTS=1 in "
        "the environment it does), and other ones are read as if they were.",
    ]
    if any(layer.scheme.needs_calibration for layer in shipped.layers.values()):
        notes.append(
            "An input with NaN or infinity in it gets plausible scores: static INT8 codes cannot hold them. Look "
            "for them before the call."
        )
    if library:
        notes.append(
            f"Load {LIBRARY} before the package: torch.ops.load_library in Python, dlopen in C++. It holds the "
            "operator of scheme int8, for CPUs with AVX-512 VNNI or AMX."
        )
    return tuple(notes)


def _compile(program: ExportedProgram, path: Path) -> None:
    """Write the package. Raises DeployError where this torch cannot compile the program."""
    settings = {**_SETTINGS, "joint_custom_post_pass": rows_pass()}
    try:
        with torch.no_grad(), sums_in_own_memory(), quiet():  # with gradients nothing is frozen
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    except Exception as error:
        raise DeployError(
            f"AOTInductor of torch {torch.__version__} cannot compile this model ({said(error)}); "
            "`precimap.compile` serves it in a process with Python"
        ) from error


def _int8_products(program: ExportedProgram) -> int:
    """Products of different inputs or weights: what a layer that is called on several inputs is counted by."""
    found = set()
    for node in program.graph.nodes:
        if node.target == torch.ops.quantized_decomposed.dequantize_per_channel.default:
            inputs = [user.args[0].args[0] for user in node.users if user.target == torch.ops.aten.linear.default]
            found |= {(node.args[0], codes.args) for codes in inputs}
    return len(found)


def _runs(shipped: Shipped, name: str) -> str:
    """What computes a layer in the package."""
    layer = shipped.layers.get(name)
    if layer is None:
        return shipped.base
    if layer.scheme.input is not None and layer.scheme.weight.has_scales:
        by = f"product of {LIBRARY}" if layer.scheme.input.dynamic else "oneDNN INT8 product"
        return f"{layer.scheme.name} ({by})"
    if layer.scheme.computes_low:
        return layer.scheme.name
    return f"{layer.scheme.name} (stored; decoded when read)"
