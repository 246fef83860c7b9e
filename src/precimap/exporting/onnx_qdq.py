"""ONNX with standard Q/DQ operators (opset 21): one file for ONNX Runtime, OpenVINO, TensorRT and whatever else reads ONNX.

Invariant: low-precision weights are in the file as the codes and scales that were certified, and a layer without a scheme as
the model has it. The file is loaded by every engine that is installed, its scores are held against the certified form, and
what each engine really multiplies in low precision is read off the graph that it made (`onnx_engines.py`) and said, layer
by layer. An engine that computes another model is named as one that must not serve the file; where none is left there is
no file. Not taken: float weights between Q and DQ, as quantising tools write them: whoever reads those makes codes anew.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from precimap.decisions import LOOKUPS
from precimap.errors import DeployError, MissingExtra
from precimap.exporting.call_structure import CALL, Structure
from precimap.exporting.calls import calls_of
from precimap.exporting.difference import Reference, reference
from precimap.exporting.exported import Exported, Served
from precimap.exporting.onnx_engines import ENGINES, EXTRAS, OPENVINO, OPENVINO_BF16, ORT
from precimap.exporting.onnx_graph import save, tidied
from precimap.exporting.onnx_kernel import OPSET, products_of, scheme_refusal, weight_in_onnx
from precimap.exporting.onnx_spelling import spelled_for_onnx
from precimap.exporting.shipped import Shipped
from precimap.exporting.traced import exported_program, quiet, root_of, said
from precimap.layers.quantized import QuantizedLayer
from precimap.runtime.weights.placing import placed

MODEL = "model.onnx"


def write(shipped: Shipped, folder: Path) -> Exported:
    """`model.onnx` in the folder, and what is said of it by the engines that are installed.

    Raises MissingExtra without the extra `onnx`, DeployError for what ONNX cannot express, for a model that cannot be traced
    or translated, and where no engine here computes what the map says.
    """
    onnx = _needed()
    _check_schemes(shipped)
    calls = calls_of(shipped.task, shipped.model)
    model = placed(shipped.model, shipped.layers, weight_in_onnx, owned=True)
    with spelled_for_onnx():
        program = exported_program(model.eval(), calls)
    made, structure = _translated(program)
    names = [value.name for value in made.model.graph.inputs]
    products = tidied(made.model, shipped.layers, calls.sizes)
    _check_products(shipped.layers, program, products)
    made.model.metadata_props.update(_metadata(shipped))
    files = save(made, folder / MODEL)
    structure.save(folder)
    file = _File(
        reference=reference(shipped, calls.batches), structure=structure, path=folder / MODEL, products=products
    )
    served = tuple(found for engine in ENGINES for found in file.served(engine))
    proven = [found for found in served if found.refused is None]
    if not proven:
        raise DeployError(f"no engine here serves it: {'; '.join(f'{s.engine}: {s.refused}' for s in served)}")
    return Exported(
        to="onnx",
        map=shipped.map.fingerprint,
        not_certified=shipped.map.not_certified,
        files=(*files, CALL),
        layers={name: _runs(shipped, name, proven) for name in shipped.map.layers},
        inputs=calls.said(names),
        difference=proven[0].difference,
        engine={"torch": torch.__version__, "onnx": onnx.__version__, "opset": str(OPSET)}
        | {found.engine: found.version for found in served},
        notes=tuple(_notes(shipped, served)),
        served=served,
    )


def _needed() -> Any:
    """onnx itself. Raises MissingExtra that names the extra."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  # what runs the file here
        import onnxscript  # noqa: F401  # what torch.onnx.export needs
    except ImportError as error:
        raise MissingExtra(
            f"ONNX needs onnx, onnxscript and onnxruntime: pip install 'precimap[onnx]' ({error})"
        ) from error
    return onnx


def _check_schemes(shipped: Shipped) -> None:
    """Raises DeployError that names all layers which ONNX cannot express."""
    refused: dict[str, list[str]] = {}
    for name, layer in shipped.layers.items():
        reason = scheme_refusal(layer.scheme)
        if reason is None and layer.scheme.computes_low and LOOKUPS.issuperset(shipped.map.layers[name].ops):
            reason = "a lookup multiplies nothing; a table takes int8-row, int4-row or base precision"
        if reason is not None:
            refused.setdefault(f"{layer.scheme.name}: {reason}", []).append(name)
    if refused:
        raise DeployError("; ".join(f"{', '.join(names)} in {reason}" for reason, names in refused.items()))


