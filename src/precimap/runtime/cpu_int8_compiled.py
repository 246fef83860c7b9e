"""The target `cpu-int8-compiled`: the layers of `cpu-int8`, in a model whose calls Inductor compiles.

Invariant: what is timed, layer by layer and as a whole, and what is certified, is the compiled model; its baseline is the
model as given. Another target and not a switch of `cpu-int8`, because its sums round otherwise and its times are others:
a map, a profile and a certificate belong to one form.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from precimap.errors import DeployError
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.schemes import Scheme
from precimap.runtime.compiled import CompiledCalls, compile_calls, no_compiler
from precimap.runtime.cpu_int8 import CPU_INT8
from precimap.runtime.cpu_timer import CpuTimer
from precimap.runtime.cpu_whole import COMPILED, CpuWholeTimer


class CpuInt8Compiled:
    """This CPU, through torch.compile."""

    name = "cpu-int8-compiled"
    claim = "Measured on the deployed model as Inductor compiles it for this CPU, not on its emulation."

    @property
    def timer(self) -> CpuTimer:
        """Times a module compiled against what takes its place here, compiled, too."""
        return CpuTimer(lambda module, layer: CPU_INT8.deployed(module, {"weight": layer}), compile_calls)

    @property
    def whole_timer(self) -> CpuWholeTimer:
        return CpuWholeTimer(CPU_INT8.deployed, COMPILED, CPU_INT8.whole_timer.casts)

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return CPU_INT8.refusal(layer, scheme) or no_compiler()

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        """Raises DeployError at its end when nothing was compiled: a forward that calls parts of the model only."""
        if not layers:
            yield model
            return
        deployed = CPU_INT8.deployed(model, layers)
        calls = compile_calls(deployed)
        yield deployed
        _check_used(calls)

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> nn.Module:
        """As `CPU_INT8.deployed`; calls of the model compile when new shapes come. Raises DeployError without a compiler."""
        reason = no_compiler()
        if reason is not None:
            raise DeployError(reason)
        made = CPU_INT8.deployed(model, layers)
        compile_calls(made)
        return made


CPU_INT8_COMPILED = CpuInt8Compiled()


def _check_used(calls: CompiledCalls) -> None:
    if not calls.graphs:
        raise DeployError(
            "expected the task's forward to call the model itself, which is what is compiled; it called parts of it only. "
            "Use the target cpu-int8, or give the task a module whose forward is all that is served"
        )
