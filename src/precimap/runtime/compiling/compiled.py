"""A model's calls through torch.compile, with its INT8 products in the generated code.

Invariant: every INT8 layer in a compiled graph is multiplied by oneDNN's INT8 product in the code for it, counted graph by
graph and not assumed: Inductor finds the product only with its weights frozen, and computes in base precision without a word
where it does not. Frozen weights cannot be changed afterwards; a deployed model's never are. Setting
`torch._inductor.config.freezing` for the process was not taken: it would freeze the user's other models too, so it is set
while a call of new shapes compiles, and the shapes that were met are remembered.
"""

import copy
import functools
import inspect
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from precimap.errors import DeployError
from precimap.layers.copying import shared_copy
from precimap.layers.quantized import QuantizedLayer
from precimap.runtime.compiling.attention import attention_pass
from precimap.runtime.compiling.counted import Products, counted
from precimap.runtime.compiling.inductor import rows_pass, sums_in_own_memory
from precimap.runtime.weights.low_weight import LowWeight

# Inductor computes what two products read in each of them again, if it reads only four tensors or fewer; where one of these
# is a gather, as after an embedding, that is done element by element and takes longer than the product.
SETTINGS = {"freezing": True, "realize_reads_threshold": 1}
NO_CACHE = {"fx_graph_cache": False}  # its products would not be counted
# Dynamo keeps code by class: forms of one model, and its shapes, are kept beside each other. At the usual 8 it stops
# compiling and runs eagerly without a word.
_LIMITS = {"recompile_limit": 4096, "accumulated_recompile_limit": 4096, "fail_on_recompile_limit_hit": True}
# Of this compiled function alone, where torch.compile takes it, also when nothing is to be compiled.
_OWN_LIMIT: dict[str, Any] = (
    {"recompile_limit": 4096} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


class _NotPrepared(Exception):
    """Dynamo compiles again, for something that `shapes` does not tell, without the settings.

    What comes before the first graph of its code has run by then, INT8 layers one by one; the rest is compiled as it should.
    """


class _Runs(threading.local):
    """Of pieces of code in this thread, whoever had them made: torch 2.11 may run those of another model of the class, which
    read the weights of this one."""

    count = 0


RUNS = _Runs()


class ServedCalls(ABC):
    """What stands for a model's own call. before: looks at each call before it is made."""

    def __init__(self) -> None:
        self.before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None] | None = None

    @property
    @abstractmethod
    def graphs(self) -> int:
        """How many pieces of code were made; 0 before the first call."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises DeployError where a compiler is at work around the call."""
        if torch.compiler.is_compiling():
            raise DeployError("this model is compiled already; give torch.compile and torch.export the deployed one")
        if self.before is not None:
            self.before(model, args, kwargs)


class CompiledCalls(ServedCalls):
    """What a call of `model` is, compiled by Inductor without gradients.

    dynamic: as of `torch.compile`. True makes one code for all sizes. None makes one for the sizes of the first call, in
    which an activation is part of an INT8 product, and variable ones from the second on.
    """

    def __init__(self, model: nn.Module, dynamic: bool | None) -> None:
        super().__init__()
        # Over the same parts, because the model's own __call__ may lead here. Compiling its `_call_impl`, as
        # nn.Module.compile does, keeps activations out of the products.
        self._run: Callable[..., Any] = torch.compile(
            copy.copy(model), backend=self._generate, dynamic=dynamic, **_OWN_LIMIT
        )
        self._prepared = threading.local()
        self._failed: str | None = None
        self._one_at_a_time = threading.Lock()
        self.model, self._met = model, set[object]()
        # For inputs with NaN or infinity, which a code cannot hold: compiled, a product makes plausible numbers of them.
        low = (p for p in model.parameters() if isinstance(p, LowWeight) and p.how.kernel.needs_frozen)
        self._eager = copy.copy(model) if next(low, None) is not None else None
        self._graphs, self._products = 0, Products()

    @property
    def graphs(self) -> int:
        return self._graphs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises DeployError when an INT8 layer is not in INT8 in the generated code."""
        self.look(self.model, args, kwargs)
        return self.computed(*args, **kwargs)

    def computed(self, *args: Any, **kwargs: Any) -> Any:
        """A call that nobody looks at. Raises DeployError as a call does."""
        if self._failed is not None:
            raise DeployError(self._failed)
        if self._eager is not None and _spoiled(args, kwargs):
            with torch.no_grad():
                return self._eager(*args, **kwargs)
        with torch.no_grad():
            shapes = self.shapes(args, kwargs)
            if shapes in self._met:
                try:
                    with _no_end_of_compiling():
                        return self._run(*args, **kwargs)
                except torch._dynamo.exc.BackendCompilerFailed as error:
                    if not isinstance(error.inner_exception, _NotPrepared):
                        raise
            result = self._compiling(*args, **kwargs)
        self._met.add(shapes)
        return result

    def _compiling(self, *args: Any, **kwargs: Any) -> Any:
        import torch._dynamo.config
        import torch._functorch.config
        import torch._inductor.config
        import torch.fx.experimental._config as shapes

        with ExitStack() as settings:
            settings.enter_context(self._one_at_a_time)
            self._products = Products()
            passes = {"pre_grad_custom_pass": attention_pass(), "joint_custom_post_pass": rows_pass()}
            settings.enter_context(torch._inductor.config.patch({**SETTINGS, **NO_CACHE, **passes}))
            settings.enter_context(sums_in_own_memory())
            settings.enter_context(torch._dynamo.config.patch(_LIMITS))
            # Code that an earlier process made is not traced again, and its products could not be counted.
            settings.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            # Or sizes that happen to be equal, as rows and a width, are taken for one size, which the weight then fixes.
            settings.enter_context(shapes.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            self._prepared.now = True
            settings.callback(delattr, self._prepared, "now")
            result = self._run(*args, **kwargs)
            if self._products.lost is not None:
                # The code is there, and further calls would run it.
                self._failed = f"{self._products.lost}; use the deployed model"
                raise DeployError(self._failed)
        return result

    def _generate(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """Inductor, with its INT8 products counted against the layers of the graph."""
        from torch._inductor.compile_fx import compile_fx

        if not hasattr(self._prepared, "now"):
            raise _NotPrepared
        with counted(self._products):
            code: Any = compile_fx(graph, inputs)
        self._graphs += 1

        def run(*given: Any) -> Any:
            RUNS.count += 1
            return code(*given)

        return run

    @staticmethod
    def shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> object:
        """What code is compiled for: shapes, strides and dtypes of all tensors, which of them are one, other values as they
        are, and what is set for torch."""
        leaves = tree_leaves((args, kwargs))
        places = {id(leaf): place for place, leaf in enumerate(reversed(leaves))}
        known = [
            (leaf.shape, leaf.stride(), leaf.dtype, places[id(leaf)])
            if isinstance(leaf, Tensor)
            else (type(leaf), repr(leaf))
            for leaf in leaves
        ]
        autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        return (torch.is_inference_mode_enabled(), torch.get_num_threads(), autocast, *known)


def _no_end_of_compiling() -> AbstractContextManager[None]:
    """Where torch.compile takes no limit of its own (2.11), that of the process, for as long as a call lasts."""
    if _OWN_LIMIT:
        return nullcontext()
    import torch._dynamo.config

    limits: AbstractContextManager[None] = torch._dynamo.config.patch(_LIMITS)
    return limits


def _spoiled(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the inputs hold NaN or infinity: their sum then is not finite, and rarely otherwise (it overflows)."""
    floats = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(not math.isfinite(float(leaf.sum())) for leaf in floats)


