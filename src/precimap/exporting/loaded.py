"""load_exported(): an exported folder as a model again, that its engine computes.

Invariant: it is called as the original model is and returns what that returns, so that a task's own forward runs on the
engine, and `precimap.compare` certifies the map on what serves it. An engine that the export saw computing another model is
refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precimap.errors import DeployError, InputError, MissingExtra
from precimap.exporting.aoti import PACKAGE
from precimap.exporting.call_structure import Structure
from precimap.exporting.exported import Exported
from precimap.exporting.int8_tokens_served import LIBRARY
from precimap.exporting.onnx_engines import ENGINES, EXTRAS
from precimap.exporting.onnx_qdq import MODEL

AOTI = "aoti"


class ExportedModel(nn.Module):
    """A model without parameters, whose calls an engine answers. exported: what the export says of itself."""

    def __init__(self, call: Callable[..., Any], exported: Exported, engine: str) -> None:
        super().__init__()
        self._call, self.exported, self.engine = call, exported, engine
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ExportedModel":
        return self  # nothing of it can be written


def load_exported(folder: str | Path, *, engine: str | None = None) -> ExportedModel:
    """The model that `precimap.export` wrote into the folder, run by an engine on this CPU.

    engine: of a folder for `onnx`, `onnxruntime`, `openvino` or `openvino-bf16` (all that has no scheme in BF16), by default
    the first that the export proved; of one for `aoti`, that. Hand the model to the task's forward, or to
    `precimap.compare` with the task.

    Raises MapError for a folder that is no export, InputError for an engine that does not load it, MissingExtra where the
    engine is not installed, DeployError for one that computed another model when it was exported.
    """
    folder = Path(folder)
    exported = Exported.load(folder)
    engines = {"aoti": (AOTI,), "onnx": tuple(ENGINES)}.get(exported.to, ())
    if engine is None and engines:
        proven = [found.engine for found in exported.served if found.refused is None]
        engine = proven[0] if proven else engines[0]
    if engine not in engines:
        raise InputError(
            f"{folder} was exported for {exported.to}; expected an engine out of {', '.join(engines) or 'none'}, "
            f"got {engine!r}"
        )
    if engine == AOTI:
        return ExportedModel(_package(folder), exported, AOTI)
    for found in exported.served:
        if found.engine == engine and found.refused is not None:
            raise DeployError(f"{engine} must not serve {folder}: {found.refused}")
    try:
        running = ENGINES[engine](folder / MODEL)
    except ImportError as error:
        raise MissingExtra(f"{engine} is not installed: pip install 'precimap[{EXTRAS[engine]}]'") from error
    return ExportedModel(Structure.load(folder).calling(running.call), exported, engine)


def _package(folder: Path) -> Callable[..., Any]:
    if (folder / LIBRARY).exists():
        torch.ops.load_library(str(folder / LIBRARY))  # type: ignore[no-untyped-call]
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(folder / PACKAGE))
    return loaded
