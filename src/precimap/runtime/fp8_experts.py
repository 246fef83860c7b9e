"""Experts in one stacked parameter, multiplied in one grouped FP8 product: a scale a token, and one an output of an expert.

Invariant: the codes of tokens are those of `numerics`, the codes of weights those of `quantize_layer` for the stacked
parameter; `torch._scaled_grouped_mm` multiplies them. It has no CPU kernel, takes E4M3, row scales and BF16 results
alone, no bias, and runs on capability 9.0 and 10.0 (GroupedBlas.cpp in torch 2.11 and 2.13).

`Fp8Experts` takes the place of the parameter, and its module's own code goes on to call `grouped_mm` with it: it is a
wrapper subclass of Tensor, which gets such a call from torch, also from a compiler. So no forward of a foreign module is
written again. Anything else that the module might do with the parameter fails.

Not taken: one `_scaled_mm` for each expert. How many tokens an expert gets is on the device; asking would stop the host
and no graph could be captured. `__torch_function__`, with or without a mode: dynamo passes private functions such as
`torch._grouped_mm` by it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from precimap.errors import DeployError
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.formats import E4M3
from precimap.numerics.schemes import Granularity, Rounding, Scheme
from precimap.runtime.fp8_linear import FAST_ACCUMULATION, Fp8Linear, dynamic_codes, scheme_refusal, width_refusal

TOKENS = Rounding(E4M3, Granularity.PER_TOKEN, dynamic=True)
GROUPED_OPS = ("_grouped_mm", "grouped_mm")  # as discovery names them


def scaled_experts(tokens: Tensor, codes: Tensor, scales: Tensor, ends: Tensor, phase: float = 1.0) -> Tensor:
    """tokens [S, K] sorted by expert, codes [E, N, K], float32 scales [E, N], ends int32 [E] -> BF16 [S, N].

    Tokens ends[e - 1] to ends[e] belong to expert e; results behind the last end are not written. K and N are multiples
    of 16; the last two dims of `codes` may lie in memory either way. phase: as in `QuantizedLayer`.
    """
    rows, row_scales = dynamic_codes(tokens, TOKENS, phase)
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


def experts_refusal(scheme: Scheme, dtype: str, widths: tuple[int, int]) -> str | None:
    """Why a grouped FP8 product cannot run experts of these widths in the scheme, or None."""
    if scheme.input != TOKENS or scheme.weight.granularity is not Granularity.PER_CHANNEL:
        return scheme_refusal(scheme) or "grouped FP8 products take a scale for each token and each output; use fp8"
    if dtype != "bfloat16":
        return f"grouped FP8 products give bfloat16 alone, not {dtype}"
    return scheme_refusal(scheme) or width_refusal(*widths)


class Fp8Experts(Tensor):
    """A stacked parameter [E, N, K] or [E, K, N] of experts, as codes and scales: BF16 to who asks, never decoded.

    codes: [E, N, K], contiguous; scales: float32 [E, N]. The two dims of an expert may be transposed; `grouped_mm` with
    tokens gives their FP8 product; anything else raises DeployError with the name of the parameter.
    """

    codes: Tensor
    scales: Tensor
    how: "Experts"

    accumulation_error = Fp8Linear.accumulation_error

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, how: "Experts") -> "Fp8Experts":
        experts, outputs, inputs = codes.shape
        shape, strides = (experts, outputs, inputs), (outputs * inputs, inputs, 1)
        if how.inputs_first:
            shape, strides = (experts, inputs, outputs), (outputs * inputs, outputs, 1)
        if how.transposed:
            shape, strides = (shape[0], shape[2], shape[1]), (strides[0], strides[2], strides[1])
        made: Fp8Experts = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=torch.bfloat16, device=codes.device
        )
        return made

    def __init__(self, codes: Tensor, scales: Tensor, how: "Experts") -> None:
        self.codes, self.scales, self.how = codes, scales, how

    def __tensor_flatten__(self) -> tuple[list[str], "Experts"]:
        return ["codes", "scales"], self.how

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], how: "Experts", size: Any, stride: Any) -> "Fp8Experts":
        return Fp8Experts(inner["codes"], inner["scales"], how)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if func is aten._grouped_mm.default:
            return _multiplied(*args, **(kwargs or {}))
        given = next(value for value in args if isinstance(value, Fp8Experts))
        if func in (aten.detach.default, aten.alias.default):
            return Fp8Experts(given.codes, given.scales, given.how)
        if func is aten.transpose.int and {args[1] % 3, args[2] % 3} == {1, 2}:
            return Fp8Experts(given.codes, given.scales, replace(given.how, transposed=not given.how.transposed))
        raise DeployError(f"{given.how.name}: experts in FP8 are read by grouped_mm alone, not by {func}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Fp8Experts({self.how.name}, {tuple(self.shape)}, {self.device})"


@dataclass(frozen=True, slots=True)
class Experts:
    """What does not depend on values. inputs_first: the parameter is [E, K, N]. transposed: this is its transpose."""

    name: str
    inputs_first: bool
    transposed: bool
    phase: float


def fp8_experts(layer: QuantizedLayer, dtype: torch.dtype, device: torch.device) -> Fp8Experts:
    """What stands for a stacked parameter. Raises DeployError for what the grouped product does not take."""
    scales, shape = layer.weight_affine.scale, layer.codes.shape
    outputs_along = [dim for dim in range(1, scales.dim()) if scales.shape[dim] > 1]
    if len(shape) != 3 or len(outputs_along) != 1:
        raise DeployError(f"{layer.name}: expected experts [E, N, K] or [E, K, N] with a scale for each output")
    inputs_first = outputs_along == [2]
    codes = layer.codes.transpose(1, 2).contiguous() if inputs_first else layer.codes
    reason = experts_refusal(layer.scheme, str(dtype).removeprefix("torch."), (codes.shape[2], codes.shape[1]))
    if reason is not None:
        raise DeployError(f"{layer.name}: {reason}")
    how = Experts(layer.name, inputs_first, False, layer.input_phase)
    return Fp8Experts(codes.to(device), scales.reshape(codes.shape[:2]).to(device), how)


def _multiplied(
    tokens: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A call of `_grouped_mm`. Raises DeployError for forms of it that the FP8 product does not have."""
    if not isinstance(weight, Fp8Experts) or isinstance(tokens, Fp8Experts) or offs is None or bias is not None:
        raise DeployError("experts in FP8 are multiplied with tokens [S, K] and offsets, without a bias")
    if weight.how.transposed == weight.how.inputs_first or out_dtype not in (None, torch.bfloat16):
        raise DeployError(
            f"{weight.how.name}: expected a product along the inputs, to bfloat16, as when the map was made"
        )
    return scaled_experts(tokens, weight.codes, weight.scales, offs, weight.how.phase)
