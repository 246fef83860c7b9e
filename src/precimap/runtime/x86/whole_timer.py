"""The time and the memory of whole models on this CPU, eager and compiled.

Invariant: forms are timed in turns on one batch, each called once untimed just before (`timing.interleaved`), by the clock
that a device names. Memory is what torch's allocator gave out, which is all that a model's tensors take; pages that the
process keeps for later are not in it, nor is what a library allocates past it.
"""

import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from precimap.errors import DeployError
from precimap.hardware_profile import Device
from precimap.layers.quantized import QuantizedLayer
from precimap.runtime.compiling.compiled import check_compiled, forms_of
from precimap.runtime.timing import turns_within
from precimap.runtime.x86.layer_timer import clock_here, device_here

SIDE, TRIES = 1024, 5  # of the product that a peak is measured with


@dataclass(frozen=True, slots=True)
class CpuWholeTimer:
    """deployed: puts layers in low precision, in a tree of its own. served: the form that is certified."""

    deployed: Callable[[nn.Module, Mapping[str, QuantizedLayer]], nn.Module]
    served: str
    casts: tuple[torch.dtype, ...]

    def device(self) -> Device:
        return device_here()

    def forms(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Mapping[str, Callable[[], nn.Module]]:
        """As it is, and with its calls compiled by Inductor with frozen weights."""
        return forms_of(self.deployed, model, layers)

    def most_shapes(self, form: str) -> int | None:
        return None

    def check(self, model: nn.Module) -> None:
        check_compiled(model)

    def turns(self, cases: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
        return turns_within(seconds, cases, clock_here()[1])

    def peak_memory(self, call: Callable[[], object]) -> int | None:
        call()
        gc.collect()
        with _quiet_profiler():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
                call()
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                seen.export_chrome_trace(str(path))
                events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        held = peak = 0
        for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
            held += event["args"]["Bytes"]
            peak = max(peak, held)
        return peak

    def peak_flops(self, dtype: torch.dtype) -> float:
        """In every form: a float32 product through MKL may take twice the time of the same through oneDNN."""
        generator, clock = torch.Generator().manual_seed(0), clock_here()[1]
        product = nn.Linear(SIDE, SIDE, bias=False, dtype=dtype).requires_grad_(False)
        rows, best = torch.randn(SIDE, SIDE, generator=generator, dtype=torch.float32).to(dtype), float("inf")
        for make in self.forms(product, {}).values():
            try:
                form = make()
            except DeployError:  # no compiler
                continue
            form(rows)
            for _ in range(TRIES):
                start = clock()
                form(rows)
                best = min(best, clock() - start)
        return 2 * SIDE**3 / best


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler tells on stderr when it starts and stops, unless this is set."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
