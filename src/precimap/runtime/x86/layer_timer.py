"""The time of single layers on this CPU, each against what takes its place when it is deployed, alone and as a sibling.

Invariant: forms of one module are timed in turns, on the same random inputs, and a call is repeated until it takes long
enough to be timed; so only their ratio within a turn is to be relied on. Not taken: timing whole models with and without
a layer, where one layer of a hundred is lost in the spread.

The allocator has moods: a result of some MB is either kept in the heap or given back to the system after each call, and
paid for page by page; which of the two may hold for a whole process (MALLOC_TRIM_THRESHOLD_ and its like settle it, and
are part of a device for that reason). So turns come in rounds, each with inputs and forms
of its own and other blocks on the heap. What a process keeps to all its life is still not in the spread.

What this leaves out: weights and inputs are in the caches as the call before left them, in a model they may not be; ids
are drawn evenly, where real ones repeat; a module is timed alone, also where a compiled model would fuse it.
"""

import copy
import itertools
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from precimap.hardware_profile import Device
from precimap.layers.copying import shared_copy
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import BASE, Turns
from precimap.runtime.shared_codes import MOST_KEPT
from precimap.runtime.timing import interleaved
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.x86.int8 import INT8_KERNEL

ROUNDS, TURNS = 3, 5  # turns of each round
SHORTEST = 1e-3  # seconds that a timed stretch takes at least
LEAST = 1e-3  # of the time in base precision: what is left of a difference that the noise makes negative


def as_it_is(module: nn.Module) -> None:
    """Served eagerly."""


@dataclass(frozen=True, slots=True)
class CpuTimer:
    """place: the module that computes a layer in the stead of the one that is given. serve: what is done to a module,
    in a tree of its own, before it is served."""

    place: Callable[[nn.Module, QuantizedLayer], nn.Module]
    serve: Callable[[nn.Module], object] = as_it_is
    rounds: int = ROUNDS
    turns: int = TURNS

    def device(self) -> Device:
        return device_here()

    def seconds(self, module: nn.Module, forms: Mapping[str, QuantizedLayer], rows: int, each: int) -> Turns:
        """As `Timer.seconds`. Raises DeployError for a form that cannot take the module's place.

        What a sibling leaves to do is timed as it runs. Eager layers keep the codes of an input: a form is called again with
        the input that it has just had. (The other way, to time the quantising and take it off, leaves out what a layer does
        around it; docs/log.md.) Compiled ones share within one code only, which then holds two of them.
        """
        found: dict[_Case, list[float]] = {}
        sizes, clock = random.Random(0), clock_here()[1]
        for _ in range(self.rounds):
            blocks = [torch.empty(2 ** sizes.randrange(8, 20)) for _ in range(sizes.randrange(32))]
            *inputs, met = _inputs(module, rows, each)
            modules = beside_each_other(module, forms, self.place, self.serve)
            calls: dict[_Case, tuple[nn.Module, Iterator[Tensor]]] = {
                (name, ALONE): (form, itertools.cycle(inputs)) for name, form in modules.items()
            }
            sharing = {name: forms[name] for name, form in modules.items() if _shares(form)}
            if modules[BASE]._compiled_call_impl is None:
                # In a tree of its own: what was read again is remembered, and copied from then on.
                again = beside_each_other(module, sharing, self.place, self.serve)
                calls |= {(name, AGAIN): (again[name], itertools.repeat(met)) for name in sharing}
            elif sharing:
                two = self._two_of_each(module, sharing)
                calls |= {(name, TWO): (form, itertools.cycle(inputs)) for name, form in two.items()}
            del blocks[::2]
            with torch.inference_mode():
                repeats = {case: _repeats(*call, clock) for case, call in calls.items()}
                timed = interleaved(
                    {case: _repeated(*call, repeats[case]) for case, call in calls.items()}, self.turns, clock
                )
            for case, values in timed.items():
                found.setdefault(case, []).extend(value / repeats[case] for value in values)
        alone, shared, doubles = (
            {name: found[name, how] for name, how in found if how == one} for one in (ALONE, AGAIN, TWO)
        )
        return Turns(alone, shared | {name: _second(alone, doubles, name) for name in doubles if name != BASE})

    def _two_of_each(self, module: nn.Module, forms: Mapping[str, QuantizedLayer]) -> dict[str, nn.Module]:
        """Two layers of one kind on one input, in one module that is served. Of equal ones one product would be left."""
        made: dict[str, nn.Module] = {BASE: _Two(copy.deepcopy(module), copy.deepcopy(module))}
        for name, layer in forms.items():
            other = replace(layer, codes=layer.codes.clone())
            made[name] = _Two(self.place(module, layer), self.place(copy.deepcopy(module), other))
        for each in made.values():
            self.serve(each.eval())
        return made


