"""What discovery found in a model: every parameter, accounted for.

Invariant: each parameter of the model is in exactly one place: a `Layer`, or an `OtherParameter` with the reason why
precision is not chosen for it. Torch-free, so that planning can be tested on invented inventories.
"""

import math
from dataclasses import dataclass
from functools import cached_property

# Calls that take a weight [E, .., ..] for E of them.
STACKING = frozenset({"bmm", "baddbmm", "_grouped_mm", "grouped_mm"})


@dataclass(frozen=True, slots=True)
class Read:
    """One call that reads a weight. input: shape of the other operand (of the ids, for a lookup). rows: of the result, where
    a row is what one weight [N, K] makes, or one lookup."""

    input: tuple[int, ...]
    rows: int
    lookup: bool = False

    @property
    def each(self) -> int:
        """Of a lookup in bags: about how many ids a bag holds."""
        return max(1, round(math.prod(self.input) / self.rows)) if self.rows else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A weight parameter and the op it feeds.

    contracted: the parameter's dims that the op sums over (None if its calls differ); the others index outputs.
    inputs, outputs: widths of one product (None for lookups and where the layout is not known).
    flops: of the discovery batch, over all calls; of a layer that only later batches reach, their mean for as many units.
    siblings: name of the group that reads the same input (may share its
    quantised form). fused: name of the group that engines run as one (must share a scheme).
    normalised: a lookup writes its rows as it reads them (max_norm).
    in_linear_module: it is only read by calls of the nn.Linear that owns it, so that a module swap serves it.
    not_packed: why no module of packed rows can take the place of the table's own; None when one can.
    also_read_by: other calls that read the weight and contract nothing. dead: why it cannot matter, or None.
    module: the nn.Linear, nn.Embedding or nn.EmbeddingBag that alone reads the weight, as torch prints it; or None.
    reads: its calls, in their order.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    element_bytes: int
    ops: tuple[str, ...]
    calls: int
    flops: int
    contracted: tuple[int, ...] | None
    inputs: int | None
    outputs: int | None
    lookup: bool = False
    positions_mixed: bool = False
    normalised: bool = False
    in_linear_module: bool = False
    not_packed: str | None = "not a table"
    tied: tuple[str, ...] = ()
    siblings: str | None = None
    fused: str | None = None
    dead: str | None = None
    also_read_by: tuple[str, ...] = ()
    module: str | None = None
    reads: tuple[Read, ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.element_bytes

    @property
    def table(self) -> bool:
        """It is looked up and nothing else multiplies it."""
        return self.lookup and not self.flops

    @property
    def stacked(self) -> int:
        """How many weights, as of experts, lie in it, every one of them multiplied by each call; 1 in other layers."""
        return self.shape[0] if len(self.shape) == 3 and self.ops and set(self.ops) <= STACKING else 1

    @property
    def timed_as(self) -> str | None:
        """The module that a timer takes for one product or lookup of it, as torch prints it; None where there is none.

        That of the model where one alone reads the weight. Otherwise a plain one of the same widths: whichever call
        multiplies, it is the same product.
        """
        if self.module is not None:
            return self.module
        if self.table:
            in_bags = "embedding_bag" in self.ops
            return f"{'EmbeddingBag' if in_bags else 'Embedding'}({self.shape[0]}, {self.shape[-1]})"
        wide = self.positions_mixed and math.prod(self.shape[2:]) > 1
        if self.inputs is None or self.outputs is None or self.contracted is None or wide:
            return None
        return f"Linear(in_features={self.inputs}, out_features={self.outputs}, bias=False)"


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherParameter:
    """A parameter for which precision is not chosen, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str
    tied: tuple[str, ...] = ()
    element_bytes: int = 4

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.element_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationProduct:
    """A product of two activations: no weight is in it, so no map reaches it and it stays in base precision.

    Attention scores, the sum of values that they weigh, feature interactions, sums of experts by `bmm`. Calls of the
    same op on the same shapes are one product; flops: over all `calls` of the discovery batch. An elementwise product
    with a sum after it is no matrix product and is not here.
    """

    op: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    calls: int
    flops: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Inventory:
    """All parameters of a model and where its FLOPs are, for one batch.

    Without slots, so that totals are summed once: they are asked for every layer of a model.

    Layers, `products` and `hidden_flops` add up to all FLOPs that torch dispatches. products: of activations with
    activations, the most FLOPs first. hidden_flops: (module and op, FLOPs) of products that neither stands for, the most
    first; a weight may be in them. uncounted: calls with products whose FLOPs nobody knows.
    """

    layers: tuple[Layer, ...]
    others: tuple[OtherParameter, ...]
    units: int
    hidden_flops: tuple[tuple[str, int], ...]
    products: tuple[ActivationProduct, ...]
    uncounted: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Inventory({len(self.layers)} layers, {self.flops:,} FLOPs for {self.units} units)"

    @cached_property
    def flops(self) -> int:
        """All that was counted: what a share that a person reads is of."""
        return self.weight_flops + self.activation_flops

    @cached_property
    def activation_flops(self) -> int:
        """In products of activations with activations."""
        return sum(product.flops for product in self.products)

    @cached_property
    def layer_flops(self) -> int:
        return sum(layer.flops for layer in self.layers)

    @cached_property
    def weight_flops(self) -> int:
        """In products that hold a weight, or may hold one. A search weighs its layers by shares of this."""
        return self.layer_flops + sum(flops for _, flops in self.hidden_flops)

    @cached_property
    def layer_bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @cached_property
    def bytes(self) -> int:
        """Of all parameters."""
        return self.layer_bytes + sum(other.bytes for other in self.others)

    @property
    def covered(self) -> float:
        """The share of all FLOPs that are in layers; without any, 1.0, or 0.0 where there are calls that nobody counts."""
        if not self.flops:
            return 0.0 if self.uncounted else 1.0
        return self.layer_flops / self.flops

    @property
    def parameters(self) -> int:
        return sum(layer.numel for layer in self.layers) + sum(other.numel for other in self.others)

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises KeyError."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}
