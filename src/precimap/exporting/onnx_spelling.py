"""Calls spelled so that torch's translation to ONNX takes them: bags of rows, attention of one head.

Invariant: what is computed is the same. Sums and means of bags are lookups and a sum: whatever table is read, of floats or
of codes, its rows are gathered first and decoded then. Bags of one length are summed along it; bags that begin at offsets
are added up where they belong. torch's own translation is a loop over bags, which OpenVINO does not read. Its translation
of `scaled_dot_product_attention` takes a dim of heads for granted; where there is none it is given one of 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


@contextmanager
def spelled_for_onnx() -> Iterator[None]:
    """Inside the block calls of a model that is traced are spelled in this way."""
    with _Spelling():
        yield


class _Spelling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        spelled = _SPELLED.get(func)
        found = None if spelled is None else spelled(*args, **(kwargs or {}))
        if found is not None:
            return found
        return func(*args, **(kwargs or {}))


def _bagged(
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Sums and means; None of whatever else is asked."""
    if mode not in ("sum", "mean") or max_norm is not None or (ids.dim() == 2) != (offsets is None):
        return None
    rows = F.embedding(ids, weight)
    real = None if padding_idx is None else (ids != padding_idx % weight.shape[0]).to(rows.dtype)
    weights = real if per_sample_weights is None else per_sample_weights * (1 if real is None else real)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    counted = rows.new_ones(ids.shape) if real is None else real
    if offsets is None:
        summed, counts = rows.sum(1), counted.sum(1)
    else:
        summed, counts = (_by_bag(each, offsets, include_last_offset) for each in (rows, counted))
    return summed if mode == "sum" else summed / counts.clamp(min=1).unsqueeze(-1)


def _by_bag(rows: Tensor, offsets: Tensor, last: bool) -> Tensor:
    """Sums of rows [n, ..] over bags that begin at offsets."""
    starts = offsets[:-1] if last else offsets
    marks = rows.new_zeros(rows.shape[0] + 1, dtype=torch.int64)
    bag = marks.index_put((starts,), torch.ones_like(starts, dtype=torch.int64), accumulate=True).cumsum(0)[:-1] - 1
    return rows.new_zeros(starts.shape[0], *rows.shape[1:]).index_put((bag,), rows, accumulate=True)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more: Any, **named: Any
) -> Tensor | None:
    """Of one head, [n, positions, width]."""
    if query.dim() != 3 or key.dim() != 3 or value.dim() != 3:
        return None
    mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
    query, key, value = (each.unsqueeze(1) for each in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, mask, *more, **named).squeeze(1)


_SPELLED: dict[Any, Callable[..., Tensor | None]] = {
    F.embedding_bag: _bagged,
    F.scaled_dot_product_attention: _attention,
}
