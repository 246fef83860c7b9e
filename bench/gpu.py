"""Does FP8 pay on this GPU? All that is measured on one, in one command, with the core's dependencies alone.

    python bench/gpu.py [--quick] [--json FILE]      (with PYTHONPATH=src where precimap is not installed)

Parity: codes that this GPU makes, eagerly and compiled, against the CPU's; and what fast accumulation adds to a product.
Products M x K -> N, each a CUDA graph of one call between two floods of the L2 cache: BF16; FP8 on codes that are given,
tensorwise and row-wise; the deployed layer, which quantises its input; and a LayerNorm with the layer behind it, compiled,
so that the quantising can be fused. One wide product against three of its parts. Experts in one grouped product.
Models: a DCNv2 whose layers are 1024 wide, and an encoder of BERT's size, by batch; BF16, `fp8` and `fp8-static`, eager
and compiled, called and as graphs. Times are medians [quartiles] over turns, ratios are taken inside each turn; models are
timed from the host, synchronised. Error: root mean square change of the results against float32, by that of those.

What is not begun within the budget (seven minutes; quick: 45 seconds) is skipped, and named in the JSON; so is what fails,
and the rest goes on. Exits with 2 without a GPU that has FP8, with 1 when a claim or a part fails.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine, write_json
from models.gpu_models import BF16, PRECISIONS, Encoder, Normed, Ranker, forms, relative_error
from precimap import compiled
from precimap.errors import PrecimapError
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.numerics.formats import E4M3
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.schemes import scheme
from precimap.runtime.nvidia.fp8 import FP8_KERNEL, TOKENS, StaticScale, dynamic_codes, scaled_experts, scaled_mm
from precimap.runtime.nvidia.graphs import capture
from precimap.runtime.nvidia.layer_timer import driver, event_seconds
from precimap.runtime.nvidia.target import CUDA_FP8, missing_hardware
from precimap.runtime.timing import interleaved, ratio, spread
from precimap.runtime.weights.low_weight import LowWeight

Row = dict[str, object]
Cases = dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]  # a callable, and what it is called with
STATIC_SCALE = 0.01


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured. shapes: M, K, N; the first `fused` of them also compiled behind a LayerNorm. wide: M, K, N of each
    of three. experts: number, tokens, K, N. sums: K. budget: seconds."""

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
    shapes=(
        (4096, 1024, 1024), (4096, 768, 3072), (4096, 4096, 4096), (256, 1024, 1024), (1024, 1024, 1024),
        (8192, 2048, 2048), (16, 4096, 4096), (16384, 1024, 4096), (512, 512, 512), (8192, 8192, 8192),
    ),
    fused=7,
    wide=((4096, 768, 768), (4096, 1024, 1024), (1024, 1024, 1024), (4096, 4096, 4096)),
    experts=((8, 4096, 4096, 4096), (64, 8192, 2048, 1536), (128, 4096, 2048, 768)),
    sums=(1024, 4096, 16384),
    side=2048,
    ranker=Ranker(1024, 64, 100_000),
    ranker_batches=(512, 4096, 16384),
    encoder=Encoder(768, 12, 12, 128),
    encoder_batches=(8, 64),
    turns=21,
    budget=420,
)  # fmt: skip
QUICK = Sizes(
    shapes=FULL.shapes[:3], fused=1, wide=FULL.wide[:1], experts=FULL.experts[:1], sums=FULL.sums[1:2], side=1024,
    ranker=FULL.ranker, ranker_batches=(4096,), encoder=FULL.encoder, encoder_batches=(), turns=9, budget=45,
)  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    arguments = command_line(__doc__, "three products and one model, few turns").parse_args(given)
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
    """A row for each thing that was measured, as it comes; rows that say what was skipped and what failed, and why."""
    parts: list[tuple[str, Callable[[], Row]]] = [("parity", lambda: parity(sizes.side, device))]
    parts += [(f"sums of {k}", lambda k=k: accumulation(k, device)) for k in sizes.sums]
    parts += [
        (f"product {shape}", lambda shape=shape, i=i: product(*shape, i < sizes.fused, sizes.turns, device))
        for i, shape in enumerate(sizes.shapes)
    ]
    parts += [(f"wide {shape}", lambda shape=shape: wide(*shape, sizes.turns, device)) for shape in sizes.wide]
    parts += [(f"experts {shape}", lambda shape=shape: experts(*shape, sizes.turns, device)) for shape in sizes.experts]
    for name, made, batches in (
        ("ranker", sizes.ranker, sizes.ranker_batches),
        ("encoder", sizes.encoder, sizes.encoder_batches),
    ):
        parts += [
            (f"{name} {n}", lambda made=made, n=n, name=name: model(name, made, n, sizes.turns, device))
            for n in batches
        ]
    started = time.monotonic()
    for name, part in parts:
        if time.monotonic() - started > sizes.budget:
            yield {"part": name, "skipped": f"not begun within {sizes.budget:g} seconds"}
            continue
        torch._dynamo.reset()
        before = time.monotonic()
        try:
            row = part()
        except (RuntimeError, ValueError, TypeError, AttributeError, PrecimapError) as error:  # one part is not all
            row = {"failed": f"{type(error).__name__}: {str(error)[:500]}"}
        yield {"part": name, **row, "seconds_taken": round(time.monotonic() - before, 1)}


