"""Weights that the first batch does not reach are found on later ones, and cost nothing where the first reaches all."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from precimap.layers.discover import FURTHEST, discover
from precimap.layers.inventory import Inventory


class Routed(nn.Module):
    """Each row goes to the expert that its first value names; an expert without rows is not called."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict(
                {"gate_proj": nn.Linear(16, 32), "up_proj": nn.Linear(16, 32), "down_proj": nn.Linear(32, 16)}
            )
            for _ in range(experts)
        )
        self.head = nn.Linear(16, 16)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        mixed = torch.zeros_like(x)
        for number, one in enumerate(self.experts):
            rows = x[:, 0].long() == number
            if rows.any():
                part = x[rows]
                mixed[rows] = one["down_proj"](torch.sigmoid(one["gate_proj"](part)) * one["up_proj"](part))
        return self.head(mixed)


def batch(*experts: int) -> Tensor:
    x = torch.rand(len(experts), 16, generator=torch.Generator().manual_seed(len(experts)))
    x[:, 0] = torch.tensor(experts, dtype=torch.float32)
    return x


def of(model: nn.Module, first: Tensor, further: Any = ()) -> Inventory:
    return discover(model.eval(), lambda m, b: m(b), first, further)


def names(inventory: Inventory) -> set[str]:
    return {layer.name for layer in inventory.layers}


def test_experts_are_found_where_a_row_first_goes_to_them() -> None:
    model = Routed()
    weights = {name for name, _ in model.named_parameters() if name.endswith("weight")}
    alone = of(model, batch(0, 0, 1, 1))
    assert names(alone) == {name for name in weights if ".2." not in name and ".3." not in name}
    (reason,) = {other.reason for other in alone.others if ".3." in other.name}
    assert reason == "never read: no call of this batch used it"

    found = of(model, batch(0, 0, 1, 1), [batch(0, 1, 2, 2), batch(3, 3, 1, 1)])
    assert names(found) == weights
    assert found.units == 4
    assert found.layer("experts.0.gate_proj.weight") == alone.layer("experts.0.gate_proj.weight")
    late = found.layer("experts.3.gate_proj.weight")
    assert late.flops == round(2 * 2 * 16 * 32 / 3)  # 2 rows in three batches of one size
    assert late.fused == found.layer("experts.3.up_proj.weight").fused is not None
    assert late.siblings == found.layer("experts.3.up_proj.weight").siblings is not None
    assert (late.dead, late.in_linear_module, late.contracted) == (None, True, (1,))
    assert not [other for other in found.others if "never read" in other.reason]
    assert [layer.name for layer in found.layers] == [n for n, _ in model.named_parameters() if n in weights]


def test_flops_and_rows_are_for_as_many_units_as_the_first_batch_has() -> None:
    found = of(Routed(2), batch(0, 0), [batch(0, 0, 0, 0, 1, 1, 1, 1)])
    late = found.layer("experts.1.down_proj.weight")
    assert late.flops == round(2 * 4 * 32 * 16 * 2 / 10)
    assert late.reads[0].rows == 1  # 4 rows of 8 units, in a batch of 2


def test_no_batch_is_read_where_the_first_reaches_all() -> None:
    def refused() -> Iterator[Tensor]:
        raise AssertionError("asked for another batch")
        yield

    model = Routed(2)
    of(model, batch(0, 1), refused())
    assert model.passes == 1
    model.register_parameter("spare", nn.Parameter(torch.zeros(16)))  # a vector is no layer: not worth a batch
    assert "never read" in next(
        other.reason for other in of(model, batch(0, 1), refused()).others if other.name == "spare"
    )


@pytest.mark.parametrize("more", [3, 100])
def test_looking_ends(more: int) -> None:
    model, given = Routed(3), 0

    def batches() -> Iterator[Tensor]:
        nonlocal given
        for _ in range(more):
            given += 1
            yield batch(0, 1)

    found = of(model, batch(0, 1), batches())
    assert given == min(more, FURTHEST)
    (reason,) = {other.reason for other in found.others if ".2." in other.name}
    assert reason == f"never read: no call of this batch used it, nor of {given} after it"
    assert model.passes == 2 + given


def test_looking_ends_with_the_last_weight() -> None:
    model = Routed(3)
    of(model, batch(0, 0), [batch(1), batch(0), batch(2, 1), batch(2)])
    assert model.passes == 1 + 1 + 3


def test_the_same_batches_give_the_same_inventory() -> None:
    model = Routed()
    further = [batch(2, 1, 0, 0), batch(3)]
    assert of(model, batch(0, 1), further) == of(model, batch(0, 1), further)


def test_a_late_layer_may_be_dead() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rare, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x[0, 0] > 0:
                self.rare(x)
            return self.head(x)

    found = of(Branch(), batch(0, 0), [batch(1, 0)])
    assert found.layer("rare.weight").dead is not None
    assert found.layer("head.weight").dead is None
