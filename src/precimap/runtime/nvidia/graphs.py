"""A model as CUDA graphs, one for each batch size it is given: no launches, no Python, between the ops of a call.

Invariant: a call computes on the smallest captured batch that holds its own, filled up with copies of its last unit, and
gives back the rows of its own. Copies, not zeros: every value in them is one that the model was given, so that ids stay
ids and a scale shared by the batch stays what it is. What depends on the batch in another way (batch norm in training,
a sum over units) is changed by them, as by any padding.

Works for deployed models as they are and for compiled ones. Not taken: `mode="reduce-overhead"` of torch.compile, which
captures a graph for every size that it meets, and none for an eager model.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from precimap.errors import DeployError, InputError, first_line

WARM_UP = 3  # calls before a capture, as torch's documentation of CUDA graphs asks for
Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Captured:
    """One graph. arguments: those of the capture; their tensors are written before `replay`. outputs: as the model gives
    them; their tensors are written by it."""

    arguments: Arguments
    outputs: Any
    replay: Callable[[], None]


class GraphedModel(nn.Module):
    """Calls of this module replay graphs. Not for several threads at once: they would share the graphs' buffers.

    names: of the arguments, where the examples have them; () for positional ones.
    """

    def __init__(self, model: nn.Module, graphs: Mapping[int, Captured], names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self._graphs = dict(sorted(graphs.items()))
        self._names = names

    @torch.no_grad()
    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the model, for arguments like those of the examples, in new tensors without gradients.

        Raises InputError for an empty batch, one larger than every graph, and arguments unlike the examples'.
        """
        if set(named) != set(self._names) or (self._names and arguments):
            how = f"the arguments {', '.join(self._names)} by name" if self._names else "positional arguments"
            raise InputError(f"expected {how} as in the examples, got {len(arguments)} positional and {sorted(named)}")
        arguments = tuple(named[name] for name in self._names) or arguments
        sizes = list(self._graphs)
        units = batch_size(arguments)
        if not 1 <= units <= sizes[-1]:
            raise InputError(f"expected a batch of 1 to {sizes[-1]} units, the largest that was captured, got {units}")
        size = sizes[bisect_left(sizes, units)]
        graph = self._graphs[size]
        _fill(graph.arguments, arguments, units)
        graph.replay()
        return _first(graph.outputs, units, size)


def graphed(model: nn.Module, *examples: Arguments | Mapping[str, Any] | Tensor) -> GraphedModel:
    """`model`, on a CUDA device, captured once for each example.

    examples: each a tuple of positional arguments, a mapping of named ones, or the only argument of a call; all in the same
    way. Every tensor argument has its units along its first dim, and so has every tensor of the result; other arguments stay
    as in the example. Raises InputError for examples that are otherwise, or of one size; DeployError without CUDA and
    for a model whose graph computes something else than the model, such as one that decides on the host.
    """
    given, names = _by_position(examples)
    call: Callable[..., Any] = partial(_named, model, names) if names else model
    sizes = [batch_size(example) for example in given]
    if not sizes or min(sizes) < 1 or len(set(sizes)) != len(sizes):
        raise InputError(f"expected examples of different batch sizes of at least 1, got {sizes}")
    graphs: dict[int, Captured] = {}
    pool: Any = None
    # The largest first: the others then find room in the memory that it leaves behind.
    for size, example in sorted(zip(sizes, given, strict=True), key=lambda pair: -pair[0]):
        graphs[size], pool = capture(call, example, pool)
        _first(graphs[size].outputs, 1, size)
        _check(call, graphs[size], example)
    return GraphedModel(model, graphs, names)


def _by_position(examples: Sequence[Arguments | Mapping[str, Any] | Tensor]) -> tuple[list[Arguments], tuple[str, ...]]:
    """The values of each example, and their names, if they have any. Raises InputError where examples name others."""
    named = [example for example in examples if isinstance(example, Mapping)]
    names = tuple(named[0]) if named else ()
    if named and any(not isinstance(e, Mapping) or set(e) != set(names) for e in examples):
        raise InputError(f"expected examples with the same arguments, here {', '.join(names)} by name, got others, too")
    if named:
        return [tuple(example[name] for name in names) for example in named], names
    return [(one,) if isinstance(one, Tensor) else tuple(one) for one in examples], ()


def _named(model: nn.Module, names: tuple[str, ...], *values: Any) -> Any:
    return model(**dict(zip(names, values, strict=True)))


