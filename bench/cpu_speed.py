"""Does INT8 pay on this CPU? Single products, and whole models end to end against BF16 and blanket INT8.

    python bench/cpu_speed.py [--quick] [--json FILE]

A figure is the CPU time of one thread, median [quartiles] over turns; a ratio is taken inside each turn. Products: a
linear layer M x K -> N in float32 and BF16, oneDNN's INT8 product alone on codes that are given, and the deployed layer,
which quantises its float32 input, eager and compiled. Models: all-MiniLM-L6-v2 on full batches, and a DCNv2 whose layers
are 1024 wide (three cross, three deep), with all layers that this CPU takes in INT8. Compiled means Inductor with the
settings of `precimap.compiled` for everybody. torchao's peer is its dynamic INT8 (per token) on every linear layer.
Error: root mean square change of the outputs against float32, by the root mean square of those. Quick: fewer turns, the
ranker at 256 alone, without torchao. Exits with 1 when a claim fails.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from click_model import Recipe
from harness import Claim, at_least, at_most, print_claims, print_machine, write_json
from torch import Tensor, nn

from precimap import CPU_INT8, Splits, Task, discover
from precimap.demos.minilm import load_encoder
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.layers.refusals import refusal
from precimap.metrics import Loss
from precimap.numerics.schemes import scheme
from precimap.runtime.compiled import compiled
from precimap.runtime.cpu_int8 import int8_scheme
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.search.calibrate import calibrate, codes
from precimap.search.progress import silent

Inputs = tuple[Tensor, ...]
SHAPES = (
    (1024, 384, 384), (1024, 384, 1536), (1024, 1536, 384), (4096, 384, 1152), (4096, 1536, 384),
    (256, 1024, 1024), (1024, 1024, 1024), (1024, 2048, 2048), (1024, 4096, 1024),
)  # fmt: skip
BF16, OURS, TORCHAO = "bf16", "int8 in bf16", "torchao int8 in bf16"
FIELDS, VALUES = 64, 10_000


@dataclass(frozen=True, slots=True)
class Product:
    """Milliseconds of one M x K -> N product.

    layer_bf16: deployed from the BF16 layer, BF16 in and out, as `bf16` beside it. overhead: the deployed layer over the
    raw product, eager and compiled.
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


@dataclass(frozen=True, slots=True)
class Run:
    """Milliseconds of one form of a model, how many times as fast as the best BF16 form, and its error."""

    model: str
    form: str
    milliseconds: Spread
    times_best_bf16: Spread
    error: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and claims to this file")
    parser.add_argument("--quick", action="store_true", help="products and one model, few turns")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    turns = 7 if arguments.quick else 11
    print_machine()
    products = [_product(*shape, turns) for shape in SHAPES]
    runs = []
    models = {"ranker, 256": lambda: _ranker(256)}
    if not arguments.quick:
        models |= {
            "ranker, 1024": lambda: _ranker(1024),
            "MiniLM, 32 x 32": lambda: _minilm(32),
            "MiniLM, 32 x 128": lambda: _minilm(128),
        }
    for name, make in models.items():
        runs += _model(name, *make(), turns, peers=not arguments.quick)
    claims = _claims(products, runs)
    print_claims(claims)
    if arguments.json:
        write_json(arguments.json, [asdict(row) for row in (*products, *runs)], claims)
    return 0 if all(claim.holds for claim in claims) else 1