def timed(cases: Cases, turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds by case of a callable on its arguments: a graph of one call, or on a CPU the call."""
    if device.type == "cuda":
        graphs = {name: capture(form, example)[0] for name, (form, example) in cases.items()}
        return event_seconds({name: graph.replay for name, graph in graphs.items()}, turns, device)
    with torch.no_grad():
        return interleaved({name: (lambda f=form, e=example: f(*e)) for name, (form, example) in cases.items()}, turns)


def summary(seconds: Mapping[str, Sequence[float]], base: Callable[[str], str]) -> Row:
    """Microseconds of each case, and how many times as fast as its base it is."""
    times = {name: asdict(spread([1e6 * value for value in values])) for name, values in seconds.items()}
    speed = {name: asdict(ratio(seconds[base(name)], values)) for name, values in seconds.items() if base(name) != name}
    return {"microseconds": times, "times_as_fast": speed}


def parity(side: int, device: torch.device) -> Row:
    """The share of codes that are not the CPU's. Static: any bits. Dynamic: rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (side, side), generator=generator).to(torch.int32).view(torch.float32)
    rows = torch.randn(side, side, generator=generator) * 10.0 ** torch.linspace(-6, 6, side)[:, None]
    static = StaticScale(0.0137)
    found: Row = {}
    for name, x, make, wanted in (
        ("static", bits, static.codes, quantize(bits, E4M3, Affine(torch.tensor(0.0137), None))),
        ("dynamic", rows.bfloat16(), _token_codes, _token_codes(rows.bfloat16())),
    ):
        here = x.to(device)
        found[f"{name}, eager"] = _differing(make(here).cpu(), wanted)
        found[f"{name}, compiled"] = _differing(torch.compile(make)(here).cpu(), wanted)
    return found


def _token_codes(x: Tensor) -> Tensor:
    return dynamic_codes(x, TOKENS, 1.0)[0]


def _differing(found: Tensor, wanted: Tensor) -> float:
    both_nan = found.float().isnan() & wanted.float().isnan()
    return float(((found.view(torch.uint8) != wanted.view(torch.uint8)) & ~both_nan).double().mean())


def accumulation(k: int, device: torch.device) -> Row:
    """Largest error of a product, over its sum of magnitudes, and over its largest result; fast and not."""
    generator = torch.Generator().manual_seed(0)
    a, b = ((torch.randn(256, k, generator=generator) * 64).to(torch.float8_e4m3fn).to(device) for _ in range(2))
    exact, magnitudes = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    one = torch.ones((1, 1), device=device)
    found: Row = {"k": k}
    for name, fast in (("fast", True), ("slow", False)):
        result = torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast)
        error = (result.double() - exact).abs()
        found[f"{name}, of the magnitudes"] = float((error / magnitudes).max())
        found[f"{name}, of the largest result"] = float(error.max() / exact.abs().max())
    return found


