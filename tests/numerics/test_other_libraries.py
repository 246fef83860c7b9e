"""The codes of other libraries: torch's and ml_dtypes' casts, torch's fake quantiser, compressed-tensors, torchao."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.quantiser_oracle import DTYPES, every_value, hard_values, raw
from precimap.numerics.fast import fake_quantize
from precimap.numerics.formats import E2M1, E4M3, INT8, UINT8, FloatFormat, Format, IntegerFormat
from precimap.numerics.quantize import Affine, dequantize, quantize, storage_dtype


@pytest.mark.parametrize("format", [f for f in DTYPES if f.torch_dtype], ids=lambda format: format.name)
def test_agrees_with_the_casts_of_torch_and_ml_dtypes_inside_the_range(format: FloatFormat) -> None:
    x = hard_values(format, 1.0)
    x = x[np.abs(x) <= format.maximum]
    codes = raw(quantize(torch.from_numpy(x), format, Affine(torch.tensor(1.0), None)))
    np.testing.assert_array_equal(codes, raw(torch.from_numpy(x).to(storage_dtype(format))))
    stored = np.uint16 if format.bits == 16 else np.uint8
    np.testing.assert_array_equal(codes, x.astype(DTYPES[format]).view(stored).astype(np.int64))


def test_agrees_with_the_four_bit_cast_of_ml_dtypes() -> None:
    x = hard_values(E2M1, 1.0)  # that cast saturates as well
    codes = quantize(torch.from_numpy(x), E2M1, Affine(torch.tensor(1.0), None)).numpy()
    np.testing.assert_array_equal(codes, x.astype(ml_dtypes.float4_e2m1fn).view(np.uint8))
    assert codes.max() == 15


def test_agrees_with_the_integer_fake_quantiser_of_torch() -> None:
    # torch adds the zero before it rounds: the same everywhere but at ties, which a step of 0.3 never meets here.
    x = torch.randn(10_000) * 20
    theirs = torch.fake_quantize_per_tensor_affine(x, 0.3, 100, 0, 255)
    affine = Affine(torch.tensor(0.3), torch.tensor(100.0))
    assert torch.equal(fake_quantize(x, UINT8, affine), theirs)


def tied_weight(format: Format) -> tuple[Tensor, Tensor]:
    """A weight and its per-channel scales: ordinary rows, then rows of nothing but ties, over whole-number scales."""
    ordinary = torch.randn(256, 512)
    half_steps = torch.arange(-253, 254, 2) / 2
    if isinstance(format, FloatFormat):
        table = np.unique(every_value(format)[np.isfinite(every_value(format))])
        half_steps = torch.from_numpy((table[1:] + table[:-1]) / 2).float()
    scales = torch.arange(3, 99).float()[:, None]
    ties = torch.nn.functional.pad(half_steps * scales, (0, 512 - len(half_steps)))
    return torch.cat([ordinary, ties]), torch.cat([ordinary.abs().amax(1, keepdim=True) / format.maximum, scales])


def assert_same_but_at_ties(codes: Tensor, theirs: Tensor, weight: Tensor, format: Format, scale: Tensor) -> int:
    """How many codes differ: only where the division ties, and the product with the reciprocal just misses the tie."""
    one = Affine(torch.ones_like(scale), None)
    ours, other = (dequantize(each, format, one).double() for each in (codes, theirs))
    apart = ours != other
    assert not apart[:256].any(), "ordinary values do not meet ties"
    np.testing.assert_array_equal(((ours + other) / 2)[apart], (weight.double() / scale.double())[apart])
    return int(apart.sum())


@pytest.mark.parametrize(("format", "kind"), [(INT8, "int"), (E4M3, "float")], ids=["int8", "fp8"])
def test_weight_codes_are_those_of_compressed_tensors(format: Format, kind: str) -> None:
    arguments = pytest.importorskip("compressed_tensors.quantization")
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    weight, scale = tied_weight(format)
    codes = quantize(weight, format, Affine(scale, None))
    how = arguments.QuantizationArgs(num_bits=8, type=kind, strategy="channel", symmetric=True)
    theirs = lifecycle.quantize(weight, scale, torch.zeros_like(scale), how, dtype=codes.dtype)
    assert assert_same_but_at_ties(codes, theirs, weight, format, scale) > 0, "it divides, so some ties must differ"


@pytest.mark.parametrize("format", [INT8, E4M3], ids=["int8", "fp8"])
def test_weight_codes_are_those_of_torchao(format: Format) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, scale = tied_weight(format)
    codes = quantize(weight, format, Affine(scale, None))
    if isinstance(format, IntegerFormat):  # it multiplies by the reciprocal as well: no tie differs
        block = (1, weight.shape[1])
        theirs = primitives.quantize_affine(weight, block, scale, torch.zeros_like(scale), torch.int8, -127, 127)
        assert torch.equal(codes, theirs)
    else:
        theirs = primitives._quantize_affine_float8(weight, scale, torch.float8_e4m3fn)
        assert assert_same_but_at_ties(codes, theirs, weight, format, scale) > 0, "it divides, so some ties must differ"
