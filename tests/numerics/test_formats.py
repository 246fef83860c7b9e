"""Every row of the format table against ml_dtypes, over every code, and against torch.finfo and torch.iinfo."""

import ml_dtypes
import numpy as np
import pytest
import torch

from helpers.quantiser_oracle import DTYPES, every_value
from precimap.numerics import formats
from precimap.numerics.formats import (
    E2M1,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    E8M0,
    FORMATS,
    INT8,
    UINT7,
    UINT8,
    FloatFormat,
    IntegerFormat,
)

float_rows = pytest.mark.parametrize("row", DTYPES, ids=lambda row: row.name)


def test_the_table_holds_every_row_under_its_own_name() -> None:
    rows = [value for value in vars(formats).values() if isinstance(value, FloatFormat | IntegerFormat)]
    assert {row.name: row for row in rows} == FORMATS
    assert {row for row in rows if isinstance(row, FloatFormat)} == set(DTYPES)


@float_rows
def test_finite_values_are_those_of_a_binary_float_with_these_fields(row: FloatFormat) -> None:
    values = every_value(row)
    bits = 1 + row.exponent_bits + row.mantissa_bits
    assert bits == row.bits
    defined = {0.0}
    for exponent in range(2**row.exponent_bits):
        for fraction in range(2**row.mantissa_bits):
            leading = 1.0 if exponent else 0.0
            value = (leading + fraction / 2**row.mantissa_bits) * 2.0 ** (max(exponent, 1) - row.bias)
            if value <= row.maximum:
                defined |= {value, -value}
    assert set(values[np.isfinite(values)]) == defined


@float_rows
def test_limits_are_those_of_the_codes(row: FloatFormat) -> None:
    values = every_value(row)
    finite = values[np.isfinite(values)]
    positive = finite[finite > 0]
    assert (row.maximum, row.minimum) == (finite.max(), finite.min())
    assert row.smallest_subnormal == positive.min()
    # Below the smallest normal the steps are equal, from it on they double with every binade.
    steps = np.diff(np.unique(positive))
    assert row.smallest_normal == row.smallest_subnormal * 2**row.mantissa_bits
    assert set(steps[: 2**row.mantissa_bits]) == {row.smallest_subnormal}
    assert row.has_infinity == np.isinf(values).any()
    assert row.has_negative_zero == (np.signbit(values) & (values == 0)).any()


@float_rows
def test_limits_are_those_of_finfo(row: FloatFormat) -> None:
    info = ml_dtypes.finfo(DTYPES[row])
    assert (row.maximum, row.smallest_normal) == (float(info.max), float(info.smallest_normal))
    assert row.smallest_subnormal == float(info.smallest_subnormal)
    if row.torch_dtype is not None:
        torch_info = torch.finfo(getattr(torch, row.torch_dtype))
        assert (row.bits, row.maximum, row.minimum) == (torch_info.bits, torch_info.max, torch_info.min)
        assert row.smallest_normal == torch_info.smallest_normal


@float_rows
def test_torch_reads_every_code_as_ml_dtypes_does(row: FloatFormat) -> None:
    if row.torch_dtype is None:
        assert not hasattr(torch, "float4_e2m1fn"), "torch has an element for E2M1 now: give the row its dtype"
        return
    codes = np.arange(2**row.bits, dtype=np.uint16 if row.bits == 16 else np.uint8)
    read = torch.from_numpy(codes).view(getattr(torch, row.torch_dtype)).to(torch.float32).numpy()
    expected = every_value(row)
    np.testing.assert_array_equal(read, expected)  # NaN where it is NaN
    signed = ~np.isnan(expected)
    assert (np.signbit(read) == np.signbit(expected))[signed].all()


@pytest.mark.parametrize(("row", "nans"), [(E4M3, 2), (E5M2, 6), (E4M3_FNUZ, 1), (E5M2_FNUZ, 1), (E2M1, 0)])
def test_number_of_nans_of_the_specifications(row: FloatFormat, nans: int) -> None:
    assert np.isnan(every_value(row)).sum() == nans


def test_exponent_format_is_a_power_of_two_for_every_code() -> None:
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert [2.0 ** (code - E8M0.bias) for code in range(255)] == list(values[:255])
    assert np.isnan(values[255])
    assert E8M0.torch_dtype is not None
    assert torch.tensor([E8M0.bias], dtype=torch.uint8).view(getattr(torch, E8M0.torch_dtype)).float().item() == 1.0
    assert E8M0.bits == 8


@pytest.mark.parametrize(("row", "limits"), [(INT8, (-127, 127)), (UINT8, (0, 255)), (UINT7, (0, 127))])
def test_integers_fit_their_bits_and_their_storage(row: IntegerFormat, limits: tuple[int, int]) -> None:
    assert (row.minimum, row.maximum) == limits
    assert 2 ** (row.bits - 1) < row.maximum - row.minimum + 1 <= 2**row.bits
    stored = torch.iinfo(getattr(torch, row.torch_dtype))
    assert stored.min <= row.minimum
    assert row.maximum <= stored.max
