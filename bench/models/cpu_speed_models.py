"""Whole models on this CPU: their forms, the time of each in turns with all others, and the bound that products set.

Invariant: every form of a model is timed in the same turns, our own and the engines of `cpu_speed_peers` alike. Compiled
means Inductor with the settings of `precimap.compiled` for everybody. torchao's peer is its dynamic INT8 (per token) on
every linear layer. "By row" is scheme `int8`, else `int8-static`. The bound is oneDNN's INT8 product alone, on codes that
are given, for each call of an INT8 layer in this model: what would remain without quantising, attention, normalisation
and gathers.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from models.all_low import all_low
from models.click_model import Recipe
from precimap import CPU_INT8
from precimap.demos.minilm import load_encoder
from precimap.numerics.schemes import scheme
from precimap.runtime.compiling.compiled import compiled
from precimap.runtime.timing import Spread, interleaved, ratio, spread
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.x86.int8 import INT8_KERNEL
from precimap.runtime.x86.target import int8_scheme
from precimap.runtime.x86.tokens import scheme_refusal

Inputs = tuple[Tensor, ...]
Call = Callable[[], Tensor]
FP32, BF16, OURS, TORCHAO = "fp32", "bf16", "int8 in bf16", "torchao int8 in bf16"
PRODUCTS = "products alone"
FIELDS, VALUES = 64, 10_000


@dataclass(frozen=True, slots=True)
class Run:
    """Milliseconds of one form of a model, and its error.

    ours: whether precimap made it. torch: whether torch runs it. How many times as fast as torch's best BF16 form, as the
    fastest form that torch runs and is not ours, and as the fastest of all that are not ours. over_products: its time over
    `PRODUCTS`.
    """

    model: str
    form: str
    ours: bool
    torch: bool
    milliseconds: Spread
    times_best_bf16: Spread
    times_fastest_torch: Spread
    times_fastest_peer: Spread
    over_products: Spread
    error: float


def minilm(sentences: int, tokens: int) -> tuple[nn.Module, Inputs]:
    """The packaged all-MiniLM-L6-v2 and one full batch of random words."""
    ids = torch.randint(1000, 20_000, (sentences, tokens), generator=torch.Generator().manual_seed(0))
    return load_encoder(), (ids, torch.ones_like(ids))


def ranker(batch: int) -> tuple[nn.Module, Inputs]:
    """A DCNv2 with layers 1024 wide. Untrained: weights of other values take the same time."""
    torch.manual_seed(0)
    model = Recipe(width=1024 // FIELDS, deep=(1024, 1024, 1024)).build(VALUES, FIELDS).eval()
    nn.init.normal_(model.embedding.weight)
    return model, (torch.randint(0, VALUES, (batch, FIELDS), generator=torch.Generator().manual_seed(0)),)


def measured(name: str, model: nn.Module, inputs: Inputs, turns: int, engines: Mapping[str, Call]) -> list[Run]:
    """The lines of one model, printed. engines: calls of the same model elsewhere; without any, torchao is left out too."""
    torch._dynamo.reset()
    ours, peers, products = _forms(model, inputs, torchao=bool(engines))
    forms = {**ours, **peers, **engines}
    with torch.no_grad():
        outputs = {form: call().double() for form, call in forms.items()}
        seconds = interleaved({**forms, PRODUCTS: products}, turns, time.process_time)
    medians = {form: spread(taken).median for form, taken in seconds.items()}
    best = min((f"{BF16}, eager", f"{BF16}, compiled"), key=medians.__getitem__)
    in_torch = min(peers, key=medians.__getitem__)
    peer = min((*peers, *engines), key=medians.__getitem__)
    expected = outputs[f"{FP32}, eager"]
    bound = 1e3 * medians[PRODUCTS]
    print(f"{name}: fastest peer {peer}; {PRODUCTS} {bound:.2f} ms", flush=True)
    rows = []
    for form in forms:
        row = Run(
            name,
            form,
            ours=form in ours,
            torch=form not in engines,
            milliseconds=spread([1e3 * value for value in seconds[form]]),
            times_best_bf16=ratio(seconds[best], seconds[form]),
            times_fastest_torch=ratio(seconds[in_torch], seconds[form]),
            times_fastest_peer=ratio(seconds[peer], seconds[form]),
            over_products=ratio(seconds[form], seconds[PRODUCTS]),
            error=float((outputs[form] - expected).square().mean().sqrt() / expected.square().mean().sqrt()),
        )
        rows.append(row)
        print(
            f"{name:18}{form:32}{f'{row.milliseconds:.2f}':>26} ms  best bf16 / it {row.times_best_bf16.median:.2f}  "
            f"fastest peer / it {row.times_fastest_peer.median:.2f}  it / products {row.over_products.median:.2f}  "
            f"error {row.error:.4f}",
            flush=True,
        )
    return rows


def _forms(model: nn.Module, inputs: Inputs, torchao: bool) -> tuple[dict[str, Call], dict[str, Call], Call]:
    """One call of each form: ours, torch's, and of the products alone."""
    half, int8 = copy.deepcopy(model).bfloat16(), scheme(int8_scheme())
    ours = {"int8 in fp32": all_low(model, inputs, int8, CPU_INT8), OURS: all_low(half, inputs, int8, CPU_INT8)}
    if scheme_refusal(scheme("int8")) is None:
        for kind, one in (("fp32", model), ("bf16", half)):
            ours[f"int8 by row in {kind}"] = all_low(one, inputs, scheme("int8"), CPU_INT8)
    peers = {FP32: model, BF16: half}
    if torchao:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        peers[TORCHAO] = copy.deepcopy(half)
        quantize_(peers[TORCHAO], Int8DynamicActivationInt8WeightConfig())
    products = _products(ours[OURS], inputs)
    return _eager_and_compiled(ours, inputs), _eager_and_compiled(peers, inputs), products


