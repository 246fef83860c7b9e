"""Does INT8 pay on this CPU? Single products, and whole models end to end against BF16 and the INT8 of other engines.

    python bench/cpu_speed.py [--quick] [--json FILE]

A figure is the CPU time of one thread, median [quartiles] over turns; a ratio is taken inside each turn. Products: a
linear layer M x K -> N in float32 and BF16, oneDNN's INT8 product alone on codes that are given, and the deployed layer,
which quantises its float32 input, eager and compiled; the same in BF16; and both again in scheme `int8`, whose scales are
those of each row, on machines that run it. Models (`models/cpu_speed_models.py`): all-MiniLM-L6-v2 on full batches, and a
DCNv2 whose layers are 1024 wide (three cross, three deep), with all layers that this CPU takes in INT8. Peers: torch
itself, torchao, ONNX Runtime and OpenVINO (`models/cpu_speed_peers.py`), which need the extra `bench`. Error: root mean
square change of the outputs against float32, by the root mean square of those. Quick: fewer turns, the ranker at 256 alone,
against torch alone. Exits with 1 when a claim fails.
"""

import copy
import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch._dynamo
from torch import Tensor, nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.cpu_speed_models import Run, measured, minilm, ranker
from models.cpu_speed_peers import engines
from precimap import CPU_INT8
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.numerics.schemes import scheme
from precimap.runtime.compiling.compiled import compiled
from precimap.runtime.shared_codes import MOST_KEPT
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.runtime.x86.target import int8_scheme
from precimap.runtime.x86.tokens import AMX, instructions, scheme_refusal

SHAPES = (
    (64, 384, 1536), (256, 576, 1536), (512, 1024, 4096),
    (1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384), (4096, 384, 1152), (4096, 1536, 384),
    (256, 1024, 1024), (1024, 1024, 1024), (1024, 2048, 2048), (1024, 4096, 1024),
)  # fmt: skip
# How many times as fast as the best BF16 form INT8 is to be: on CPUs with AMX, and without.
RANKER, ENCODER = (1.6, 1.4) if instructions() == AMX else (1.5, 1.15)
# Model -> how it is made, and what is claimed of it; None: nothing.
MODELS = {
    "ranker, 256": (lambda: ranker(256), RANKER),
    "ranker, 1024": (lambda: ranker(1024), RANKER),
    "MiniLM, 1 x 32": (lambda: minilm(1, 32), None),
    "MiniLM, 32 x 32": (lambda: minilm(32, 32), ENCODER),
    "MiniLM, 8 x 128": (lambda: minilm(8, 128), None),
    "MiniLM, 32 x 128": (lambda: minilm(32, 128), ENCODER),
}
NEAR = 1 / 1.1  # of the speed of the fastest engine


@dataclass(frozen=True, slots=True)
class Product:
    """Milliseconds of one M x K -> N product.

    layer_bf16: deployed from the BF16 layer, BF16 in and out, as `bf16` beside it. overhead: the deployed layer over the
    raw product, eager and compiled. tokens: in scheme `int8`, float32 in and out and BF16 in and out, over the BF16 layer;
    None where this machine does not run it.
    """

    shape: str
    fp32: Spread
    bf16: Spread
    raw: Spread
    layer: Spread
    compiled: Spread
    layer_bf16: Spread
    bf16_over_layer: Spread
    overhead: Spread
    compiled_overhead: Spread
    tokens_over_bf16: Spread | None = None
    tokens_bf16_over_bf16: Spread | None = None


def main() -> int:
    arguments = command_line(__doc__, "products and one model, few turns").parse_args()
    torch.set_num_threads(1)
    turns = 7 if arguments.quick else 11
    print_machine()
    print(f"scheme int8: {scheme_refusal(scheme('int8')) or instructions()}")
    products = [_product(*shape, turns) for shape in SHAPES]
    runs: list[Run] = []
    for name in list(MODELS)[:1] if arguments.quick else MODELS:
        model, inputs = MODELS[name][0]()
        runs += measured(name, model, inputs, turns, {} if arguments.quick else engines(model, inputs))
    claims = _claims(products, runs)
    return finished(arguments.json, [*products, *runs], claims)


