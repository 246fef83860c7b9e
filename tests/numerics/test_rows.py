"""Packed rows of embedding tables, to the bit: the operators of torch and of FBGEMM make and read the same."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precimap.errors import SchemeError
from precimap.numerics.fast import fake_quantize
from precimap.numerics.grid_shift import GridShift
from precimap.numerics.quantize import Affine, dequantize, quantize
from precimap.numerics.ranges import affine_from_range, fit
from precimap.numerics.rows import pack_rows, unpack_rows
from precimap.numerics.schemes import SCHEMES, FusedRows, Rounding, scheme, scheme_from_row

ROWS = [name for name, found in SCHEMES.items() if found.rows is not None]
OPERATORS = torch.ops.quantized


@pytest.fixture(scope="module")
def fbgemm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("fbgemm_gpu", reason="needs requirements-models.txt")
    return torch.ops.fbgemm


def made(x: Tensor, name: str) -> tuple[Tensor, Affine, Tensor]:
    """Codes, affine and packed rows of a table under a scheme."""
    how = scheme(name).weight
    affine = fit(x, how, (1,))
    codes = quantize(x, how.format, affine)
    return codes, affine, pack_rows(codes, affine, how.format, layout(name))


def layout(name: str) -> FusedRows:
    found = scheme(name).rows
    assert found is not None
    return found


def assert_same_rows(name: str, packed: Tensor, theirs: Tensor) -> None:
    """To the bit, but for the sign of an offset of zero: a minimum of -0 and 0 is either, by the order of a reduction."""
    ours, other = packed.clone(), theirs.clone()
    for rows in (ours, other):
        half = layout(name).bytes // 2
        offset = rows[:, -half:].contiguous().view(getattr(torch, layout(name).parameters))
        rows[:, -half:] = (offset + 0.0).view(torch.uint8)
    assert torch.equal(ours, other)


def read(name: str, packed: Tensor) -> Tensor:
    """Each row by torch's operator."""
    operator = OPERATORS.embedding_bag_byte_rowwise_offsets
    if scheme(name).weight_bits == 4:
        operator = OPERATORS.embedding_bag_4bit_rowwise_offsets
    every = torch.arange(len(packed))
    found: Tensor = operator(packed, every, every)
    return found


def ordinary() -> list[Tensor]:
    """Tables of many scales: also constant rows, zeros, rows far from zero, subnormals, values on ties."""
    generator = torch.Generator().manual_seed(5)
    tables = []
    for width in (4, 16, 36, 100):
        x = torch.randn(64, width, generator=generator)
        whole = torch.randint(-300, 300, (64, width), generator=generator) / 8
        tables += [x, x * 1e-3, x * 1e-7, x * 1e-40, x * 3000, x + 500, x * 1e-4 + x[:, :1], whole]
        tables += [x[:, :1].expand(64, width).contiguous(), torch.zeros(3, width), -torch.zeros(3, width)]
    return tables


def packed_by_torch(name: str, x: Tensor) -> Tensor:
    pack = OPERATORS.embedding_bag_byte_prepack if name == "int8-row" else OPERATORS.embedding_bag_4bit_prepack
    found: Tensor = pack(x)
    return found


def packed_by_fbgemm(name: str, x: Tensor, fbgemm: Any) -> Tensor:
    if name == "int8-row":
        found: Tensor = fbgemm.FloatToFused8BitRowwiseQuantized(x)
        return found
    halves: Tensor = fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(x, scheme(name).weight_bits)
    return halves


@pytest.mark.parametrize("name", ["int8-row", "int4-row"])
def test_packs_the_bytes_of_torch(name: str) -> None:
    for x in ordinary():
        assert_same_rows(name, made(x, name)[2], packed_by_torch(name, x))


@pytest.mark.parametrize("name", ROWS)
def test_packs_the_bytes_of_fbgemm(name: str, fbgemm: Any) -> None:
    for x in ordinary():
        assert_same_rows(name, made(x, name)[2], packed_by_fbgemm(name, x, fbgemm))


tables = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 5).flatmap(
        lambda quads: st.lists(
            st.one_of(
                st.floats(-60000, 60000, width=32),
                st.floats(-2, 2, width=32),
                st.sampled_from([0.0, -0.0, 1.0, 2.0**-24, 1e-40, 65504.0]),
            ),
            min_size=rows * quads * 4,
            max_size=rows * quads * 4,
        ).map(lambda values: torch.tensor(values, dtype=torch.float32).reshape(rows, quads * 4))
    )
)