def _eager_and_compiled(models: Mapping[str, nn.Module], inputs: Inputs) -> dict[str, Call]:
    forms: dict[str, Call] = {f"{name}, eager": partial(form, *inputs) for name, form in models.items()}
    for name, form in models.items():
        started = time.perf_counter()
        forms[f"{name}, compiled"] = partial(compiled(form, inputs), *inputs)
        print(f"  {name} compiled in {time.perf_counter() - started:.0f} s", flush=True)
    return forms


def _in_int8(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, LowWeight) and weight.how.kernel is INT8_KERNEL


def _products(deployed: nn.Module, inputs: Inputs) -> Call:
    """The product of every call of an INT8 layer, on codes that are given, its result in BF16, one after the other."""
    calls: list[Callable[[], Any]] = []
    generator = torch.Generator().manual_seed(0)

    def add(layer: nn.Module, arguments: tuple[Tensor], _: object) -> None:
        weight = layer.weight
        assert isinstance(layer, nn.Linear)
        assert isinstance(weight, LowWeight)
        n, k = weight.shape
        given = torch.randint(0, 255, (arguments[0].numel() // k, k), dtype=torch.uint8, generator=generator)
        packed, zeros = torch.ops.onednn.qlinear_prepack(weight.codes, None), torch.zeros(n, dtype=torch.int32)
        bias = None if layer.bias is None else layer.bias.float()
        scales = weight.affine.scale.reshape(-1)
        what = (given, 0.03, 120, packed, scales, zeros, bias, 1.0, 0, torch.bfloat16, "none", [], "")
        calls.append(partial(torch.ops.onednn.qlinear_pointwise, *what))

    low = [layer for layer in deployed.modules() if _in_int8(layer)]
    hooks = [layer.register_forward_hook(add) for layer in low]
    with torch.no_grad():
        deployed(*inputs)
    for hook in hooks:
        hook.remove()

    def all_of_them() -> Tensor:
        result: Tensor
        for call in calls:
            result = call()
        return result

    return all_of_them
