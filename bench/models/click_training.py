"""How a click model is trained: log-loss, Adam, the best epoch on validation rows.

Invariant: all click models train alike, so that what differs between two tasks is the model. A recipe is the model's own
frozen dataclass, which holds a `ClickTraining` and builds the model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.trained import BestEpoch, alone, kept


@dataclass(frozen=True, slots=True)
class ClickTraining:
    """Stops after `epochs`, or before when the validation rows do not improve any more."""

    learning_rate: float = 1e-3
    batch_size: int = 512
    epochs: int = 20
    patience: int = 2
    validation_share: float = 0.1
    seed: int = 0


class ClickRecipe(Protocol):
    """What can be trained here: features int64 [n, fields] -> logits float32 [n]."""

    @property
    def training(self) -> ClickTraining: ...

    def build(self, features: int, fields: int) -> nn.Module:
        """A fresh model for that many values of all fields together; draws from the global random state."""
        ...


def cached(recipe: ClickRecipe, features: Tensor, labels: Tensor, folder: Path | None) -> Any:
    """What `train` gives, from `folder` where it is there already; see `trained.kept`."""
    model = recipe.build(_count(features), features.shape[1])
    name, code = type(model).__name__.lower(), (type(model), train)
    model.load_state_dict(kept(name, recipe, (features, labels), code, folder, lambda: train(recipe, features, labels)))
    return model.eval().requires_grad_(False)


def train(recipe: ClickRecipe, features: Tensor, labels: Tensor) -> nn.Module:
    """A model in evaluation mode, with the weights of its best epoch on the validation rows.

    features: int64 [rows, fields], numbered over all fields. labels: float32 [rows], 0 or 1. The global random state
    and the number of threads are as before afterwards.
    """
    how = recipe.training
    with alone(how.seed):
        order = torch.randperm(len(features))
        held = int(len(features) * how.validation_share)
        validation, training = order[:held], order[held:]
        model = recipe.build(_count(features), features.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=how.learning_rate)
        best = BestEpoch(model, how.patience)
        for _ in range(how.epochs):
            model.train()
            for rows in torch.split(training[torch.randperm(len(training))], how.batch_size):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(features[rows]), labels[rows])
                torch.autograd.backward(loss)
                optimizer.step()
            if best.enough(_loss(model.eval(), features[validation], labels[validation])):
                break
    return best.restored()


def _count(features: Tensor) -> int:
    """Rows of the embedding table: features must be numbered without regard to a split, as frappe's are."""
    return int(features.max()) + 1


@torch.no_grad()
def _loss(model: nn.Module, features: Tensor, labels: Tensor) -> float:
    return float(F.binary_cross_entropy_with_logits(model(features), labels))
