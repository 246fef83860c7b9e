"""How many different shapes a task's batches give the model, for forms that hold code for each of them.

Invariant: shapes are those of the first call of the model in each batch, which is then broken off: nothing is computed, and
what the forward pads or cuts before it calls is counted as the model meets it. Not taken: the shapes of the batches
themselves, which a forward may change.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from precimap.layers.copying import shared_copy
from precimap.searching.subject import Subject
from precimap.task import to_device


class _BrokenOff(BaseException):
    """Not an Exception: a forward that catches those is not to go on."""


def too_many_shapes(subject: Subject, most: int | None) -> str | None:
    """Why the batches of the search and the certify split have more shapes than `most`, or None."""
    if most is None:
        return None
    task = subject.run.task
    found = {shape for split in (task.splits.search, task.splits.certify) for shape in _shapes(subject, split)}
    if len(found) <= most:
        return None
    return f"the batches give the model {len(found)} different shapes, and there can be code for {most} of them"


def _shapes(subject: Subject, split: Iterable[Any]) -> set[tuple[object, ...]]:
    task, found = subject.run.task, set[tuple[object, ...]]()
    model = shared_copy(task.model)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves = tree_leaves((args, kwargs))
        found.add(tuple((tuple(v.shape), v.dtype) if isinstance(v, Tensor) else repr(v) for v in leaves))
        raise _BrokenOff

    model.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        for batch in split:
            try:
                task.forward(model, to_device(batch, task.device))
            except _BrokenOff:
                continue
    return found
