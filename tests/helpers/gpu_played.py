"""A CPU in the place of a GPU with FP8: graphs and clocks played by the host, for tests of what surrounds them.

What computes is what would compute there, for `_scaled_mm` has a CPU kernel. What only a device can do (record a graph, time
by its own clock, say what memory it gave out) is replaced by its definition. Nothing that is measured with it is a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from helpers.planted_times import HERE
from precimap.layers.target import BASE, Turns
from precimap.runtime import timing
from precimap.runtime.nvidia import graph_calls, graphs, layer_timer, target, whole_timer
from precimap.runtime.nvidia.graphs import Captured
from precimap.runtime.nvidia.layer_timer import CudaTimer
from precimap.runtime.nvidia.whole_timer import CudaWholeTimer
from precimap.runtime.timing import interleaved


@torch.no_grad()
def played(model: nn.Module, example: tuple[Any, ...], pool: Any = None) -> tuple[Captured, Any]:
    """What a graph does, on the host: the same tensors in, the same tensors out, whatever they hold."""
    arguments = tree_map_only(Tensor, torch.clone, example)
    outputs = model(*arguments)

    @torch.no_grad()
    def replay() -> None:
        again = model(*arguments)
        for old, new in zip(graphs._tensors(outputs), graphs._tensors(again), strict=True):
            old.copy_(new)

    return Captured(arguments, outputs, replay), (pool or 0) + 1


def plant_times(patch: pytest.MonkeyPatch, seconds: Mapping[str, float]) -> None:
    """Seconds by how the name of a scheme or of a whole model begins, one where nothing is said: then layers are chosen."""

    def of(name: str) -> list[float]:
        found = max((start for start in seconds if name.startswith(start)), key=len, default=None)
        return [1.0 if found is None else seconds[found]] * 5

    def layers(_: CudaTimer, module: nn.Module, forms: Mapping[str, Any], *__: int) -> Turns:
        return Turns({name: of(name) for name in (BASE, *forms)}, {})

    def wholes(_: CudaWholeTimer, cases: Mapping[str, Callable[[], object]], __: float) -> dict[str, list[float]]:
        for call in cases.values():
            call()
            call()
        return {name: of(name) for name in cases}

    patch.setattr(CudaTimer, "seconds", layers)
    patch.setattr(CudaWholeTimer, "turns", wholes)


def play_a_gpu(patch: pytest.MonkeyPatch, compiler: bool = False) -> None:
    """Until the patch is undone. compiler: let Inductor make code; else its graphs run op by op, which takes no seconds."""
    patch.setattr(target, "missing_hardware", lambda *_: None)
    patch.setattr(graphs, "capture", played)
    patch.setattr(graph_calls, "capture", played)
    patch.setattr(layer_timer, "capture", played)
    patch.setattr(layer_timer, "event_seconds", lambda replays, turns, _: interleaved(replays, turns))
    patch.setattr(layer_timer, "device_here", lambda: HERE)
    patch.setattr(whole_timer, "device_here", lambda: HERE)
    patch.setattr(timing, "_wait_for", lambda _: None)
    patch.setattr(CudaWholeTimer, "peak_memory", lambda *_: 1000)
    patch.setattr(CudaWholeTimer, "peak_flops", lambda *_: 1e9)
    if not compiler:
        import torch._inductor.compile_fx  # warns of parts of its own

        patch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, _: graph.forward)
