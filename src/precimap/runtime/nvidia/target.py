"""FP8 on NVIDIA GPUs, through torch's scaled matrix products, and BF16 and FP16. Experimental: not yet measured on a GPU.

The kernel itself is in `weights/fp8.py`. Ada (capability 8.9), Hopper (9.0) and newer have E4M3 products; the model
must be on such a device. Search and certificate run the deployed model, so the certificate holds what the kernels add to
the rounding. Without a GPU one plans with the target `emulated` and a profile that `bench-device` recorded on one.

Experts in stacked parameters that `grouped_mm` reads are deployed, as one grouped product, but not searched for here: there
is no layer that could be timed alone. The target `emulated` finds maps with them. Not taken: kernels of other libraries,
each a heavy dependency.

AMD's MI300 (gfx942) is a CUDA device to torch, and has E4M3 products in the FNUZ form. Its codes are schemes of their own,
`fp8-fnuz` and the like, so that a map says which codes were measured; each device takes its own and refuses the other's.
Taking `fp8` for whatever a device reads was not taken: the same map would be other numbers there. AMD's later devices read
the codes of `fp8`; they are refused until somebody has one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.formats import E4M3_FNUZ
from precimap.numerics.schemes import Scheme
from precimap.runtime.nvidia.fp8 import (
    FP8_KERNEL,
    GROUPED_OPS,
    RESULTS,
    experts_refusal,
    scheme_refusal,
    width_refusal,
)
from precimap.runtime.nvidia.layer_timer import CudaTimer
from precimap.runtime.nvidia.whole_timer import CudaWholeTimer
from precimap.runtime.weights.half import HALF_KERNEL
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.placing import placed, weight_of
from precimap.runtime.weights.products import product_refusal, unserved

EXPERIMENTAL = "experimental: not yet measured on a GPU"
CAPABILITY = (8, 9)  # the first with FP8 arithmetic
GROUPED = ((9, 0), (10, 0))  # those that torch has grouped FP8 products for
FNUZ = "gfx942"  # as `_scaled_mm_is_fnuz` in torch's ScaledBlas.cpp


class CudaFp8:
    """The target `cuda-fp8`: the CUDA device that the model is on."""

    name = "cuda-fp8"
    claim = f"Measured on the deployed model: the FP8 products of this GPU ({EXPERIMENTAL})."

    @property
    def timer(self) -> CudaTimer:
        """Times a module against what takes its place here."""
        return CudaTimer(lambda module, layer: self.deployed(module, {"weight": layer}))

    @property
    def whole_timer(self) -> CudaWholeTimer:
        return CudaWholeTimer(self.deployed)

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this GPU cannot run the layer in the scheme, or None. Raises DeployError where there is none with FP8."""
        _check_hardware(None)
        if scheme.result is not None:
            return unserved(layer)
        return scheme_refusal(scheme) or codes_refusal(scheme) or _layer_refusal(layer, scheme)

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        yield self.deployed(model, layers) if layers else model

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer], *, owned: bool = False) -> nn.Module:
        """A copy of the model with FP8 weights in place of the given ones; owned: as of `placed`.

        Raises DeployError for a weight that is not on a device with FP8, or in a form that it does not multiply.
        """
        return placed(model, layers, _weight, owned=owned)


CUDA_FP8 = CudaFp8()


def marked(target: str) -> str:
    """A target's name as people read it, with what they have to know of it."""
    return f"{target} ({EXPERIMENTAL})" if target.startswith(CUDA_FP8.name) else target


