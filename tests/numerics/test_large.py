"""Large weights in parts have the bits of the whole, and are quantised once in a search."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precimap.layers import quantized
from precimap.layers.quantized import codes_kept, quantize_layer
from precimap.numerics import large
from precimap.numerics.large import large_to_codes, large_to_values
from precimap.numerics.quantize import dequantize, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import SCHEMES

NAMES = ("fp8", "fp8-tensor", "int8-static", "int8-row", "int4-row", "fp8-weight")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(NAMES), st.integers(1, 9), st.integers(1, 4), st.sampled_from([(0,), (1,), (1, 2)]), st.booleans()
)
def test_parts_are_the_whole(name: str, rows: int, part: int, contracted: tuple[int, ...], turned: bool) -> None:
    rounding, patch = SCHEMES[name].weight, pytest.MonkeyPatch()
    shape = (rows, 8) if "row" in name else (rows, 4, 6)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rows)) * 5
    weight = weight.transpose(0, 1) if turned and "row" not in name else weight
    dims = (1,) if "row" in name else contracted
    affine = fit(weight, rounding, dims)
    whole = quantize(weight, rounding.format, affine)
    with patch.context() as patched:
        patched.setattr(large, "LARGEST_PART", part * weight[0].numel())
        codes = large_to_codes(weight, rounding.format, affine)
        values = large_to_values(codes, rounding.format, affine)
    assert torch.equal(codes.view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(values, dequantize(whole, rounding.format, affine))


def test_a_search_quantises_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    plain = quantized.large_to_codes
    monkeypatch.setattr(quantized, "large_to_codes", lambda *given: made.append(1) or plain(*given))
    weight = torch.randn(16, 32)

    def codes(name: str = "a", scheme: str = "fp8") -> torch.Tensor:
        return quantize_layer(name, weight, (1,), SCHEMES[scheme], None).codes

    with codes_kept():
        assert codes() is codes()
        assert len(made) == 1
        codes("b"), codes(scheme="fp8-tensor")
        assert len(made) == 3
        first = codes()
        weight.mul_(2)
        assert codes() is not first, "another weight, as its version tells"
        with codes_kept():
            codes()
        assert len(made) == 5
    codes(), codes()
    assert len(made) == 7, "nothing is kept beyond the search"
