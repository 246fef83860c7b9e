"""How a search split is screened: which rows are looked at, where they lie in each call's result, and what it takes.

Invariant: nothing is assumed of a model's shapes. Two backward passes of one batch, one with the rows weighed, show where
each row lies in each result; a layer whose result mixes rows is left out with the reason. It is the largest batch: there
memory is measured before the split is run, and one row or one token alone would fit every layout.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precimap.layers.code_products import Operand
from precimap.layers.emulation import operand
from precimap.layers.first_order import FirstOrder, Layout, find_layout, routed_rows, row_weights
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import scheme_key
from precimap.searching.pairs import Key, Pair
from precimap.searching.subject import Subject
from precimap.task import Task, to_device

MOST_HEADS = 8  # each takes a backward pass of its own


class Differentiated(StrEnum):
    """What the backward passes start from.

    SCORES: the sum of all scores, one pass, where each score has a row of its own in every result (one score per unit,
    or candidates that are scored one by one). HEADS: each column of scores, one pass each, where the few scores of a unit
    share its row (several tasks). LOSSES: the units' losses, one pass, where many scores share it.
    """

    SCORES = "scores"
    HEADS = "heads"
    LOSSES = "losses"

    def values(self, task: Task, scores: Tensor, batch: Any) -> tuple[Tensor, ...]:
        """For each backward pass the values whose sum it differentiates, one of each row: float32 [rows]."""
        match self:
            case Differentiated.SCORES:
                return (scores.flatten().float(),)
            case Differentiated.HEADS:
                return scores.float().unbind(1)
            case Differentiated.LOSSES:
                return (task.loss(scores, batch).float(),)


def located(values: Sequence[Tensor]) -> Tensor:
    """One number of each row, [rows], through which all of `values` say where rows lie.

    Each counts differently: the heads of a softmax sum to one, and a sum without a gradient shows nothing.
    """
    first, *others = values
    return sum((number * value for number, value in enumerate(others, 2)), start=first)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScreenPlan:
    """How the split is screened, found on its largest batch. passes: the pairs that go through the model together.

    layouts: of each call of a layer. routed: layers that gather rows in an order of their own, found anew in each batch.
    digest: of what a row of the table stands for.
    """

    what: Differentiated
    rows: Mapping[Key, int]
    layouts: Mapping[tuple[str, int], Layout]
    routed: frozenset[str]
    unseen: Mapping[str, str]
    passes: tuple[tuple[QuantizedLayer, ...], ...]
    bytes: int
    digest: str

    @property
    def by_scores(self) -> bool:
        """Whether the table holds the changes of scores."""
        return self.what is not Differentiated.LOSSES


def plan_screen(subject: Subject, pairs: Sequence[Pair], memory: int) -> ScreenPlan:
    """Look at the largest batch of the search split. A plan without passes has every layer in `unseen`."""
    task, layers = subject.task, subject.codes(pairs)
    batch = to_device(max(task.splits.search, key=_bytes), task.device)
    together = (layers,) if layers else ()
    apart = tuple(
        tuple(layer for layer in layers if layer.scheme.name == name)
        for name in dict.fromkeys(scheme.name for _, scheme in pairs)
    )
    need, reason = 0, "no layer is eligible"
    for passes in (together, apart) if len(apart) > 1 else (together,) if layers else ():
        try:
            found = [_explore(task, one, batch) for one in passes]
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = f"the scores carry no gradient here ({_first_line(error)})"
            break
        need = max(one.bytes for one in found)
        if need <= memory and len({one.what for one in found}) == 1:
            return _fitting(layers, passes, found, need)
        reason = f"a batch would take {need >> 20} MB, more than the {memory >> 20} MB it may; give smaller batches"
    return ScreenPlan(
        what=Differentiated.LOSSES,
        rows={},
        layouts={},
        routed=frozenset(),
        unseen={name: reason for name, _ in pairs},
        passes=(),
        bytes=need,
        digest="",
    )


def _fitting(
    layers: Sequence[QuantizedLayer],
    passes: Sequence[Sequence[QuantizedLayer]],
    found: Sequence["_Explored"],
    need: int,
) -> ScreenPlan:
    layouts = {key: layout for one in found for key, layout in one.layouts.items()}
    routed = frozenset(name for one in found for name in one.routed)
    seen = {name for name, _ in layouts} | routed
    reasons = {name: why for one in found for name, why in one.unseen.items()}
    unseen = {layer.name: reasons.get(layer.name, "it was not called") for layer in layers if layer.name not in seen}
    kept = [tuple(layer for layer in one if layer.name in seen) for one in passes]
    order = [layer for one in kept for layer in one]
    rows = {(layer.name, layer.scheme.name): row for row, layer in enumerate(order)}
    # The order of the rows depends on how many schemes fit into memory: tables of another order are other tables.
    what = found[0].what
    said = [what is not Differentiated.LOSSES, [[layer.name, scheme_key(layer.scheme)] for layer in order]]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return ScreenPlan(
        what=what,
        rows=rows,
        layouts=layouts,
        routed=routed,
        unseen=unseen,
        passes=tuple(one for one in kept if one),
        bytes=need,
        digest=digest,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Explored:
    what: Differentiated
    layouts: Mapping[tuple[str, int], Layout]
    routed: frozenset[str]
    unseen: Mapping[str, str]
    bytes: int


def _explore(task: Task, layers: Sequence[QuantizedLayer], batch: Any) -> _Explored:
    """Find the rows in every call's result on one batch: in the first way to differentiate in which no result mixes them.

    Raises RuntimeError when there is no gradient.
    """
    mode = first_order(task, layers, decode(layers), {})
    saved = _SavedBytes()
    with torch.enable_grad():
        with saved, mode:
            scores = task.forward(task.model, batch)
        held = mode.held_bytes + saved.bytes + _decoded_bytes(layers)
        for what in _ways(mode, scores):
            found = _found_rows(mode, located(what.values(task, scores, batch)))
            if not found.unseen or scores.numel() == scores.shape[0]:
                break
        cut = mode.before_cuts() - set(found.unseen)
    mode.clear()
    unseen = found.unseen | dict.fromkeys(sorted(cut), "detach() hides a part of what it does")
    layouts = {key: layout for key, layout in found.layouts.items() if key[0] not in unseen}
    return _Explored(what=what, layouts=layouts, routed=found.routed - set(unseen), unseen=unseen, bytes=held)


def _ways(mode: FirstOrder, scores: Tensor) -> Iterator[Differentiated]:
    """From the most to the least that is told, as far as the shapes allow; the last sees as much as can be seen."""
    if scores.numel() == scores.shape[0] or _holds_rows(mode, scores.numel()):
        yield Differentiated.SCORES
    if scores.dim() == 2 and scores.shape[1] <= MOST_HEADS:
        yield Differentiated.HEADS
    else:
        yield Differentiated.LOSSES


def _holds_rows(mode: FirstOrder, count: int) -> bool:
    """Whether every result has a dim in which that many rows can lie: a look at shapes, before any backward pass."""
    errors = [error for tapped in mode.taps for error in tapped.errors.values()]
    return all(any(Layout(dim, True).fits(error, count) for dim in range(error.dim())) for error in errors)


@dataclass(slots=True)
class _Found:
    layouts: dict[tuple[str, int], Layout] = field(default_factory=dict)
    routed: frozenset[str] = frozenset()
    unseen: dict[str, str] = field(default_factory=dict)


def _found_rows(mode: FirstOrder, rows: Tensor) -> _Found:
    """Where these rows lie in the result of each call; a layer of which one call mixes them is `unseen`."""
    weights = row_weights(len(rows)).to(rows.device)
    mode.backward(rows.sum())
    plain = [tapped.gradient for tapped in mode.taps]
    mode.backward((rows * weights).sum())
    found, irregular = _Found(), set[str]()
    for tapped, gradient in zip(mode.taps, plain, strict=True):
        if not any(error.numel() for error in tapped.errors.values()):
            irregular.add(tapped.layer)  # an expert without tokens
            continue
        if gradient is None or tapped.gradient is None or not gradient.any():
            found.unseen[tapped.layer] = "no gradient reaches its result"
            continue
        layout = find_layout(gradient.float(), tapped.gradient.float(), weights)
        if layout is not None:
            found.layouts[tapped.layer, tapped.number] = layout
            continue
        irregular.add(tapped.layer)
        if routed_rows(gradient, tapped.gradient, weights) is None:
            found.unseen[tapped.layer] = "its result has no dim along which the units lie"
    found.routed = frozenset(irregular - set(found.unseen))
    left_out = irregular | set(found.unseen)
    found.layouts = {key: layout for key, layout in found.layouts.items() if key[0] not in left_out}
    return found


def decode(layers: Sequence[QuantizedLayer]) -> dict[Key, Operand]:
    """The weights as the emulation multiplies them."""
    return {(layer.name, layer.scheme.name): operand(layer) for layer in layers}


def first_order(
    task: Task, layers: Sequence[QuantizedLayer], decoded: Mapping[Key, Operand], joint: Mapping[str, str]
) -> FirstOrder:
    """The interception that collects local errors of `layers`; those in `joint` run in their scheme."""
    by_name: dict[str, dict[str, QuantizedLayer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, {})[layer.scheme.name] = layer
    return FirstOrder(parameter_names(task.model), by_name, decoded, joint, task.model.buffers())


def _bytes(batch: Any) -> int:
    """Of the tensors in a batch; 0 where it keeps them in objects of its own, so that the first of such batches wins."""
    tensors = (value for value in tree_leaves(batch) if isinstance(value, Tensor))
    return sum(value.numel() * value.element_size() for value in tensors)  # a sparse one has no nbytes


def _decoded_bytes(layers: Sequence[QuantizedLayer]) -> int:
    return sum(4 * layer.codes.numel() for layer in layers)


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd keeps for the backward pass, each storage once.

    Torch does not look at what its hooks hand back, so a tensor that was changed in place since is refused here, as
    torch refuses it without hooks.
    """

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        self._seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor, tensor._version

    @property
    def bytes(self) -> int:
        return sum(self._seen.values())


def _unpack(saved: tuple[Tensor, int]) -> Tensor:
    tensor, version = saved
    if tensor._version != version:
        raise RuntimeError("a tensor that its gradient needs is changed in place")
    return tensor


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