def _product(m: int, k: int, n: int, turns: int) -> Product:
    """One line of the first table, printed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    linear = nn.Linear(k, n).eval()
    half, x_half = copy.deepcopy(linear).bfloat16(), x.bfloat16()
    found = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.03, 120))
    layer, layer_half = (CPU_INT8.deployed(each, {"weight": found}) for each in (linear, half))
    given = torch.randint(0, 255, (m, k), dtype=torch.uint8, generator=generator)
    packed, zeros = torch.ops.onednn.qlinear_prepack(found.codes, None), torch.zeros(n, dtype=torch.int32)
    scales, bias = found.weight_affine.scale.reshape(-1), linear.bias.detach()

    def raw() -> Tensor:
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            given, 0.03, 120, packed, scales, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
        )
        return result

    torch._dynamo.reset()
    in_one = compiled(layer, (x,))
    cases = {
        "fp32": lambda: linear(x),
        "bf16": lambda: half(x_half),
        "raw": raw,
        "layer": lambda: layer(x.view(m, k)),  # another tensor on every call: no codes are shared
        "compiled": lambda: in_one(x),
        "layer_bf16": lambda: layer_half(x_half.view(m, k)),
    }
    with torch.no_grad():
        seconds = interleaved(cases, turns, time.process_time)
    row = Product(
        f"{m} x {k} -> {n}",
        *(spread([1e3 * value for value in seconds[case]]) for case in cases),
        bf16_over_layer=ratio(seconds["bf16"], seconds["layer_bf16"]),
        overhead=ratio(seconds["layer"], seconds["raw"]),
        compiled_overhead=ratio(seconds["compiled"], seconds["raw"]),
    )
    print(
        f"{row.shape:20} fp32 {row.fp32:.2f}  bf16 {row.bf16:.2f}  raw {row.raw:.2f}  layer {row.layer:.2f}  "
        f"in bf16 {row.layer_bf16:.2f}  bf16/that {row.bf16_over_layer:.2f}  layer/raw {row.overhead:.2f}  "
        f"compiled/raw {row.compiled_overhead:.2f}",
        flush=True,
    )
    return row


def _minilm(tokens: int) -> tuple[nn.Module, Inputs]:
    ids = torch.randint(1000, 20_000, (32, tokens), generator=torch.Generator().manual_seed(0))
    return load_encoder(), (ids, torch.ones_like(ids))


def _ranker(batch: int) -> tuple[nn.Module, Inputs]:
    """Untrained: weights of other values take the same time."""
    torch.manual_seed(0)
    model = Recipe(width=1024 // FIELDS, deep=(1024, 1024, 1024)).build(VALUES, FIELDS).eval()
    nn.init.normal_(model.embedding.weight)
    return model, (torch.randint(0, VALUES, (batch, FIELDS), generator=torch.Generator().manual_seed(0)),)


def _int8(model: nn.Module, inputs: Inputs) -> nn.Module:
    """Every layer that takes INT8 on this CPU, ranges from the inputs."""
    task = Task(
        model,
        splits=Splits([inputs], [inputs], [inputs]),
        forward=lambda m, batch: m(*batch),
        loss=lambda scores, batch: scores.float().square(),
        metric=Loss(),
    )
    chosen = scheme(int8_scheme())
    inventory = discover(model, task.forward, inputs)
    takes = [
        layer.name
        for layer in inventory.layers
        if refusal(layer, chosen) is None and CPU_INT8.refusal(layer, chosen) is None
    ]
    calibration = calibrate(task, tuple(takes), silent)
    layers = codes(task, inventory, calibration, [(name, chosen) for name in takes])
    return CPU_INT8.deployed(model, {layer.name: layer for layer in layers})


def _forms(model: nn.Module, inputs: Inputs, peers: bool) -> dict[str, Callable[[], Any]]:
    """Form -> one call of it."""
    half = copy.deepcopy(model).bfloat16()
    eager = {"fp32": model, BF16: half, "int8 in fp32": _int8(model, inputs), OURS: _int8(half, inputs)}
    if peers:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        eager[TORCHAO] = copy.deepcopy(half)
        quantize_(eager[TORCHAO], Int8DynamicActivationInt8WeightConfig())
    forms = {f"{name}, eager": form for name, form in eager.items()}
    for name, form in eager.items():
        started = time.perf_counter()
        forms[f"{name}, compiled"] = compiled(form, inputs)  # nothing of ours in it: Inductor with frozen weights
        print(f"  {name} compiled in {time.perf_counter() - started:.0f} s", flush=True)
    return {name: (lambda form=form: form(*inputs)) for name, form in forms.items()}


def _model(name: str, model: nn.Module, inputs: Inputs, turns: int, peers: bool) -> list[Run]:
    """The lines of one model, printed."""
    torch._dynamo.reset()
    forms = _forms(model, inputs, peers)
    with torch.no_grad():
        outputs = {form: call().double() for form, call in forms.items()}
        seconds = interleaved(forms, turns, time.process_time)
    expected = outputs["fp32, eager"]
    best = min((f"{BF16}, eager", f"{BF16}, compiled"), key=lambda form: spread(seconds[form]).median)
    rows = []
    for form in forms:
        error = float((outputs[form] - expected).square().mean().sqrt() / expected.square().mean().sqrt())
        milliseconds = spread([1e3 * value for value in seconds[form]])
        rows.append(Run(name, form, milliseconds, ratio(seconds[best], seconds[form]), error))
        print(
            f"{name:18}{form:32}{f'{milliseconds:.1f}':>24} ms  as fast as the best bf16: "
            f"{rows[-1].times_best_bf16:.2f}  error {error:.4f}",
            flush=True,
        )
    return rows


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
    fastest: Mapping[str, float] = {
        name: max(row.times_best_bf16.median for row in runs if row.model == name and row.form.startswith("int8"))
        for name in {row.model for row in runs}
    }
    for name, bound in (
        ("ranker, 256", 1.5),
        ("ranker, 1024", 1.5),
        ("MiniLM, 32 x 32", 1.15),
        ("MiniLM, 32 x 128", 1.15),
    ):
        if name in fastest:
            claims.append(at_least(f"{name}: INT8, its best form, as fast as the best BF16", fastest[name], bound))
    return claims


if __name__ == "__main__":
    sys.exit(main())