def product(m: int, k: int, n: int, fused: bool, turns: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(device, torch.bfloat16)
    linear = nn.Linear(k, n).eval().to(device, torch.bfloat16)
    layers = {name: _fp8(linear, name) for name in PRECISIONS}
    static, rows = layers["fp8-static"], layers["fp8"]
    one, row_scales = torch.ones((1, 1), device=device), torch.ones((m, 1), device=device)
    codes = _token_codes(x)

    def raw(layer: nn.Linear, scales: Tensor) -> Callable[[Tensor], Tensor]:
        codes_of, scales_of = _held(layer)
        return lambda given: scaled_mm(given, codes_of, scales, scales_of, layer.bias, torch.bfloat16)

    cases: Cases = {
        BF16: (linear, (x,)),
        "given codes, tensorwise": (raw(static, one), (codes,)),
        "given codes, row-wise": (raw(rows, row_scales), (codes,)),
        **{name: (layer, (x,)) for name, layer in layers.items()},
    }
    if fused:
        for name, layer in {BF16: linear, **layers}.items():
            torch._dynamo.reset()
            cases[f"norm, {name}"] = (compiled(Normed(layer, k, device).eval(), (x,)), (x,))
    found = timed(cases, turns, device)
    return {"m": m, "k": k, "n": n, **summary(found, lambda name: f"norm, {BF16}" if name.startswith("norm") else BF16)}


def _fp8(linear: nn.Linear, name: str) -> nn.Linear:
    layer = quantize_layer("weight", linear.weight, (1,), scheme(name), InputRange(STATIC_SCALE, 0))
    made = CUDA_FP8.deployed(linear, {"weight": layer})
    assert isinstance(made, nn.Linear)
    return made


def _held(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and scales [1, N] or [1, 1] of a layer in FP8."""
    weight = layer.weight
    assert isinstance(weight, LowWeight)
    return weight.codes, weight.affine.scale.reshape(1, -1)


def wide(m: int, k: int, n: int, turns: int, device: torch.device) -> Row:
    """Three products of one input against one of three times the width, on given codes and in BF16."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    codes, scales = dynamic_codes(x, TOKENS, 1.0)
    whole = nn.Linear(k, 3 * n).eval().to(device, torch.bfloat16)
    parts = [nn.Linear(k, n).eval().to(device, torch.bfloat16) for _ in range(3)]
    fp8, fp8_parts = _fp8(whole, "fp8"), [_fp8(part, "fp8") for part in parts]

    def low(layer: nn.Linear, given: Tensor) -> Tensor:
        held, by_output = _held(layer)
        return scaled_mm(given, held, scales, by_output, layer.bias, torch.bfloat16)

    cases: Cases = {
        "bf16, three": (lambda given: [part(given) for part in parts], (x,)),
        "bf16, wide": (whole, (x,)),
        "fp8, three": (lambda given: [low(part, given) for part in fp8_parts], (codes,)),
        "fp8, wide": (lambda given: low(fp8, given), (codes,)),
    }
    return {"m": m, "k": k, "n": n, **summary(timed(cases, turns, device), lambda name: f"{name.split(',')[0]}, three")}


def experts(number: int, tokens: int, k: int, n: int, turns: int, device: torch.device) -> Row:
    """As many tokens for each expert, give or take: sorted random choices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(number, n, k, generator=generator) * k**-0.5).to(device, torch.bfloat16)
    chosen = torch.randint(0, number, (tokens,), generator=generator)
    ends = torch.bincount(chosen, minlength=number).cumsum(0).to(device, torch.int32)
    layer = quantize_layer("weight", weight, (2,), scheme("fp8"), None)
    scales = layer.weight_affine.scale.squeeze(2)
    cases: Cases = {
        BF16: (lambda given: torch._grouped_mm(given, weight.transpose(-2, -1), offs=ends), (x,)),
        "fp8": (lambda given: scaled_experts(given, layer.codes.mT, scales, ends), (x,)),
    }
    error = relative_error(scaled_experts(x, layer.codes.mT, scales, ends), cases[BF16][0](x))
    found = summary(timed(cases, turns, device), lambda _: BF16)
    return {"experts": number, "tokens": tokens, "k": k, "n": n, "error": error, **found}


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
        if part in ("ranker 4096", "encoder 64"):
            fastest = max(value["median"] for form, value in speed.items() if form.startswith("fp8"))
            found.append(at_least(f"{part}: FP8, its best form, as fast as the best BF16", fastest, 1.1))
    return found


def _number(value: object) -> float:
    assert isinstance(value, float)
    return value


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{key}: {each['median'] if isinstance(each, dict) else each:.4g}" for key, each in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
