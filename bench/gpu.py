"""Does FP8 pay on this GPU? All that is measured on one, in one command, with the core's dependencies alone.

    python bench/gpu.py [--quick] [--json FILE]      (with PYTHONPATH=src where precimap is not installed)

Parity: codes that this GPU makes, eagerly and compiled, against the CPU's; and what fast accumulation adds to a product.
Products M x K -> N, each a CUDA graph of one call between two floods of the L2 cache: BF16; FP8 on codes that are given,
tensorwise and row-wise; the deployed layer, which quantises its input; and a LayerNorm with the layer behind it, compiled,
so that the quantising can be fused. One wide product against three of its parts. Experts in one grouped product.
The main job (`measuring/gpu_jobs.py`): click models trained here on generated logs, in BF16 and float32, and an encoder of
BERT's size judged against its own BF16 outputs (`tasks/gpu_tasks.py`), each searched for the target `cuda` over `fp8`,
`fp8-static` and `bf16`, certified in NE, deployed compiled and as CUDA graphs, and timed against BF16 in these forms, with
the share of the machine's peak.
Models: an untrained DCNv2 whose layers are 1024 wide, and an encoder of BERT's size, by batch; BF16, `fp8` and `fp8-static`,
eager and compiled, called and as graphs. Times are medians [quartiles] over turns, ratios are taken inside each turn; models
are timed from the host, synchronised. Error: root mean square change of the results against float32, by that of those.

Each part has a limit of seconds, and all together a budget (400; quick: 48): what is not begun within it is skipped, and
named in the JSON; so is what fails or takes too long, and the rest goes on. Exits with 2 without a GPU that has FP8, with 1
when a claim or a part fails.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from harness import Claim, at_least, at_most, command_line, finished, print_machine, write_json
from measuring.gpu_jobs import Job
from measuring.gpu_products import accumulation, experts, parity, product, wide
from measuring.parts import Part, Row, in_turn, summary
from models.gpu_models import BF16, Encoder, Ranker, forms, relative_error
from precimap import Effort
from precimap.runtime.nvidia.fp8 import FP8_KERNEL
from precimap.runtime.nvidia.layer_timer import driver
from precimap.runtime.nvidia.target import missing_hardware
from precimap.runtime.timing import interleaved, spread
from tasks.gpu_tasks import ClickSizes, EncoderSizes, click_task, encoder_task


@dataclass(frozen=True, slots=True)
class Asked:
    """One main job. form, minutes: as of `Serving` and `Effort`. seconds: of its two parts, at most."""

    of: ClickSizes | EncoderSizes
    margin: float
    form: str
    minutes: float
    seconds: tuple[float, float]

    @property
    def name(self) -> str:
        if isinstance(self.of, EncoderSizes):
            return f"encoder of {self.of.encoder.blocks} blocks"
        return f"clicks {self.of.width} wide, {str(self.of.dtype).removeprefix('torch.')}"

    def job(self, turns: int, device: torch.device) -> Job:
        """timing_seconds: few turns, and more where they leave open what is faster."""
        effort = Effort(rounding_draws=0, timing_seconds=1.0, minutes=self.minutes)
        if isinstance(self.of, EncoderSizes):
            make, given = partial(encoder_task, self.of, device), "words"
        else:
            make, given = partial(click_task, self.of, device), "features"
        return Job(self.name, make, given, self.margin, self.form, effort, self.seconds, turns)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. shapes: M, K, N; the first `fused` of them also compiled behind a LayerNorm. wide: M, K, N of each
    of three. experts: number, tokens, K, N. sums: K. budget: seconds."""

    jobs: tuple[Asked, ...]
    shapes: tuple[tuple[int, int, int], ...]
    fused: int
    wide: tuple[tuple[int, int, int], ...]
    experts: tuple[tuple[int, int, int, int], ...]
    sums: tuple[int, ...]
    side: int
    ranker: Ranker
    ranker_batches: tuple[int, ...]
    encoder: Encoder
    encoder_batches: tuple[int, ...]
    turns: int
    budget: float


FULL = Sizes(
    jobs=(
        Asked(ClickSizes(2048, torch.bfloat16, 600_000, 4096, (2, 16, 32), 8.0), 1e-3, "auto", 0.5, (75, 30)),
        Asked(EncoderSizes(Encoder(768, 12, 12, 128), 64, (1, 8, 16)), 1e-2, "auto", 0.7, (170, 50)),
        Asked(ClickSizes(1024, torch.float32, 600_000, 4096, (2, 16, 32), 8.0), 1e-3, "auto", 0.5, (75, 30)),
    ),
    shapes=(
        (4096, 4096, 4096), (4096, 1024, 1024), (4096, 768, 3072), (8192, 8192, 8192), (256, 1024, 1024),
        (1024, 1024, 1024), (8192, 2048, 2048), (16, 4096, 4096), (16384, 1024, 4096), (512, 512, 512),
    ),
    fused=8,
    wide=((4096, 768, 768), (4096, 1024, 1024), (1024, 1024, 1024), (4096, 4096, 4096)),
    experts=((8, 4096, 4096, 4096), (64, 8192, 2048, 1536), (128, 4096, 2048, 768)),
    sums=(1024, 4096, 16384),
    side=2048,
    ranker=Ranker(1024, 64, 100_000),
    ranker_batches=(512, 4096, 16384),
    encoder=Encoder(768, 12, 12, 128),
    encoder_batches=(8, 64),
    turns=21,
    budget=400,
)  # fmt: skip
QUICK = Sizes(
    # Eager: nothing is compiled before the map is deployed.
    jobs=(Asked(ClickSizes(1024, torch.bfloat16, 200_000, 4096, (1, 8, 16), 2.0), 5e-3, "eager", 0.1, (18, 12)),),
    shapes=FULL.shapes[:3], fused=1, wide=FULL.wide[:1], experts=FULL.experts[:1], sums=FULL.sums[1:2], side=1024,
    ranker=FULL.ranker, ranker_batches=(4096,), encoder=FULL.encoder, encoder_batches=(), turns=9, budget=48,
)  # fmt: skip
LIMIT = 40.0  # seconds of a part that is no main job


