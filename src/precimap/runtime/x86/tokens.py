"""The kernel of scheme `int8` on x86 CPUs: inputs [M, K] quantised row by row, a scale for each, times INT8 codes [N, K].

Invariant: quantising is part of the product (`tokens.cpp`), in tiles of AMX or in AVX-512 VNNI, and a result has the same
bits with either, with any number of threads and beside any other rows: those of the emulation wherever that adds up exactly.
A row with NaN gives NaN, infinity saturates, as `numerics` says. Nothing is calibrated.

The product is an operator, `precimap::int8_tokens`, which compilers and exporters take as it is: compiled, a layer has its
eager bits. Its weight is packed by `precimap::pack_codes`: a cache that no copy or file holds, in eager mode; in a compiled
model a constant, since its weights are frozen; in an exported program an operator before the product, at each call.

Not taken: oneDNN's product of codes that torch's operators quantised, 1.4 to 4 times as long as the product alone eagerly;
and a slower form for CPUs with neither instruction set, which would be slower than what it stands for. They are refused.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precimap.errors import DeployError
from precimap.numerics.formats import INT8
from precimap.numerics.schemes import Granularity, Rounding, Scheme
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.products import CodedKernel, scales_of
from precimap.runtime.x86.building import library

TOKENS = Rounding(INT8, Granularity.PER_TOKEN, dynamic=True)
CHANNELS = Rounding(INT8, Granularity.PER_CHANNEL)
AMX, VNNI = "AMX", "AVX-512 VNNI"
_PANEL, _STEP = 32, 64  # outputs and inputs of a packed block, as in tokens.cpp
_LONGEST = (2**31 - 1) // 127**2  # inputs whose products add up in 32 bits
_RESULTS = (torch.float32, torch.bfloat16)
FLAGS = tuple("-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mamx-tile -mamx-int8 -mprfchw".split())


def scheme_refusal(scheme: Scheme) -> str | None:
    """Why this machine cannot run a scheme with a scale for each token, or None. Compiles the kernel when first asked."""
    if scheme.input != TOKENS or scheme.weight != CHANNELS:
        return (
            "inputs with a scale for each row are multiplied in INT8, symmetric and amax, by such weights per channel"
        )
    if instructions() is None:
        return "this CPU has neither AMX nor AVX-512 VNNI, without which INT8 with a scale for each row does not pay"
    return _not_built()


@functools.cache
def instructions() -> str | None:
    """What the kernel multiplies with on this CPU; None where it has neither."""
    if not torch.cpu._is_avx512_supported() or not torch.cpu._is_vnni_supported():
        return None
    has_tiles = torch.cpu.get_capabilities().get("amx_int8", False) and torch.cpu._init_amx()
    return AMX if has_tiles else VNNI


@functools.cache
def _not_built() -> str | None:
    try:
        _kernel()
    except DeployError as error:
        return f"the kernel of INT8 with a scale for each row is not built here: {error}"
    return None


class _Problem(ctypes.Structure):
    """As in tokens.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "packed", "scales", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("m", "n", "k", "stride")),
        *((name, ctypes.c_int) for name in ("x_half", "bias_half", "out_half")),
        ("phase", ctypes.c_float),
        ("tiles", ctypes.c_int),
        ("threads", ctypes.c_int),
    )


@functools.cache
def _kernel() -> "ctypes._NamedFuncPointer":
    """Raises DeployError as `library`."""
    kernel = library(Path(__file__).with_name("tokens.cpp"), FLAGS).precimap_int8_tokens
    kernel.argtypes, kernel.restype = [ctypes.POINTER(_Problem)], None
    return kernel


@dataclass(frozen=True, slots=True)
class _Packed:
    codes: Tensor
    scales: Tensor


class TokensKernel(CodedKernel):
    """INT8 weights with a scale a channel, INT8 inputs with a scale a row that is found in each call."""

    name = "TOKENS_KERNEL"
    needs_frozen = True  # or its codes would be packed in each call

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        packed = _packed(weight) if weight.traced else weight.prepared("int8 tokens", _packed)
        given = x if x.dtype in _RESULTS else x.float()
        added = bias if bias is None or bias.dtype in _RESULTS else bias.float()
        wanted = dtype if dtype in _RESULTS else torch.float32
        product = torch.ops.precimap.int8_tokens.default  # to look for it among overloads takes six microseconds
        output: Tensor = product(given, packed.codes, packed.scales, added, weight.how.input_phase, wanted)
        return output if wanted == dtype else output.to(dtype)


