"""What `gpu.py` runs: two untrained models, their FP8 forms, and the ways to call them.

Weights of other values would take as long.

Everything here runs on a CPU as well, at sizes that suit one; only the graphs need a GPU.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn import functional as F

from models.all_low import all_low
from models.click_model import Recipe
from precimap import CUDA_FP8, compiled, graphed
from precimap.numerics.schemes import scheme

Inputs = tuple[Tensor, ...]
Call = Callable[[], Any]
PRECISIONS = ("fp8", "fp8-static")
BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class Ranker:
    """DCNv2 with `layers` cross and `layers` deep layers, all of `width`, over `fields` fields of `values` values."""

    width: int
    fields: int
    values: int
    layers: int = 3

    def build(self, device: torch.device) -> nn.Module:
        recipe = Recipe(self.width // self.fields, self.layers, (self.width,) * self.layers)
        model = recipe.build(self.values, self.fields)
        nn.init.normal_(model.embedding.weight)
        return model.eval().to(device, torch.bfloat16)

    def inputs(self, batch: int, device: torch.device) -> Inputs:
        drawn = torch.randint(0, self.values, (batch, self.fields), generator=torch.Generator().manual_seed(0))
        return (drawn.to(device),)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A stack of transformer blocks, norms first, on `tokens` vectors a unit; query, key and value are three layers."""

    width: int
    heads: int
    blocks: int
    tokens: int

    def build(self, device: torch.device) -> nn.Module:
        return (
            nn.Sequential(*(Block(self.width, self.heads) for _ in range(self.blocks)))
            .eval()
            .to(device, torch.bfloat16)
        )

    def inputs(self, batch: int, device: torch.device) -> Inputs:
        drawn = torch.randn(batch, self.tokens, self.width, generator=torch.Generator().manual_seed(0))
        return (drawn.to(device, torch.bfloat16),)


class Block(nn.Module):
    """Attention and a GELU network of four times the width, each behind a LayerNorm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        normed = self.before(x)
        query, key, value = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return result


class Normed(nn.Module):
    """A LayerNorm before a linear layer: something that quantising can be fused into."""

    def __init__(self, linear: nn.Module, width: int, device: torch.device) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width, device=device, dtype=torch.bfloat16), linear

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x))
        return result


def forms(model: nn.Module, inputs: Inputs, with_graphs: bool) -> tuple[Mapping[str, Call], Mapping[str, Tensor]]:
    """Form -> one call of it, and what it gives; `float32` is among the results alone."""
    eager = {BF16: model, **{name: all_low(model, inputs, scheme(name), CUDA_FP8) for name in PRECISIONS}}
    made: dict[str, nn.Module] = {}
    for name, form in eager.items():
        torch._dynamo.reset()
        made[f"{name}, eager"] = form
        made[f"{name}, compiled"] = compiled(form, inputs)
        if with_graphs:
            for how in ("eager", "compiled"):
                made[f"{name}, {how}, graph"] = graphed(made[f"{name}, {how}"], inputs)
    floats = tuple(value.float() if value.is_floating_point() else value for value in inputs)
    with torch.no_grad():
        results = {name: form(*inputs) for name, form in made.items()}
        results["float32"] = copy.deepcopy(model).float()(*floats)
    return {name: (lambda form=form: form(*inputs)) for name, form in made.items()}, results


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, over that of the expected."""
    difference = found.double() - expected.double()
    return float(difference.square().mean().sqrt() / expected.double().square().mean().sqrt())
