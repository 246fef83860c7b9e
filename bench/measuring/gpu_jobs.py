"""The main job on a GPU, from a task to a served model: search, certificate, deployment, and what it gains over BF16.

Invariant: everything goes through precimap's public doors (`search`, `deploy`, `compile`, `graphed`), as a user's call
would, and what is timed last is what was deployed. Each step is a part of its own, so that a step which fails or takes too
long leaves what the steps before it measured. Not taken: times from the search alone, which speak of the forms it knows.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch._dynamo
from torch import Tensor, nn

from measuring.parts import Part, Row, summary
from models.gpu_models import BF16
from precimap import CUDA_FP8, Effort, SearchResult, Serving, Task, compiled, deploy, graphed, search
from precimap.certificate import Certificate
from precimap.layers.casting import cast
from precimap.runtime.timing import interleaved, spread

SCHEMES = ("fp8", "fp8-static", "bf16")
COMPILED = "compiled"


@dataclass
class Job:
    """make: the task. given: the column of a batch that its model is called with. form: as of `Serving`. seconds: of the two
    parts. effort: of the search."""

    name: str
    make: Callable[[], Task]
    given: str
    margin: float
    form: str
    effort: Effort
    seconds: tuple[float, float]
    turns: int
    found: SearchResult | None = None
    task: Task | None = None

    def parts(self) -> list[Part]:
        return [
            Part(f"{self.name}: searched", self.seconds[0], self.searched),
            Part(f"{self.name}: served", self.seconds[1], self.served),
        ]

    def searched(self) -> Row:
        """Make the task, search it for `cuda` and certify; the whole models that the search timed."""
        start = time.monotonic()
        self.task = self.make()
        made = time.monotonic() - start
        with tempfile.TemporaryDirectory() as ledger:
            self.found = search(
                self.task,
                schemes=list(SCHEMES),
                margin=self.margin,
                target="cuda",
                effort=self.effort,
                serving=Serving(form=self.form),
                ledger=ledger,
            )
        found, times = self.found, self.found.end_to_end
        row: Row = {
            "answer": found.answer,
            "target": found.map.target,
            "certified": found.certified,
            "low": len(found.map.low),
            "layers": len(found.map.layers),
            "schemes": sorted({str(found.map.layers[name].scheme) for name in found.map.low}),
            "cast": found.map.cast,
            "certificate": _proof(found.certificate),
            "notes": list(found.preflight.notes),
            "seconds_to_make": round(made, 1),
        }
        if times is not None:
            (size,) = times.sizes
            row["microseconds"] = {form.name: 1e6 * form.seconds.median for form in size.forms}
            row["over_the_map"] = {form.name: form.ratio.median for form in size.forms}
            row["could_not_be_timed"] = times.refused
        return row

    def served(self) -> Row:
        """The map deployed: as it is, compiled and as a graph of that, against BF16 in these forms, on one batch.

        Ratios are to the fastest compiled BF16. of_peak: products of the model, by what a large BF16 product reaches here.
        """
        if self.found is None or self.task is None:
            raise RuntimeError("the search before it gave no map")
        found, task = self.found, self.task
        inputs = (task.splits.search[0][self.given],)
        base = task.model if task.base_precision == "bfloat16" else cast(task.model, "bfloat16")
        models = {BF16: base}
        if found.map.changes:
            models["map"] = deploy(task.model, found.map, target=CUDA_FP8.name)
        made = in_forms(models, inputs)
        calls = {name: (lambda form=form: form(*inputs)) for name, form in made.items()}
        with torch.no_grad():
            wanted = task.model(*inputs).float()
            changes = {name: float((call().float() - wanted).square().mean().sqrt()) for name, call in calls.items()}
            seconds = interleaved(calls, self.turns, device=inputs[0].device)
        best = min(
            (name for name in calls if name.startswith(f"{BF16}, {COMPILED}")),
            key=lambda name: np.median(seconds[name]),
        )
        units = len(inputs[0])
        flops = units * found.inventory.flops / found.inventory.units
        peak = CUDA_FP8.whole_timer.peak_flops(torch.bfloat16)
        median = {name: spread(values).median for name, values in seconds.items()}
        row: Row = {
            "certified": found.certified,
            "batch": units,
            "best_bf16": best,
            "rms_change": changes,
            "units_per_second": {name: units / value for name, value in median.items()},
            "of_peak": {name: flops / value / peak for name, value in median.items()},
            "peak_tflops": peak / 1e12,
        }
        return {**row, **summary(seconds, lambda _: best)}


def _proof(found: Certificate | None) -> Row | None:
    names = ("metric", "baseline", "drop", "error", "upper", "margin", "n", "clusters", "verdict")
    return None if found is None else {name: getattr(found, name) for name in names}


def in_forms(models: dict[str, nn.Module], inputs: tuple[Tensor, ...]) -> dict[str, nn.Module]:
    """Each model as it is, compiled, and as a graph of what was compiled."""
    made: dict[str, nn.Module] = {}
    for name, model in models.items():
        torch._dynamo.reset()
        made[f"{name}, eager"] = model
        made[f"{name}, {COMPILED}"] = compiled(model, inputs)
        made[f"{name}, {COMPILED}, graph"] = graphed(made[f"{name}, {COMPILED}"], inputs)
    return made
