"""Real recommenders with published weights, for tests that need real differences.

NCF-MLP and GMF (He et al. 2017, "Neural Collaborative Filtering") trained on MovieLens-1M by their authors, with the
leave-one-out candidates they evaluate on: for each of 6,040 users one held-out film and 99 others. The files are not
part of the project; a test that asks for them is skipped where they are absent.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


class NCF(nn.Module):
    """The MLP tower: user and item embeddings side by side, ReLU layers 64-32-16-8, one logit."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding.from_pretrained(weights["user_embedding_W"])
        self.item_embedding = nn.Embedding.from_pretrained(weights["item_embedding_W"])
        self.layer1 = _linear(weights, "layer1")
        self.layer2 = _linear(weights, "layer2")
        self.layer3 = _linear(weights, "layer3")
        self.prediction = _linear(weights, "prediction")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """int64 [n], int64 [n] -> logits float32 [n]."""
        hidden = torch.cat([self.user_embedding(user), self.item_embedding(item)], dim=-1)
        for layer in (self.layer1, self.layer2, self.layer3):
            hidden = torch.relu(layer(hidden))
        logits: Tensor = self.prediction(hidden).squeeze(-1)
        return logits


class GMF(nn.Module):
    """Generalized matrix factorization: the product of user and item embedding, weighed by one output column."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding.from_pretrained(weights["user_embedding_W"])
        self.item_embedding = nn.Embedding.from_pretrained(weights["item_embedding_W"])
        self.prediction = _linear(weights, "prediction")

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """int64 [n], int64 [n] -> logits float32 [n]."""
        logits: Tensor = self.prediction(self.user_embedding(user) * self.item_embedding(item)).squeeze(-1)
        return logits


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    kernel = weights[f"{name}_W"]  # Keras: [in, out]
    layer = nn.Linear(*kernel.shape)
    with torch.no_grad():
        layer.weight.copy_(kernel.T)
        layer.bias.copy_(weights[f"{name}_b"])
    return layer


def ncf_mlp() -> NCF:
    """The tower with its published weights, in evaluation mode; skips the test where the files are absent."""
    return NCF(load_file(_present("mlp.safetensors"))).eval().requires_grad_(False)


def ncf_gmf() -> GMF:
    """The factorization with its published weights; otherwise as `ncf_mlp`."""
    return GMF(load_file(_present("gmf.safetensors"))).eval().requires_grad_(False)


def ncf_candidates() -> tuple[Tensor, Tensor]:
    """Users int64 [6040] and their candidates int64 [6040, 100]; candidate 0 is the relevant one."""
    with np.load(_present("candidates.npz")) as arrays:
        return torch.from_numpy(arrays["user"]).long(), torch.from_numpy(arrays["item"]).long()


def ncf_scores(model: Callable[[Tensor, Tensor], Tensor], user: Tensor, item: Tensor) -> Tensor:
    """Logits float32 [users, candidates]."""
    with torch.no_grad():
        flat: Tensor = model(user.repeat_interleave(item.shape[1]), item.reshape(-1))
    return flat.reshape(item.shape)


@cache
def ncf_in_fp8() -> tuple[Tensor, Tensor]:
    """Scores [users, candidates] of the tower as published, and with its products in E4M3, a static scale per tensor."""
    user, item = ncf_candidates()
    baseline, model = ncf_scores(ncf_mlp(), user, item), ncf_mlp()
    amax: dict[nn.Module, Tensor] = {}
    layers = (model.layer1, model.layer2, model.layer3, model.prediction)
    observers = [
        layer.register_forward_pre_hook(lambda layer, args: amax.update({layer: args[0].abs().max()}))
        for layer in layers
    ]
    ncf_scores(model, user[:500], item[:500])
    for observer, layer in zip(observers, layers, strict=True):
        observer.remove()
        layer.weight.copy_(_e4m3(layer.weight, layer.weight.abs().max()))
        layer.register_forward_pre_hook(lambda layer, args: (_e4m3(args[0], amax[layer]),))
    return baseline, ncf_scores(model, user, item)


def _e4m3(x: Tensor, amax: Tensor) -> Tensor:
    scale = amax / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def _present(name: str) -> Path:
    path = DATA / "ncf_ml1m" / name
    if not path.is_file():
        pytest.skip(f"the NCF weights and candidates are not at {path.parent}")
    return path
