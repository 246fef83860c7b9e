"""Small tasks with a known truth, for tests of the search."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import EMULATED, Scheme, Splits, Task, discover
from precimap.layers.inventory import Inventory
from precimap.layers.target import Target
from precimap.metrics import Loss
from precimap.runtime.x86.target import CpuInt8
from precimap.searching.calibrate import InputRanges
from precimap.searching.eligibility import eligibility
from precimap.searching.run import Parts, Pass, Run, scored
from precimap.searching.subject import Subject

INPUTS, CLASSES = 64, 16
NO_RANGES = InputRanges({})


def subject_on(
    run: Run,
    schemes: Sequence[Scheme],
    inventory: Inventory | None = None,
    calibration: InputRanges = NO_RANGES,
    target: Target = EMULATED,
) -> Subject:
    """What a search works with, without a search."""
    task = run.task
    found = inventory or discover(task.model, task.forward, next(iter(task.splits.search)))
    return Subject(
        run=run,
        inventory=found,
        schemes=tuple(schemes),
        target=target,
        eligibility=eligibility(found, schemes, target, ()),
        calibration=calibration,
    )


def baseline_named(run: Run, name: str) -> Parts:
    """The search split under the model as given, written down under a name."""
    split, model = run.task.splits.search, run.task.model
    return scored(run, Pass(kind="baseline", of=name, batches=split, running=lambda: EMULATED.running(model, {})))


class CountedInt8(CpuInt8):
    """This CPU, whose layers are chosen by FLOPs: the INT8 products of layers as small as these take longer here."""

    timer = None  # type: ignore[assignment]
    whole_timer = None  # type: ignore[assignment]


COUNTED_INT8 = CountedInt8()


class Planted(nn.Module):
    """A classifier with one layer that per-tensor FP8 cannot hold, and one whose result goes nowhere.

    Row 0 of `outlier` is a million times larger than the rest and its output is not used: one scale for the whole
    weight flushes all useful rows to zero, a scale for each channel does not.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.first = nn.Linear(INPUTS, 128)
        self.outlier = nn.Linear(128, 64)
        self.dead = nn.Linear(64, 32)
        self.last = nn.Linear(64, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            self.outlier.weight[0] *= 1e7

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.outlier(torch.relu(self.first(x)))
        mask = torch.ones(64)
        mask[0] = 0
        hidden = torch.relu(hidden * mask)
        self.dead(hidden)
        return 4 * self.last(hidden)


def batches(model: nn.Module, units: int, seed: int, size: int = 125) -> list[dict[str, Tensor]]:
    """Inputs, and labels that the model gets right most of the time."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, INPUTS, generator=generator)
    with torch.no_grad():
        scores = model(x)
    labels = (scores + torch.randn(scores.shape, generator=generator)).argmax(1)
    return [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, units, size)]


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"])
    return scores


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(scores, batch["labels"], reduction="none")


def planted_task(units: int = 500, **changes: Any) -> Task:
    """A Task around `Planted`; `changes` replace fields of it."""
    model = Planted().eval()
    splits = Splits(batches(model, 250, 1), batches(model, units, 2), batches(model, 2 * units, 3))
    fields: dict[str, Any] = {"splits": splits, "forward": forward, "loss": loss, "metric": Loss(), "name": "planted"}
    return Task(model, **{**fields, **changes})
