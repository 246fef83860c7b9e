"""A forward that writes where it reads: into its own weights, its buffers or the batch it was given.

Invariant: found by what torch counts (each tensor has the number of writes to it) and said by name; such a model scores a
batch otherwise the second time, and looks as if it drew random numbers.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from precimap.errors import TaskError
from precimap.layers.emulation import quantized
from precimap.layers.views import plain_name
from precimap.task import Task
from precimap.user_code import called

_ROWS = 1 << 16  # of a table, copied at a time


def check_tables(model: nn.Module) -> None:
    """Raises TaskError for a table whose rows are rewritten as they are read: one that is beyond its own `max_norm`."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
            continue
        if _is_beyond(module.weight.detach(), module.max_norm, module.norm_type):
            raise TaskError(
                f"the table {plain_name(name)} has max_norm={module.max_norm:g} and rows beyond it: every lookup rewrites "
                "those rows in place, so the model changes while it is measured. Shorten them once and for all, under "
                f"torch.no_grad(): table.weight.renorm_({module.norm_type:g}, 0, {module.max_norm:g}); table.max_norm = None"
            )


def _is_beyond(weight: Tensor, max_norm: float, norm_type: float) -> bool:
    """Whether a lookup of all rows would change one, by the op that does it."""
    for rows in torch.split(weight, _ROWS):
        read = rows.clone()
        torch.embedding_renorm_(read, torch.arange(len(rows), device=rows.device), max_norm, norm_type)
        if not torch.equal(read, rows):
            return True
    return False


def written_by(task: Task, batch: Any) -> str | None:
    """What one forward of `batch` writes to, as a sentence with what to do; None where it writes to nothing it is given."""
    watched = list(_watched(task, batch))
    before = [tensor._version for _, tensor in watched]
    with torch.no_grad(), quantized(task.model, {}), called("forward", "the first batch of the search split"):
        task.forward(task.model, batch)
    changed = [name for (name, tensor), version in zip(watched, before, strict=True) if tensor._version != version]
    if not changed:
        return None
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return (
        f"forward changes in place what it is given: {', '.join(changed[:3])}{more}. Work on copies there (x = x - mean, "
        "not x.sub_(mean)); max_norm of a table does it, too"
    )


def _watched(task: Task, batch: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that can be counted: those of inference mode cannot."""
    found: list[tuple[str, Any]] = [(f"the parameter {plain_name(n)}", x) for n, x in task.model.named_parameters()]
    found += [(f"the buffer {plain_name(n)}", x) for n, x in task.model.named_buffers()]
    leaves, _ = tree_flatten_with_path(batch)
    found += [(f"the batch's {''.join(map(str, path)) or 'tensor'}", leaf) for path, leaf in leaves]
    return ((name, tensor) for name, tensor in found if isinstance(tensor, Tensor) and not tensor.is_inference())
