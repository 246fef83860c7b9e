"""FP8 on NVIDIA GPUs: `nn.Linear` layers through torch's scaled matrix product. Experimental: not yet measured on a GPU.

The layers themselves are in `fp8_linear`. Ada (capability 8.9), Hopper (9.0) and newer have E4M3 products; the model
must be on such a device. Search and certificate run the deployed model, so the certificate holds what the kernels add to
the rounding. Without a GPU one plans with the target `emulated` and a profile that `bench-device` recorded on one.

Experts in stacked parameters that `grouped_mm` reads are deployed (`fp8_experts`) but not searched for here: they have no
module that could be timed alone. The target `emulated` finds maps with them. Not taken: AMD's MI300, whose E4M3 is the
FNUZ form, with other codes; kernels of other libraries, each a heavy dependency.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.schemes import Scheme
from precimap.runtime.cuda_timer import CudaTimer
from precimap.runtime.cuda_whole import CudaWholeTimer
from precimap.runtime.fp8_experts import GROUPED_OPS, experts_refusal, fp8_experts
from precimap.runtime.fp8_linear import RESULTS, Fp8Linear, scheme_refusal, width_refusal
from precimap.runtime.swapping import parameter_owner, with_modules

EXPERIMENTAL = "experimental: not yet measured on a GPU"
CAPABILITY = (8, 9)  # the first with FP8 arithmetic
GROUPED = ((9, 0), (10, 0))  # those that torch has grouped FP8 products for


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
        return scheme_refusal(scheme) or _layer_refusal(layer, scheme)

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        yield self.deployed(model, layers) if layers else model

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> nn.Module:
        """A copy of the model's tree, over the same tensors, with `Fp8Linear` and `Fp8Experts` in place of the layers.

        Raises DeployError for a layer that is neither the weight of an nn.Linear nor a stack of experts, or not on a device
        with FP8, or that they cannot multiply.
        """
        stacked = {name: layer for name, layer in layers.items() if layer.codes.dim() == 3}
        copied = with_modules(model, {name: layer for name, layer in layers.items() if name not in stacked}, _place)
        for layer in stacked.values():
            _place_experts(copied, layer)
        return copied


CUDA_FP8 = CudaFp8()


def marked(target: str) -> str:
    """A target's name as people read it, with what they have to know of it."""
    return f"{target} ({EXPERIMENTAL})" if target.startswith(CUDA_FP8.name) else target


def _place(layer: QuantizedLayer, module: nn.Module | None) -> Fp8Linear:
    if type(module) is not nn.Linear:
        raise DeployError(
            f"{layer.name}: expected the weight of an nn.Linear, got {type(module).__name__}; keep it in the map"
        )
    _check_hardware(module.weight.device)
    bias: Tensor | None = module.bias
    return Fp8Linear(layer, None if bias is None else bias.detach(), module.weight.dtype, module.weight.device)


def _place_experts(copied: nn.Module, layer: QuantizedLayer) -> None:
    owner = parameter_owner(copied, layer.name)
    if owner is None:
        raise DeployError(f"{layer.name}: the model has no such parameter")
    module, attribute = owner
    parameter = getattr(module, attribute)
    _check_hardware(parameter.device, grouped=True)
    experts = fp8_experts(layer, parameter.dtype, parameter.device)
    setattr(module, attribute, nn.Parameter(experts, requires_grad=False))


def _layer_refusal(layer: Layer, scheme: Scheme) -> str | None:
    if layer.ops and set(layer.ops) <= set(GROUPED_OPS) and layer.inputs is not None and layer.outputs is not None:
        return experts_refusal(scheme, layer.dtype, (layer.inputs, layer.outputs)) or (
            "experts cannot be timed alone; search with the target emulated, by FLOPs, and deploy the map for cuda-fp8"
        )
    if not layer.in_linear_module:
        return f"read by {', '.join(layer.ops)} outside an nn.Linear; the FP8 path of GPUs serves nn.Linear modules"
    if layer.tied:
        return f"tied to {', '.join(layer.tied)}; the FP8 path of GPUs would untie them"
    if layer.dtype not in [str(dtype).removeprefix("torch.") for dtype in RESULTS]:
        return f"FP8 products give bfloat16, float16 or float32, not {layer.dtype}"
    return None if layer.inputs is None or layer.outputs is None else width_refusal(layer.inputs, layer.outputs)


def _check_hardware(device: torch.device | None, grouped: bool = False) -> None:
    """Raises DeployError for a device, by default the current one, without FP8 products, or without grouped ones."""
    reason = missing_hardware(device, grouped)
    if reason is not None:
        raise DeployError(
            f"cuda-fp8 ({EXPERIMENTAL}): expected a CUDA device of capability {CAPABILITY[0]}.{CAPABILITY[1]} or higher "
            f"(Ada, Hopper, newer), got {reason}. To plan without it, search with the target emulated and a profile that "
            "precimap bench-device --target cuda-fp8 recorded there"
        )


def missing_hardware(device: torch.device | None, grouped: bool = False) -> str | None:
    """What there is instead of a device with FP8 products, `grouped` ones if asked for, or None."""
    if device is not None and device.type != "cuda":
        return f"a model on {device.type}; move it, and what its forward is given, to the GPU"
    if getattr(torch.version, "hip", None) is not None:
        return "an AMD device (a ROCm build of torch), whose E4M3 has other codes"
    if not torch.cuda.is_available():
        return f"a machine where torch {torch.__version__} finds no CUDA device"
    found = torch.cuda.get_device_capability(device)
    here = f"{torch.cuda.get_device_name(device)} of capability {found[0]}.{found[1]}"
    if found < CAPABILITY:
        return here
    if grouped and found not in GROUPED:
        return f"{here}, for which torch has no grouped FP8 products (it has for 9.0 and 10.0)"
    return None