def _check_products(
    layers: Mapping[str, QuantizedLayer], program: ExportedProgram, products: Mapping[str, list[str]]
) -> None:
    """Raises DeployError for a layer that is multiplied in another way than its scheme says, or not at all."""
    traced, read = products_of(program)
    for name, layer in layers.items():
        multiplies = layer.scheme.computes_low and layer.scheme.result is None
        if multiplies and (name not in traced or (name in read and not products[name])):
            raise DeployError(
                f"{name}: expected its product in {layer.scheme.name} in the file, found none; ONNX has products of "
                "matrices in low precision here, and no convolutions. Keep the layer in base precision"
            )


def _translated(program: ExportedProgram) -> tuple[Any, Structure]:
    """The ONNX program, its outputs named as the model returns them, and how a call becomes its inputs."""
    out, specs = program.call_spec.out_spec, program.graph_signature.output_specs
    assert out is not None
    paths, _ = tree_flatten_with_path(tree_unflatten(list(range(out.num_leaves)), out))
    names = ["output" + keystr(path) if not path else _output_name(path) for path, _ in paths]
    tensors = [isinstance(one.arg, torch.export.graph_signature.TensorArgument) for one in specs]
    try:
        with torch.no_grad(), quiet():
            made: Any = torch.onnx.export(
                program,
                opset_version=OPSET,
                output_names=[name for name, tensor in zip(names, tensors, strict=True) if tensor],
                verbose=False,
            )
    except Exception as error:
        raise DeployError(
            f"torch.onnx.export cannot translate the model ({said(root_of(error))}); --to aoti takes whatever "
            "torch.export traces"
        ) from error
    return made, Structure.of(program)


def _output_name(path: Sequence[Any]) -> str:
    """`logit`, `output_0`, `states.0`."""
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return "output_" + "_".join(keys) if keys[0].isdigit() else ".".join(keys)


def _metadata(shipped: Shipped) -> dict[str, str]:
    schemes = {name: layer.scheme.name for name, layer in shipped.layers.items()}
    return {
        "precimap.map": shipped.map.fingerprint,
        "precimap.certified": shipped.map.not_certified or "yes",
        "precimap.schemes": json.dumps(schemes),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _File:
    """What was written. products: layer -> the names of its products in the file."""

    reference: Reference
    structure: Structure
    path: Path
    products: Mapping[str, list[str]]

    def served(self, engine: str) -> Iterator[Served]:
        """What one engine makes of it; nothing where it is not installed."""
        try:
            running = ENGINES[engine](self.path)
        except ImportError:
            return
        except DeployError as error:
            yield Served(engine=engine, version="", layers={}, difference=None, refused=str(error))
            return
        layers = {name: running.layer(of) for name, of in self.products.items() if of}
        off, refused = None, None
        try:
            off = self.reference.beside(self.structure.calling(running.call))
        except DeployError as error:
            refused = str(error)
        yield Served(engine=engine, version=running.version, layers=layers, difference=off, refused=refused)


def _runs(shipped: Shipped, name: str, proven: Sequence[Served]) -> str:
    """What computes a layer."""
    layer = shipped.layers.get(name)
    if layer is None:
        return shipped.base
    scheme = layer.scheme
    if scheme.result is not None:
        return f"{scheme.name} (operands and result rounded)"
    if scheme.input is None:
        return f"{scheme.name} (stored; decoded when read)"
    if name not in proven[0].layers:
        return "not in the file: its result goes nowhere"
    return f"{scheme.name} as Q/DQ ({', '.join(f'{found.engine} {found.layers[name]}' for found in proven)})"


def _notes(shipped: Shipped, served: Sequence[Served]) -> list[str]:
    said = [
        f"{found.engine} must not serve this file: {found.refused}" for found in served if found.refused is not None
    ]
    ran = {found.engine for found in served}
    missing = [engine for engine in (ORT, OPENVINO) if engine not in ran]
    said += [
        f"{engine} is not installed and was not tried: pip install 'precimap[{EXTRAS[engine]}]'" for engine in missing
    ]
    if OPENVINO_BF16 in ran:
        said.append(
            "OpenVINO computes what has no scheme in BF16 on CPUs that multiply it, which is not what was certified; "
            "INFERENCE_PRECISION_HINT f32 computes what the map says."
        )
    if OPENVINO in ran and any(layer.scheme.result is not None for layer in shipped.layers.values()):
        said.append(
            "OpenVINO 2026.4 cuts values off where they become BF16, instead of rounding them, and leaves out a "
            "rounding to FP16: its bf16 and fp16 layers are near those of the map and not the same."
        )
    said.append(
        "The certificate was measured on the form that is named; an engine divides by an input's scale where precimap "
        "multiplies by its reciprocal, and adds up in another order. precimap.load_exported gives the engine's model, "
        "which precimap.compare certifies itself."
    )
    return said