@settings(max_examples=200, deadline=None)
@given(x=tables)
def test_any_table_packs_and_reads_as_in_torch(x: Tensor) -> None:
    for name in ("int8-row", "int4-row"):
        codes, affine, packed = made(x, name)
        assert_same_rows(name, packed, packed_by_torch(name, x))
        assert_close_to_an_ulp(dequantize(codes, scheme(name).weight.format, affine), read(name, packed))


@settings(max_examples=100, deadline=None)
@given(x=tables)
def test_any_table_packs_as_in_fbgemm(x: Tensor, fbgemm: Any) -> None:
    for name in ROWS:
        assert_same_rows(name, made(x, name)[2], packed_by_fbgemm(name, x, fbgemm))


def assert_close_to_an_ulp(ours: Tensor, theirs: Tensor) -> None:
    """float32 neighbours: rounding by way of float64 may fall to the other side once in 2**29 values."""
    apart = np.abs(ours.numpy().view(np.int32).astype(np.int64) - theirs.numpy().view(np.int32).astype(np.int64))
    assert int(apart[ours.numpy() != theirs.numpy()].max(initial=0)) <= 1


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no fused multiply-add here")
@pytest.mark.parametrize("name", ["int8-row", "int4-row"])
def test_reads_the_bits_that_torch_reads(name: str, fbgemm: Any) -> None:
    for x in ordinary():
        codes, affine, packed = made(x, name)
        values = dequantize(codes, scheme(name).weight.format, affine)
        assert torch.equal(values, read(name, packed))
        wide = fbgemm.Fused8BitRowwiseQuantizedToFloat
        found = wide(packed) if name == "int8-row" else fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, 4)
        assert torch.equal(values, found)


def test_eight_bits_with_half_parameters_read_as_in_fbgemm(fbgemm: Any) -> None:
    for x in ordinary():
        codes, affine, packed = made(x, "int8-row-half")
        found = fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(packed, 8)
        assert torch.equal(dequantize(codes, scheme("int8-row-half").weight.format, affine), found)


