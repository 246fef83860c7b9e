"""What a searched map saves as a whole: the sum of its layers against the deployed model, and against what it competes with.

    python bench/end_to_end.py [--quick] [--json FILE]

Whole searches on this machine for the target `cpu`, which finds the faster form first, over the INT8 schemes that run here
and BF16: a DCNv2 whose layers are 1024 wide, with clicks drawn from itself, in float32 and BF16; and all-MiniLM-L6-v2 as
semantic search over the Python documentation. One search is for `cpu-int8`, where the sum of layers timed alone can be
held against the whole. Each is asked for a map that keeps the margin, deployed and timed by the search itself
(`EndToEnd`): CPU time of one thread, interleaved turns, median [quartiles]. Foretold is what the layers, each timed alone,
say together. Quick: that one search, with batches of 256. Exits with 1 when a claim fails.
"""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.click_model import Recipe
from precimap import CPU_INT8, Effort, Serving, Splits, Task, metrics, search
from precimap.demos.semantic_search import queries
from precimap.layers.target import Target
from precimap.report.end_to_end_table import end_to_end_page
from precimap.runtime.x86.target import has_bf16, int8_scheme
from precimap.runtime.x86.tokens import AMX, instructions

FIELDS, VALUES = 64, 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """One search. target: of the map, which names the form. cast: of the whole model, if the map has one. gain: the base
    model's time over the served map's; ends: quartiles. rival: the fastest thing that is no map and no blanket INT8, and the
    map's speed over it. low, layers: how many. foretold: None beside a cast."""

    task: str
    target: str
    cast: str | None
    batches: tuple[int, ...]
    certified: bool
    low: int
    layers: int
    gain: float
    ends: tuple[float, float]
    foretold: float | None
    n: int
    rival: str
    over_rival: float
    answer: str


def main() -> int:
    arguments = command_line(__doc__, "one search").parse_args()
    torch.set_num_threads(1)
    print_machine()
    asked: list[tuple[Callable[[], Task], Target | str, tuple[int, ...], float]] = [
        (lambda: _ranker(torch.float32), CPU_INT8, (256,) if arguments.quick else (256, 1024), 0.01)
    ]
    if not arguments.quick:
        asked += [(lambda: _ranker(torch.float32), "cpu", (256, 1024), 0.01)]
        if has_bf16():
            asked += [(lambda: _ranker(torch.bfloat16), "cpu", (256, 1024), 0.01)]
        asked += [(queries, "cpu", (32,), 0.02)]
    rows = [_searched(make(), target, sizes, margin, quick=arguments.quick) for make, target, sizes, margin in asked]
    claims = _claims(rows)
    return finished(arguments.json, rows, claims)


def _ranker(dtype: torch.dtype) -> Task:
    """Untrained, and its own clicks: weights of other values take the same time, and its NE is what it can be."""
    torch.manual_seed(0)
    model = Recipe(width=1024 // FIELDS, deep=(1024, 1024, 1024)).build(VALUES, FIELDS).eval()
    nn.init.normal_(model.embedding.weight)

    def split(batches: int, seed: int) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        found = []
        for _ in range(batches):
            ids = torch.randint(0, VALUES, (256, FIELDS), generator=generator)
            with torch.no_grad():
                clicks = torch.bernoulli(torch.sigmoid(model(ids).float().reshape(-1)), generator=generator)
            found.append({"ids": ids, "labels": clicks})
        return found

    splits = Splits(split(2, 1), split(8, 2), split(16, 3))
    return Task(
        model.to(dtype),
        splits=splits,
        forward=lambda m, batch: m(batch["ids"]).float().reshape(-1),
        loss=lambda scores, batch: nn.functional.binary_cross_entropy_with_logits(
            scores, batch["labels"], reduction="none"
        ),
        metric=metrics.NE(),
        labels=lambda batch: batch["labels"],
        name=f"ranker, 1024 wide, {str(dtype).removeprefix('torch.')}",
    )


def _searched(task: Task, target: Target | str, sizes: tuple[int, ...], margin: float, quick: bool) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        found = search(
            task,
            schemes=["int8", int8_scheme(), "bf16"],
            margin=margin,
            target=target,
            serving=Serving(sizes),
            effort=Effort(rounding_draws=0, timing_seconds=4.0 if quick else 15.0),
            ledger=folder,
        )
    print(f"\n{task.name}, {found.map.target}, margin {margin}\n{found.answer}", flush=True)
    times = found.end_to_end
    assert times is not None, "no map got as far as being timed: nothing to compare"
    Console(width=100, file=sys.stdout).print(end_to_end_page(times))
    rival, over_rival = times.rival()
    return Row(
        task.name,
        found.map.target,
        found.map.cast,
        sizes,
        found.certified,
        len(found.map.low),
        len(found.map.layers),
        times.gain.median,
        (times.gain.lower, times.gain.upper),
        None if times.foretold is None else times.foretold.median,
        times.gain.n,
        rival,
        over_rival.median,
        found.answer,
    )


def _claims(rows: list[Row]) -> list[Claim]:
    """Of maps that are certified: what is not is no promise."""
    certified = [row for row in rows if row.certified]
    slowest = min(row.ends[0] for row in certified)
    claims = [
        at_least("certified maps: as fast as the base model in the same form, worst lower quartile", slowest, 1.0)
    ]
    # Compiled, what fusing saves is in no single layer.
    for form, compiled, bound in (("eager", False, 0.1), ("compiled", True, 0.15)):
        off = [
            abs(1 / row.gain - 1 / row.foretold)
            for row in rows
            if row.foretold is not None and row.target.endswith("-compiled") is compiled
        ]
        if off:
            name = f"{form}: the sum of single layers off the measured time, as a share of the base model's, worst"
            claims.append(at_most(name, max(off), bound))
    if instructions() == AMX:
        best = {row.task: row.over_rival for row in certified}  # of two searches for one task, the later one
        claims += [
            at_least(f"{task}: over the fastest model without INT8", speed, 1.6 if "ranker" in task else 1.4)
            for task, speed in best.items()
        ]
    return claims


if __name__ == "__main__":
    sys.exit(main())
