"""Codes that are decoded once: what weight-only schemes are on a CPU.

Invariant: a saved file holds the codes and no decoded weight. So the file is smaller and nothing else is: in memory the
codes are kept beside the decoded weight, one byte a value more than the model had. Decoding in each call was not taken:
at 32 rows and 1024 x 1024 in BF16 a call then takes 14 times as long in FP8 and 1.8 times in INT8 (docs/log.md), and
INT8 that is multiplied as INT8 needs as little memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_iter, tree_map_only

from precimap.numerics.quantize import Affine, dequantize
from precimap.runtime.weights.low_weight import AFFINE, How, LowWeight, Parts, composite
from precimap.runtime.weights.products import CALLS, CodedKernel


class StoredKernel(CodedKernel):
    """Every product in the weight's own dtype. In float32 that is the emulation; in BF16 the decoded weight is rounded once
    more, by 2^-9 of each value at most."""

    name = "STORED_KERNEL"

    def derived(self, how: How, parts: Parts, dtype: torch.dtype) -> Parts:
        affine = Affine(*(parts.get(name) for name in AFFINE))  # type: ignore[arg-type]
        return {"decoded": dequantize(parts["codes"], how.scheme.weight.format, affine).to(dtype)}

    def linear(self, x: Tensor, weight: LowWeight, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight.parts["decoded"], bias)

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return F.linear(x, weight.parts["decoded"], bias)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Whatever reads the weight reads it decoded, but who is no product where the parameter is kept."""
        kept = func not in CALLS and any(
            isinstance(leaf, LowWeight) and "wide" in leaf.parts for leaf in tree_iter((args, kwargs))
        )
        if kept or func._schema.is_mutable or composite(func):
            return NotImplemented
        args, kwargs = tree_map_only(LowWeight, lambda weight: weight.parts["decoded"], (args, kwargs))
        return func(*args, **kwargs)


STORED_KERNEL = StoredKernel()
