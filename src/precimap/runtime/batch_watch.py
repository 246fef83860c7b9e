"""Tells when a deployed model serves batches that its times do not speak of.

Invariant: it only looks; the answer is the same with and without it, and it says so once for a model. Rows are those of the
first tensor that the model is given: lengths of texts or lists inside a batch are not looked at.
"""

import warnings
from typing import Any

import torch
from torch import nn

from precimap.errors import BatchSizeWarning
from precimap.layers.given import leading_rows
from precimap.runtime.compiling.compiled import ServedCalls


class BatchWatch:
    """Looks at every call before it is made. fewest, most: rows that were measured."""

    def __init__(self, fewest: int, most: int) -> None:
        self._fewest, self._most = fewest, most
        self._told = False

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._told or torch.compiler.is_compiling():
            return
        rows = leading_rows(args, kwargs)
        if rows is None or self._fewest <= rows <= self._most:
            return
        self._told = True
        measured = f"{self._fewest:,}" if self._fewest == self._most else f"{self._fewest:,} to {self._most:,}"
        warnings.warn(
            f"this model was timed with batches of {measured} rows and now gets {rows:,}: its precision map may not be the "
            "fastest there. Search with --batch-sizes as you serve",
            BatchSizeWarning,
            stacklevel=2,
        )


def watch(deployed: nn.Module, fewest: int, most: int) -> None:
    """From now on a call of `deployed` with fewer or more rows warns, the first time."""
    looking, calls = BatchWatch(fewest, most), deployed._compiled_call_impl
    if isinstance(calls, ServedCalls):
        calls.before = looking  # hooks of the module are in the compiled code, which does not warn
    else:
        deployed.register_forward_pre_hook(looking, with_kwargs=True)
