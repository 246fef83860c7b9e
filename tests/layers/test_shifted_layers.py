"""A layer on a shifted grid: its codes and its inputs by hand, and what the shift does to errors."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.quantiser_oracle import oracle
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.numerics.fast import fake_quantize
from precimap.numerics.grid_shift import GridShift
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import BF16_FLOOR, SCHEMES, Scheme, scheme
from precimap.runtime.weights.placing import weight_of
from precimap.runtime.x86.int8 import INT8_KERNEL
from precimap.runtime.x86.target import int8_scheme

W = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))  # [N, K]
X = torch.randn(6, 48, generator=torch.Generator().manual_seed(2))
SHIFTED = [name for name, found in SCHEMES.items() if found.weight.has_scales]
RANGE = InputRange(float(np.float32(0.03)), 0)


def range_of(chosen: Scheme) -> InputRange | None:
    if not chosen.needs_calibration:
        return None
    assert chosen.input is not None
    return RANGE if chosen.input.symmetric else dataclasses.replace(RANGE, zero=50)


def made(name: str, seed: int | None = None, layer: str = "weight") -> QuantizedLayer:
    chosen = scheme(name)
    shift = None if seed is None else GridShift(seed)
    return quantize_layer(layer, W, (1,), chosen, range_of(chosen), shift)


def linear() -> nn.Linear:
    model = nn.Linear(48, 24, bias=False)
    with torch.no_grad():
        model.weight.copy_(W)
    return model


def run(layer: QuantizedLayer) -> Tensor:
    model = linear()
    with torch.no_grad(), quantized(model, {"weight": layer}):
        found: Tensor = model(X)
    return found


def by_hand(chosen: Scheme, input_phase: float, weight_scales: np.ndarray) -> np.ndarray:
    """x W^T of values that the oracle rounds, one scale at a time; weight_scales [N], shifted already."""
    rows = zip(W.numpy(), weight_scales, strict=True)
    w = np.stack([oracle(row, chosen.weight.format, float(scale), 0.0)[1] for row, scale in rows])
    x = X.numpy()
    if chosen.input is not None:
        static = range_of(chosen)
        scales, zero = fit(X, chosen.input, (1,)).scale.numpy().reshape(-1), 0
        if static is not None:
            scales, zero = np.full(1, static.scale, np.float32), static.zero
        shifted = np.broadcast_to(scales * np.float32(input_phase), len(x))
        tokens = zip(x, shifted, strict=True)
        x = np.stack([oracle(row, chosen.input.format, float(scale), zero)[1] for row, scale in tokens])
    return x.astype(np.float64) @ w.astype(np.float64).T


@pytest.mark.parametrize("seed", [None, 3, 4])
@pytest.mark.parametrize("name", [name for name in SHIFTED if scheme(name).rows is None])
def test_a_shifted_layer_computes_what_hands_compute(name: str, seed: int | None) -> None:
    chosen, layer = scheme(name), made(name, seed)
    plain = fit(W, chosen.weight, (1,)).scale
    scales, phase = plain, 1.0
    if seed is not None:
        scales = GridShift(seed).weight_affine("weight", chosen.weight.format, Affine(plain, None)).scale
        phase = 1.0 if chosen.input is None else GridShift(seed).input_phase("weight", chosen.input.format)
        assert not torch.equal(scales, plain)
        assert chosen.input is None or phase > 1
    assert torch.equal(layer.weight_affine.scale, scales)
    per_row = np.broadcast_to(scales.numpy().reshape(-1), len(W))
    np.testing.assert_allclose(run(layer).numpy(), by_hand(chosen, phase, per_row), rtol=1e-5, atol=1e-4)


def test_codes_by_ml_dtypes() -> None:
    layer = made("fp8", 3)
    phases = layer.weight_affine.scale / fit(W, scheme("fp8").weight, (1,)).scale
    assert float(phases.min()) >= 1
    assert float(phases.max()) > 1.5
    scaled = W.numpy() * (np.float32(1) / layer.weight_affine.scale.numpy())
    assert np.array_equal(scaled.astype(ml_dtypes.float8_e4m3fn).view(np.uint8), layer.codes.view(torch.uint8).numpy())


@pytest.mark.parametrize("name", SHIFTED)
def test_without_a_shift_nothing_changes(name: str) -> None:
    """The layer, bit for bit, from the pieces and without a phase anywhere; its output within what a sum may round."""
    chosen, layer = scheme(name), made(name)
    affine = fit(W, chosen.weight, (1,))
    assert torch.equal(layer.codes.view(torch.uint8), quantize(W, chosen.weight.format, affine).view(torch.uint8))
    assert (layer.input_range, layer.input_phase) == (range_of(chosen), 1.0)
    x = X
    if chosen.input is not None:
        found = fit(X, chosen.input, (1,))
        if layer.input_range is not None:
            zero = None if chosen.input.symmetric else torch.tensor([[float(layer.input_range.zero)]])
            found = Affine(torch.tensor([[layer.input_range.scale]]), zero)
        x = fake_quantize(X, chosen.input.format, found)
    w = fake_quantize(W, chosen.weight.format, affine)
    bound = (W.shape[1] + 3) * 2.0**-24 * F.linear(x.double().abs(), w.double().abs())
    assert ((run(layer).double() - F.linear(x.double(), w.double())).abs() <= bound).all()


@pytest.mark.parametrize("name", SHIFTED)
def test_a_seed_is_a_draw(name: str) -> None:
    first, again, other = made(name, 1), made(name, 1), made(name, 2)
    assert torch.equal(first.codes.view(torch.uint8), again.codes.view(torch.uint8))
    assert torch.equal(run(first), run(again))
    assert not torch.equal(run(first), run(other))
    assert not torch.equal(made(name, 1, "other").weight_affine.scale, first.weight_affine.scale)


def test_a_static_range_carries_its_shift() -> None:
    for name in ("int8-static", "fp8-static"):
        layer, given = made(name, 5), range_of(scheme(name))
        chosen = scheme(name).input
        assert layer.input_range is not None
        assert given is not None
        assert chosen is not None
        phase = GridShift(5).input_phase("weight", chosen.format)
        assert layer.input_range.scale == float(np.float32(given.scale) * np.float32(phase)) > given.scale
        assert (layer.input_range.zero, layer.input_phase) == (given.zero, 1.0)


def test_a_kernel_runs_the_shifted_layer() -> None:
    name = int8_scheme()
    layer = made(name, 5)
    with torch.no_grad():
        kernel, unshifted = (INT8_KERNEL.linear(X, weight_of(each, W, INT8_KERNEL)) for each in (layer, made(name)))
    torch.testing.assert_close(kernel, run(layer), rtol=1e-4, atol=1e-4)
    assert float((kernel - unshifted).abs().max()) > 1e-2


class Siblings(nn.Module):
    """Two layers that read one tensor: without a draw they may share its rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def test_siblings_with_their_own_phases_do_not_share_an_input() -> None:
    model, chosen = Siblings(), scheme("fp8")
    layers = {name: quantize_layer(name, W, (1,), chosen, None, GridShift(1)) for name in ("a.weight", "b.weight")}
    assert layers["a.weight"].input_phase != layers["b.weight"].input_phase
    with torch.no_grad(), quantized(model, layers):
        found = model(X)
    for half, layer in zip(found.split(24, -1), layers.values(), strict=True):
        scales = layer.weight_affine.scale.numpy().reshape(-1)
        np.testing.assert_allclose(half.numpy(), by_hand(chosen, layer.input_phase, scales), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("chosen", [BF16_FLOOR, SCHEMES["bf16"], SCHEMES["fp16"]], ids=lambda chosen: chosen.name)
def test_formats_of_16_bits_stay_on_their_one_grid(chosen: Scheme) -> None:
    plain, drawn = (quantize_layer("weight", W, (1,), chosen, None, shift) for shift in (None, GridShift(1)))
    assert torch.equal(plain.codes, drawn.codes)
    assert (drawn.input_phase, float(drawn.weight_affine.scale)) == (1.0, 1.0)


@pytest.mark.parametrize(("name", "resolution", "kept"), [("fp8-weight", 2.0**-3, 0.1), ("int8-weight", None, 0.5)])
def test_the_error_over_draws_is_that_of_fresh_rounding(name: str, resolution: float | None, kept: float) -> None:
    """Error of y = w . x: mean about 0, variance sum x^2 step^2 / 12 with the step under each weight.

    The mean over draws would be 0 for each output if all were drawn anew; the smallest codes of integers keep a part.
    """
    draws = [made(name, seed) for seed in range(200)]
    x, w = X[0].double(), W.double()
    errors = torch.stack([(layer.weight().double() - w) @ x for layer in draws])  # [draws, N]
    variance = torch.zeros(len(W), dtype=torch.float64)
    for layer in draws:
        step = layer.weight_affine.scale.double().expand_as(w)
        if resolution is not None:
            step = resolution * torch.exp2((w.abs() / step).clamp(min=2.0**-6).log2().floor()) * step
        variance += (x.square() * step.square() / 12).sum(1) / len(draws)
    expected = float(variance.sum().sqrt())
    around = float(errors.sub(errors.mean(0)).square().mean(0).sum().sqrt())
    assert 0.85 * expected < around < 1.1 * expected
    assert abs(float(errors.mean())) < 4 * expected / len(W)
    assert float(errors.mean(0).square().sum().sqrt()) < kept * expected
