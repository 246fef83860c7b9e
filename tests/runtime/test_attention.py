"""Attention written out in products is torch's own, to the rounding of BF16, and Inductor's code has no other."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap.runtime.compiling import attention
from precimap.runtime.compiling.attention import attend
from precimap.runtime.compiling.compiled import compiled


@pytest.fixture(autouse=True)
def _on_a_cpu_where_products_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_products_are_faster", lambda: True)


def _tensors(rows: int = 3, heads: int = 4, m: int = 10, n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(rows, size, heads, 8, generator=generator) for size in (m, n, n))
    return tuple(tensor.bfloat16().transpose(1, 2) for tensor in (query, key, value))  # type: ignore[return-value]


def _masks() -> dict[str, Tensor | None]:
    keep = torch.rand(3, 1, 10, 12, generator=torch.Generator().manual_seed(1)) < 0.7
    keep[1, 0, 2] = False  # a row that may look at nothing
    return {
        "none": None,
        "bool": keep,
        "added": torch.zeros(10, 12, dtype=torch.bfloat16).masked_fill(~keep[0, 0], -torch.inf),
    }


# Bytes that hold everything, one row of the batch, and two heads.
@pytest.mark.parametrize("piece", [1 << 20, 4 * 10 * 12 * 2, 2 * 10 * 12 * 2])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_torchs_attention(monkeypatch: pytest.MonkeyPatch, piece: int, mask: str, scale: float | None) -> None:
    monkeypatch.setattr(attention, "_PIECE", piece)
    tensors, given = _tensors(), _masks()[mask]
    wide = [tensor.double() for tensor in tensors]
    wide_mask = given if given is None or given.dtype == torch.bool else given.double()
    expected = F.scaled_dot_product_attention(*wide, attn_mask=wide_mask, scale=scale)
    found = attend(*tensors, attn_mask=given, scale=scale)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("change", ["float32", "causal", "grouped"])
def test_what_it_does_not_serve_is_torchs_own_call(change: str) -> None:
    query, key, value = _tensors()
    if change == "float32":
        query, key, value = query.float(), key.float(), value.float()
    if change == "grouped":
        key, value = key[:, :2], value[:, :2]
    options = {"is_causal": change == "causal", "enable_gqa": change == "grouped"}
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(attend(query, key, value, **options), expected)


class _Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
def test_the_generated_code_has_it() -> None:
    tensors = _tensors()
    model = compiled(_Attention(), tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = model(*tensors)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::bmm" in ran or any("bmm" in name for name in ran)
    assert not any("scaled_dot_product" in name for name in ran)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*tensors), atol=0.02, rtol=0.02)