def _product(m: int, k: int, n: int, turns: int) -> Product:
    """One line of the first table, printed."""
    generator = torch.Generator().manual_seed(0)
    starts = range(0, 16 * (MOST_KEPT + 2), 16)
    values = torch.randn(m * k + starts[-1], generator=generator)
    values_half = values.bfloat16()

    def inputs(all_of: Tensor) -> Iterator[Tensor]:
        """In turns more inputs than a layer keeps codes of, over nearly the same memory; each case has its own."""
        return itertools.cycle([all_of[start : start + m * k].view(m, k) for start in starts])

    linear = nn.Linear(k, n).eval()
    half = copy.deepcopy(linear).bfloat16()
    found = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.03, 120))
    layer, layer_half = (CPU_INT8.deployed(each, {"weight": found}) for each in (linear, half))
    by_row = {}
    if scheme_refusal(scheme("int8")) is None:
        rows = quantize_layer("weight", linear.weight, (1,), scheme("int8"), None)
        by_row = {
            f"tokens{end}": CPU_INT8.deployed(each, {"weight": rows}) for end, each in (("", linear), ("_bf16", half))
        }
    given = torch.randint(0, 255, (m, k), dtype=torch.uint8, generator=generator)
    packed, zeros = torch.ops.onednn.qlinear_prepack(found.codes, None), torch.zeros(n, dtype=torch.int32)
    scales, bias = found.weight_affine.scale.reshape(-1), linear.bias.detach()

    def raw() -> Tensor:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            given, 0.03, 120, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    torch._dynamo.reset()
    in_one = compiled(layer, (next(inputs(values)),))
    forms = {
        "fp32": (linear, inputs(values)),
        "bf16": (half, inputs(values_half)),
        "layer": (layer, inputs(values)),
        "compiled": (in_one, inputs(values)),
        "layer_bf16": (layer_half, inputs(values_half)),
        **{name: (each, inputs(values_half if "bf16" in name else values)) for name, each in by_row.items()},
    }
    calls = {name: (lambda form=form, given=given: form(next(given))) for name, (form, given) in forms.items()}
    cases = {"fp32": calls["fp32"], "bf16": calls["bf16"], "raw": raw, **calls}
    with torch.no_grad():
        seconds = interleaved(cases, turns, time.process_time)
    row = Product(
        f"{m} x {k} -> {n}",
        *(spread([1e3 * value for value in seconds[case]]) for case in cases if case not in by_row),
        bf16_over_layer=ratio(seconds["bf16"], seconds["layer_bf16"]),
        overhead=ratio(seconds["layer"], seconds["raw"]),
        compiled_overhead=ratio(seconds["compiled"], seconds["raw"]),
        **{f"{name}_over_bf16": ratio(seconds[name], seconds["bf16"]) for name in by_row},
    )
    print(
        f"{row.shape:20} fp32 {row.fp32:.2f}  bf16 {row.bf16:.2f}  raw {row.raw:.2f}  layer {row.layer:.2f}  "
        f"in bf16 {row.layer_bf16:.2f}  bf16/that {row.bf16_over_layer:.2f}  layer/raw {row.overhead:.2f}  "
        f"compiled/raw {row.compiled_overhead:.2f}  "
        + "  ".join(f"{name}/bf16 {ratio(seconds[name], seconds['bf16']):.2f}" for name in by_row),
        flush=True,
    )
    return row


def _claims(products: list[Product], runs: list[Run]) -> list[Claim]:
    """What the documentation says, on the machine that this ran on."""
    wide = [row for row in products if min(int(side) for side in row.shape.replace("->", "x").split("x")[1:]) >= 1024]
    claims = [
        at_most(
            "K, N >= 1024: compiled layer, input quantised, over the raw product, worst",
            max(row.compiled_overhead.median for row in wide),
            1.15,
        ),
        at_least(
            "deployed layer, eager and quantising alone, as fast as its BF16 self, worst",
            min(row.bf16_over_layer.median for row in products),
            1.0,
        ),
    ]
    claims += [
        at_most(f"scheme int8, quantising in it, {what} in and out, over the BF16 layer, worst", max(found), 0.7)
        for what, found in (
            ("BF16", [row.tokens_bf16_over_bf16.median for row in products if row.tokens_bf16_over_bf16]),
            ("float32", [row.tokens_over_bf16.median for row in products if row.tokens_over_bf16]),
        )
        if found
    ]
    for name, (_, bound) in MODELS.items():
        rows = [row for row in runs if row.model == name]
        if not rows:
            continue
        best = min((row for row in rows if row.ours), key=lambda row: row.milliseconds.median)
        if bound is not None:
            value = best.times_best_bf16.median
            claims.append(at_least(f"{name}: INT8, its best form, as fast as the best BF16", value, bound))
        if all(row.torch for row in rows):
            continue
        claims += [
            at_least(
                f"{name}: the same, as fast as the best of torch and torchao", best.times_fastest_torch.median, 1.0
            ),
            at_least(f"{name}: the same, as fast as the fastest engine", best.times_fastest_peer.median, NEAR),
        ]
    return claims


if __name__ == "__main__":
    sys.exit(main())