def capture(model: Callable[..., Any], example: Arguments, pool: Any = None) -> tuple[Captured, Any]:
    """One call as a graph, and the pool of its memory; `pool` is that of a graph that is never replayed at the same time.

    Raises DeployError without CUDA, and for what cannot be captured.
    """
    if not torch.cuda.is_available():
        raise DeployError(f"expected a CUDA device to capture graphs on; torch {torch.__version__} finds none here")
    devices = {value.device for value in example if isinstance(value, Tensor)}
    if {device.type for device in devices} != {"cuda"} or len(devices) != 1:
        raise DeployError(f"expected tensors on one CUDA device, got {', '.join(map(str, devices)) or 'no tensor'}")
    try:
        with torch.no_grad(), torch.cuda.device(devices.pop()):
            return _captured(model, tree_map_only(Tensor, torch.clone, example), pool)
    except RuntimeError as error:
        raise DeployError(
            f"no CUDA graph can be captured of a call: part of it runs on the host, or waits for the device "
            f"({first_line(error)}); serve the model without graphs"
        ) from error


def _captured(model: Callable[..., Any], arguments: Arguments, pool: Any) -> tuple[Captured, Any]:
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            model(*arguments)
        with waiting_refused():
            model(*arguments)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = model(*arguments)
    return Captured(arguments, outputs, graph.replay), graph.pool()


@contextmanager
def waiting_refused() -> Iterator[None]:
    """In the block RuntimeError for an op that waits for the device. A capture would find it, too, and torch's allocator
    would then stay as if it were capturing (`CUDAGraph::capture_end` in its main branch)."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def batch_size(arguments: Arguments) -> int:
    """The units of a call. Raises InputError where tensors do not agree on them, or there are none."""
    found = {value.shape[0] if value.dim() else None for value in arguments if isinstance(value, Tensor)}
    if len(found) != 1 or None in found:
        raise InputError(
            "expected positional tensors whose first dim is the batch, of one size, got "
            + (", ".join(str(tuple(value.shape)) for value in arguments if isinstance(value, Tensor)) or "no tensor")
        )
    return int(found.pop() or 0)


def _fill(kept: Arguments, given: Arguments, units: int) -> None:
    """Write a call's tensors into those of the graph, the last unit again behind them."""
    if len(kept) != len(given):
        raise InputError(f"expected {len(kept)} positional arguments as in the examples, got {len(given)}")
    for slot, value in zip(kept, given, strict=True):
        if isinstance(slot, Tensor) != isinstance(value, Tensor) or (not isinstance(slot, Tensor) and slot != value):
            raise InputError(f"expected the arguments of the examples, {slot!r} among them, got {value!r}")
        if isinstance(slot, Tensor):
            if slot.shape[1:] != value.shape[1:] or slot.dtype != value.dtype:
                raise InputError(
                    f"expected units of shape {tuple(slot.shape[1:])} and {slot.dtype} as in the examples, got "
                    f"{tuple(value.shape[1:])} and {value.dtype}"
                )
            slot[:units].copy_(value)
            slot[units:].copy_(value[units - 1 : units].expand(slot[units:].shape))


def _first(outputs: Any, units: int, size: int) -> Any:
    """The first units of every tensor, in new memory: the next replay writes over that of the graph."""

    def rows(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size:
            raise InputError(
                f"expected results whose first dim is the batch of {size}, got one of shape {tuple(tensor.shape)}"
            )
        return tensor[:units].clone()

    return tree_map_only(Tensor, rows, outputs)


def _check(model: Callable[..., Any], graph: Captured, example: Arguments) -> None:
    """Compare the graph with the model on units that it was not captured with: the example's, in another order."""
    turned = tuple(value.roll(1, 0).flip(0) if isinstance(value, Tensor) else value for value in example)
    units = batch_size(turned)
    _fill(graph.arguments, turned, units)
    graph.replay()
    with torch.no_grad():
        found = difference(graph.outputs, model(*turned))
    if not found <= 2**-6:
        raise DeployError(
            f"the captured graph differs from the model by {found:.3g} of its largest output: part of it does "
            "not run on the device, or not from the inputs; capture what does, or use the model as it is"
        )


def difference(found: Any, expected: Any) -> float:
    """The largest of all tensors of two results, each over its largest expected value; NaN where only one has NaN."""
    largest = 0.0
    for one, other in zip(_tensors(found), _tensors(expected), strict=True):
        if not other.numel():
            continue
        wide, wanted = one.double(), other.double()
        apart = torch.where((wide == wanted) | (wide.isnan() & wanted.isnan()), 0.0, (wide - wanted).abs())
        worst = float(apart.max()) / max(float(wanted.nan_to_num(nan=0.0).abs().max()), 1e-30)
        if not worst <= largest:
            largest = worst
        if worst != worst:
            break
    return largest


def _tensors(outputs: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, outputs)
    return found