def _weight(layer: QuantizedLayer, parameter: Tensor) -> LowWeight:
    """What stands for the parameter. Its codes lie as the product reads them: inputs next to each other."""
    stacked, dtype = layer.codes.dim() == 3, str(parameter.dtype).removeprefix("torch.")
    _check_hardware(parameter.device, grouped=stacked and layer.scheme.result is None)
    if layer.scheme.result is not None:
        return weight_of(layer, parameter, HALF_KERNEL)
    shared = [dim for dim, size in enumerate(layer.weight_affine.scale.shape) if size == 1]
    inputs = next((dim for dim in reversed(shared) if layer.codes.shape[dim] > 1), layer.codes.dim() - 1)
    reason = scheme_refusal(layer.scheme) or codes_refusal(layer.scheme)
    outputs = layer.codes.numel() // layer.codes.shape[inputs] // (len(layer.codes) if stacked else 1)
    if reason is None and stacked and len(shared) != 1:
        reason = "expected experts [E, N, K] or [E, K, N] with a scale for each output"
    elif reason is None and stacked:
        reason = experts_refusal(layer.scheme, dtype, (layer.codes.shape[inputs], outputs))
    elif reason is None:
        reason = width_refusal(layer.codes.shape[inputs], outputs)
    if reason is None and parameter.dtype not in RESULTS:
        reason = f"FP8 products give bfloat16, float16 or float32, not {dtype}"
    if reason is not None:
        raise DeployError(f"{layer.name}: {reason}")
    codes = layer.codes.movedim(inputs, -1).contiguous().movedim(-1, inputs)
    return weight_of(replace(layer, codes=codes), parameter, FP8_KERNEL)


def _layer_refusal(layer: Layer, scheme: Scheme) -> str | None:
    if layer.ops and set(layer.ops) <= set(GROUPED_OPS) and layer.inputs is not None and layer.outputs is not None:
        return experts_refusal(scheme, layer.dtype, (layer.inputs, layer.outputs)) or (
            "experts cannot be timed alone; search with the target emulated, by FLOPs, and deploy the map for cuda-fp8"
        )
    reason = product_refusal(layer)
    if reason is not None:
        return reason
    if len(layer.shape) != 2:
        return "the FP8 path of GPUs multiplies weights of two dims, and experts by grouped_mm"
    if layer.dtype not in [str(dtype).removeprefix("torch.") for dtype in RESULTS]:
        return f"FP8 products give bfloat16, float16 or float32, not {layer.dtype}"
    return None if layer.inputs is None or layer.outputs is None else width_refusal(layer.inputs, layer.outputs)


def _check_hardware(device: torch.device | None, grouped: bool = False) -> None:
    """Raises DeployError for a device, by default the current one, without FP8 products, or without grouped ones."""
    reason = missing_hardware(device, grouped)
    if reason is not None:
        raise DeployError(
            f"cuda-fp8 ({EXPERIMENTAL}): expected a CUDA device of capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher "
            f"(Ada, Hopper, newer) or AMD's {FNUZ}, got {reason}. To plan without it, search with the target emulated and a "
            "profile that precimap bench-device --target cuda-fp8 recorded there"
        )


def codes_refusal(scheme: Scheme) -> str | None:
    """Why the devices of this build of torch do not read the scheme's codes as what they stand for, or None."""
    if (scheme.weight.format == E4M3_FNUZ) == _is_amd():
        return None
    if _is_amd():
        return f"AMD's {FNUZ} reads other codes of E4M3 (FNUZ); take fp8-fnuz"
    return f"its codes are those of AMD's {FNUZ} (FNUZ), which this GPU reads as other values; take fp8"


def _is_amd() -> bool:
    """Of a build of torch, which has devices of one maker."""
    return getattr(torch.version, "hip", None) is not None


def missing_hardware(device: torch.device | None, grouped: bool = False) -> str | None:
    """What there is instead of a device with FP8 products, `grouped` ones if asked for, or None."""
    if device is not None and device.type != "cuda":
        return f"a model on {device.type}; move it, and what its forward is given, to the GPU"
    if not torch.cuda.is_available():
        return f"a machine where torch {torch.__version__} finds no CUDA device"
    if _is_amd():
        chip = str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
        if chip != FNUZ:
            return f"an AMD device ({chip}), whose FP8 products nobody has tried here"
        return f"an AMD device ({chip}), whose grouped FP8 products nobody has tried here" if grouped else None
    found = torch.cuda.get_device_capability(device)
    here = f"{torch.cuda.get_device_name(device)} of capability {found[0]}.{found[1]}"
    if found < CAPABILITY:
        return here
    if grouped and found not in GROUPED:
        return f"{here}, for which torch has no grouped FP8 products (it has for 9.0 and 10.0)"
    return None
