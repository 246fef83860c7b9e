"""Grouped FP8 products against the emulation of `_grouped_mm`; on a CPU by the product's definition (`grouped_on_cpu`)."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grouped_on_cpu import grouped_on_cpu
from precimap.layers.quantized import quantize_layer, quantized
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.fp8_experts import scaled_experts
from precimap.runtime.fp8_linear import Fp8Linear

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() in ((9, 0), (10, 0))
DEVICE = "cuda" if HOPPER else "cpu"


@pytest.fixture(autouse=True)
def product() -> Iterator[None]:
    with nullcontext() if HOPPER else grouped_on_cpu():
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
        found = scaled_experts(tokens, layer.codes, layer.weight_affine.scale.squeeze(2), ends)
        layer_sums = layer.weight().abs().repeat_interleave(torch.tensor(counts, device=DEVICE), 0)
        magnitudes = torch.einsum("sk,snk->sn", tokens.float().abs(), layer_sums)
    assert found.dtype == torch.bfloat16
    # The emulation rounds to BF16 as well, so that two results may be a whole step apart.
    allowed = 2.0**-7 * expected.abs() + (Fp8Linear.accumulation_error if HOPPER else 1e-6) * magnitudes
    assert bool(((found.float() - expected).abs() <= allowed).all())


def test_experts_compute_the_emulation() -> None:
    check(4, 48, 32, [5, 0, 3, 8])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(1, 3), st.integers(1, 3))
def test_any_number_of_tokens(counts: list[int], outputs: int, inputs: int) -> None:
    check(len(counts), 16 * outputs, 16 * inputs, counts)


def test_operands_that_cuda_would_refuse_are_found() -> None:
    """Of the stand-in: a row-major weight, scales of another shape, ends of 64 bits."""
    codes = torch.zeros(2, 16, 32, dtype=torch.float8_e4m3fn, device=DEVICE)
    tokens, scales = torch.ones(4, 32, dtype=torch.bfloat16, device=DEVICE), torch.ones(2, 16, device=DEVICE)
    ends = torch.tensor([2, 4], dtype=torch.int32, device=DEVICE)
    assert scaled_experts(tokens, codes, scales, ends).shape == (4, 16)
    row_major = codes.transpose(1, 2).contiguous().transpose(1, 2)
    for wrong in (
        (tokens, row_major, scales, ends),
        (tokens, codes, scales[:, :1], ends),
        (tokens, codes, scales, ends.long()),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            scaled_experts(*wrong)
