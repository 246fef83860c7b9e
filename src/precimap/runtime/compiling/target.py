"""The targets `cpu-int8-compiled`, `cuda-fp8-compiled` and `cuda-fp8-graphs`: the layers of the eager ones, in a model that
Inductor compiles, and whose compiled calls are CUDA graphs.

Invariant: what is timed as a whole, and what is certified, is the model in the form that is served; its baseline is the
model as given. Layers are timed compiled, on a GPU as graphs in any case.

Targets of their own and not a switch, because their sums round otherwise and their times are others: a map,
a profile and a certificate belong to one form.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import Hardware
from precimap.numerics.schemes import Scheme
from precimap.runtime.compiling.compiled import (
    COMPILED,
    EAGER,
    GRAPHS,
    ServedCalls,
    check_compiled,
    compile_calls,
    compile_part,
    no_compiler,
)
from precimap.runtime.nvidia.graph_calls import graph_calls
from precimap.runtime.nvidia.layer_timer import CudaTimer
from precimap.runtime.nvidia.target import CUDA_FP8, EXPERIMENTAL, CudaFp8
from precimap.runtime.nvidia.whole_timer import CudaWholeTimer
from precimap.runtime.x86.layer_timer import CpuTimer
from precimap.runtime.x86.target import CPU_INT8, CpuInt8
from precimap.runtime.x86.whole_timer import CpuWholeTimer


@dataclass(frozen=True, slots=True)
class CompiledTarget:
    """eager: the target whose layers it compiles. form: as it is called; serve: lets calls of a model be served in it."""

    eager: CpuInt8 | CudaFp8
    claim: str
    form: str = COMPILED
    serve: Callable[[nn.Module], ServedCalls] = compile_calls

    @property
    def name(self) -> str:
        return f"{self.eager.name}-{self.form}"

    @property
    def timer(self) -> CpuTimer | CudaTimer | None:
        """Times a module compiled against what takes its place, compiled, too."""
        return replace(self.eager.timer, serve=compile_part)

    @property
    def whole_timer(self) -> CpuWholeTimer | CudaWholeTimer | None:
        return replace(self.eager.whole_timer, served=self.form)

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return self.eager.refusal(layer, scheme) or self._not_lowered(layer, scheme) or no_compiler()

    def _not_lowered(self, layer: Layer, scheme: Scheme) -> str | None:
        if isinstance(self.eager, CpuInt8) and scheme.needs_calibration and layer.calls > 1:
            return f"called {layer.calls} times: Inductor lowers no INT8 layer that one graph calls on several inputs"
        return None

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        """Raises DeployError at its end when nothing was compiled: a forward that calls parts of the model only."""
        deployed = self.deployed(model, layers)
        yield deployed
        check_compiled(deployed)

    def deployed(self, model: nn.Module, layers: Mapping[str, QuantizedLayer], *, owned: bool = False) -> nn.Module:
        """As the eager target's; calls of the model compile when new shapes come, and are captured where graphs are served.

        Raises DeployError without a compiler.
        """
        made = self.eager.deployed(model, layers, owned=owned)
        self.serve(made)
        return made


CPU_INT8_COMPILED = CompiledTarget(
    CPU_INT8, "Measured on the deployed model as Inductor compiles it for this CPU, not on its emulation."
)
CUDA_FP8_COMPILED = CompiledTarget(
    CUDA_FP8, f"Measured on the deployed model as Inductor compiles it for this GPU ({EXPERIMENTAL})."
)
CUDA_FP8_GRAPHS = CompiledTarget(
    CUDA_FP8,
    f"Measured on the deployed model as CUDA graphs of what Inductor compiles for this GPU ({EXPERIMENTAL}).",
    form=GRAPHS,
    serve=graph_calls,
)
CPU = Hardware("cpu", {EAGER: CPU_INT8, COMPILED: CPU_INT8_COMPILED})
CUDA = Hardware("cuda", {EAGER: CUDA_FP8, COMPILED: CUDA_FP8_COMPILED, GRAPHS: CUDA_FP8_GRAPHS})
