"""What packed rows of embedding tables save and cost: bytes, lookups against float32, the metric of real rankers.

    python bench/embedding_tables.py [--quick] [--json FILE]

Lookups: ratios of CPU time of one thread, taken inside each turn, median and quartiles over turns; random rows of a table
larger than the caches, so that what is read is what is paid for. Real tasks: every table of the model in one scheme and
nothing else, paired drop on the certify split, in nats, with its standard error over clusters; without their data they are
left out and said to be. Exits with 1 when a claim fails.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from measuring.rival_scores import eligible
from precimap import CPU_INT8, Task, discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_layer
from precimap.metrics.paired import Drop, drop_of
from precimap.numerics.schemes import scheme
from precimap.runtime.timing import Spread, interleaved, ratio
from precimap.task import first_batch, score
from tasks.real_tasks import frappe_dcnv2, ncf

SCHEMES = ("int8-row", "int4-row")
POOLED = 20  # ids of each bag, as the histories of a ranking model


@dataclass(frozen=True, slots=True)
class Lookup:
    """One table: bytes against float32, and `faster` = time of float32 / time of the packed rows."""

    scheme: str
    kind: str
    rows: int
    width: int
    bytes: int
    bytes_ratio: float
    faster: Spread


@dataclass(frozen=True, slots=True)
class Real:
    """All tables of a model in one scheme: `drop` in the metric, positive is worse; bytes of the tables."""

    task: str
    scheme: str
    tables: int
    before: int
    after: int
    baseline: float
    drop: Drop


def lookups(rows: int, width: int, bags: int, turns: int) -> list[Lookup]:
    """Bags of POOLED ids and plain lookups of as many ids, in turns with float32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows, (bags, POOLED), generator=generator)
    weight = torch.randn(rows, width, generator=generator)
    found = []
    for kind, plain in (
        ("bags", nn.EmbeddingBag(rows, width, mode="sum", _weight=weight)),
        ("rows", nn.Embedding(rows, width, _weight=weight)),
    ):
        packed = {}
        for name in SCHEMES:
            layer = quantize_layer("weight", weight, (1,), scheme(name), None)
            packed[name] = CPU_INT8.deployed(plain, {"weight": layer})
        cases: dict[str, Callable[[], object]] = {
            name: lambda module=module: module(ids) for name, module in {"float32": plain, **packed}.items()
        }
        with torch.no_grad():
            seconds = interleaved(cases, turns, time.process_time)
        for name, module in packed.items():
            size = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
            gained = ratio(seconds["float32"], seconds[name])
            found.append(Lookup(name, kind, rows, width, size, size / (4 * weight.numel()), gained))
    return found


def on_real_task(task: Task) -> list[Real]:
    """Both schemes on all tables that can take them."""
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    weights = dict(task.model.named_parameters())
    with quantized(task.model, {}):
        baseline = score(task, task.model, task.splits.certify)
    rows = []
    for name in SCHEMES:
        tables = [inventory.layer(layer) for layer in eligible(inventory, scheme(name))]
        layers = {t.name: quantize_layer(t.name, weights[t.name], t.contracted, scheme(name), None) for t in tables}
        with quantized(task.model, layers):
            after = score(task, task.model, task.splits.certify)
        sample = task.metric.paired(baseline.values, after.values, baseline.units)
        drop = drop_of(sample)
        size = sum(scheme(name).stored_bytes(table.shape, table.contracted) for table in tables)
        before = sum(table.bytes for table in tables)
        mean = float(baseline.values.mean())
        rows.append(Real(task.name, name, len(tables), before, size, mean, drop))
    return rows


def real_tasks() -> list[Real]:
    found: list[Real] = []
    for make in (frappe_dcnv2, ncf):
        try:
            found += on_real_task(make())
        except FileNotFoundError as error:
            print(f"left out: {error}")
    return found


def claims_of(timed: list[Lookup], real: list[Real]) -> list[Claim]:
    claims = []
    for name, bound in (("int8-row", 0.2813), ("int4-row", 0.1407)):
        largest = max(row.bytes_ratio for row in timed if row.scheme == name and row.width == 64)
        claims.append(at_most(f"{name}: bytes of a table of 64 columns, of float32", largest, bound))
    for name, bound in (
        ("int8-row", 0.9),
        ("int4-row", 0.6),
    ):  # pooled 4-bit rows are not faster: it is bytes they save
        slowest = min(row.faster.median for row in timed if row.scheme == name and row.kind == "bags")
        claims.append(at_least(f"{name}: bags, times as fast as float32", slowest, bound))
    for row in real:
        if row.scheme == "int8-row":
            worst = (abs(row.drop.estimate) + 2 * row.drop.error) / row.baseline
            claims.append(at_most(f"{row.task}, int8-row: |drop| + 2 errors, of the log-loss", worst, 1e-3))
    return claims


def main() -> int:
    given = command_line(__doc__, "fewer turns and the smaller tables").parse_args()
    torch.set_num_threads(1)
    print_machine()
    sizes = ((400_000, 64),) if given.quick else ((400_000, 64), (2_000_000, 64), (2_000_000, 16))
    timed = [row for rows, width in sizes for row in lookups(rows, width, 2048, 9 if given.quick else 25)]
    print(f"{'scheme':<10}{'kind':<6}{'table':>14}{'MB':>8}{'of float32':>12}{'times as fast':>24}")
    for row in timed:
        table = f"{row.rows:,}x{row.width}"
        print(
            f"{row.scheme:<10}{row.kind:<6}{table:>14}{row.bytes / 1e6:>8.1f}{row.bytes_ratio:>12.3f}"
            f"{format(row.faster, '.2f'):>24}"
        )
    real = real_tasks()
    for found in real:
        drop = found.drop
        print(
            f"{found.task}, {found.scheme}: {found.tables} tables, {found.before:,} -> {found.after:,} bytes; drop of the "
            f"log-loss {drop.estimate:+.2e} ± {drop.error:.1e} of {found.baseline:.5f}, n = {drop.n:,} in {drop.clusters:,}"
        )
    claims = claims_of(timed, real)
    return finished(given.json, [*timed, *real], claims)


if __name__ == "__main__":
    sys.exit(main())
