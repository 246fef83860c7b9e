"""Experts in FP8 against the emulation of `_grouped_mm`; on a CPU by the product's definition (`grouped_on_cpu`)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from helpers.grouped_on_cpu import grouped_on_cpu
from helpers.specimen import Builder
from helpers.zoo_libraries import mixtral, qwen3_moe
from precimap import CUDA_FP8, Splits, Task, deploy, discover, load_deployed, save_deployed, search
from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_layer
from precimap.layers.refusals import refusal
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.deploy import deployment_of
from precimap.runtime.nvidia import fp8 as fp8_weights
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.nvidia.fp8 import FP8_KERNEL, scaled_experts
from precimap.runtime.weights.low_weight import LowWeight

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() in ((9, 0), (10, 0))
DEVICE = "cuda" if HOPPER else "cpu"


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU pass for a GPU where there is none."""
    if HOPPER:
        yield
        return
    monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
    with grouped_on_cpu():
        yield


class Experts(nn.Module):
    """Stacked weights [E, N, K], as Mixtral and Qwen3-MoE keep them, read by one grouped product."""

    def __init__(self, experts: int, outputs: int, inputs: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(experts, outputs, inputs, generator=generator) * inputs**-0.5
        weight *= 10.0 ** torch.linspace(-2, 1, experts)[:, None, None]  # a scale of all would lose the small ones
        self.weight = nn.Parameter(weight.bfloat16())

    def forward(self, tokens: Tensor, ends: Tensor) -> Tensor:
        result: Tensor = torch._grouped_mm(tokens, self.weight.transpose(-2, -1), offs=ends)
        return result


def check(experts: int, outputs: int, inputs: int, counts: list[int]) -> None:
    model = Experts(experts, outputs, inputs).to(DEVICE)
    tokens = torch.randn(sum(counts), inputs, generator=torch.Generator().manual_seed(1)).bfloat16().to(DEVICE)
    ends = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    layer = quantize_layer("weight", model.weight, (2,), SCHEMES["fp8"], None)
    with torch.no_grad():
        with quantized(model, {"weight": layer}):
            expected = model(tokens, ends).float()
        found = scaled_experts(tokens, layer.codes.mT, layer.weight_affine.scale.squeeze(2), ends)
        layer_sums = layer.weight().abs().repeat_interleave(torch.tensor(counts, device=DEVICE), 0)
        magnitudes = torch.einsum("sk,snk->sn", tokens.float().abs(), layer_sums)
    assert found.dtype == torch.bfloat16
    # The emulation rounds to BF16 as well, so that two results may be a whole step apart.
    allowed = 2.0**-7 * expected.abs() + (FP8_KERNEL.accumulation_error if HOPPER else 1e-6) * magnitudes
    assert bool(((found.float() - expected).abs() <= allowed).all())


def test_experts_compute_the_emulation() -> None:
    check(4, 48, 32, [5, 0, 3, 8])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(1, 3), st.integers(1, 3))
def test_any_number_of_tokens(counts: list[int], outputs: int, inputs: int) -> None:
    check(len(counts), 16 * outputs, 16 * inputs, counts)


