"""Scales: amax saturates nothing, a percentile is numpy's, the least error is least, no input breaks a scale."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.fast import fake_quantize
from precimap.numerics.formats import BF16, E2M1, E4M3, FORMATS, FP16, INT8, UINT7, UINT8, Format, IntegerFormat
from precimap.numerics.quantize import quantize, sqnr_db
from precimap.numerics.ranges import affine_from_range, fit
from precimap.numerics.schemes import (
    BF16_FLOOR,
    SCHEMES,
    Amax,
    Granularity,
    MinimumError,
    Percentile,
    RangeRule,
    Rounding,
)

TENSOR, CHANNEL, TOKEN = Granularity.PER_TENSOR, Granularity.PER_CHANNEL, Granularity.PER_TOKEN
RULES = (Amax(), Percentile(99.0), MinimumError(10))
SCALED = [format for format in FORMATS.values() if format.bits <= 8]
LARGEST = torch.finfo(torch.float32).max
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.row())
scaled_format = pytest.mark.parametrize("format", SCALED, ids=lambda format: format.name)
ASYMMETRIC = [Rounding(format, TENSOR, symmetric=False) for format in (UINT8, UINT7, INT8)]
asymmetric = pytest.mark.parametrize("rounding", ASYMMETRIC, ids=lambda rounding: rounding.format.name)


def outliers(*shape: int) -> Tensor:
    """Values with heavy tails and rows of very different size, as activations have."""
    x = torch.randn(shape) ** 3
    return x * torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def rounded(x: Tensor, rounding: Rounding, contracted: tuple[int, ...]) -> Tensor:
    return fake_quantize(x, rounding.format, fit(x, rounding, contracted))


def squared_error(x: Tensor, rounding: Rounding, contracted: tuple[int, ...]) -> Tensor:
    dims = tuple(range(x.ndim)) if rounding.granularity is TENSOR else contracted
    return (rounded(x, rounding, contracted).double() - x.double()).square().sum(dims)


# --- granularity


@pytest.mark.parametrize(
    ("granularity", "contracted", "shape"),
    [
        (TENSOR, (), (1, 1, 1)),
        (TENSOR, (2,), (1, 1, 1)),
        (CHANNEL, (2,), (4, 5, 1)),
        (CHANNEL, (1, 2), (4, 1, 1)),
        (CHANNEL, (0, 2), (1, 5, 1)),
        (TOKEN, (-1,), (4, 5, 1)),
        (TOKEN, (-1, 0), (1, 5, 1)),
    ],
)
@every_rule
def test_one_scale_for_what_is_contracted(
    granularity: Granularity, contracted: tuple[int, ...], shape: tuple[int, ...], rule: RangeRule
) -> None:
    affine = fit(outliers(4, 5, 6), Rounding(INT8, granularity, range=rule), contracted)
    assert affine.scale.shape == shape
    assert affine.scale.dtype == torch.float32
    assert affine.zero is None


@scaled_format
@every_rule
def test_per_channel_is_the_loop_over_channels(format: Format, rule: RangeRule) -> None:
    weight = outliers(6, 50)
    for symmetric in {True, not isinstance(format, IntegerFormat)}:
        per_tensor = Rounding(format, TENSOR, symmetric=symmetric, range=rule)
        per_channel = Rounding(format, CHANNEL, symmetric=symmetric, range=rule)
        loop = torch.stack([rounded(row, per_tensor, ()) for row in weight])
        assert torch.equal(rounded(weight, per_channel, (1,)), loop)
        assert torch.equal(rounded(weight.t().contiguous(), per_channel, (0,)), loop.t())
        assert torch.equal(rounded(weight.view(6, 5, 10), per_channel, (1, 2)), loop.view(6, 5, 10))
        assert len(fit(weight, per_channel, (1,)).scale.unique()) == 6


def test_a_shared_scale_needs_something_to_share_it_over() -> None:
    with pytest.raises(SchemeError, match="per-channel needs at least one contracted dim"):
        fit(torch.ones(3, 4), Rounding(INT8, CHANNEL), ())


# --- range rules


@scaled_format
def test_amax_reaches_the_largest_value_and_saturates_nothing(format: Format) -> None:
    x = outliers(5, 400)
    affine = fit(x, Rounding(format, CHANNEL), (1,))
    np.testing.assert_array_equal(
        affine.scale.numpy(), np.abs(x.numpy()).max(1, keepdims=True) / np.float32(format.maximum)
    )
    assert ((x / affine.scale).abs().amax(1) <= format.maximum * (1 + 2**-22)).all()
    largest = x.abs().argmax(1, keepdim=True)
    expected = x.gather(1, largest)
    if format.minimum == 0:  # an unsigned symmetric code holds only the positive half
        expected = expected.clamp(min=0)
    approximation = fake_quantize(x, format, affine).gather(1, largest)
    np.testing.assert_allclose(approximation.numpy(), expected.numpy(), rtol=1e-6)


@asymmetric
@given(low=st.floats(-(2.0**100), 2.0**100, width=32), high=st.floats(-(2.0**100), 2.0**100, width=32))
def test_an_asymmetric_range_reaches_both_ends_and_holds_zero(rounding: Rounding, low: float, high: float) -> None:
    low, high = sorted((low, high))
    affine = affine_from_range(low, high, rounding)
    assert affine.zero is not None
    zero, step = affine.zero.item(), affine.scale.item()
    assert zero == int(zero)
    assert rounding.format.minimum <= zero <= rounding.format.maximum
    ends = torch.tensor([low, high, 0.0])
    error = (fake_quantize(ends, rounding.format, affine) - ends).abs()
    assert (error <= step * 1.001).all()  # half a step of the code, and half a step of the rounded zero
    assert error[2] == 0


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero"),
    [
        (-1.0, 3.0, 4 / 255, 64),
        (0.0, 2.55, 0.01, 0),
        (1.0, 2.55, 0.01, 0),
        (-2.55, -1.0, 0.01, 255),
        (-0.5, 2.05, 0.01, 50),
    ],
)
def test_literal_asymmetric_ranges(low: float, high: float, scale: float, zero: int) -> None:
    affine = affine_from_range(low, high, Rounding(UINT8, TENSOR, symmetric=False))
    assert affine.zero is not None
    assert affine.scale.item() == pytest.approx(scale, rel=1e-6)
    assert affine.zero.item() == zero


def test_a_static_range_gives_the_scale_of_the_tensor() -> None:
    x = outliers(7, 30)
    for rounding in (Rounding(E4M3, TENSOR), Rounding(INT8, TENSOR), *ASYMMETRIC):
        static, own = affine_from_range(x.min().item(), x.max().item(), rounding), fit(x, rounding, ())
        assert static.scale == own.scale
        assert (static.zero is None) == (own.zero is None) == rounding.symmetric
        if static.zero is not None:
            assert static.zero == own.zero
        assert torch.equal(fake_quantize(x, rounding.format, static), fake_quantize(x, rounding.format, own))


@given(
    percentile=st.floats(50.01, 99.999),
    thousandths=st.lists(st.integers(-(10**9), 10**9), min_size=1, max_size=200),
)
def test_percentile_is_that_of_numpy(percentile: float, thousandths: list[int]) -> None:
    x = torch.tensor(thousandths) / 1000
    expected = np.percentile(np.abs(x.numpy().astype(np.float64)), percentile) / 127
    scale = fit(x, Rounding(INT8, TENSOR, range=Percentile(percentile)), ()).scale.item()
    assert scale == pytest.approx(expected or 1.0, rel=1e-5, abs=1e-12)


def test_percentile_of_equal_infinities_is_finite() -> None:
    x = torch.tensor([1.0, math.inf, -math.inf, math.inf])
    assert fit(x, Rounding(INT8, TENSOR, range=Percentile(80.0)), ()).scale.item() == pytest.approx(LARGEST / 127)


def test_percentile_over_some_dims_is_that_of_numpy() -> None:
    x = outliers(4, 30, 20)
    for contracted in ((1,), (2,), (0, 2), (-1, -2), (0, 1, 2)):
        scale = fit(x, Rounding(E4M3, CHANNEL, range=Percentile(97.3)), contracted).scale
        expected = np.percentile(np.abs(x.numpy()), 97.3, axis=contracted, keepdims=True) / 448
        np.testing.assert_allclose(scale.numpy(), expected, rtol=1e-5)


def test_percentile_cuts_both_ends_of_an_asymmetric_range() -> None:
    x = torch.cat([torch.linspace(-1, 3, 1000), torch.tensor([-50.0, 90.0])])
    rounding = Rounding(UINT8, TENSOR, symmetric=False, range=Percentile(99.0))
    reach = float(np.percentile(np.abs(x.numpy()), 99))
    assert fit(x, rounding, ()).scale.item() == pytest.approx(2 * reach / 255, rel=1e-5)
    x = x.clamp(min=-1)  # now the percentile cuts nothing below
    reach = float(np.percentile(np.abs(x.numpy()), 99))
    assert fit(x, rounding, ()).scale.item() == pytest.approx((reach + 1) / 255, rel=1e-5)


@scaled_format
@pytest.mark.parametrize("granularity", [TENSOR, CHANNEL])
def test_least_error_is_least_for_each_scale(format: Format, granularity: Granularity) -> None:
    x = outliers(5, 300)
    for symmetric in {True, not isinstance(format, IntegerFormat)}:
        amax = Rounding(format, granularity, symmetric=symmetric)
        chosen = squared_error(x, Rounding(format, granularity, symmetric=symmetric, range=MinimumError(20)), (1,))
        assert (chosen <= squared_error(x, amax, (1,))).all()
        own = (0, 1) if granularity is TENSOR else (1,)
        low, high = x.amin(own, keepdim=True), x.amax(own, keepdim=True)
        for k in range(1, 21):  # the definition again: no copy of the range shrunken by k / steps is better
            affine = affine_from_range(low * (k / 20), high * (k / 20), amax)
            error = (fake_quantize(x, format, affine).double() - x.double()).square().sum(own)
            assert (chosen <= error * (1 + 1e-12)).all()


def test_least_error_cuts_an_outlier_and_keeps_a_plain_range() -> None:
    x = torch.cat([torch.randn(4000), torch.tensor([30.0])])
    amax, least = Rounding(INT8, TENSOR), Rounding(INT8, TENSOR, range=MinimumError())
    assert fit(x, least, ()).scale < fit(x, amax, ()).scale
    levels = torch.arange(-127, 128).float()
    assert fit(levels, least, ()).scale == fit(levels, amax, ()).scale == 1
    # Exact at the full range, and close again at half of it, where only the one large value saturates.
    twice = torch.cat([torch.arange(100_000) % 11, torch.tensor([127])]).float()
    assert fit(twice, least, ()).scale == 1


# --- no input breaks a scale


@scaled_format
@every_rule
@pytest.mark.parametrize("shape", [(3, 4), (1,), (), (0, 4)], ids=str)
def test_zeros_and_nothing_have_scale_one(format: Format, rule: RangeRule, shape: tuple[int, ...]) -> None:
    for symmetric in {True, not isinstance(format, IntegerFormat)}:
        rounding = Rounding(format, TENSOR, symmetric=symmetric, range=rule)
        affine = fit(torch.zeros(shape), rounding, ())
        assert affine.scale.shape == (1,) * len(shape)
        assert affine.scale.eq(1).all()
        assert torch.equal(fake_quantize(torch.zeros(shape), format, affine), torch.zeros(shape))


@every_rule
def test_a_dead_row_does_not_touch_its_neighbours(rule: RangeRule) -> None:
    weight = outliers(3, 40)
    weight[1] = 0
    affine = fit(weight, Rounding(E4M3, CHANNEL, range=rule), (1,))
    assert affine.scale[1] == 1
    assert (affine.scale[[0, 2]] != 1).all()


def test_rows_of_an_empty_batch() -> None:
    assert fit(torch.zeros(0, 8), Rounding(E4M3, TOKEN, dynamic=True), (1,)).scale.shape == (0, 1)
    assert fit(torch.zeros(5, 0), Rounding(E4M3, TOKEN, dynamic=True), (1,)).scale.tolist() == [[1.0]] * 5


@scaled_format
@every_rule
@pytest.mark.parametrize("size", [1e-45, 1e-40, 2.0**-126, 1e-30, 1e30, 1.7e38, LARGEST, math.inf])
def test_tiny_and_huge_ranges_stay_finite(format: Format, rule: RangeRule, size: float) -> None:
    x = torch.tensor([size, -size, size / 2, 0.0, -0.0])
    for symmetric in {True, not isinstance(format, IntegerFormat)}:
        affine = fit(x, Rounding(format, TENSOR, symmetric=symmetric, range=rule), ())
        assert affine.scale.isfinite().all()
        assert affine.scale.item() >= 2.0**-126
        assert affine.scale.item() == 2.0**-126 or size > 2.0**-126
        assert affine.reciprocal.isfinite().all()
        assert affine.zero is None or affine.zero.isfinite().all()
        result = fake_quantize(x, format, affine)
        assert result.isfinite().all()
        assert result[3:].eq(0).all()
        if size >= 1e-30 and not (isinstance(format, IntegerFormat) and format.minimum == 0 and symmetric):
            assert (result[:2] * torch.tensor([1, -1]) > 0.4 * min(size, LARGEST)).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20))
def test_a_scale_is_finite_unless_there_is_a_nan(patterns: list[int]) -> None:
    x = torch.from_numpy(np.array(patterns, np.uint32).view(np.float32))
    for rounding in (Rounding(E4M3, TENSOR), Rounding(E2M1, TENSOR, range=Percentile(90.0)), *ASYMMETRIC):
        affine = fit(x, rounding, ())
        if x.isnan().any():
            assert affine.scale.isnan().all()
            assert fake_quantize(x, rounding.format, affine).isnan().all()
        else:
            assert 2.0**-126 <= affine.scale.item() < math.inf
            assert fake_quantize(x, rounding.format, affine).isfinite().all()


@scaled_format
@every_rule
def test_a_nan_spreads_over_its_own_scale_only(format: Format, rule: RangeRule) -> None:
    x = outliers(3, 40)
    x[1, 7] = math.nan
    result = rounded(x, Rounding(format, TOKEN, range=rule), (1,))
    assert result.isnan().all(1).tolist() == [False, True, False]
    assert result[[0, 2]].isfinite().all()


def test_a_float_format_has_no_zero() -> None:
    with pytest.raises(SchemeError, match="a zero point needs an integer format, got e4m3"):
        fit(torch.ones(3), Rounding(E4M3, TENSOR, symmetric=False), ())


def test_gradients_do_not_enter_a_scale() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    for rule in RULES:
        assert not fit(x, Rounding(E4M3, TENSOR, range=rule), ()).scale.requires_grad
    assert not affine_from_range(x.min(), x.max(), Rounding(UINT8, TENSOR, symmetric=False)).scale.requires_grad


# --- schemes


@pytest.mark.parametrize(
    "rounding", [Rounding(BF16, TENSOR), Rounding(FP16, CHANNEL), BF16_FLOOR.weight, BF16_FLOOR.input]
)
@every_rule
def test_sixteen_bit_formats_take_scale_one(rounding: Rounding, rule: RangeRule) -> None:
    x = outliers(4, 6)
    affine = fit(x, Rounding(rounding.format, rounding.granularity, range=rule), (1,))
    assert affine.scale.eq(1).all()
    assert affine.scale.shape == ((1, 1) if rounding.granularity is TENSOR else (4, 1))
    dtype = torch.bfloat16 if rounding.format is BF16 else torch.float16
    assert torch.equal(fake_quantize(x, rounding.format, affine), x.to(dtype).float())
    assert torch.equal(quantize(x, rounding.format, affine), x.to(dtype))


# In decibel, of the seeded tensors below: a change of the numerics is a change of this table.
SQNR = {
    "fp8": (31.48, 31.89),
    "fp8-tensor": (31.80, 31.50),
    "fp8-static": (31.80, 31.50),
    "fp8-fnuz": (31.64, 32.00),  # by ml_dtypes' casts alone, as the next two
    "fp8-fnuz-tensor": (31.28, 31.51),
    "fp8-fnuz-static": (31.28, 31.51),
    "fp8-e5m2": (25.68, 26.01),
    "fp8-weight": (31.48, None),
    "int8": (42.76, 39.35),
    "int8-static": (42.76, 33.99),
    "int8-static-u7": (42.76, 27.94),
    "int8-weight": (42.76, None),
    "int8-row": (43.63, None),
    "int8-row-half": (43.64, None),
    "int4-row": (18.95, None),
    "bf16": (55.34, 55.61),
    "fp16": (73.57, 73.57),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_pinned_sqnr_of_every_scheme(name: str) -> None:
    generator = np.random.Generator(np.random.PCG64(7))
    weight = torch.from_numpy(generator.standard_normal((64, 256), np.float32)) * torch.logspace(-1, 1, 64)[:, None]
    inputs = torch.from_numpy(generator.standard_t(5, (128, 256)).astype(np.float32)) + 0.5
    pairs = ((weight, SCHEMES[name].weight), (inputs, SCHEMES[name].input))
    measured = tuple(None if how is None else sqnr_db(x, rounded(x, how, (1,))) for x, how in pairs)
    assert measured == pytest.approx(SQNR[name], abs=0.01)