class CompiledModel(nn.Module):
    """Calls of this module are compiled calls of `model`. Its other methods and attributes are not reached."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._calls = CompiledCalls(model, dynamic=None)
        if "precimap" in vars(model):  # what a deployed model carries
            object.__setattr__(self, "precimap", vars(model)["precimap"])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._calls(*args, **kwargs)


def compile_calls(model: nn.Module) -> CompiledCalls:
    """Let calls of `model` itself, and not of its parts, be compiled for all sizes, in evaluation mode.

    Its parts stay as they are; attributes of its own that are set later are not seen by compiled calls.

    All sizes in one code, because batches vary, and because Inductor takes MKL's float32 product for fixed ones: on an
    AMD CPU that takes twice the time of oneDNN's (docs/log.md), and is no base to be measured against. Raises DeployError
    without a compiler.
    """
    reason = no_compiler()
    if reason is not None:
        raise DeployError(reason)
    calls = CompiledCalls(model.eval(), dynamic=True)
    model._compiled_call_impl = calls
    return calls


def compile_part(module: nn.Module) -> None:
    """`compile_calls` for the time of one layer: inputs are looked at for NaN once in a call of a model, not by layers."""
    compile_calls(module)._eager = None


def compile(deployed: nn.Module, *examples: tuple[Any, ...] | Mapping[str, Any] | Tensor) -> nn.Module:
    """`deployed` compiled by Inductor for the shapes of the examples.

    examples: each a tuple of positional arguments, a mapping of named ones, or the only argument of a call.
    Compiles now, with a C++ compiler of this machine; a call with other shapes later compiles when it comes. An activation
    that follows a layer and the codes of the next are computed inside the product, whose sums may round to another code
    now and then; attention in BF16 is products where those are faster (`attention`), its scores in BF16. Search with the
    target `cpu-int8-compiled` to have a compiled form certified. The result carries the deployed model's `precimap` and
    does not warn of batch sizes.
    Raises DeployError when a layer is not in INT8 in the generated code.
    """
    model = CompiledModel(deployed)
    for example in examples:
        if isinstance(example, Mapping):
            model(**example)
        else:
            model(*((example,) if isinstance(example, Tensor) else example))
    return model


compiled = compile  # its name until 0.2
EAGER, COMPILED, GRAPHS = "eager", "compiled", "graphs"  # the forms that a model is served in


def check_compiled(model: nn.Module) -> None:
    """Raises DeployError for compiled calls that were never made: a forward that calls parts of the model only."""
    calls = model._compiled_call_impl
    if isinstance(calls, ServedCalls) and not calls.graphs:
        raise DeployError(
            "expected the task's forward to call the model itself, which is what is compiled; it called parts of it "
            "only. Use an eager target, or give the task a module whose forward is all that is served"
        )


def forms_of(
    deployed: Callable[[nn.Module, Mapping[str, QuantizedLayer]], nn.Module],
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
) -> Mapping[str, Callable[[], nn.Module]]:
    """What `WholeTimer.forms` gives where `deployed` puts layers in low precision: as it is, and with compiled calls."""

    def eager() -> nn.Module:
        return deployed(model, layers) if layers else shared_copy(model)

    def compiled_too() -> nn.Module:
        made = eager()
        compile_calls(made)
        return made

    return {EAGER: eager, COMPILED: compiled_too}


@functools.cache
def no_compiler() -> str | None:
    """Why nothing can be compiled here, or None."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler on this machine; install g++, or serve without compiling"
    return None
