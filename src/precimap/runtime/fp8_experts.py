"""All experts of a layer in one grouped FP8 product, with a scale for each token and for each output of each expert.

Invariant: the codes of tokens are those of `numerics`, the codes of weights those of `quantize_layer` for the stacked
parameter; `torch._scaled_grouped_mm` multiplies them. It has no CPU kernel, takes E4M3, row scales and BF16 results
alone, no bias, and runs on capability 9.0 and 10.0 (GroupedBlas.cpp in torch 2.11 and 2.13).

Not taken: one `_scaled_mm` for each expert. How many tokens an expert gets is on the device; asking would stop the host
and no graph could be captured.
"""

import torch
from torch import Tensor

from precimap.numerics.formats import E4M3
from precimap.numerics.schemes import Granularity, Rounding
from precimap.runtime.fp8_linear import FAST_ACCUMULATION, dynamic_codes

TOKENS = Rounding(E4M3, Granularity.PER_TOKEN, dynamic=True)


def scaled_experts(tokens: Tensor, codes: Tensor, scales: Tensor, ends: Tensor) -> Tensor:
    """tokens [S, K] sorted by expert, codes [E, N, K], float32 scales [E, N], ends int32 [E] -> BF16 [S, N].

    Tokens ends[e - 1] to ends[e] belong to expert e; results behind the last end are not written. K and N are multiples
    of 16.
    """
    rows, row_scales = dynamic_codes(tokens, TOKENS, 1.0)
    output: Tensor = torch._scaled_grouped_mm(
        rows,
        codes.transpose(-2, -1),
        row_scales.reshape(-1),
        scales,
        offs=ends,
        out_dtype=torch.bfloat16,
        use_fast_accum=FAST_ACCUMULATION,
    )
    return output
