"""FLOPs by torch's own counter: the figure that precimap's discovery is held against, with nothing of precimap in it.

Two FLOPs per multiply-add, biases not counted. Attention (`_scaled_dot_product...`, some `bmm`) has no weight in it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count(run: Callable[[], Any]) -> dict[str, int]:
    """FLOPs of one run by ATen op, such as `aten.addmm`.

    Fused paths hide their multiplications from the counter, so the encoder's and oneDNN's (LSTM) are off while it counts,
    and ops that it has no formula for are given one.
    """
    with _nothing_fused(), FlopCounterMode(display=False, custom_mapping=_FORMULAS) as mode:
        run()
    return {str(op): flops for op, flops in mode.get_flop_counts().get("Global", {}).items()}


@contextmanager
def _nothing_fused() -> Iterator[None]:
    fast_path, onednn = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.backends.mkldnn.enabled = onednn


def _grouped_mm_flops(inputs: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    """[rows, in] against [groups, in, out]: each row meets the weight of its group."""
    return 2 * inputs[0] * weight[1] * weight[2]


def _attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """torch 2.11 refuses heads of keys that several heads of queries share: each is then counted as often as it is met."""
    batch, heads = query[:2]
    return sdpa_flop_count(query, (batch, heads, *key[2:]), (batch, heads, *value[2:]))


def _vector_flops(matrix: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A matrix or a vector against a vector."""
    return 2 * math.prod(matrix)


_FORMULAS = {
    torch.ops.aten.mv: _vector_flops,
    torch.ops.aten.dot: _vector_flops,
    torch.ops.aten._grouped_mm: _grouped_mm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
}