class _Two(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def _second(alone: Mapping[str, list[float]], two: Mapping[str, list[float]], name: str) -> list[float]:
    """What the second of two takes, by turn: so much that both save what two in base precision take longer than two low.

    Each time holds a call from outside, which two share in one code, in base precision as well.
    """
    turns = zip(alone[BASE], two[BASE], alone[name], two[name], strict=True)
    return [max(low_two - low + 2 * base - base_two, LEAST * base) for base, base_two, low, low_two in turns]


def _shares(form: nn.Module) -> bool:
    """Whether siblings of a form need not quantise its input again."""
    weight = getattr(form, "weight", None)
    return isinstance(weight, LowWeight) and weight.how.kernel is INT8_KERNEL


_Case = tuple[str, str]  # the name of a form, and how it is called
ALONE, AGAIN, TWO = "alone", "on an input that is quantised already", "two on one input"


def beside_each_other(
    module: nn.Module,
    forms: Mapping[str, QuantizedLayer],
    place: Callable[[nn.Module, QuantizedLayer], nn.Module],
    serve: Callable[[nn.Module], object],
) -> dict[str, nn.Module]:
    """The module as it is (`BASE`) and what takes its place in each form, each in a tree of its own and served."""
    modules = {BASE: shared_copy(module), **{name: place(module, layer) for name, layer in forms.items()}}
    for each in modules.values():
        serve(each)
    return modules


def device_here() -> Device:
    """This machine as torch uses it now."""
    return Device(
        name=_cpu_name(),
        capability=str(torch.backends.cpu.get_cpu_capability()),
        threads=torch.get_num_threads(),
        allocator=_allocator(),
        clock=clock_here()[0],
        torch=torch.__version__,
        precimap=version("precimap"),
    )


def clock_here() -> tuple[str, Callable[[], float]]:
    """Of one thread the processor's own time, which other work on the machine does not lengthen; of more, that of a wall."""
    if torch.get_num_threads() == 1:
        return "processor time", time.process_time
    return "wall time", time.perf_counter


def _inputs(module: nn.Module, rows: int, each: int) -> list[Tensor]:
    """Inputs to be taken in turns, so many that nothing which is kept of one is met again; and one to be met again.

    Those of an nn.Linear lie over each other in memory but for 16 values, and so in the caches, as an input does that the
    layer before has just written.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Linear):
        size, starts = rows * module.in_features, range(0, 16 * (MOST_KEPT + 2), 16)
        values = torch.randn(starts[-1] + size, generator=generator, dtype=torch.float32).to(module.weight.dtype)
        return [values[start : start + size].view(rows, -1) for start in starts]
    assert isinstance(module, nn.Embedding | nn.EmbeddingBag)
    shape = (rows, each) if isinstance(module, nn.EmbeddingBag) else (rows,)
    return [torch.randint(module.num_embeddings, shape, generator=generator) for _ in range(3)]


def _repeats(module: nn.Module, inputs: Iterator[Tensor], clock: Callable[[], float]) -> int:
    """How many calls take `SHORTEST` seconds; the first call is not counted, it may allocate."""
    module(next(inputs))
    count = 1
    while True:
        start = clock()
        _repeated(module, inputs, count)()
        if clock() - start >= SHORTEST:
            return count
        count *= 2


def _repeated(module: nn.Module, inputs: Iterator[Tensor], count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            module(next(inputs))

    return run


def _allocator() -> str:
    """The settings of glibc's allocator and the library that may stand in its place, as the environment has them."""
    named = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")]
    named += [Path(path).name for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    return " ".join(named) or "default"


def _cpu_name() -> str:
    """As the system knows it; two machines of one name may still differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    family, model = fields.get("cpu family"), fields.get("model")
    return name if family is None or model is None else f"{name} (family {family}, model {model})"
