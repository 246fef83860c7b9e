"""The oracle of the quantiser: a table of all codes, from ml_dtypes, and a search for the nearest in float64.

It trusts none of the rows of the format table, and knows torch only to read the codes of what is under test.
"""

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from precimap.numerics.formats import (
    BF16,
    E2M1,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    FP16,
    FloatFormat,
    Format,
    IntegerFormat,
)

DTYPES: dict[FloatFormat, type] = {
    E4M3: ml_dtypes.float8_e4m3fn,
    E5M2: ml_dtypes.float8_e5m2,
    E4M3_FNUZ: ml_dtypes.float8_e4m3fnuz,
    E5M2_FNUZ: ml_dtypes.float8_e5m2fnuz,
    E2M1: ml_dtypes.float4_e2m1fn,
    BF16: ml_dtypes.bfloat16,
    FP16: np.float16,
}


def oracle(x: np.ndarray, format: Format, scale: float, zero: float) -> tuple[np.ndarray, np.ndarray]:
    """The codes (as unsigned or whole numbers) and the float32 values of a float32 array without NaN."""
    with np.errstate(over="ignore"):  # an overflow of the product is meant to saturate, one of the value is infinite
        scaled = (x * (np.float32(1) / np.float32(scale))).astype(np.float64)  # a float32 product
        if isinstance(format, IntegerFormat):
            codes = np.clip(np.rint(scaled) + zero, format.minimum, format.maximum)
            values = codes - zero
        else:
            codes, values = nearest_in_table(scaled, format)
        return codes.astype(np.int64), values.astype(np.float32) * np.float32(scale)


def every_value(format: FloatFormat) -> np.ndarray:
    """The float64 value of each code, by ml_dtypes."""
    codes = np.arange(2**format.bits, dtype=np.uint16 if format.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):  # half of the NaNs of BF16 are signalling ones
        return codes.view(DTYPES[format]).astype(np.float64)


def nearest_in_table(scaled: np.ndarray, format: FloatFormat) -> tuple[np.ndarray, np.ndarray]:
    signed = every_value(format)
    sign_bit = len(signed) // 2
    table = signed[:sign_bit][np.isfinite(signed[:sign_bit])]  # ascending: a value is at the place of its code
    magnitude = np.minimum(np.abs(scaled), table[-1])
    upper = np.searchsorted(table, magnitude).clip(1)  # table[upper - 1] <= magnitude <= table[upper]
    down, up = magnitude - table[upper - 1], table[upper] - magnitude
    code = np.where((up < down) | ((up == down) & (upper % 2 == 0)), upper, upper - 1)
    no_negative_zero = np.isnan(signed[sign_bit])
    negative = np.signbit(scaled) & ~((code == 0) & no_negative_zero)
    return code + negative * sign_bit, np.where(negative, -table[code], table[code])


def raw(codes: Tensor) -> np.ndarray:
    """Codes as whole numbers: bit patterns of floats, values of integers."""
    if codes.dtype in (torch.int8, torch.uint8):
        return codes.numpy().astype(np.int64)
    return codes.view(torch.uint16 if codes.element_size() == 2 else torch.uint8).numpy().astype(np.int64)


def bits(values: Tensor | np.ndarray) -> np.ndarray:
    array = values.numpy() if isinstance(values, Tensor) else values
    assert array.dtype == np.float32
    return array.view(np.uint32)


def hard_values(format: Format, scale: float) -> np.ndarray:
    """Every boundary of the format at that scale, a step to each side, and all exponents with some fractions."""
    if isinstance(format, IntegerFormat):
        points = np.arange(-300, 301) / 2
    else:
        table = every_value(format)[: 2 ** (format.bits - 1)]
        table = table[np.isfinite(table)]
        points = np.concatenate([table, (table[1:] + table[:-1]) / 2, [table[-1] + (table[-1] - table[-2]) / 2]])
    with np.errstate(over="ignore"):
        near = (points * scale).astype(np.float32)
    near = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    leading = np.arange(0, 0x7F80, 16, dtype=np.uint32)[:, None] << 16  # every exponent, three bits of fraction
    wide = (leading + np.array([0, 1, 0x40000, 0x7FFFF], np.uint32)).view(np.float32).ravel()
    everything = np.concatenate([near, wide, np.array([0, np.inf], np.float32)])
    return np.concatenate([everything, -everything])[~np.isnan(np.concatenate([everything, everything]))]
