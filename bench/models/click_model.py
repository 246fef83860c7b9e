"""A click model of today's kind, DCNv2: small enough to train while a benchmark starts.

Wang et al. 2021, "DCN V2: Improved Deep & Cross Network": cross layers x0 * (W x + b) + x beside a deep tower, one
logit.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from models.click_training import ClickTraining


@dataclass(frozen=True, slots=True)
class Recipe:
    """Architecture and training."""

    width: int = 16
    cross_layers: int = 3
    deep: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.2
    training: ClickTraining = field(default_factory=ClickTraining)

    def build(self, features: int, fields: int) -> "DCNv2":
        """A fresh model for that many values of all fields together."""
        return DCNv2(self, features, fields)


class DCNv2(nn.Module):
    """Embeddings of all fields side by side, through cross layers and a deep tower at once, then one logit."""

    def __init__(self, recipe: Recipe, features: int, fields: int) -> None:
        super().__init__()
        inputs = fields * recipe.width
        self.embedding = nn.Embedding(features, recipe.width)
        nn.init.normal_(self.embedding.weight, std=0.01)
        self.cross = nn.ModuleList(nn.Linear(inputs, inputs) for _ in range(recipe.cross_layers))
        widths = (inputs, *recipe.deep)
        self.deep = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(recipe.dropout)
        self.logit = nn.Linear(inputs + widths[-1], 1)

    def forward(self, features: Tensor) -> Tensor:
        """int64 [n, fields] -> logits float32 [n]."""
        first = self.embedding(features).flatten(1)
        crossed = deep = first
        for layer in self.cross:
            crossed = first * layer(crossed) + crossed
        for layer in self.deep:
            deep = self.dropout(torch.relu(layer(deep)))
        logits: Tensor = self.logit(torch.cat([crossed, deep], dim=1)).squeeze(1)
        return logits
