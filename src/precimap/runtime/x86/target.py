"""INT8 on x86 CPUs: products through oneDNN's quantised one or a kernel of our own, and tables in packed rows.

`torch.ops.onednn.qlinear_pointwise` takes a static per-tensor input scale and per-channel weight scales. Scales per token,
which it refuses, are those of scheme `int8` and of `tokens.py`: with AMX or AVX-512 VNNI, and a C++ compiler. FP8 is no
alternative on these CPUs: oneDNN has no fast FP8 kernel for them; torch's `_scaled_mm` takes 7 times as long as BF16
(docs/log.md).

Without VNNI or AMX, x86 adds pairs of 8-bit products in 16 bits and saturates: 255 * 127 * 2 does not fit. Whether this CPU
does is measured, not looked up; where it does, inputs must be 7 bits wide (scheme `int8-static-u7`).
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.formats import BF16, INT8, UINT7, UINT8, Format
from precimap.numerics.schemes import SCHEMES, Granularity, Scheme
from precimap.runtime.compiling.compiled import EAGER
from precimap.runtime.weights.half import HALF_KERNEL
from precimap.runtime.weights.low_weight import Kernel, LowWeight
from precimap.runtime.weights.placing import on_cpu, placed, weight_of
from precimap.runtime.weights.products import product_refusal, unserved
from precimap.runtime.x86 import tokens
from precimap.runtime.x86.int8 import INT8_KERNEL
from precimap.runtime.x86.layer_timer import CpuTimer
from precimap.runtime.x86.rows import ROWS_KERNEL, packed_parts, table_refusal
from precimap.runtime.x86.stored import STORED_KERNEL
from precimap.runtime.x86.tokens import TOKENS_KERNEL
from precimap.runtime.x86.whole_timer import CpuWholeTimer


class CpuInt8:
    """The target `cpu-int8`: this CPU."""

    name = "cpu-int8"
    claim = "Measured on the deployed model: the kernels of this CPU, not their emulation."

    @property
    def timer(self) -> CpuTimer:
        """Times a module against the same with its weight in low precision."""
        return CpuTimer(lambda module, layer: self.deployed(module, {"weight": layer}))

    @property
    def whole_timer(self) -> CpuWholeTimer:
        return CpuWholeTimer(self.deployed, EAGER, (torch.bfloat16,) if has_bf16() else ())

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this CPU cannot run the layer in the scheme, or None."""
        if scheme.rows is not None:
            return table_refusal(layer, scheme)
        return _scheme_refusal(scheme) or _layer_refusal(layer, scheme)

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        yield self.deployed(model, layers) if layers else model

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer], *, owned: bool = False) -> nn.Module:
        """A copy of the model with weights of this target in place of the given ones; owned: as of `placed`.

        Raises DeployError for a scheme that this CPU has no arithmetic for, and for a model that cannot be copied.
        """
        return placed(model, layers, _weight, owned=owned)


CPU_INT8 = CpuInt8()


def _weight(layer: QuantizedLayer, parameter: Tensor) -> LowWeight:
    """What stands for the parameter. Raises DeployError as `CpuInt8.deployed` does."""
    on_cpu(parameter, layer.name)
    if layer.scheme.rows is not None:
        return weight_of(layer, parameter, ROWS_KERNEL, packed_parts(layer))
    reason = _scheme_refusal(layer.scheme)
    if reason is not None:
        raise DeployError(f"{layer.name}: {reason}")
    return weight_of(layer, parameter, _kernel_of(layer.scheme))


def _kernel_of(scheme: Scheme) -> Kernel:
    if scheme.result is not None:
        return HALF_KERNEL
    if scheme.input is None:
        return STORED_KERNEL
    return TOKENS_KERNEL if scheme.input.granularity is Granularity.PER_TOKEN else INT8_KERNEL


def _scheme_refusal(scheme: Scheme) -> str | None:
    if scheme.input is None:
        return None  # stored low, computed in base precision
    if scheme.result is not None:
        return (
            None
            if scheme.result == BF16 and has_bf16()
            else f"this CPU multiplies {scheme.name} no faster than float32"
        )
    if scheme.weight.format != INT8:
        return "this CPU has no arithmetic for it; its INT8 kernels take INT8 weights and 8-bit inputs"
    if scheme.input.granularity is Granularity.PER_TOKEN:
        return tokens.scheme_refusal(scheme)
    if scheme.input.dynamic or scheme.input.granularity is not Granularity.PER_TENSOR:
        return "oneDNN's INT8 product takes one static input scale; use int8-static or int8-static-u7"
    if scheme.weight.granularity is not Granularity.PER_CHANNEL or scheme.input.format not in (UINT8, UINT7):
        return "oneDNN's INT8 product is used with per-channel weights and unsigned inputs"
    if not has_qlinear():
        return "this torch build has no oneDNN INT8 product (torch.ops.onednn.qlinear_pointwise)"
    if not products_are_exact(scheme.input.format):
        return "this CPU saturates sums of 8-bit products (no VNNI or AMX); use int8-static-u7"
    return None


def _layer_refusal(layer: Layer, scheme: Scheme) -> str | None:
    if layer.table:
        return "a table takes packed rows here (int8-row, int8-row-half, int4-row)"
    if scheme.result is not None:
        return unserved(layer)
    reason = product_refusal(layer) if scheme.computes_low else None
    if reason is not None:
        return reason
    if layer.dtype == "float32" or (layer.dtype == "bfloat16" and has_bf16()):
        return None
    return f"this CPU has no fast product with {layer.dtype} results; give the model in float32"


@functools.cache
def has_qlinear() -> bool:
    """True when torch can multiply INT8 codes through oneDNN here."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and hasattr(torch.ops.onednn, "qlinear_pointwise")


@functools.cache
def has_bf16() -> bool:
    """True when this CPU multiplies BF16 in hardware (AVX512-BF16 or AMX); without it a product is ten times slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@functools.cache
def products_are_exact(format: Format) -> bool:
    """Whether sums of the largest products of this input format and INT8 come out exactly on this CPU."""
    k = n = 64
    inputs = torch.full((n, k), int(format.maximum), dtype=torch.uint8)
    codes = torch.full((n, k), INT8.maximum, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    ones, zeros = torch.ones(n), torch.zeros(n, dtype=torch.int32)
    found = torch.ops.onednn.qlinear_pointwise(
        inputs, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((found == int(format.maximum) * INT8.maximum * k).all())


def int8_scheme() -> str:
    """The name of the widest INT8 scheme that this CPU multiplies exactly. Raises DeployError if there is none."""
    for name in ("int8-static", "int8-static-u7"):
        if _scheme_refusal(SCHEMES[name]) is None:
            return name
    raise DeployError(f"this machine runs no INT8 scheme: {_scheme_refusal(SCHEMES['int8-static-u7'])}")
