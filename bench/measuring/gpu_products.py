"""Single layers on a GPU: the codes it makes, the sums of its products, and what each costs beside BF16.

Invariant: a product is a CUDA graph of one call between two floods of the L2 cache, its times in turns with its rivals'. All
of it runs on a CPU as well, by the host's clock, so that no minute of a GPU is lost to a typo.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from measuring.parts import Row, summary
from models.gpu_models import BF16, PRECISIONS, Normed, relative_error
from precimap import compiled
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.numerics.formats import E4M3
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.schemes import scheme
from precimap.runtime.nvidia.fp8 import TOKENS, StaticScale, dynamic_codes, scaled_experts, scaled_mm
from precimap.runtime.nvidia.graphs import capture
from precimap.runtime.nvidia.layer_timer import event_seconds
from precimap.runtime.nvidia.target import CUDA_FP8
from precimap.runtime.timing import interleaved
from precimap.runtime.weights.low_weight import LowWeight

Cases = dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]  # a callable, and what it is called with
STATIC_SCALE = 0.01


def timed(cases: Cases, turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds by case of a callable on its arguments: a graph of one call, or on a CPU the call."""
    if device.type == "cuda":
        graphs = {name: capture(form, example)[0] for name, (form, example) in cases.items()}
        return event_seconds({name: graph.replay for name, graph in graphs.items()}, turns, device)
    with torch.no_grad():
        return interleaved({name: (lambda f=form, e=example: f(*e)) for name, (form, example) in cases.items()}, turns)


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
