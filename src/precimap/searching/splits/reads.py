"""Which parts of a batch the task's forward and loss read, seen while they run.

Invariant: they are given what they would have been given, a dict with the same content; what they ask of it is noted. A unit
is known by what the model is told of it, so that a row number, or a key that nobody reads, makes no unit another one. Only
dicts can be watched; of every other batch all parts count as read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Reads:
    """The paths that the forward and the loss read of a batch; None: all of them, or not known.

    counts: the path of something that has a row for each unit, as the first batch was scored; None: not known.
    """

    forward: frozenset[Path] | None = None
    loss: frozenset[Path] | None = None
    counts: Path | None = None

    def is_input(self, path: Path) -> bool:
        """Whether the forward reads what lies at `path`."""
        return self.forward is None or _within(path, self.forward)

    def is_judged(self, path: Path) -> bool:
        """Whether the loss reads what lies at `path`."""
        return self.loss is None or _within(path, self.loss)


class WatchedDict(dict[Any, Any]):
    """A dict that notes which of its keys were read, and those of the dicts in it."""

    def __init__(self, content: dict[Any, Any], read: set[Path], path: Path = ()) -> None:
        super().__init__({k: WatchedDict(v, read, (*path, k)) if type(v) is dict else v for k, v in content.items()})
        self._read, self._path = read, path

    def _note(self, key: Any) -> None:
        if key in self and not isinstance(super().get(key), WatchedDict):
            self._read.add((*self._path, key))

    def _note_all(self) -> None:
        for key in self:
            self._note(key)
            inner = super().get(key)
            if isinstance(inner, WatchedDict):
                inner._note_all()

    def __iter__(self) -> Iterator[Any]:  # its own, so that ** and dict(...) ask for each key
        return super().__iter__()

    def __getitem__(self, key: Any) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self._note(key)
        return super().pop(key, *default)

    def values(self) -> Any:
        self._note_all()
        return super().values()

    def items(self) -> Any:
        self._note_all()
        return super().items()

    def copy(self) -> dict[Any, Any]:
        self._note_all()
        return dict(super().items())


def watched(batch: Any, read: set[Path]) -> Any:
    """The batch to give to a function, which adds to `read` what it reads; as it is where it cannot be watched."""
    return WatchedDict(batch, read) if type(batch) is dict else batch


def _within(path: Path, read: frozenset[Path]) -> bool:
    """Itself, or within something that was read."""
    return any(path[: len(one)] == one for one in read)
