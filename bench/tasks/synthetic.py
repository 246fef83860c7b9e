"""A ranker with as many weight layers as asked, to see how the cost of a search grows with them.

Towers read a group of features each, a trunk goes on from their sum, a head gives the scores: parallel and serial
parts, as in rankers with many experts. Invariant: the same sizes give the same weights and data, bit for bit. The labels
are drawn from the model's own scores, so that it is calibrated as a trained model is, and quantising it costs loss.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import Splits, Task
from precimap.errors import InputError
from precimap.metrics import Loss

TOWERS = 8
WIDTH = 128
HIDDEN = 256
CLASSES = 16
BATCH = 512
LINEARS = 4  # of a block, and of the head
FEWEST = LINEARS * (TOWERS + 2)  # a block in each tower, one in the trunk, the head


class Block(nn.Module):
    """x + gain * MLP(norm(x)): four layers, wide and narrow in turns.

    The gain, from 1/10 to 1, makes some blocks matter a hundred times more than others; equal ones would give a
    ranking nothing to find.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (WIDTH, HIDDEN, WIDTH, HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.gain = 10 ** -float(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(x)
        for layer in self.layers:
            hidden = layer(torch.relu(hidden))
        return x + self.gain * hidden


class DeepRanker(nn.Module):
    """Towers of residual blocks side by side, a trunk of them, and a head of four layers."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        blocks = layers // LINEARS - 1
        in_tower = max(1, blocks * 2 // (3 * TOWERS))
        self.towers = nn.ModuleList(nn.Sequential(*(Block() for _ in range(in_tower))) for _ in range(TOWERS))
        self.trunk = nn.Sequential(*(Block() for _ in range(blocks - TOWERS * in_tower)))
        widths = (WIDTH, HIDDEN, HIDDEN, WIDTH, CLASSES)
        self.head = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        """float32 [n, TOWERS, WIDTH] -> scores float32 [n, CLASSES]."""
        experts = [tower(features[:, number]) for number, tower in enumerate(self.towers)]
        hidden = F.layer_norm(self.trunk(torch.stack(experts).sum(dim=0)), (WIDTH,))
        for number, layer in enumerate(self.head):
            hidden = layer(torch.relu(hidden) if number else hidden)
        return hidden


def deep_task(layers: int = 1000, units: int = 512) -> Task:
    """A task over a model of exactly `layers` weight layers; `units` in the search and in the certify split each.

    A unit is a request with one of 16 classes right, its loss the cross-entropy of that class.
    Raises InputError for a number of layers that is below 40 or no multiple of 4, or for no units.
    """
    if layers < FEWEST or layers % LINEARS or units < 1:
        raise InputError(
            f"expected a multiple of {LINEARS} layers, {FEWEST} or more, and a unit or more; got {layers} and {units}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DeepRanker(layers).eval().requires_grad_(False)
        splits = [_batches(model, n) for n in (BATCH, units, units)]

    def forward(model: DeepRanker, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["features"])
        return scores

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores, batch["labels"], reduction="none")

    return Task(
        model,
        splits=Splits(*splits),
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        name=f"a synthetic ranker of {layers} layers",
    )


@torch.no_grad()
def _batches(model: DeepRanker, units: int) -> list[dict[str, Tensor]]:
    features = torch.randn(units, TOWERS, WIDTH)
    return [
        {"features": part, "labels": model(part).softmax(dim=1).multinomial(1).squeeze(1)}
        for part in torch.split(features, BATCH)
    ]
