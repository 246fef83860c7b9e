"""What quantising each layer would change, to first order: local errors of every call, and the gradient that meets them.

One forward pass keeps, for each call of each layer and scheme, the local error Q(op)(x) - op(x); a backward pass brings
the gradient g of some sum over rows; <g, error> taken row by row is the change of each row. So one backward serves all
layers and schemes. Invariant: the model's own results are those of a plain pass, no parameter gets a gradient, and a
tensor that a row shares with another row is never split between them: how rows lie in a tensor is found by weighing
rows, not guessed from shapes. Quantising layers one at a time, the alternative, costs a pass for each.

With `joint`, the pass runs at the jointly quantised point: each of those layers returns its emulated result and lets the
gradient through as the original op would (straight-through; Bengio et al. 2013).
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from precimap.errors import FAILURES
from precimap.layers.code_products import Operand
from precimap.layers.emulation import SharedInputs, emulate
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.quantized import QuantizedLayer

SchemeName = str
_CUTS = (Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a batch lie in a tensor: along `dim`, in runs (`adjacent`) or interleaved."""

    dim: int
    adjacent: bool

    def fits(self, tensor: Tensor, count: int) -> bool:
        """Whether the dim is there and holds a whole number of values for each row."""
        return tensor.dim() > self.dim and tensor.shape[self.dim] % count == 0 and tensor.numel() > 0

    def rows(self, tensor: Tensor, count: int) -> Tensor:
        """The tensor as float32 [count, values of one row]."""
        front = tensor.movedim(self.dim, 0)
        each = front.shape[0] // count
        split = front.reshape(count, each, -1) if self.adjacent else front.reshape(each, count, -1).transpose(0, 1)
        return split.reshape(count, -1).float()


@dataclass(slots=True)
class Tapped:
    """One call of a layer: its local errors, and the gradient that came back (None before, or when none arrives)."""

    layer: str
    number: int  # of this call among the layer's calls in one pass
    errors: dict[SchemeName, Tensor]
    gradient: Tensor | None = None


class _Tap(torch.autograd.Function):
    """Identity; its backward hands the gradient over. `zero` makes the output require a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, zero: Tensor, tapped: Tapped) -> Tensor:
        ctx.tapped = tapped
        return output.clone()  # not a view of it: the model may change its result in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        ctx.tapped.gradient = gradients[0]
        return gradients[0], gradients[0].new_zeros((), dtype=torch.float32), None


class FirstOrder(Interception):
    """Runs a model with gradients and keeps the local error of each call.

    weights: name -> parameter. layers: layer -> scheme -> its codes. operands: (layer, scheme) -> its weight,
    as values or codes. joint: layer -> scheme in which it is to run during the pass. buffers: the model's, which a
    forward may write to. Gradients flow although the caller's own code says no_grad or inference_mode; what it says is
    in force again afterwards. `cuts` are the results that the caller's code took out of the graph: what comes before them
    may change more than its gradient says.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layers: Mapping[str, Mapping[SchemeName, QuantizedLayer]],
        operands: Mapping[tuple[str, SchemeName], Operand],
        joint: Mapping[str, SchemeName],
        buffers: Iterable[Tensor] = (),
    ) -> None:
        super().__init__({name: weights[name] for name in layers})
        self.taps: list[Tapped] = []
        self.cuts: list[Tensor] = []
        self.zero = torch.zeros((), dtype=torch.float32, requires_grad=True, device=next(iter(weights.values())).device)
        self._layers = layers
        self._operands = operands
        self._joint = joint
        self._buffers = tuple(buffers)
        self._inputs: dict[SchemeName, SharedInputs] = {}
        self._calls: dict[str, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None  # gradients stay on, whatever the user's forward says
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False), torch.enable_grad():
                args, kwargs = tree_map(_usable, (args, kwargs or {}))
                return super().__torch_function__(func, types, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for buffer in self._buffers:
            if buffer.grad_fn is not None:
                buffer.detach_()  # written to by the forward: without this it would keep this pass's graph

    def on_other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moving = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.grad_fn]
        if moving and func in _CUTS:
            self.cuts.append(moving[0].view_as(moving[0]))
        # What parameters alone would require needs no graph, and torch may choose another kernel where there is one.
        with nullcontext() if moving else torch.no_grad():
            return super().on_other(func, args, kwargs)

    def on_weight(self, call: WeightCall) -> Any:
        name = call.view.name
        # `matmul` computes in another way when its weight requires a gradient; elsewhere it would only take memory.
        weight = call.weight if call.op.name == "matmul" else call.weight.detach()
        output = call.run_with(weight, call.input)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return call.written(output)
        errors: dict[SchemeName, Tensor] = {}
        with torch.no_grad():
            for scheme, layer in self._layers[name].items():
                inputs = self._inputs.setdefault(scheme, SharedInputs())
                try:
                    low = emulate(call, layer, self._operands[name, scheme], inputs)
                    errors[scheme] = low.float() - output.float()
                except FAILURES:
                    if self._joint.get(name) == scheme:
                        raise
                    # NaN is no prediction: the layer is then probed, and the probe says what is wrong.
                    errors[scheme] = torch.full_like(output, torch.nan, dtype=torch.float32)
        if name in self._joint:
            output = output + errors[self._joint[name]].to(output.dtype)
        number = self._calls.get(name, 0)
        self._calls[name] = number + 1
        self.taps.append(Tapped(name, number, errors))
        tapped: Tensor = _Tap.apply(output, self.zero, self.taps[-1])  # type: ignore[no-untyped-call]
        return call.written(tapped)

    def backward(self, total: Tensor) -> None:
        """Bring the gradient of the scalar `total` to every tap that it depends on; parameters get none.

        Raises RuntimeError when `total` does not depend on any tap.
        """
        for tapped in self.taps:
            tapped.gradient = None
        torch.autograd.grad(total, [self.zero], retain_graph=True)

    def before_cuts(self) -> frozenset[str]:
        """The layers on which a result depends that the caller's code took out of the graph."""
        found: set[str] = set()
        for cut in self.cuts:
            self.backward(cut.float().sum())
            found.update(tapped.layer for tapped in self.taps if tapped.gradient is not None)
        return frozenset(found)

    def clear(self) -> None:
        """Let go of a batch: its graph and its errors."""
        self.taps = []
        self.cuts = []
        self._inputs = {}
        self._calls = {}

    @property
    def held_bytes(self) -> int:
        """Bytes of the local errors that are held now."""
        return sum(e.numel() * e.element_size() for tapped in self.taps for e in tapped.errors.values())


