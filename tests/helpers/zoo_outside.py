"""What can be seen of a model from outside: its names, ties, hooks and values."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helpers.specimen import Specimen, run


class Calls:
    """A hook that counts the calls of modules; it can be copied and pickled with them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, module: nn.Module, *_: Any) -> None:
        self.seen[type(module).__name__] += 1


def count_calls(model: nn.Module) -> None:
    calls = Calls()
    for module in model.modules():
        module.register_forward_hook(calls)


def calls_of(specimen: Specimen, model: nn.Module) -> Counter[str]:
    """How often the hooks of a copy are called in one run."""
    found = {id(hook): hook for module in model.modules() for hook in module._forward_hooks.values()}
    (own,) = (hook for hook in found.values() if isinstance(hook, Calls))
    own.seen.clear()
    run(specimen, model)
    return own.seen


def names(model: nn.Module) -> list[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Every parameter by all of its names, with its shape."""
    known: dict[int, list[str]] = {}
    shapes = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    return [(all_names[0], tuple(all_names), shapes[key]) for key, all_names in known.items()]


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """The model is bit for bit as it was after the block: values, gradients, hooks, attributes."""
    before = of_model(model)
    yield
    after = of_model(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, f"{name} of the base model has changed"


_HOOKS: tuple[Callable[[nn.Module], Any], ...] = (
    lambda module: [id(hook) for hook in module._forward_hooks.values()],
    lambda module: [id(hook) for hook in module._forward_pre_hooks.values()],
    lambda module: [id(hook) for hook in module._state_dict_hooks.values()],
)


def of_model(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[name] = parameter.detach().clone()
        found[f"{name}, as an object"] = (id(parameter), parameter.requires_grad, parameter.dtype, parameter.data_ptr())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        found[f"{name}, a buffer"] = buffer.detach().clone()
    for name, module in model.named_modules():
        found[f"{name}, a module"] = (type(module), module.training, sorted(vars(module)))
        found[f"hooks of {name}"] = [hooks(module) for hooks in _HOOKS]
    return found
