"""Is a parameter that no call was seen to read really not read? It is changed, and the output looked at.

Invariant: the model is bit for bit as it was afterwards, also when the forward fails, and its versions have not moved. All
suspects are changed together, so that a model without a secret costs one forward; only where the output moves are they
parted, in at most `MOST_PASSES` passes. Not taken: a copy of the model with other parameters, which a forward that closes
over the model, or holds the parameter's memory under another name (as C++ does), would not read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import FAILURES
from precimap.layers.interception import Interception
from precimap.layers.storages import parts

MOST_PASSES = 32
READ_UNSEEN = "read where it cannot be seen (another thread, compiled code): the output changes with it"
NEVER_READ = "never read: no call of this batch used it"
_SHARED = "no call was seen to read it; whether any does was not tested, for its memory is shared with other processes"
_UNSTEADY = "no call was seen to read it, and whether any does cannot be told: the output differs from call to call"

Forward = Callable[[Any, Any], Tensor]


def told_apart(
    model: nn.Module, forward: Forward, batch: Any, output: Tensor, suspects: Mapping[str, Tensor]
) -> dict[str, str]:
    """What to say of each suspect. output: of the batch as it was watched."""
    told = dict.fromkeys(suspects, NEVER_READ)
    shared = [name for name, suspect in suspects.items() if _is_shared(suspect)]
    told |= dict.fromkeys(shared, _SHARED)
    testable = [
        n for n, suspect in suspects.items() if n not in shared and parts(suspect) == (suspect,) and suspect.numel()
    ]
    if not testable:
        return told
    passes = _Passes(model, forward, batch, suspects)
    after = passes.with_changed(testable)
    if after is not None and _same(after, output):
        return told
    plain = passes.with_changed(())  # watched, a model may take other paths to another last bit
    if plain is None or not _same_or_none(passes.with_changed(()), plain):
        return told | dict.fromkeys(testable, _UNSTEADY)
    if _same_or_none(after, plain):
        return told
    for group in _readers(testable, lambda names: not _same_or_none(passes.with_changed(names), plain), passes):
        among = "" if len(group) == 1 else f", or with another of {len(group)}"
        told |= dict.fromkeys(group, READ_UNSEEN + among)
    return told


def _is_shared(suspect: Tensor) -> bool:
    """Whether another process sees what is written; torch says so of every tensor on a GPU."""
    return suspect.device.type == "cpu" and bool(suspect.is_shared())  # type: ignore[no-untyped-call]


class _Passes:
    def __init__(self, model: nn.Module, forward: Forward, batch: Any, suspects: Mapping[str, Tensor]) -> None:
        self._run: Callable[[], Tensor] = lambda: forward(model, batch)
        self._suspects = suspects
        self.done = 0

    def with_changed(self, names: Sequence[str]) -> Tensor | None:
        """The output with these parameters changed; None where the forward fails with them, which says that they matter."""
        self.done += 1
        try:
            with _changed([self._suspects[name] for name in names]), torch.no_grad(), Interception({}):
                return self._run().detach().clone()
        except FAILURES:
            return None


def _readers(names: list[str], matters: Callable[[list[str]], bool], passes: _Passes) -> Iterator[list[str]]:
    """The names that matter, one by one as far as the passes go. `names` together do."""
    waiting = [names]
    while waiting:
        group = waiting.pop()
        if len(group) == 1 or passes.done + 2 > MOST_PASSES:
            yield group
            continue
        halves = (group[: len(group) // 2], group[len(group) // 2 :])
        first = matters(halves[0])
        waiting += [half for half, moves in zip(halves, (first, not first or matters(halves[1])), strict=True) if moves]


@contextmanager
def _changed(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Other values inside the block. Written through `data`, which moves no version that somebody counts."""
    kept = [(parameter, parameter.data.clone()) for parameter in parameters]
    try:
        for parameter, _ in kept:
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                _change(parameter.data)
        yield
    finally:
        for parameter, before in kept:
            with torch.inference_mode(parameter.is_inference()), torch.no_grad():
                parameter.data.copy_(before)


def _change(values: Tensor) -> None:
    if values.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128):
        values.mul_(-1.5).add_(0.25)
    elif values.dtype is torch.bool:
        values.logical_not_()
    else:
        values.copy_((values.contiguous().view(torch.uint8) ^ 1).view(values.dtype).view(values.shape))


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(torch.eq(first, second).logical_or((first != first) & (second != second)).all())


def _same_or_none(first: Tensor | None, second: Tensor) -> bool:
    return first is not None and _same(first, second)