def test_operands_that_cuda_would_refuse_are_found() -> None:
    """Of the stand-in: a row-major weight, scales of another shape, ends of 64 bits."""
    codes = torch.zeros(2, 16, 32, dtype=torch.float8_e4m3fn, device=DEVICE).mT
    tokens, scales = torch.ones(4, 32, dtype=torch.bfloat16, device=DEVICE), torch.ones(2, 16, device=DEVICE)
    ends = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    assert scaled_experts(tokens, codes, scales, ends).shape == (4, 16)
    row_major = codes.contiguous()
    for wrong in (
        (tokens, row_major, scales, ends),
        (tokens, codes, scales[:, :1], ends),
        (tokens, codes, scales, ends.long()),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            scaled_experts(*wrong)


class Mixture(nn.Module):
    """A router, experts of two products each in stacked parameters, and a classifier; `inputs_first` as gpt-oss has them."""

    def __init__(self, inputs_first: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)

        def stacked(*shape: int) -> nn.Parameter:
            weight = torch.randn(shape, generator=generator) * shape[2] ** -0.5
            return nn.Parameter(weight.transpose(1, 2).contiguous() if inputs_first else weight)

        self.inputs_first = inputs_first
        self.router, self.last = nn.Linear(32, 3, bias=False), nn.Linear(32, 16)
        self.up, self.down = stacked(3, 48, 32), stacked(3, 32, 48)
        with torch.no_grad():
            for parameter in (self.router.weight, self.last.weight, self.last.bias):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        chosen, order = torch.sort(self.router(x).argmax(1))
        ends = torch.searchsorted(chosen, torch.arange(3, device=x.device), right=True).int()
        hidden = torch._grouped_mm(x[order], self.turned(self.up), offs=ends)
        hidden = torch._grouped_mm(torch.relu(hidden), self.turned(self.down), offs=ends)
        result: Tensor = self.last(torch.zeros_like(x).index_copy(0, order, hidden))
        return result

    def turned(self, weight: Tensor) -> Tensor:
        return weight if self.inputs_first else weight.transpose(-2, -1)


def task_of(model: nn.Module) -> Task:
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(12):
        x = torch.randn(50, 32, generator=generator).bfloat16().to(DEVICE)
        with torch.no_grad():
            batches.append({"x": x, "labels": model(x).argmax(1)})
    return Task(
        model,
        splits=Splits(batches[:1], batches[1:5], batches[5:]),
        forward=lambda m, batch: m(batch["x"]).float(),
        loss=lambda scores, batch: nn.functional.cross_entropy(scores, batch["labels"], reduction="none"),
        metric=Loss(),
        name="mixture",
    )


@pytest.mark.parametrize("inputs_first", [False, True])
def test_a_map_with_experts_is_deployed_saved_and_loaded(inputs_first: bool, tmp_path: Path) -> None:
    model = Mixture(inputs_first).eval().to(DEVICE, torch.bfloat16)
    task = task_of(model)
    found = search(task, schemes=["fp8"], margin=0.5, ledger=tmp_path / "ledger")
    assert {"up", "down", "last.weight"} == set(found.map.low)
    fast = deploy(model, found.map, target="cuda-fp8", task=task)
    assert all(isinstance(weight, LowWeight) for weight in (fast.up, fast.down, fast.last.weight))
    assert isinstance(model.up, nn.Parameter)
    agreed = deployment_of(fast).agreement
    assert agreed is not None
    assert agreed.relative < 2**-6
    save_deployed(fast, model, tmp_path / "model.safetensors")
    skeleton = Mixture(inputs_first).eval().to(DEVICE, torch.bfloat16)
    loaded = load_deployed(skeleton, tmp_path / "model.safetensors", target="cuda-fp8")
    assert isinstance(loaded.up, LowWeight)
    assert loaded.up.codes.stride() == fast.up.codes.stride()
    with torch.no_grad():
        x = task.splits.search[0]["x"]
        assert torch.equal(loaded(x), fast(x))
        assert not torch.equal(model(x), fast(x))


@pytest.mark.filterwarnings("ignore")
def test_a_compiler_sees_the_grouped_products() -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    fast, x = deployed_mixture(), torch.randn(9, 32).bfloat16().to(DEVICE)
    with torch.no_grad():
        found = torch.compile(fast, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x)
        assert torch.equal(found, fast(x))
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes]
    assert called.count(torch.ops.aten._scaled_grouped_mm.default) == 2
    assert torch.ops.aten._grouped_mm.default not in called


def deployed_mixture() -> nn.Module:
    model = Mixture().eval().to(DEVICE, torch.bfloat16)
    layers = {name: quantize_layer(name, getattr(model, name), (2,), SCHEMES["fp8"], None) for name in ("up", "down")}
    return CUDA_FP8.deployed(model, layers)


