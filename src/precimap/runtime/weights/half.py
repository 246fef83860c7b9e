"""Products in BF16 or FP16: a model's call with every operand in that format, its result in the model's own again.

Invariant: sums are float32, and what comes out is rounded to the format once, which is what torch's kernels do on CPUs and
GPUs, and what `layers/emulation.py` emulates. So a call here is the one that autocast would make of it. The result goes
back to the model's dtype at once, for what comes after (normalisation, a sum, another layer's quantising) expects it;
compiled, that conversion is a part of the next loop. Not taken: results that stay in 16 bits, as in a model that is cast as
a whole: what reads them is the user's own code, which then meets two dtypes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from precimap.numerics.formats import FP16
from precimap.numerics.quantize import storage_dtype
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.products import CALLS, GATHERS, CodedKernel

_aten = torch.ops.aten
_BAGS = {_aten._embedding_bag.default, _aten._embedding_bag_forward_only.default}
_PRODUCTS = CALLS.keys() - GATHERS - {_aten.embedding.default} - _BAGS


class HalfKernel(CodedKernel):
    """Codes [..] of 16 bits, as they lie; any operator that multiplies them."""

    name = "HALF_KERNEL"

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        codes = weight.codes
        return F.linear(_cast(x, codes.dtype), codes, None if bias is None else bias.to(codes.dtype)).to(dtype)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        weight = next(value for value in (*args, *kwargs.values()) if isinstance(value, LowWeight))
        if func not in _PRODUCTS or sum(isinstance(value, LowWeight) for value in args) > 1:
            return super().product(func, args, kwargs)
        dtype = weight.codes.dtype

        def given(value: Any) -> Any:
            if isinstance(value, LowWeight):
                return value.codes
            return _cast(value, dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        args, kwargs = tree_map(given, (args, kwargs))
        return func(*args, **kwargs).to(weight.outward)


HALF_KERNEL = HalfKernel()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Saturated, as the emulation does: FP16 ends at 65,504, which inputs reach."""
    if dtype == storage_dtype(FP16) and x.dtype != dtype:
        x = x.clamp(FP16.minimum, FP16.maximum)
    return x.to(dtype)
