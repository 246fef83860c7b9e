"""What a map ships, before any format: the one object that all writers write from.

Invariant: codes and scales are those of `quantize_map`, which the certificate was measured with; no writer quantises.
What is not in low precision is the model's own, realigned and cast as the map says.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from precimap.errors import MapError
from precimap.fingerprints import modules_of, of_weights
from precimap.layers.prepared import prepared
from precimap.layers.quantized import QuantizedLayer
from precimap.precision_map import PrecisionMap
from precimap.searching.progress import Progress, silent
from precimap.task import Task


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shipped:
    """model: as given, or realigned and cast, in base precision. layers: codes and scales, by name. progress: of the writer,
    a stage for each part of its work. to: the target's name. checkpoint: the folder that the model came from, for targets
    that rewrite it; None: as its config says."""

    task: Task
    map: PrecisionMap
    model: nn.Module
    layers: Mapping[str, QuantizedLayer]
    progress: Progress = silent
    to: str = ""
    checkpoint: Path | None = None

    @property
    def base(self) -> str:
        """The precision of all that has no scheme, such as `bfloat16`."""
        return self.map.cast or self.map.premise.base_precision


def shipped(task: Task, precision_map: PrecisionMap, *, uncertified: bool, progress: Progress = silent) -> Shipped:
    """Raises PremiseMismatch for a map of another model, MapError for one that is not certified, or changes nothing."""
    precision_map.check(weights=of_weights(task.model), architecture=modules_of(task.model))
    if not precision_map.changes:
        raise MapError("the map keeps every layer at base precision; there is nothing to export")
    why = precision_map.not_certified
    if why is not None and not uncertified:
        raise MapError(
            f"this map is not certified: {why}. Judge it with precimap certify first, or say --uncertified "
            "(uncertified=True) to export it all the same"
        )
    model, layers = prepared(task.model, precision_map)
    return Shipped(task=task, map=precision_map, model=model, layers=layers, progress=progress)