TOKENS_KERNEL = TokensKernel()


def _packed(weight: LowWeight) -> _Packed:
    scales = scales_of(weight)
    if scales is None:
        raise DeployError(f"{weight.how.name}: expected one scale for each output")
    if weight.codes.shape[1] > _LONGEST:
        raise DeployError(f"{weight.how.name}: sums of more than {_LONGEST} products of codes do not fit into 32 bits")
    return _Packed(torch.ops.precimap.pack_codes(weight.codes), scales)


def _sizes(outputs: int, inputs: int) -> tuple[int, int]:
    """Panels of outputs and steps of inputs."""
    return -(-outputs // _PANEL), -(-inputs // _STEP)


def _pack_codes(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] as tokens.cpp reads them: int8 [panels, bytes], each panel with the sums of its codes at its end."""
    outputs, inputs = codes.shape
    panels, steps = _sizes(outputs, inputs)
    filled = torch.zeros(panels * _PANEL, steps * _STEP, dtype=torch.int8)
    filled[:outputs, :inputs] = codes
    tiles = filled.view(panels, 2, 16, steps, 16, 4).permute(0, 3, 1, 4, 2, 5)
    sums = filled.sum(1, dtype=torch.int32).view(panels, _PANEL).view(torch.int8)
    return torch.cat([tiles.reshape(panels, -1), sums], 1)


def _int8_tokens(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, phase: float, dtype: torch.dtype
) -> Tensor:
    """x [.., K] float32 or BF16, scales float32 [N], bias [N] as x -> [.., N] in `dtype`. phase: as in `QuantizedLayer`."""
    outputs, inputs = scales.shape[0], x.shape[-1]
    panels, steps = _sizes(outputs, inputs)
    if packed.shape != (panels, _PANEL * (steps * _STEP + 4)) or not packed.is_contiguous():
        raise DeployError(f"expected codes packed for {inputs} inputs and {outputs} outputs, got {tuple(packed.shape)}")
    rows = x if x.dim() == 2 else x.reshape(-1, inputs)
    if rows.stride(1) != 1 and inputs > 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs, dtype=dtype)
    if not out.numel():
        return out
    scales, bias = scales.contiguous(), None if bias is None else bias.contiguous()
    problem = _Problem(
        *(rows.data_ptr(), packed.data_ptr(), scales.data_ptr(), None if bias is None else bias.data_ptr()),
        *(out.data_ptr(), rows.shape[0], outputs, inputs, rows.stride(0)),
        *(x.dtype == torch.bfloat16, bias is not None and bias.dtype == torch.bfloat16, dtype == torch.bfloat16),
        *(phase, instructions() == AMX, torch.get_num_threads()),
    )
    _kernel()(problem)
    return out


def _packed_alike(codes: Tensor) -> Tensor:
    panels, steps = _sizes(*codes.shape)
    return codes.new_empty(panels, _PANEL * (steps * _STEP + 4))


def _result_alike(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, phase: float, dtype: torch.dtype
) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0], dtype=dtype)


_LIBRARY: Any = torch.library.Library("precimap", "DEF")  # type: ignore[no-untyped-call]
for _schema, _computed, _alike in (
    ("pack_codes(Tensor codes) -> Tensor", _pack_codes, _packed_alike),
    (
        "int8_tokens(Tensor x, Tensor packed, Tensor scales, Tensor? bias, float phase, ScalarType dtype) -> Tensor",
        _int8_tokens,
        _result_alike,
    ),
):
    _name = _schema.partition("(")[0]
    # Strides of inputs are as they come: held to those of the trace, Inductor writes an input once for each of its readers.
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    _LIBRARY.impl(_name, _computed, "CPU")
    torch.library.register_fake(f"precimap::{_name}", _alike, lib=_LIBRARY)
