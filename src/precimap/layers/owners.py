"""Whose weight is it: which plain torch modules read a weight themselves, so that a module swap can serve it.

Invariant: an owner is named only when every call of the batch that read the weight came from it; a weight that anything
else reads would be missing there after a swap. Exact types: a subclass may do anything with its weight.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn
from torch.utils.hooks import RemovableHandle

from precimap.layers.views import plain_name

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_OWNERS = (nn.Linear, *_TABLES)


@dataclass(frozen=True, slots=True)
class Owners:
    """Weight name -> the module that owns it, and how often that module was called; and which modules run just now."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    running: list[str] = field(default_factory=list)

    @property
    def here(self) -> str:
        """The innermost module that runs, such as `tower.lstm (LSTM)`."""
        return self.running[-1] if self.running else "outside of any module"

    def left(self) -> None:
        """A module has returned. No value, which a hook would put in place of the module's result."""
        self.running.pop()

    def alone(self, name: str, calls: int) -> nn.Module | None:
        """The owner, if all `calls` that read the weight were its own."""
        return self.modules.get(name) if self.calls[name] == calls else None


@contextmanager
def owners(model: nn.Module) -> Iterator[Owners]:
    """Watch the calls of every module, and count those of plain nn.Linear, nn.Embedding and nn.EmbeddingBag by weight.

    Hooks on the modules themselves, taken off again: torch.compile warns about hooks that are global.
    """
    found = Owners()
    hooks: list[RemovableHandle] = []
    for path, module in model.named_modules():
        said = f"{plain_name(path) or 'the model'} ({type(module).__name__})"
        hooks.append(module.register_forward_pre_hook(lambda *_, said=said: found.running.append(said)))
        hooks.append(module.register_forward_hook(lambda *_: found.left(), always_call=True))
        if type(module) in _OWNERS:
            name = plain_name(f"{path}.weight".lstrip("."))
            found.modules[name] = module
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: found.calls.update([name])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def module_of(model: nn.Module, name: str) -> nn.Module:
    """The module whose weight has this name. Raises KeyError when there is none."""
    named = {plain_name(f"{path}.weight".lstrip(".")): module for path, module in model.named_modules()}
    found: nn.Module = named[name]
    return found


def why_not_packed(module: nn.Module | None) -> str | None:
    """Why a module of packed rows cannot take this module's place, or None."""
    if type(module) not in _TABLES or not isinstance(module, _TABLES):
        return "not read by an nn.Embedding or nn.EmbeddingBag of its own; packed rows are served by a swap of those"
    if module.max_norm is not None:
        return "its rows are normalised as they are read (max_norm); packed rows cannot be written"
    if isinstance(module, nn.EmbeddingBag) and module.mode == "max":
        return "it takes the largest of its rows (mode max); the operators for packed rows add them up"
    return None
