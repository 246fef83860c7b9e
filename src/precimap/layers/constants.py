"""Which tensors hold nothing of the batch: the model's buffers, and what is computed from them and from parameters alone.

Invariant: a product of a weight with such a tensor is part of computing another weight (the sigma of spectral_norm, a basis
that is mixed), not a layer; what reads the result later multiplies something that no code of the parameter stands for. A
tensor is constant in the version in which it was found so: a buffer into which the batch is written is none any more.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from precimap.layers.contents import version_of


@dataclass(frozen=True, slots=True)
class Origin:
    """The parameters from which a constant tensor is computed, none for buffers alone; and by which call."""

    names: frozenset[str]
    through: str


_BUFFER = Origin(frozenset(), "")


class Constants:
    """Follows constant tensors by identity. They are held, so that an id stays its tensor's own."""

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._known: dict[int, tuple[Tensor, int, Origin]] = {}
        for buffer in buffers:
            self._add(buffer, _BUFFER)

    def find(self, value: Any) -> Origin | None:
        found = self._known.get(id(value))
        return found[2] if found is not None and version_of(found[0]) == found[1] else None

    def origin(self, read: Iterable[Tensor | str], through: str) -> Origin | None:
        """What the result of a call would be that reads these tensors and parameters (by name), before it is made.

        None where it is not constant, and where nothing is read: what is made of nothing may have the batch's size.
        """
        names, count = set[str](), 0
        for value in read:
            count += 1
            if isinstance(value, str):
                names.add(value)
            elif (known := self.find(value)) is None:
                return None
            else:
                names |= known.names
        return Origin(frozenset(names), through) if count else None

    def add(self, origin: Origin, read: Iterable[Tensor], output: Any) -> None:
        """A call with a constant result is over; what it wrote in place is constant still, in another version."""
        for one in read:
            known = self._known.get(id(one))
            if known is not None and known[1] != version_of(one):
                self._add(one, origin)
        for one in output if isinstance(output, tuple | list) else (output,):
            if isinstance(one, Tensor) and id(one) not in self._known:
                self._add(one, origin)

    def _add(self, tensor: Tensor, origin: Origin) -> None:
        self._known[id(tensor)] = (tensor, version_of(tensor), origin)
