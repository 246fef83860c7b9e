"""The time and the memory of whole models on this GPU: eager, compiled, and as CUDA graphs.

Invariant: forms are timed in turns on one batch, each called once untimed just before, by the host's clock and with the
device idle at both ends: what a caller waits for. Memory is what torch's allocator gave out for a call; what graphs hold
between calls is in no call. The graphs are of the code that the compiled form runs, which is compiled once for both.
"""

import functools
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from precimap.hardware_profile import Device
from precimap.layers.quantized import QuantizedLayer
from precimap.runtime.compiling.compiled import COMPILED, EAGER, GRAPHS, check_compiled, forms_of
from precimap.runtime.nvidia.graph_calls import MOST_SHAPES, beside
from precimap.runtime.nvidia.layer_timer import device_here
from precimap.runtime.timing import interleaved, turns_within

SIDE, TRIES = 8192, 5  # of the product that a peak is measured with


@dataclass(frozen=True, slots=True)
class CudaWholeTimer:
    """deployed: puts layers in low precision, in a tree of its own."""

    deployed: Callable[[nn.Module, Mapping[str, QuantizedLayer]], nn.Module]
    served: str = EAGER
    casts: tuple[torch.dtype, ...] = (torch.bfloat16,)

    def device(self) -> Device:
        return device_here()

    def forms(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Mapping[str, Callable[[], nn.Module]]:
        """As it is, with its calls compiled by Inductor with frozen weights, and as graphs of those over the same parts."""
        made = dict(forms_of(self.deployed, model, layers))
        made[COMPILED] = functools.cache(made[COMPILED])
        return {**made, GRAPHS: lambda: beside(made[COMPILED]())}

    def most_shapes(self, form: str) -> int | None:
        return MOST_SHAPES if form == GRAPHS else None

    def check(self, model: nn.Module) -> None:
        check_compiled(model)

    def turns(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        return turns_within(seconds, cases, device=torch.device("cuda"))

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        call()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def peak_flops(self, dtype: torch.dtype) -> float:
        a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.float32).to(dtype) for _ in range(2))
        seconds = interleaved({"product": lambda: a @ b}, TRIES, device=a.device)["product"]
        return 2 * SIDE**3 / min(seconds)
