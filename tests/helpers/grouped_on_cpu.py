"""`torch._scaled_grouped_mm` for CPU tensors, which torch has for CUDA alone: its definition, expert by expert.

What CUDA would refuse is refused: the arguments go through torch's own meta function for CUDA tensors first. So a caller's
layouts and dtypes are tested, and its numbers against a product that is right; the CUDA kernel itself is not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def _like_cuda(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def _grouped(
    tokens: Tensor,
    weights: Tensor,
    token_scales: Tensor,
    weight_scales: Tensor,
    ends: Tensor | None = None,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    arguments = (tokens, weights, token_scales, weight_scales, ends, bias, scale_result, out_dtype, use_fast_accum)
    with FakeTensorMode():
        shape = torch._scaled_grouped_mm(*map(_like_cuda, arguments)).shape
    assert tokens.shape[1] % 16 == weights.shape[1] % 16 == weights.shape[2] % 16 == 0
    assert ends is not None
    result = torch.full(shape, torch.nan, dtype=torch.float32)  # what no expert writes
    start = 0
    for expert, end in enumerate(ends.tolist()):
        product = tokens[start:end].float() @ weights[expert].float()
        result[start:end] = product * token_scales[start:end, None] * weight_scales[expert]
        start = end
    return result.to(torch.bfloat16)


@contextmanager
def grouped_on_cpu() -> Iterator[None]:
    """Inside the block torch has the product for CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_grouped_mm", _grouped, "CPU")
    try:
        yield
    finally:
        library._destroy()
