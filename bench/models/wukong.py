"""Wukong, a click model of stacked factorization machines, small enough to train while a benchmark starts.

Zhang et al. 2024, "Wukong: Towards a Scaling Law for Large-Scale Recommendation" (arXiv 2403.02545). Half of its products
are none of an nn.Linear: the compression of embeddings is a raw parameter, and a factorization machine multiplies
activations with activations. The feature interaction X X^T is never formed: X (X^T Y) with a learned Y of `rank` columns.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.click_training import ClickTraining


@dataclass(frozen=True, slots=True)
class WukongRecipe:
    """Architecture and training. Every layer has `machine` + `compressed` embeddings of `width` values as its result."""

    width: int = 16
    layers: int = 3
    machine: int = 16
    compressed: int = 16
    rank: int = 16
    hidden: int = 128
    head: tuple[int, ...] = (128, 64)
    dropout: float = 0.2
    training: ClickTraining = field(default_factory=ClickTraining)

    def build(self, features: int, fields: int) -> "Wukong":
        """A fresh model for that many values of all fields together."""
        return Wukong(self, features, fields)


class Compression(nn.Module):
    """LCB: embeddings out as learned sums of embeddings in, one weight [in, out], no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        nn.init.xavier_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, width] -> [n, outputs, width]."""
        return torch.matmul(x.transpose(1, 2), self.weight).transpose(1, 2)


class FactorizationMachine(nn.Module):
    """FMB: X (X^T Y), normed, through an MLP to embeddings."""

    def __init__(self, inputs: int, outputs: int, recipe: WukongRecipe) -> None:
        super().__init__()
        self.project = Compression(inputs, recipe.rank)
        self.norm = nn.LayerNorm(inputs * recipe.rank)
        self.mlp = nn.Sequential(
            nn.Linear(inputs * recipe.rank, recipe.hidden),
            nn.ReLU(),
            nn.Dropout(recipe.dropout),
            nn.Linear(recipe.hidden, outputs * recipe.width),
        )
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, width] -> [n, outputs, width]."""
        interactions = torch.bmm(x, self.project(x).transpose(1, 2))  # [n, inputs, rank]
        hidden: Tensor = self.mlp(self.norm(interactions.flatten(1)))
        return hidden.unflatten(1, (self.outputs, -1))


class WukongLayer(nn.Module):
    """LN(concat(FMB(X), LCB(X)) + X); the residual is compressed where the number of embeddings changes."""

    def __init__(self, inputs: int, recipe: WukongRecipe) -> None:
        super().__init__()
        outputs = recipe.machine + recipe.compressed
        self.machine = FactorizationMachine(inputs, recipe.machine, recipe)
        self.compress = Compression(inputs, recipe.compressed)
        self.residual = nn.Identity() if inputs == outputs else Compression(inputs, outputs)
        self.norm = nn.LayerNorm(recipe.width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, width] -> [n, machine + compressed, width]."""
        both = torch.cat([self.machine(x), self.compress(x)], dim=1)
        normed: Tensor = self.norm(both + self.residual(x))
        return normed


class Wukong(nn.Module):
    """One embedding for each field, Wukong layers, an MLP to one logit."""

    def __init__(self, recipe: WukongRecipe, features: int, fields: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(features, recipe.width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        every = recipe.machine + recipe.compressed
        self.layers = nn.Sequential(
            *(WukongLayer(fields if number == 0 else every, recipe) for number in range(recipe.layers))
        )
        widths = (every * recipe.width, *recipe.head)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(recipe.dropout)
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, features: Tensor) -> Tensor:
        """int64 [n, fields] -> logits float32 [n]."""
        hidden = self.layers(self.embedding(features)).flatten(1)
        for layer in self.head:
            hidden = self.dropout(torch.relu(layer(hidden)))
        logits: Tensor = self.logit(hidden).squeeze(1)
        return logits