def test_what_is_no_grouped_product_is_served_or_reads_the_values() -> None:
    """A product of one expert, or of all in a batch, by the FP8 product; along the outputs, where no scale is shared, and
    elsewhere by the decoded values."""
    fast = deployed_mixture()
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(4, 32, generator=generator).bfloat16().to(DEVICE)
    ends, values = torch.tensor([2, 3, 4], dtype=torch.int32, device=DEVICE), fast.up.dequantize()
    wide, close = x.repeat(1, 2)[:, :48], {"rtol": 0.05, "atol": 0.1}
    with torch.no_grad():
        assert torch.equal(fast.up + 1, values.bfloat16() + 1)
        torch.testing.assert_close((fast.up[0] @ x.T).float(), values[0] @ x.T.float(), **close)
        torch.testing.assert_close(
            torch.bmm(x.expand(3, 4, 32), fast.up.mT).float(), torch.bmm(x.float().expand(3, 4, 32), values.mT), **close
        )
        found = torch._grouped_mm(wide, fast.up, offs=ends)
        assert torch.equal(found, torch._grouped_mm(wide, values.bfloat16(), offs=ends))
        assert torch.equal(fast.up.transpose(0, 1).dequantize(), values.transpose(0, 1))
        with pytest.raises(DeployError, match="up: its codes cannot be written"):
            fast.up.mul_(2)
    assert fast.up.half().dtype == torch.float16
    assert "up" in repr(fast.up)


def test_a_grouped_kernel_that_multiplies_wrongly_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an expert with the scales of its neighbour."""
    model = Mixture().eval().to(DEVICE, torch.bfloat16)
    found = search(task_of(model), schemes=["fp8"], margin=0.5, ledger=tmp_path / "ledger")
    plain = fp8_weights.scaled_experts

    def shifted(tokens: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, phase: float = 1.0) -> Tensor:
        return plain(tokens, codes, scales.roll(1, 0), ends, phase)

    monkeypatch.setattr(fp8_weights, "scaled_experts", shifted)
    with pytest.raises(DeployError, match="up: the kernel of fp8 differs from its emulation"):
        deploy(model, found.map, target="cuda-fp8")


def test_experts_are_refused_where_they_cannot_be_served() -> None:
    model = Mixture().eval().to(DEVICE, torch.bfloat16)
    layer = discover(model, lambda m, b: m(b), torch.randn(6, 32).bfloat16().to(DEVICE)).layer("up")
    assert "cannot be timed alone" in str(CUDA_FP8.refusal(layer, SCHEMES["fp8"]))
    assert "a scale for each token" in str(CUDA_FP8.refusal(layer, SCHEMES["fp8-static"]))
    assert "only stores" in str(CUDA_FP8.refusal(layer, SCHEMES["fp8-weight"]))
    assert "bfloat16 alone" in str(CUDA_FP8.refusal(replace(layer, dtype="float32"), SCHEMES["fp8"]))
    wide = Mixture().eval().to(DEVICE)
    odd = nn.ParameterDict({"up": torch.ones(2, 24, 32, dtype=torch.bfloat16, device=DEVICE)})
    kernels = nn.ParameterDict({"up": torch.ones(32, 16, 3, dtype=torch.bfloat16, device=DEVICE)})
    for wrong, contracted, reason in (
        (wide, (2,), "bfloat16 alone, not float32"),
        (odd, (2,), "multiples of 16, not 24"),
        (kernels, (1, 2), "with a scale for each output"),  # a convolution's
    ):
        layers = {"up": quantize_layer("up", dict(wrong.named_parameters())["up"], contracted, SCHEMES["fp8"], None)}
        with pytest.raises(DeployError, match=reason):
            CUDA_FP8.deployed(wrong, layers)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [qwen3_moe, mixtral])
def test_real_mixtures_run_their_own_code_on_them(make: Builder) -> None:
    """transformers' own forward, eager and in one graph, against the emulation of the same codes."""
    torch._dynamo.reset()
    specimen = make()
    model, batch, chosen = specimen.model.bfloat16().to(DEVICE), specimen.batch.to(DEVICE), SCHEMES["fp8"]
    inventory = discover(model, specimen.forward, batch)
    weights = dict(model.named_parameters())
    names = [found.name for found in inventory.layers if "experts." in found.name and refusal(found, chosen) is None]
    assert len(names) == 4
    layers = {n: quantize_layer(n, weights[n], inventory.layer(n).contracted, chosen, None) for n in names}
    with torch.no_grad():
        fast = CUDA_FP8.deployed(model, layers)
        found = specimen.forward(fast, batch).float()
        with quantized(model, layers):
            expected = specimen.forward(model, batch).float()
        plain = specimen.forward(model, batch).float()
        assert torch.equal(
            specimen.forward(torch.compile(fast, backend="aot_eager", fullgraph=True), batch).float(), found
        )
    assert float((found - expected).square().mean()) < 0.05 * float((plain - expected).square().mean())
