"""The results of one batch's baseline pass, for the probes of the same batch.

Invariant: a result is given only while it is what the call returned. Two rules keep it so: before a call changes a
recorded result in place, the recording takes a copy; and a recorded storage is in the hands of one user at a time,
everyone else gets a copy, also whoever keeps a result beyond the pass.
"""

import functools
import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from precimap.layers.contents import Content, Contents, address_of, tensors_in


@dataclass(slots=True, kw_only=True, eq=False)
class Call:
    """One recorded call: the contents it wrote, by number, and its result while the recording holds it.

    output: a copy of the result's structure with the recording's own tensors in it, or None. holders: storage address
    -> how many of these tensors are on it. to_copy: the model changes this result in place after the call.
    """

    numbers: tuple[int, ...]
    output: Any = None
    tensors: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    holders: dict[int, int] = field(default_factory=dict)
    contents: dict[int, Content] = field(default_factory=dict)
    bytes: int = 0
    to_copy: bool = False


class Recording:
    """The results of one batch's baseline pass, up to `limit_bytes` of them.

    replayed, computed: calls of all probes that were answered from here, and that were run (reads and pure views aside).
    bytes: what is held now. evicted: results given up for the limit, the cheapest to compute per byte first.
    """

    def __init__(self, limit_bytes: float) -> None:
        self.limit_bytes = limit_bytes
        self.replayed = 0
        self.computed = 0
        self.evicted = 0
        self.bytes = 0
        self.complete = False
        self._calls: dict[Any, Call] = {}
        self._owners: dict[int, Call] = {}
        self._cheapest: list[tuple[float, int, Call]] = []
        self._contents: dict[int, Content] = {}
        self._numbers = itertools.count()

    def contents(self) -> Contents:
        """The contents at the start of a pass, which numbers new ones only while recording."""
        return Contents((lambda: None) if self.complete else self._numbers.__next__, self._contents)

    def finish(self, contents: Contents, given: Iterable[Call] | None) -> None:
        """A pass is over, and gave out these results; None for the baseline pass, after which passes are probes.

        What outlives a pass (outputs, caches) belongs to its user: the recording takes copies.
        """
        for call in self._calls.values() if given is None else given:
            if call.output is not None and self._in_use(call):
                self._separate(call)
        if given is None:
            contents.drop_freed()
            self._contents = contents.here
            self.complete = True
        else:  # a version does not tell of writes through `.data`
            self._contents.update({a: c for a, c in contents.here.items() if a in self._contents})

    def clear(self) -> None:
        """Forget everything: the pass did not end."""
        for call in self._calls.values():
            self.forget(call)
        self._calls.clear()
        self._cheapest.clear()

    def find(self, key: Any) -> Call | None:
        return self._calls.get(key)

    def add(self, key: Any, written: int) -> Call:
        """A call seen for the first time, which wrote so many storages."""
        call = self._calls[key] = Call(numbers=tuple(next(self._numbers) for _ in range(written)))
        return call

    def keep(self, call: Call, output: Any, seconds: float) -> None:
        """Hold the result of a call that took so many seconds, if there is room for it."""
        self._hold(call, _mapped(output, Tensor.detach))
        heapq.heappush(self._cheapest, (seconds / max(call.bytes, 1), call.numbers[0], call))
        while self.bytes > self.limit_bytes:
            _, _, cheapest = heapq.heappop(self._cheapest)
            self.evicted += cheapest.output is not None
            self.forget(cheapest)

    def give(self, call: Call, contents: Contents) -> Any:
        """The call's result for the model to use, or None where it is not held any more."""
        self._forget_if_changed(call)
        if call.output is None:
            return None
        if call.to_copy or self._in_use(call):
            output = _copied(call.output)
            for tensor, number in zip(one_per_storage(tensors_in((output,))), call.numbers, strict=True):
                contents.write(tensor, number)
            return output
        contents.here.update(call.contents)
        return _mapped(call.output, Tensor.detach)

    def before_write(self, tensor: Tensor) -> None:
        """The tensor's values are about to change: take a copy if they are a recorded result."""
        call = self._owners.get(address_of(tensor))
        if call is not None:
            call.to_copy = True
            self._separate(call)

    def after_write(self, tensor: Tensor) -> None:
        """The tensor's values have changed, which nobody knew before: a recorded result among them is lost."""
        call = self._owners.get(address_of(tensor))
        if call is not None:
            self.forget(call)

    def forget(self, call: Call) -> None:
        """Hold the result no longer; probes compute it."""
        for address in call.holders:
            self._owners.pop(address, None)
        self.bytes -= call.bytes
        call.output, call.tensors, call.versions, call.holders, call.contents, call.bytes = None, [], [], {}, {}, 0

    def distrust(self, call: Call) -> None:
        """The same call gave other values: neither its result nor what follows from it is known."""
        self.forget(call)
        call.numbers = ()

    def _hold(self, call: Call, output: Any) -> None:
        call.output, call.tensors = output, tensors_in((output,))
        call.versions = [tensor._version for tensor in call.tensors]
        call.holders, known = {}, Contents(lambda: None, {})
        for tensor in call.tensors:
            call.holders[address_of(tensor)] = call.holders.get(address_of(tensor), 0) + 1
        first = one_per_storage(call.tensors)
        for tensor, number in zip(first, call.numbers, strict=True):
            known.write(tensor, number)
            self._owners[address_of(tensor)] = call
        call.contents = known.here
        call.bytes = sum(tensor.untyped_storage().nbytes() for tensor in first)
        self.bytes += call.bytes

    def _separate(self, call: Call) -> None:
        """Move the result to storages of the recording's own."""
        self._forget_if_changed(call)
        if call.output is None:
            return
        output = _copied(call.output)
        self.forget(call)
        self._hold(call, output)

    def _forget_if_changed(self, call: Call) -> None:
        """A version that moved without `before_write` tells of a change that no mode saw."""
        if [tensor._version for tensor in call.tensors] != call.versions:
            self.forget(call)

    @staticmethod
    def _in_use(call: Call) -> bool:
        alone = _uses_alone()
        return any(_uses(address) > holders + alone for address, holders in call.holders.items())


def one_per_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        found.setdefault(address_of(tensor), tensor)
    return list(found.values())


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output with each tensor changed; tuples, named tuples and lists are made anew."""
    if isinstance(output, Tensor):
        return change(output)
    if not isinstance(output, tuple | list):
        return output
    items = [_mapped(item, change) for item in output]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _copied(output: Any) -> Any:
    """The output on storages of its own, with the same layout: zero strides and holes stay as they are."""
    storages: dict[int, torch.UntypedStorage] = {}

    def copy(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage.clone()  # type: ignore[no-untyped-call]
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride())

    return _mapped(output, copy)


def _uses(address: int) -> int:
    """How many tensors (and wrappers of the storage) share the storage."""
    uses: int = torch._C._storage_Use_Count(address)
    return uses


@functools.cache
def _uses_alone() -> int:
    """What `_uses` counts beside the tensors: a storage that Python has looked at counts its wrapper, or not."""
    tensor = torch.empty(1)
    return _uses(address_of(tensor)) - 1
