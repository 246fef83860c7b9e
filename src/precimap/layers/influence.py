"""Which layers can change the output at all.

A trace carries, for every storage, the set of layers whose results went into it. It errs on the side of influence, but
values that leave torch (numpy, `.item()`) leave the trace; so a layer that seems to be dead is confirmed by disturbing
it: it is dead only if the output stays the same to the bit.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from precimap.errors import FAILURES
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.ops import Arguments, call_name
from precimap.layers.storages import storages_of
from precimap.user_code import called


class InfluenceTrace:
    """Storage -> names of the layers whose results it holds."""

    def __init__(self) -> None:
        self._layers: dict[int, frozenset[str]] = {}

    def after(self, func: Any, arguments: Arguments, output: Any, layer: str | None) -> None:
        """Record one call: everything it read, and the layer it was, now influence what it wrote."""
        gathered: frozenset[str] = frozenset() if layer is None else frozenset({layer})
        for key in storages_of((*arguments.args, *arguments.kwargs.values())):
            gathered |= self._layers.get(key, frozenset())
        written = storages_of((output, arguments.kwargs.get("out")))
        if call_name(func) == "__setitem__":
            written += storages_of(arguments.args[:1])
        for key in written:
            # A fresh storage may sit where an old one was, so the old record does not count; a call that writes in
            # place reads that storage too, so its record is already gathered.
            self._layers[key] = gathered

    def without_influence(self, output: Tensor, layers: Iterable[str]) -> tuple[str, ...]:
        reached: frozenset[str] = frozenset()
        for key in storages_of((output,)):
            reached |= self._layers.get(key, frozenset())
        return tuple(name for name in layers if name not in reached)


class _Disturbed(Interception):
    """Replaces what the layer returns by other finite values."""

    def on_weight(self, call: WeightCall) -> Any:
        output = call.run()
        return call.written(output.mul(-1.5).add(0.25)) if isinstance(output, Tensor) else output


def confirmed_dead(
    model: nn.Module,
    forward: Callable[[Any, Any], Tensor],
    batch: Any,
    suspects: Iterable[str],
    weights: Mapping[str, nn.Parameter],
) -> dict[str, str]:
    """Those suspects whose disturbance leaves every bit of the output as it was, with the reason."""
    suspects = tuple(suspects)
    if not suspects:
        return {}
    with torch.no_grad():
        with Interception({}), called("forward", "the first batch"):
            before = forward(model, batch).clone()  # it may be memory of the model's own, which the next call writes
        dead = {}
        for name in suspects:
            try:
                with _Disturbed({name: weights[name]}):
                    after = forward(model, batch)
            except FAILURES:  # other values of it are not even possible, so they matter
                continue
            if torch.equal(before, after):
                dead[name] = "its result does not reach the output"
    return dead
