"""The time of single layers on this GPU, each against what takes its place when it is deployed.

Invariant: a form is captured as a CUDA graph of one call and timed by events around a replay, so that no Python and no
launch of an op is in it; forms of one module are timed in turns, on the same random input, and between two replays the
L2 cache is written over, as the rest of a model would. So a weight comes from memory, and only ratios within a turn are
to be relied on. Rounds, each with inputs and graphs of its own, have other addresses.

What this leaves out: the start of a graph is in every time, some microseconds, which draws the ratios of small layers
towards 1; a module is timed alone, also where a compiled model would fuse its quantising into the op before.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.hardware_profile import Device
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import BASE, Turns
from precimap.runtime.nvidia.graphs import capture
from precimap.runtime.x86.layer_timer import as_it_is, beside_each_other

ROUNDS, TURNS = 3, 15  # turns of each round
Replay = Callable[[], None]


@dataclass(frozen=True, slots=True)
class CudaTimer:
    """place, serve: as of `CpuTimer`."""

    place: Callable[[nn.Module, QuantizedLayer], nn.Module]
    serve: Callable[[nn.Module], object] = as_it_is
    rounds: int = ROUNDS
    turns: int = TURNS

    def device(self) -> Device:
        return device_here()

    def seconds(self, module: nn.Module, forms: Mapping[str, QuantizedLayer], rows: int, each: int) -> Turns:
        """As `Timer.seconds`; eager FP8 layers share nothing. Raises DeployError for a form that cannot take the module's
        place, and without CUDA."""
        found: dict[str, list[float]] = {name: [] for name in (BASE, *forms)}
        device, generator = next(module.parameters()).device, torch.Generator().manual_seed(0)
        for _ in range(self.rounds):
            example = (_input(module, rows, each, generator).to(device),)
            modules = beside_each_other(module, forms, self.place, self.serve)
            graphs = {name: capture(form, example)[0] for name, form in modules.items()}
            replays = {name: graph.replay for name, graph in graphs.items()}
            for name, seconds in event_seconds(replays, self.turns, device).items():
                found[name] += seconds
        return Turns(found, {})


def device_here() -> Device:
    """This GPU as torch uses it now. Raises DeployError without CUDA."""
    if not torch.cuda.is_available():
        raise DeployError(f"expected a CUDA device to time on; torch {torch.__version__} finds none here")
    return Device(
        name=torch.cuda.get_device_name(),
        capability="{}.{}".format(*torch.cuda.get_device_capability()),
        threads=1,
        allocator=os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "default",
        clock="CUDA events around a graph, L2 cache flushed",
        torch=torch.__version__,
        precimap=version("precimap"),
        driver=f"{driver()}, {toolkit()}",
    )


def event_seconds(replays: Mapping[str, Replay], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each replay in each turn, by the device's own clock; every turn starts with another one.

    Each runs once untimed, then finds an L2 cache full of something else. What is written there also keeps the device busy
    until the host has handed over the events and the replay.
    """
    names = list(replays)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.cuda.device(device):
        written = torch.empty(2 * _l2_bytes(), dtype=torch.int8, device=device)
        for turn in range(turns):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                replays[name]()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
                written.zero_()
                start.record()
                replays[name]()
                end.record()
                end.synchronize()
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def _input(module: nn.Module, rows: int, each: int, generator: torch.Generator) -> Tensor:
    if isinstance(module, nn.Linear):
        return torch.randn(rows, module.in_features, generator=generator, dtype=torch.float32).to(module.weight.dtype)
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    shape = (rows, each) if isinstance(module, nn.EmbeddingBag) else (rows,)
    return torch.randint(module.num_embeddings, shape, generator=generator)


def _l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def toolkit() -> str:
    """What this torch was built with."""
    hip = getattr(torch.version, "hip", None)
    return f"CUDA {torch.version.cuda}" if hip is None else f"ROCm {hip}"


def driver() -> str:
    """The kernel module's version, as the system tells it."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "driver unknown"
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return f"driver {found[0]}" if found else "driver unknown"