def main(given: Sequence[str] | None = None) -> int:
    arguments = command_line(__doc__, "three products, one eager search and one model, few turns").parse_args(given)
    missing = missing_hardware(None)
    if missing is not None:
        print(
            f"bench/gpu.py measures FP8 on a CUDA device of capability 8.9 or higher; this is {missing}",
            file=sys.stderr,
        )
        return 2
    print_machine()
    rows: list[Row] = [{"part": "device", "driver": driver(), "cuda": torch.version.cuda}]
    failed = False
    for row in measured(QUICK if arguments.quick else FULL, torch.device("cuda")):
        rows.append(row)
        failed |= "failed" in row
        print("  ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        write_json(arguments.json, rows, claims(rows))
    return finished(arguments.json, rows, claims(rows)) or int(failed)


def measured(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A row for each thing that was measured, as it comes; rows that say what was skipped and what failed, and why.

    The main jobs come after the first product: what a claim is about is not to be skipped.
    """
    products = [
        Part(f"product {shape}", LIMIT, partial(product, *shape, i < sizes.fused, sizes.turns, device))
        for i, shape in enumerate(sizes.shapes)
    ]
    parts = [Part("parity", LIMIT, partial(parity, sizes.side, device)), *products[:1]]
    for asked in sizes.jobs:
        parts += asked.job(sizes.turns, device).parts()
    parts += [Part(f"sums of {k}", LIMIT, partial(accumulation, k, device)) for k in sizes.sums]
    parts += products[1:]
    parts += [Part(f"wide {shape}", LIMIT, partial(wide, *shape, sizes.turns, device)) for shape in sizes.wide]
    parts += [Part(f"experts {shape}", LIMIT, partial(experts, *shape, sizes.turns, device)) for shape in sizes.experts]
    for name, made, batches in (
        ("ranker", sizes.ranker, sizes.ranker_batches),
        ("encoder", sizes.encoder, sizes.encoder_batches),
    ):
        parts += [Part(f"{name} {n}", 2 * LIMIT, partial(model, name, made, n, sizes.turns, device)) for n in batches]
    return in_turn(parts, sizes.budget)


def model(name: str, made: Ranker | Encoder, batch: int, turns: int, device: torch.device) -> Row:
    """Every form of a model on one batch; the base is the best BF16 form."""
    torch.manual_seed(0)
    inputs = made.inputs(batch, device)
    calls, results = forms(made.build(device), inputs, with_graphs=device.type == "cuda")
    with torch.no_grad():
        seconds = interleaved(calls, turns, device=device)
    best = min((form for form in calls if form.startswith(BF16)), key=lambda form: spread(seconds[form]).median)
    errors = {form: relative_error(results[form], results["float32"]) for form in calls}
    return {"model": name, "batch": batch, "best_bf16": best, "errors": errors, **summary(seconds, lambda _: best)}


def claims(rows: Sequence[Row]) -> list[Claim]:
    """What the documentation says. Until it is measured: what published figures lead one to expect of a Hopper GPU."""
    found: list[Claim] = []
    for row in rows:
        part, speed = str(row["part"]), row.get("times_as_fast")
        if part == "parity" and "failed" not in row:
            for how in ("static, eager", "dynamic, eager", "static, compiled"):
                found.append(at_most(f"codes that are not the CPU's, {how}", _number(row[how]), 0.0))
            found.append(
                at_most("codes that are not the CPU's, dynamic, compiled", _number(row["dynamic, compiled"]), 1e-3)
            )
        if row.get("k") == 4096 and "fast, of the magnitudes" in row:
            error = _number(row["fast, of the magnitudes"])
            found.append(at_most("fast sums of 4096: error, of the magnitudes", error, FP8_KERNEL.accumulation_error))
        if not isinstance(speed, dict):
            continue
        if part == "product (4096, 4096, 4096)":
            for how, bound in (("given codes, row-wise", 1.5), ("fp8", 1.2), ("norm, fp8-static", 1.4)):
                if how in speed:
                    found.append(at_least(f"4096 x 4096 -> 4096: {how} as fast as BF16", speed[how]["median"], bound))
        if part.startswith("product") and min(_number(row.get(name, 0)) for name in "kn") >= 4096:
            layer = max(
                (value["median"] for name, value in speed.items() if name.removeprefix("norm, ").startswith("fp8")),
                default=0.0,
            )
            found.append(at_least(f"{part}: layer with its quantising, at best, as fast as BF16", layer, 1.5))
        if part in ("ranker 4096", "encoder 64"):
            fastest = max(value["median"] for form, value in speed.items() if form.startswith("fp8"))
            found.append(at_least(f"{part}: FP8, its best form, as fast as the best BF16", fastest, 1.1))
        if part.endswith(": served"):
            found.append(at_least(f"{part}: certified", float(bool(row["certified"])), 1.0))
        if part.endswith(": served") and part.startswith(("encoder", "clicks 2048")):
            fastest = max((value["median"] for form, value in speed.items() if form.startswith("map")), default=0.0)
            found.append(at_least(f"{part}: the map, at best, as fast as the fastest compiled BF16", fastest, 1.3))
    return found


def _number(value: object) -> float:
    assert isinstance(value, float | int)
    return float(value)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key}: {_short(each.get('median', each) if isinstance(each, dict) else each)}"
            for key, each in value.items()
        )
    if isinstance(value, list):
        return "; ".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
