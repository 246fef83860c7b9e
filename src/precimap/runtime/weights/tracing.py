"""Whether a compiler reads a call instead of running it, what it may take for constants, and what it was given.

Invariant: who counts the products in compiled code counts them against the layers that were traced, and a layer whose
values an operator read instead (a library's own, in compiled code alone) is named: it would run in base precision
without a word.
"""

import threading
from typing import Any

import torch
from torch._guards import TracingContext


class Traced(threading.local):
    """What a compiler was given while `names` was set. names: products, by layer and place in it. otherwise: layer -> the
    operator that read its decoded values, of layers in a scheme that multiplies codes."""

    def __init__(self) -> None:
        self.names: set[object] | None = None
        self.otherwise: dict[str, str] = {}

    def read(self, how: Any, by: Any) -> None:
        """The values of a low weight were. how: of which."""
        if self.names is not None and how.scheme.computes_low:
            self.otherwise[how.name] = str(by)


TRACED = Traced()


def compiling() -> bool:
    """torch 2.11 says so only of the Python that Dynamo reads, and no more while the operators found there are traced."""
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


def freezing() -> bool:
    """Whether Inductor makes constants of weights; a constant to who traces this."""
    return bool(torch._inductor.config.freezing)
