"""Calls of a model as its task makes them: what an exporter traces, and what may vary from call to call.

Invariant: nothing is asked of the user. The task's forward runs on calibration batches, whole and cut to fewer units;
what it calls the model with is the example, and a size that differs between two of these calls is one that varies. A
size that was the same in all of them is fixed in what is exported, and said to be. Letting an exporter guess which sizes
vary was not taken: one that it takes for variable may have been specialised without a word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_map_only

from precimap.errors import FAILURES, DeployError
from precimap.layers.copying import shared_copy
from precimap.searching.preflight.batches import resized
from precimap.task import Task, to_device
from precimap.user_code import called

MOST_BATCHES = 8  # of the calibration split that are looked at


@dataclass(frozen=True, slots=True, eq=False)
class ModelCall:
    """One call: model(*args, **kwargs). Tensors are contiguous: what is exported is code for the strides of an example."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> tuple[list[Any], TreeSpec]:
        found: tuple[list[Any], TreeSpec] = tree_flatten((self.args, self.kwargs))
        return found

    @property
    def names(self) -> list[str]:
        """Of its tensors, as its own arguments have them: `0`, `input_ids`, `0['clicks']`."""
        named, _ = tree_flatten_with_path((self.args, self.kwargs))
        return [_name(path) for path, leaf in named if isinstance(leaf, Tensor)]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves[0] if isinstance(leaf, Tensor)]


def _name(path: tuple[Any, ...]) -> str:
    first, *rest = path[1:]  # without the place in (args, kwargs)
    return f"{getattr(first, 'key', getattr(first, 'idx', first))}{keystr(tuple(rest))}"


def contiguous(values: Any) -> Any:
    """Arguments, with every tensor in them contiguous."""
    return tree_map_only(Tensor, Tensor.contiguous, values)


@dataclass(frozen=True, slots=True, eq=False)
class Calls:
    """All alike, but for sizes; the first has most elements. batches: those of the calibration split that made them."""

    each: tuple[ModelCall, ...]
    batches: tuple[Any, ...]

    @property
    def example(self) -> ModelCall:
        return self.each[0]

    @property
    def varying(self) -> list[tuple[int, ...]]:
        """Of each tensor, the dims whose size was not always the same."""
        return [
            tuple(dim for dim in range(len(sizes[0])) if len({size[dim] for size in sizes}) > 1)
            for sizes in zip(*([tuple(t.shape) for t in call.tensors] for call in self.each), strict=True)
        ]

    @property
    def sizes(self) -> list[list[str]]:
        """Of each tensor: the number that a size is, or the letter of one that varies, the same for those that vary
        alike.
        """
        letters, found = dict[tuple[int, ...], str](), []
        for number, (tensor, dims) in enumerate(zip(self.example.tensors, self.varying, strict=True)):
            each = [tuple(call.tensors[number].shape[dim] for call in self.each) for dim in range(tensor.dim())]
            found.append(
                [
                    letters.setdefault(seen, f"n{len(letters)}" if letters else "n") if dim in dims else str(seen[0])
                    for dim, seen in enumerate(each)
                ]
            )
        return found

    def said(self, names: Sequence[str]) -> tuple[str, ...]:
        """A line for each tensor: its name, as the caller has it, its dtype and sizes."""
        return tuple(
            f"{name}: {str(tensor.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"
            for name, tensor, sizes in zip(names, self.example.tensors, self.sizes, strict=True)
        )


def calls_of(task: Task, model: nn.Module) -> Calls:
    """What the task's forward calls `model` with, on calibration batches.

    Raises DeployError for a forward that never calls the model itself, and for calls that differ in more than sizes.
    """
    watched, made = shared_copy(model), list[ModelCall]()

    def seen(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        made.append(ModelCall(*contiguous((args, kwargs))))

    watched.register_forward_pre_hook(seen, with_kwargs=True)
    batches = [to_device(batch, task.device) for batch in islice(task.splits.calibration, MOST_BATCHES)]
    with torch.no_grad():
        units = []
        for number, batch in enumerate(batches):
            with called("forward", f"batch {number} of the calibration split"):
                units.append(len(task.forward(watched, batch)))
        for size in (units[0] // 2, 2 * units[0]) if units else ():
            before = len(made)
            other = resized(batches[0], units[0], size) if size > 1 else None
            if other is not None and not _runs(task, watched, other):
                del made[before:]
    if not made:
        raise DeployError(
            "expected the task's forward to call the model itself, which is what is exported; it called parts of it "
            "only. Give the task a module whose forward is all that is served"
        )
    _check_alike(made)
    each = sorted(made, key=lambda call: -sum(tensor.numel() for tensor in call.tensors))
    return Calls(tuple(each), tuple(batches))


def _runs(task: Task, model: nn.Module, batch: Any) -> bool:
    """Whether a batch that was made of another is one to the task's forward."""
    try:
        task.forward(model, batch)
    except FAILURES:
        return False
    return True


def _check_alike(made: Sequence[ModelCall]) -> None:
    """Raises DeployError for calls that one exported program cannot be."""
    first, spec = made[0].leaves
    for call in made[1:]:
        leaves, other = call.leaves
        if other != spec:
            raise DeployError(f"the task's forward calls the model in two ways, {spec} and {other}; an export has one")
        for name, one, two in zip(range(len(first)), first, leaves, strict=True):
            if isinstance(one, Tensor) and (one.dtype, one.dim()) == (two.dtype, two.dim()):
                continue
            if isinstance(one, Tensor) or one != two:
                raise DeployError(
                    f"the task's forward calls the model with argument {name} as {_said(one)} and as {_said(two)}; "
                    "an export has one of them fixed"
                )


def _said(value: Any) -> str:
    return f"{value.dtype} with {value.dim()} dims" if isinstance(value, Tensor) else repr(value)[:60]
