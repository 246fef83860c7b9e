"""One test over oracle, readable quantiser and fast twin, to the bit; then literal values, shapes, NaN and devices."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers.quantiser_oracle import bits, hard_values, oracle, raw
from precimap.errors import SchemeError
from precimap.numerics import fast
from precimap.numerics.fast import all_finite, fake_quantize
from precimap.numerics.formats import (
    BF16,
    E2M1,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    FORMATS,
    FP16,
    INT8,
    UINT7,
    UINT8,
    Format,
    IntegerFormat,
)
from precimap.numerics.quantize import Affine, dequantize, quantize, sqnr_db, storage_dtype

SCALES = (1.0, 0.0123, 3.0, 2.0**-126, 2.0**-120 * 1.1, 1e30, 7.5e35)
every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)


def by_codes(x: Tensor, format: Format, affine: Affine) -> Tensor:
    codes = quantize(x, format, affine)
    assert codes.dtype == storage_dtype(format)
    return dequantize(codes, format, affine)


def affine_of(format: Format, scale: float, zero: float) -> Affine:
    asymmetric = isinstance(format, IntegerFormat) and zero != 0
    return Affine(torch.tensor(scale), torch.tensor(zero) if asymmetric else None)


QUANTISERS: tuple[Callable[[Tensor, Format, Affine], Tensor], ...] = (by_codes, fake_quantize)


def assert_bits_of_oracle(x: np.ndarray, format: Format, scale: float, zero: float) -> None:
    codes, values = oracle(x, format, scale, zero)
    affine = affine_of(format, scale, zero)
    np.testing.assert_array_equal(raw(quantize(torch.from_numpy(x), format, affine)), codes)
    for quantiser in QUANTISERS:
        result = quantiser(torch.from_numpy(x), format, affine)
        np.testing.assert_array_equal(bits(result), bits(values), err_msg=quantiser.__name__)


@every_format
@pytest.mark.parametrize("scale", SCALES)
def test_bits_are_those_of_the_oracle(format: Format, scale: float) -> None:
    for zero in (0.0, 3.0, float(format.maximum)) if isinstance(format, IntegerFormat) else (0.0,):
        assert_bits_of_oracle(hard_values(format, scale), format, scale, zero)


float32_patterns = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64)


@every_format
@given(
    patterns=float32_patterns, exponent=st.integers(-126, 119), fraction=st.floats(1, 1.999), zero=st.integers(0, 127)
)
@example(
    patterns=[0x80000000, 0x00000001, 0x80000001, 0x7F800000, 0xFF800000, 0x7F7FFFFF], exponent=0, fraction=1, zero=0
)
def test_any_bit_pattern_and_any_scale(
    format: Format, patterns: list[int], exponent: int, fraction: float, zero: int
) -> None:
    x = np.array(patterns, np.uint32).view(np.float32)
    assert_bits_of_oracle(x[~np.isnan(x)], format, float(np.float32(fraction)) * 2.0**exponent, float(zero))


@pytest.mark.parametrize(
    ("format", "given", "expected"),
    [
        (E4M3, 464.0, 448.0),  # halfway to 480, which the plain cast of torch turns into NaN
        (E4M3, 1e30, 448.0),
        (E4M3, -math.inf, -448.0),
        (E4M3, 232.0, 224.0),  # tie to the even code
        (E4M3, 248.0, 256.0),
        (E4M3, 2.0**-10, 0.0),  # half of the smallest subnormal ties to zero
        (E4M3, -(2.0**-10), -0.0),
        (E4M3, 3 * 2.0**-10, 2.0**-8),
        (E5M2, 61440.0, 57344.0),  # the plain cast gives infinity
        (E5M2, math.inf, 57344.0),
        (E4M3_FNUZ, 248.0, 240.0),
        (E4M3_FNUZ, -(2.0**-12), 0.0),  # there is no negative zero
        (E4M3_FNUZ, -0.0, 0.0),
        (E5M2_FNUZ, 2.0**-17, 2.0**-17),
        (E2M1, 2.5, 2.0),
        (E2M1, 3.5, 4.0),
        (E2M1, 5.0, 4.0),
        (E2M1, -7.0, -6.0),
        (E2M1, -0.25, -0.0),
        (E2M1, 0.75, 1.0),
        (BF16, 1.00390625, 1.0),
        (BF16, 1.01171875, 1.015625),
        (BF16, 3.4028234663852886e38, 3.3895313892515355e38),
        (FP16, 65520.0, 65504.0),
        (FP16, 2.0**-25, 0.0),
        (INT8, 2.5, 2.0),
        (INT8, 3.5, 4.0),
        (INT8, -0.5, 0.0),
        (INT8, 128.0, 127.0),  # a wrap would give -128
        (INT8, -1000.0, -127.0),
        (INT8, math.inf, 127.0),
        (UINT8, -1.0, 0.0),
        (UINT8, 256.0, 255.0),
        (UINT7, 128.0, 127.0),
    ],
)
def test_literal_values(format: Format, given: float, expected: float) -> None:
    for quantiser in QUANTISERS:
        value = quantiser(torch.tensor(given), format, Affine(torch.tensor(1.0), None)).item()
        assert (value, math.copysign(1, value)) == (expected, math.copysign(1, expected))


@pytest.mark.parametrize(("x", "scale", "quotient", "code"), [(37.5, 15.0, 2.5, 3), (91.5, 61.0, 1.5, 1)])
def test_the_scaled_value_is_a_product_with_the_reciprocal(x: float, scale: float, quotient: float, code: int) -> None:
    # The quotient is a tie that goes to code 2; 1/15 rounds up and 1/61 down, and so does the product.
    assert x / scale == quotient
    affine = Affine(torch.tensor(scale), None)
    assert quantize(torch.tensor(x), INT8, affine).item() == code
    assert fake_quantize(torch.tensor(x), INT8, affine).item() == code * scale


@pytest.mark.parametrize("format", [UINT8, UINT7, INT8], ids=lambda format: format.name)
@pytest.mark.parametrize("zero", [0.0, 1.0, 77.0, 127.0])
def test_a_zero_keeps_zero_exact_and_its_codes_in_bounds(format: IntegerFormat, zero: float) -> None:
    affine = Affine(torch.tensor(0.037), torch.tensor(zero))
    x = torch.linspace(-20, 20, 10_001)
    codes = quantize(x, format, affine)
    assert (codes.min().item(), codes.max().item()) == (format.minimum, format.maximum)
    assert quantize(torch.tensor(0.0), format, affine).item() == zero
    for quantiser in QUANTISERS:
        assert bits(quantiser(torch.tensor([0.0, -0.0, 1e-9, -1e-9]), format, affine)).tolist() == [0, 0, 0, 0]


@every_format
def test_nan_stays_nan_in_the_twin_and_has_a_code_where_there_is_one(format: Format) -> None:
    affine = Affine(torch.tensor(1.0), None)
    x = torch.tensor([math.nan, 1.0, -math.nan])
    assert fake_quantize(x, format, affine).isnan().tolist() == [True, False, True]
    codes = quantize(x, format, affine)
    if isinstance(format, IntegerFormat) or format is E2M1:
        assert codes[[0, 2]].tolist() == [0, 0]
    else:
        assert dequantize(codes, format, affine).isnan().tolist() == [True, False, True]
    not_a_scale = Affine(torch.tensor(math.nan), None)
    for quantiser in QUANTISERS:
        assert quantiser(torch.ones(3), format, not_a_scale).isnan().all()


SHAPES = [  # x, scale
    ((7,), ()),
    ((), ()),
    ((0, 5), (0, 1)),
    ((0,), (1,)),
    ((1, 30), (1, 1)),
    ((6, 10), (6, 1)),
    ((6, 10), (1, 10)),
    ((6, 10), (10,)),
    ((6, 10), (6, 10)),
    ((3, 5, 7), (3, 1, 7)),
    ((3, 5, 7), (1, 5, 1)),
    ((2, 1, 3, 11), (2, 1, 1, 11)),
]


@every_format
@pytest.mark.parametrize(("shape", "scale_shape"), SHAPES)
def test_parts_and_broadcasting_change_nothing(
    format: Format, shape: tuple[int, ...], scale_shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(shape) * 100
    zero = torch.randint(0, 20, scale_shape).float() if isinstance(format, IntegerFormat) else None
    affine = Affine(torch.rand(scale_shape) + 0.1, zero)
    expected = by_codes(x, format, affine)
    for part in (1, 4, 13, 1 << 18):
        monkeypatch.setattr(fast, "_PART", part)
        result = fake_quantize(x, format, affine)
        assert result.shape == x.shape
        np.testing.assert_array_equal(bits(result), bits(expected))


def test_a_view_and_a_tensor_of_more_than_one_part() -> None:
    x = torch.randn(700, 1000).t()[::2]
    affine = Affine(torch.rand(500, 1) * 0.01, None)
    assert x.numel() > torch.get_num_threads() * fast._PART
    assert torch.equal(fake_quantize(x, E4M3, affine), by_codes(x, E4M3, affine))
    assert not x.is_contiguous()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@every_format
def test_a_gpu_gives_the_same_bits(format: Format) -> None:
    x = torch.from_numpy(hard_values(format, 0.0123))
    affine = affine_of(format, 0.0123, 3.0)
    there = Affine(affine.scale.cuda(), None if affine.zero is None else affine.zero.cuda())
    expected = by_codes(x, format, affine)
    for quantiser in QUANTISERS:
        np.testing.assert_array_equal(bits(quantiser(x.cuda(), format, there).cpu()), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_format
def test_every_input_dtype_is_taken_as_float32(format: Format, dtype: torch.dtype) -> None:
    x = (torch.randn(50, 40) * 30).to(dtype)
    affine = Affine(torch.tensor(0.3), None)  # 0-dim: must not pull the product down to the dtype of x
    expected = by_codes(x.float(), format, affine)
    for quantiser in QUANTISERS:
        result = quantiser(x, format, affine)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)


def test_inputs_are_detached_and_left_alone() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    before = x.detach().clone()
    affine = Affine(torch.tensor(0.1), None)
    for format in FORMATS.values():
        assert not fake_quantize(x, format, affine).requires_grad
        assert not by_codes(x, format, affine).requires_grad
    assert torch.equal(x.detach(), before)


@every_format
def test_rounding_twice_is_rounding_once(format: Format) -> None:
    x = torch.randn(1000) * 50
    affine = Affine(torch.tensor(0.25), None)  # a power of two: the scaled value is exact
    once = fake_quantize(x, format, affine)
    assert torch.equal(fake_quantize(once, format, affine), once)


def test_a_float_format_refuses_a_zero() -> None:
    affine = Affine(torch.tensor(1.0), torch.tensor(3.0))
    for call in (quantize, dequantize, fake_quantize):
        with pytest.raises(SchemeError, match="only for an integer format, got one for e4m3"):
            call(torch.ones(2), E4M3, affine)


def test_sqnr_is_the_ratio_of_energies_in_decibel() -> None:
    assert sqnr_db(torch.full((10,), 2.0), torch.full((10,), 1.8)) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf
    tiny = torch.full((10,), 2e-30)  # squares that float32 cannot hold
    assert sqnr_db(tiny, tiny * 0.9) == pytest.approx(20.0, abs=1e-5)


def test_sqnr_of_an_integer_is_that_of_uniform_noise() -> None:
    # The noise of a uniform signal over a step is step^2 / 12: 6.02 dB for each bit, of 255 levels here.
    x = torch.rand(100_000) * 2 - 1
    rounded = fake_quantize(x, INT8, Affine(torch.tensor(1 / 127), None))
    assert sqnr_db(x, rounded) == pytest.approx(20 * math.log10(2 * 127), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_what_is_not_finite_is_found(dtype: torch.dtype) -> None:
    x = torch.full((3, 1000), 60_000).to(dtype)  # whose sum is not finite in 16 bits
    assert all_finite(x)
    assert all_finite(x[:0])
    if dtype.is_floating_point:
        assert all_finite(torch.full_like(x, torch.finfo(dtype).max))
        for odd in (torch.nan, torch.inf, -torch.inf):
            x[1, 7] = odd
            assert not all_finite(x)
