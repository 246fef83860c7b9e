"""Calls of a model as CUDA graphs of its compiled calls, one for each set of shapes: the form `graphs` of the target `cuda`.

Invariant: what is replayed is the code of the compiled form on inputs that are copied in, and results are copied out; and a
graph gives nothing out before it was compared with the compiled call, on what it was captured with and on the first inputs
that differ from that. What a graph would not do again is refused when it is captured: code that runs on the host between
pieces compiled apart, writes into buffers, values that cannot be looked into. Shapes are taken exactly and not padded, for
only the user knows which dim is the batch; `graphed` pads. Not taken: torch.compile(mode="reduce-overhead"), which goes on
without a graph where it meets one of these, and whose results the next call overwrites.
"""

import copy
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from precimap.errors import DeployError
from precimap.runtime.compiling.compiled import RUNS, CompiledCalls, ServedCalls, compile_calls
from precimap.runtime.nvidia.graphs import Captured, capture, difference

MOST_SHAPES = 16  # graphs of one model: each holds its inputs and results
TOLERANCE = 2.0**-6  # of the largest result, between a replay and the same code launched op by op
_INSTEAD = "serve it in the form compiled"
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class GraphCalls(ServedCalls):
    """What a call of a model is. One call at a time, and all on one stream: the graphs share their memory."""

    def __init__(self, compiled: CompiledCalls) -> None:
        super().__init__()
        self._compiled = compiled
        self._graphs: dict[object, _Graph] = {}
        self._pool: Any = None
        self._one_at_a_time = threading.Lock()

    @property
    def graphs(self) -> int:
        """How many were captured."""
        return len(self._graphs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raises DeployError for what no graph can be made of, and for one that computes something else than the model."""
        self.look(self._compiled.model, args, kwargs)
        leaves, tree = tree_flatten((args, kwargs))
        _check_plain(leaves, "arguments")
        with torch.no_grad(), self._one_at_a_time:
            key = self._compiled.shapes(args, kwargs), tuple(v.device for v in leaves if isinstance(v, Tensor))
            graph = self._graphs.get(key)
            if graph is None:
                if len(self._graphs) == MOST_SHAPES:
                    raise DeployError(
                        f"expected calls of at most {MOST_SHAPES} different shapes, for each has a CUDA graph of its own; "
                        f"this is one more: {_said(leaves)}. Give the batches in fewer sizes, or {_INSTEAD}"
                    )
                graph = self._captured(leaves, tree)
                self._graphs[key] = graph
            return graph.results(leaves)

    def _captured(self, leaves: list[Any], tree: TreeSpec) -> "_Graph":
        call, model = partial(_called, self._compiled, tree), self._compiled.model
        before = {name: value.clone() for name, value in model.named_buffers()}
        call(*leaves)  # compiles
        runs = RUNS.count
        expected = call(*leaves)
        _check_plain(tree_flatten(expected)[0], "results")
        pieces = RUNS.count - runs
        if pieces != 1:
            raise DeployError(
                f"expected a model that is compiled in one piece, got {pieces}: what runs on the host between pieces would "
                f"be in no CUDA graph; {_INSTEAD}"
            )
        written = [name for name, value in model.named_buffers() if not _same(value, before[name])]
        if written:
            raise DeployError(
                f"a call writes into {', '.join(written)}, and capturing a CUDA graph makes calls of its own; {_INSTEAD}"
            )
        made, self._pool = capture(call, tuple(leaves), self._pool)
        graph = _Graph(made, call)
        graph.check(expected)
        return graph


class _Graph:
    """One graph, and the compiled call that it was captured from, until it was compared on other inputs."""

    def __init__(self, captured: Captured, call: partial[Any]) -> None:
        self._captured = captured
        self._call: partial[Any] | None = call

    def results(self, leaves: list[Any]) -> Any:
        """Of these leaves of the arguments, in new tensors."""
        slots = self._captured.arguments
        pairs = [pair for pair in zip(slots, leaves, strict=True) if isinstance(pair[0], Tensor)]
        unseen = self._call is not None and not all(_same(slot, value) for slot, value in pairs)
        for slot, value in pairs:
            slot.copy_(value)
        if unseen:
            assert self._call is not None
            self.check(self._call(*leaves))
            self._call = None
        else:
            self._captured.replay()
        return tree_map_only(Tensor, torch.clone, self._captured.outputs)

    def check(self, expected: Any) -> None:
        """Replay, and compare. Raises DeployError where the results differ."""
        self._captured.replay()
        found = difference(self._captured.outputs, expected)
        if not found <= TOLERANCE:
            raise DeployError(
                f"the captured CUDA graph differs from the model by {found:.3g} of its largest result: part of it does not "
                f"run on the device, or not from the arguments; {_INSTEAD}"
            )


def graph_calls(model: nn.Module) -> GraphCalls:
    """Let calls of `model` itself, and not of its parts, be replays of graphs of its compiled calls.

    Raises DeployError without a compiler.
    """
    calls = GraphCalls(compile_calls(model))
    model._compiled_call_impl = calls
    return calls


def beside(model: nn.Module) -> nn.Module:
    """A model over the same parts and the same code as `model`, whose calls are compiled, as replays of graphs."""
    compiled = model._compiled_call_impl
    assert isinstance(compiled, CompiledCalls)
    made = copy.copy(model)
    made._compiled_call_impl = GraphCalls(compiled)
    return made


def _called(compiled: CompiledCalls, tree: TreeSpec, *leaves: Any) -> Any:
    args, kwargs = tree_unflatten(leaves, tree)
    return compiled.computed(*args, **kwargs)


def _check_plain(leaves: Sequence[Any], what: str) -> None:
    """Raises DeployError for a value whose tensors would not be seen, or have no memory to copy into."""
    for leaf in leaves:
        plain = (
            leaf.layout == torch.strided and not leaf.is_nested
            if isinstance(leaf, Tensor)
            else isinstance(leaf, _PLAIN)
        )
        if not plain:
            kind = f"{leaf.layout} tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise DeployError(
                f"expected {what} that are tensors, numbers or texts, in lists, tuples and dicts, got a {kind}, which a "
                f"CUDA graph cannot be given; {_INSTEAD}"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _said(leaves: Sequence[Any]) -> str:
    return ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf)[:40] for leaf in leaves)