@pytest.mark.parametrize("width", [2, 6, 10])
def test_widths_that_are_no_multiple_of_four(width: int) -> None:
    """torch packs and reads them; FBGEMM's own 4-bit quantiser wants whole 16-bit words and refuses."""
    x = torch.randn(20, width)
    codes, affine, packed = made(x, "int4-row")
    assert packed.shape == (20, width // 2 + 4)
    assert torch.equal(packed, packed_by_torch("int4-row", x))
    assert torch.equal(dequantize(codes, scheme("int4-row").weight.format, affine), read("int4-row", packed))


@pytest.mark.parametrize("name", ROWS)
def test_unpacking_gives_the_codes_back(name: str) -> None:
    codes, affine, packed = made(torch.randn(30, 16), name)
    again, found = unpack_rows(packed, scheme(name).weight.format, layout(name))
    assert torch.equal(again, codes)
    assert torch.equal(found.scale, affine.scale)
    assert found.offset is not None
    assert affine.offset is not None
    assert torch.equal(found.offset, affine.offset)
    assert packed.numel() == scheme(name).stored_bytes((30, 16), (1,))


@pytest.mark.parametrize("name", ROWS)
def test_the_fast_twin_has_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precimap.numerics.fast._PART", 100)  # several parts, also within a row
    for x in [*ordinary(), torch.randn(3, 300).bfloat16(), torch.randn(9, 16).double()]:
        how = scheme(name).weight
        affine = fit(x, how, (1,))
        expected = dequantize(quantize(x, how.format, affine), how.format, affine)
        found = fake_quantize(x, how.format, affine)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("name", ["int4-row", "int8-row-half"])
def test_rows_beyond_float16_are_refused(name: str) -> None:
    x = torch.randn(4, 8)
    x[2, 3] = -70000
    with pytest.raises(SchemeError, match=r"row 2 reaches from -70000 to .*float16.*keep this table"):
        made(x, name)
    made(x, "int8-row")
    with pytest.raises(SchemeError, match=r"row 1 .*float32"):
        made(torch.tensor([[0.0, 1.0], [-3e38, 3e38]]), "int8-row")


def test_odd_rows_and_rows_without_an_offset_are_refused() -> None:
    how = scheme("int4-row").weight
    with pytest.raises(SchemeError, match="even width, got 3"):
        made(torch.randn(2, 3), "int4-row")
    with pytest.raises(SchemeError, match="without one"):
        pack_rows(torch.zeros(2, 4, dtype=torch.uint8), Affine(torch.ones(2, 1), None), how.format, layout("int4-row"))
    with pytest.raises(SchemeError, match="zero only for an integer format"):
        quantize(torch.ones(1, 2), scheme("fp8").weight.format, Affine(torch.ones(1), None, torch.ones(1)))


@pytest.mark.parametrize(
    "change",
    [
        {"granularity": "per-tensor"},
        {"symmetric": True},
        {"dynamic": True},
        {"format": "int8"},
        {"format": "uint4", "range": "rows:float32"},
        {"format": "uint7"},
    ],
    ids=str,
)
def test_rows_that_no_operator_reads_are_no_scheme(change: dict[str, object]) -> None:
    row = scheme("int8-row").row()
    assert scheme_from_row("int8-row", row) == scheme("int8-row")
    with pytest.raises(SchemeError):
        scheme_from_row("int8-row", {**row, "weight": {**row["weight"], **change}})  # type: ignore[dict-item]


def test_rows_are_a_weight_s_alone() -> None:
    rows, static = scheme("int8-row"), scheme("int8-static")
    with pytest.raises(SchemeError, match="an input takes amax"):
        static.with_range(FusedRows("float32"))
    assert static.input is not None
    for weight, inputs in ((rows.weight, static.input), (static.weight, rows.weight)):
        with pytest.raises(SchemeError, match="a weight's alone"):
            scheme_from_row("x", {"weight": weight.row(), "input": inputs.row()})


def drawn(x: Tensor, how: Rounding, seed: int) -> Affine:
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return affine_from_range(*GridShift(seed).row_limits("table", low, high, how.format), how)


@pytest.mark.parametrize("name", ROWS)
def test_a_draw_moves_every_row_by_a_part_of_a_step(name: str) -> None:
    how, x = scheme(name).weight, torch.randn(500, 16, generator=torch.Generator().manual_seed(3))
    plain, shifted = fit(x, how, (1,)), drawn(x, how, 1)
    assert plain.offset is not None
    assert shifted.offset is not None
    moved = ((plain.offset - shifted.offset) / shifted.scale).flatten()
    half = 0.0 if name == "int8-row" else 0.25 if name == "int8-row-half" else 0.02  # the minimum's own rounding
    assert -half <= float(moved.min()) < float(moved.max()) <= 1 + half
    assert float(moved.mean()) == pytest.approx(0.5, abs=4 / 12**0.5 / 500**0.5 + half / 10)
    rounded = fake_quantize(x, how.format, shifted)
    assert float(((rounded - x).abs() / shifted.scale).max()) <= 0.5 + half  # nothing saturates
    assert not torch.equal(drawn(x, how, 2).offset, shifted.offset)  # type: ignore[arg-type]
    assert torch.equal(drawn(x, how, 1).offset, shifted.offset)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ROWS)
def test_a_draw_reads_high_by_what_it_says(name: str) -> None:
    """Rows of 16 values: one step of the range is lost, and the two ends are no longer exact."""
    how, x = scheme(name).weight, torch.randn(4000, 16, generator=torch.Generator().manual_seed(4))
    own = float((fake_quantize(x, how.format, fit(x, how, (1,))) - x).square().mean().sqrt())
    draws = [float((fake_quantize(x, how.format, drawn(x, how, seed)) - x).square().mean().sqrt()) for seed in range(4)]
    assert np.mean(draws) / own == pytest.approx(1.14 if name == "int4-row" else 1.07, abs=0.02)


def test_a_constant_row_stays_in_a_draw() -> None:
    x = torch.tensor([[0.25] * 4, [0.0] * 4])
    for name in ROWS:
        how = scheme(name).weight
        assert torch.equal(fake_quantize(x, how.format, drawn(x, how, 9)), x)


def test_a_phase_is_refused_for_rows() -> None:
    how = scheme("int8-row").weight
    with pytest.raises(SchemeError, match="row_limits"):
        GridShift(1).weight_affine("table", how.format, fit(torch.randn(3, 4), how, (1,)))


def test_a_large_table_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, how = torch.randn(70, 12), scheme("int8-row").weight
    affine = fit(x, how, (1,))
    codes = quantize(x, how.format, affine)
    expected = dequantize(codes, how.format, affine)
    monkeypatch.setattr("precimap.numerics.quantize._LARGEST_PART", 100)
    assert torch.equal(dequantize(codes, how.format, affine), expected)
    one = Affine(affine.scale[:1], None, affine.offset[:1])  # type: ignore[index]
    assert torch.equal(dequantize(codes, how.format, one)[33], dequantize(codes[33:34], how.format, one)[0])
