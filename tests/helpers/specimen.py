"""A specimen of the zoo: a model, how its owner calls it, and one batch."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

SEED = 7
ROWS = 8


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model, how its owner calls it, one batch, and the weights (two or more dims) that cannot change its output."""

    name: str
    model: nn.Module
    forward: Callable[[Any, Any], Tensor]
    batch: Any
    dead: frozenset[str] = field(default=frozenset())

    def __call__(self) -> Tensor:
        """The output for the batch, without autograd."""
        with torch.no_grad():
            return self.forward(self.model, self.batch)


def run(specimen: Specimen, model: nn.Module) -> Tensor:
    """The output for the batch of another model in the specimen's place."""
    return replace(specimen, model=model)()


Builder = Callable[[], Specimen]


def seeded(build: Builder) -> Builder:
    """The builder, from SEED, in evaluation mode; the global random state is as before afterwards."""

    @functools.wraps(build)
    def seeded() -> Specimen:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            specimen = build()
        specimen.model.eval()
        return specimen

    return seeded


def call(model: Any, batch: Any) -> Tensor:
    """A model of one argument."""
    return model(batch)


def call_all(model: Any, batch: tuple[Any, ...]) -> Tensor:
    """A model of several."""
    return model(*batch)


def call_by_name(model: Any, batch: dict[str, Any]) -> Tensor:
    """A model of several, by name."""
    return model(**batch)