def _usable(value: Any) -> Any:
    """A tensor made under inference mode cannot be saved for a backward pass; its clone can."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def row_changes(tapped: Tapped, layout: Layout, rows: int) -> dict[SchemeName, Tensor]:
    """<gradient, local error> of each row, float64 [rows] on the CPU, for each scheme.

    Zero when no gradient arrived; NaN when the result does not have the layout in this batch.
    """
    if tapped.gradient is None:
        return {scheme: torch.zeros(rows, dtype=torch.float64) for scheme in tapped.errors}
    if not layout.fits(tapped.gradient, rows):
        return {scheme: torch.full((rows,), torch.nan, dtype=torch.float64) for scheme in tapped.errors}
    gradient = layout.rows(tapped.gradient, rows)
    return {
        scheme: torch.linalg.vecdot(gradient, layout.rows(error, rows)).double().cpu()
        for scheme, error in tapped.errors.items()
    }


def find_layout(plain: Tensor, weighed: Tensor, weights: Tensor) -> Layout | None:
    """How rows lie in a tensor, from its gradients of a plain sum over rows and of a weighed one; None if rows mix.

    In the right layout each row of `weighed` is that of `plain` times the row's weight (float32 [rows]). The tolerance
    is far below the spread of the weights and far above the rounding of a BF16 backward pass. None for a gradient of
    zeros, which fits every layout.
    """
    count = len(weights)
    if not plain.any():
        return None
    for dim in range(plain.dim()):
        for layout in (Layout(dim, True), Layout(dim, False)):
            if not layout.fits(plain, count):
                continue
            expected = layout.rows(plain, count) * weights[:, None]
            found = layout.rows(weighed, count)
            if float((found - expected).norm()) <= 0.05 * float(found.norm()):
                return layout
    return None


def row_weights(count: int) -> Tensor:
    """One weight for each row, evenly spaced from 0.5 to 2 in a fixed random order: a row is known by its weight."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return 0.5 + 1.5 * order.float() / max(1, count - 1)


def routed_rows(plain: Tensor, weighed: Tensor, weights: Tensor) -> Tensor | None:
    """The row to which each line of a tensor belongs, where lines were gathered in an order of their own (experts).

    A line is all values but those of the last dim. Its gradient under the weighed sum is its plain gradient times the
    weight of its row, and the weight names the row. int64 [lines]; -1 for a line without a gradient. None where a line
    mixes rows, or where the rounding of the backward pass is too coarse to tell the weights apart.
    """
    count = len(weights)
    if plain.dim() < 2 or not plain.numel():
        return None
    lines, found = (t.reshape(-1, t.shape[-1]).float() for t in (plain, weighed))
    square = torch.linalg.vecdot(lines, lines)
    moving = square > 1e-12 * square.max()
    ratio = torch.linalg.vecdot(found, lines) / torch.where(moving, square, 1.0)
    off = (found - ratio[:, None] * lines).norm(dim=1) > 0.05 * found.norm(dim=1)
    place = (ratio - 0.5) / 1.5 * max(1, count - 1)
    nearest = place.round()
    doubtful = off | ((place - nearest).abs() > 0.25) | (nearest < 0) | (nearest >= count)
    if not moving.any() or bool((doubtful & moving).any()):
        return None
    row_at = weights.argsort()
    return torch.where(moving, row_at[nearest.clamp(0, count - 1).long()], -1)


def routed_changes(tapped: Tapped, rows: Tensor, count: int) -> dict[SchemeName, Tensor]:
    """As `row_changes`, for lines that belong to `rows` (int64 [lines], -1 for none)."""
    assert tapped.gradient is not None
    lines = tapped.gradient.reshape(len(rows), -1).float()
    belongs = rows >= 0
    changes = {}
    for scheme, error in tapped.errors.items():
        each = torch.linalg.vecdot(lines, error.reshape(len(rows), -1)).double()
        total = torch.zeros(count, dtype=torch.float64, device=each.device)
        changes[scheme] = total.index_add_(0, rows[belongs], each[belongs]).cpu()
    return changes
