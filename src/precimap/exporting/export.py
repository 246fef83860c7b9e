"""export(): a certified map into the files that a serving engine loads.

Invariant: what a target cannot express is refused before anything is written, and what is written is whole: a folder
that did not exist before, with `export.json` beside the engine's own files.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from precimap.errors import InputError
from precimap.exporting.exported import Exported
from precimap.exporting.folder import new_folder
from precimap.exporting.shipped import Shipped, shipped
from precimap.precision_map import PrecisionMap
from precimap.searching.progress import Progress, silent
from precimap.task import Task

# Target -> the module that writes it; imported when it is asked for.
_CHECKPOINT = "precimap.exporting.checkpoints.compressed_tensors"
WRITERS = {
    "aoti": "precimap.exporting.aoti",
    "onnx": "precimap.exporting.onnx_qdq",
    "fbgemm": "precimap.exporting.fbgemm",
    "vllm": _CHECKPOINT,
    "sglang": _CHECKPOINT,
    "transformers": _CHECKPOINT,
}


def export(
    task: Task,
    precision_map: PrecisionMap | str | Path,
    *,
    to: str,
    output: str | Path,
    uncertified: bool = False,
    checkpoint: str | Path | None = None,
    progress: Progress = silent,
) -> Exported:
    """Write a map for the engine that serves it, into the new folder `output`.

    to: `aoti`, a package of AOTInductor for this CPU, of the model with its codes; `onnx`, a file of standard Q/DQ
    operators, for ONNX Runtime, OpenVINO and others; `fbgemm`, the embedding tables alone; `vllm`, `sglang` or
    `transformers`, a compressed-tensors checkpoint. uncertified: also a map without a certificate. checkpoint: the Hugging
    Face folder that the model came from, which such a checkpoint is written from; by default the one that the model's config
    names. Returns what was written, and what was measured of it.

    Raises PremiseMismatch for a map of another model, MapError for one that cannot be read, is not certified or changes
    nothing, DeployError for what the engine cannot express, naming layers and reasons, MissingExtra where the target's
    extra is missing, SaveError for a folder that is not empty or cannot be written.
    """
    if to not in WRITERS:
        raise InputError(f"expected a target out of {', '.join(WRITERS)}, got {to!r}")
    if not isinstance(precision_map, PrecisionMap):
        precision_map = PrecisionMap.load(precision_map)
    if checkpoint is not None and WRITERS[to] != _CHECKPOINT:
        raise InputError(f"{to} is made of the model alone; expected no checkpoint, got {str(checkpoint)!r}")
    given = shipped(task, precision_map, uncertified=uncertified, progress=progress)
    given = replace(given, to=to, checkpoint=None if checkpoint is None else Path(checkpoint))
    write: Callable[[Shipped, Path], Exported] = import_module(WRITERS[to]).write
    with new_folder(Path(output)) as folder:
        found = write(given, folder)
        found.save(folder)
    return found
