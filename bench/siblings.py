"""Is what a plan foretells of a whole model from its layers what the deployed model takes, eager and compiled?

    python bench/siblings.py [--quick] [--json FILE]

Every layer of a model that this CPU takes in INT8 is timed one by one, as a search does, and the whole model beside it:
in float32 and deployed, in turns, both in the form that is served. Foretold is the deployed model's time over the float32
one's, 1 - what the layers save over what the model takes: once as if each layer quantised its own input, once with inputs
shared. Scheme `int8-static` shares what it has quantised; `int8`, where this CPU has its kernel, shares nothing. A figure
is the CPU time of one thread, median [quartiles] over turns. Models: all-MiniLM-L6-v2 (q, k and v share) and a trunk of
1024 with twelve heads of 16 columns, most of which lose time alone. Where the heads lose together, too (on CPUs with AMX,
which multiply a head in less time than an eager layer takes to be called), the right plan is to leave them out: what is
claimed is that the plan and the clock agree on it, where they are more than a twentieth apart. Quick: fewer turns, and
`int8-static` eager alone. Its JSON was made with MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at 1 GB: what else the
allocator does is in docs/log.md. Exits with 1 when a claim fails.
"""

import itertools
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.all_low import all_low, takes, task_of
from precimap import CPU_INT8, CPU_INT8_COMPILED, bench_device, discover
from precimap.demos.minilm import load_encoder
from precimap.layers.copying import shared_copy
from precimap.layers.target import Target
from precimap.numerics.schemes import SCHEMES, Scheme
from precimap.runtime.compiling.compiled import compile_calls
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.runtime.x86.target import int8_scheme
from precimap.runtime.x86.tokens import scheme_refusal
from precimap.searching.latency.planned import planned

HEADS = 12
OFF = 0.10  # of the float32 model's time, at most


@dataclass(frozen=True, slots=True)
class Row:
    """One model. float32, layers: milliseconds of the model and of the sum of its layers. alone, shared: its INT8 time over
    that of float32 as foretold, without and with shared inputs; measured: as deployed. slower_alone: layers that gain
    nothing by themselves, of `number`; slower: those that gain nothing beside their siblings either. heads: of the model
    with its heads in INT8 alone, as `shared` and `measured`; None of a model without heads."""

    model: str
    target: str
    scheme: str
    float32: Spread
    layers: float
    alone: Spread
    shared: Spread
    measured: Spread
    number: int
    slower_alone: int
    slower: int
    heads: tuple[Spread, Spread] | None

    @property
    def name(self) -> str:
        return f"{self.model}, {self.scheme} on {self.target}"


class Heads(nn.Module):
    """A trunk, and heads that read its result."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(256, 1024), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(1024, 16) for _ in range(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        return torch.cat([head(hidden) for head in self.heads], 1)


def _row(name: str, model: nn.Module, inputs: tuple[Tensor, ...], how: tuple[Target, Scheme], turns: int) -> Row:
    (target, chosen), units = how, inputs[0].shape[0]
    task = task_of(model, inputs)
    inventory = discover(model, task.forward, inputs)
    names = takes(inventory, chosen, target)
    profile = bench_device(task, target=target, batch_sizes=(units,), schemes=[chosen])
    plan = planned(inventory, [(layer, chosen) for layer in names], profile, (units,), ())
    heads = [layer for layer in names if layer.startswith("heads.")]
    models = {"float32": _served(model, target), "int8": all_low(model, inputs, chosen, target)}
    if heads:
        models["heads"] = all_low(model, inputs, chosen, target, heads)
    with torch.no_grad():
        cases = {which: (lambda one=one: one(*inputs)) for which, one in models.items()}
        seconds = interleaved(cases, turns, time.process_time)
    whole, pairs = spread(seconds["float32"]), list(plan.saved)
    apart = [plan.savings.total([key]) for key in pairs]
    part = min(1.0, plan.seconds[0] / whole.median)  # as an answer counts: alone, layers may take longer than the model

    def foretold(saved: tuple[float, float, float]) -> Spread:
        share, lower, upper = saved
        return Spread(1 - part * share, 1 - part * upper, 1 - part * lower, profile.rows[0].base.n)

    return Row(
        model=name,
        target=target.name,
        scheme=chosen.name,
        float32=spread([1e3 * value for value in seconds["float32"]]),
        layers=1e3 * plan.seconds[0],
        alone=foretold((sum(a[0] for a in apart), sum(a[1] for a in apart), sum(a[2] for a in apart))),
        shared=foretold(plan.savings.total(pairs)),
        measured=ratio(seconds["int8"], seconds["float32"]),
        number=len(pairs),
        slower_alone=sum(saved.lower <= 0 for saved in plan.saved.values()),
        slower=len(plan.slower),
        heads=(
            foretold(plan.savings.total([key for key in pairs if key[0] in heads])),
            ratio(seconds["heads"], seconds["float32"]),
        )
        if heads
        else None,
    )


def _served(model: nn.Module, target: Target) -> nn.Module:
    """The base model in the form of the target."""
    made = shared_copy(model)
    if target is CPU_INT8_COMPILED:
        compile_calls(made)
    return made


def main() -> int:
    options = command_line(__doc__, "fewer turns, int8-static alone").parse_args()
    torch.set_num_threads(1)
    print_machine()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (32, 32), generator=generator)
    models = [
        (f"heads, {batch}", Heads().eval(), (torch.randn(batch, 256, generator=generator),)) for batch in (256, 1024)
    ]
    models.append(("MiniLM, 32 x 32", load_encoder(), (ids, torch.ones_like(ids))))
    schemes = [SCHEMES[int8_scheme()]]
    if not options.quick and scheme_refusal(SCHEMES["int8"]) is None:
        schemes.append(SCHEMES["int8"])
    targets = (CPU_INT8,) if options.quick else (CPU_INT8, CPU_INT8_COMPILED)
    print(f"{'model':50}{'float32, ms':>22}{'layers, ms':>12}   INT8 over float32: alone, shared, measured")
    rows = []
    for (name, model, inputs), target, scheme in itertools.product(models, targets, schemes):
        row = _row(name, model, inputs, (target, scheme), 9 if options.quick else 25)
        rows.append(row)
        said = f"{row.alone:.3f}, {row.shared:.3f}, {row.measured:.3f}"
        losing = f"of {row.number} lose alone {row.slower_alone}, with siblings {row.slower}"
        heads = "" if row.heads is None else f"; heads alone {row.heads[0]:.3f}, measured {row.heads[1]:.3f}"
        print(f"{row.name:50}{f'{row.float32:.2f}':>22}{row.layers:>12.2f}   {said}; {losing}{heads}", flush=True)
    claims = _claims(rows)
    return finished(options.json, rows, claims)


def _claims(rows: list[Row]) -> list[Claim]:
    claims = []
    for row in rows:
        error = abs(row.shared.median - row.measured.median)
        claims.append(at_most(f"{row.name}: foretold, off by this share of float32", error, OFF))
    for row in (row for row in rows if row.heads is not None):
        foretold, measured = row.heads
        apart = abs(foretold.median - measured.median) > OFF / 2
        wrong = apart and ((foretold.upper < 1 <= measured.lower) or (measured.upper < 1 <= foretold.lower))
        claims.append(at_most(f"{row.name}: plan and clock surely disagree on whether heads gain", wrong, 0))
    static = next(row for row in rows if row.model == "heads, 256")
    off = abs(static.alone.median - static.measured.median)
    claims.append(at_least(f"{static.name}: foretold without sharing, off by this share of float32", off, 0.3))
    return claims


if __name__ == "__main__":
    sys.exit(main())
