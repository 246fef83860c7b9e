"""Is what a plan counts for layers that share a quantised input what the deployed model takes?

    python bench/siblings.py [--quick] [--json FILE]

Every layer of a model that this CPU takes in INT8 is timed one by one, as a search does, and the whole model beside it: in
float32 and deployed, in turns. Foretold is the deployed model's time over the float32 one's, 1 - what the layers save over
what the model takes: once as if each layer quantised its own input, once with inputs shared. A figure is the CPU time of
one thread, median [quartiles] over turns. Models: all-MiniLM-L6-v2 (q, k and v share) and a trunk of 1024 with twelve heads
of 16 columns, each of which loses time alone. Quick: fewer turns. Its JSON was made with MALLOC_MMAP_THRESHOLD_ and
MALLOC_TRIM_THRESHOLD_ at 1 GB: what else the allocator does is in docs/log.md. Exits with 1 when a claim fails.
"""

import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.all_low import all_low, takes, task_of
from precimap import CPU_INT8, bench_device, discover
from precimap.demos.minilm import load_encoder
from precimap.numerics.schemes import scheme
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.latency.planned import planned

HEADS = 12


@dataclass(frozen=True, slots=True)
class Row:
    """One model. float32, layers: milliseconds of the model and of the sum of its layers. alone, shared: its INT8 time over
    that of float32 as foretold, without and with shared inputs; measured: as deployed. slower_alone: layers that gain
    nothing by themselves, of `number`; slower: those that gain nothing beside their siblings either."""

    model: str
    float32: Spread
    layers: float
    alone: Spread
    shared: Spread
    measured: Spread
    number: int
    slower_alone: int
    slower: int


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


def _row(name: str, model: nn.Module, inputs: tuple[Tensor, ...], turns: int) -> Row:
    chosen, units = scheme(int8_scheme()), inputs[0].shape[0]
    task = task_of(model, inputs)
    inventory = discover(model, task.forward, inputs)
    names = takes(inventory, chosen, CPU_INT8)
    profile = bench_device(task, target=CPU_INT8, batch_sizes=(units,), schemes=[chosen])
    plan = planned(inventory, [(layer, chosen) for layer in names], profile, (units,), ())
    deployed = all_low(model, inputs, chosen, CPU_INT8)
    with torch.no_grad():
        cases = {"float32": lambda: model(*inputs), "int8": lambda: deployed(*inputs)}
        seconds = interleaved(cases, turns, time.process_time)
    whole, pairs = spread(seconds["float32"]), list(plan.saved)
    apart = [plan.savings.total([key]) for key in pairs]
    part = plan.seconds[0] / whole.median

    def foretold(saved: tuple[float, float, float]) -> Spread:
        share, lower, upper = saved
        return Spread(1 - part * share, 1 - part * upper, 1 - part * lower, profile.rows[0].base.n)

    return Row(
        name,
        spread([1e3 * value for value in seconds["float32"]]),
        1e3 * plan.seconds[0],
        foretold((sum(a[0] for a in apart), sum(a[1] for a in apart), sum(a[2] for a in apart))),
        foretold(plan.savings.total(pairs)),
        ratio(seconds["int8"], seconds["float32"]),
        len(pairs),
        sum(saved.lower <= 0 for saved in plan.saved.values()),
        len(plan.slower),
    )


def main() -> int:
    options = command_line(__doc__, "fewer turns").parse_args()
    torch.set_num_threads(1)
    print_machine()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (32, 32), generator=generator)
    models = [
        (f"heads, {batch}", Heads().eval(), (torch.randn(batch, 256, generator=generator),)) for batch in (256, 1024)
    ]
    models.append(("MiniLM, 32 x 32", load_encoder(), (ids, torch.ones_like(ids))))
    print(f"{'model':18}{'float32, ms':>22}{'layers, ms':>12}   INT8 over float32: alone, shared, measured")
    rows = []
    for name, model, inputs in models:
        row = _row(name, model, inputs, 9 if options.quick else 25)
        rows.append(row)
        said = f"{row.alone:.3f}, {row.shared:.3f}, {row.measured:.3f}"
        losing = f"of {row.number} lose alone {row.slower_alone}, with siblings {row.slower}"
        print(f"{row.model:18}{f'{row.float32:.2f}':>22}{row.layers:>12.2f}   {said}; {losing}", flush=True)
    claims = _claims(rows)
    return finished(options.json, rows, claims)


def _claims(rows: list[Row]) -> list[Claim]:
    claims = []
    for row in rows:
        error = abs(row.shared.median - row.measured.median)
        claims.append(at_most(f"{row.model}: foretold with shared inputs, off by this share of float32", error, 0.15))
    heads = next(row for row in rows if row.model == "heads, 256")
    claims.append(
        at_least("heads, 256: heads that lose alone and gain together", heads.slower_alone - heads.slower, HEADS)
    )
    apart = abs(heads.alone.median - heads.measured.median)
    claims.append(at_least("heads, 256: foretold without them, off by this share of float32", apart, 0.3))
    return claims


if __name__ == "__main__":
    sys.exit(main())
