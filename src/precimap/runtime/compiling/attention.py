"""Attention in BF16 as two products around a softmax, in pieces that stay in the cache, where torch's own kernel is slower.

Invariant: what is not known to be better here is torch's own call, unchanged: other dtypes, causal, dropped-out and grouped
attention, sizes that are not known when compiling, and CPUs that are not AVX512 with BF16 and without AMX. On such a CPU
torch's fused kernel multiplies in BF16 no faster than in float32, and oneDNN's batched product does; docs/log.md has
both. Scores are rounded to BF16 before the softmax, which itself is in float32, as in the "eager" attention of transformers;
the fused kernel keeps float32 scores. One product over the whole batch was not taken: its scores are fresh pages from the
system on every call, and it was half as fast as the fused kernel then.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Bytes of scores at once; half, twice and four times as much were as fast within a fifth.
_PIECE = 1 << 20


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As `F.scaled_dot_product_attention`: query [b, heads, m, d], key [b, heads, n, d], value [b, heads, n, e]."""
    known = all(type(size) is int for tensor in (query, key, value) for size in tensor.shape)
    if (
        not known
        or query.dim() != 4
        or not query.shape[:2] == key.shape[:2] == value.shape[:2]
        or any(each.dtype != torch.bfloat16 or each.device.type != "cpu" for each in (query, key, value))
        or dropout_p
        or is_causal
        or enable_gqa
        or not _products_are_faster()
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    rows, heads, m, d = query.shape
    factor = 1 / math.sqrt(d) if scale is None else scale
    mask = None if attn_mask is None else attn_mask.expand(rows, heads, m, key.shape[2])
    per_head = m * key.shape[2] * query.element_size()
    some_rows, some_heads = max(1, _PIECE // (heads * per_head)), min(heads, max(1, _PIECE // per_head))
    return torch.cat(
        [
            torch.cat(
                [
                    _piece(query, key, value, mask, factor, (r, some_rows), (h, some_heads))
                    for h in range(0, heads, some_heads)
                ],
                1,
            )
            for r in range(0, rows, some_rows)
        ]
    )


def _piece(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    factor: float,
    rows: tuple[int, int],
    heads: tuple[int, int],
) -> Tensor:
    """The rows and heads from the first on, as many as the second."""
    r, h = (slice(first, first + count) for first, count in (rows, heads))
    scores = (query[r, h] @ key[r, h].transpose(-1, -2)).float() * factor
    if mask is None:
        weights = torch.softmax(scores, -1)
    else:
        mask = mask[r, h]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = torch._safe_softmax(scores, -1)  # as torch: a row of -inf alone gives zeros
    return weights.to(value.dtype) @ value[r, h]


@functools.cache
def attention_pass() -> object:
    """For Inductor's `pre_grad_custom_pass`: `attend` in place of torch's call. Imported no sooner than it is needed."""
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class AttentionPass(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            for node in graph.nodes:
                if node.target is F.scaled_dot_product_attention:
                    node.target = attend

        def uuid(self) -> object:
            return get_hash_for_files((__file__,))  # a part of the key under which generated code is kept

    return AttentionPass()


@functools.cache
def _products_are_faster() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported())
