"""A click model of today's kind, DCNv2, and how it is trained: small enough to train while a benchmark starts.

Wang et al. 2021, "DCN V2: Improved Deep & Cross Network": cross layers x0 * (W x + b) + x beside a deep tower, one
logit. Invariant: the same recipe, data, code and version of torch give the same weights, bit for bit, so that a cache of
them is only a matter of time. Shipping trained weights was not taken: the data's terms allow research only.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from precimap.durable import write_bytes


@dataclass(frozen=True, slots=True)
class Recipe:
    """Architecture and training. Stops after `epochs`, or before when the validation rows do not improve any more."""

    width: int = 16
    cross_layers: int = 3
    deep: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.2
    learning_rate: float = 1e-3
    batch_size: int = 512
    epochs: int = 20
    patience: int = 2
    validation_share: float = 0.1
    seed: int = 0


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


def cached(recipe: Recipe, features: Tensor, labels: Tensor, folder: Path | None) -> DCNv2:
    """What `train` gives, from `folder` where it is there already; None: `precimap-bench` in the system's temporary one."""
    folder = folder or Path(tempfile.gettempdir()) / "precimap-bench"
    digest = hashlib.sha256(f"{recipe} torch {torch.__version__}".encode())
    digest.update(Path(__file__).read_bytes())
    for tensor in (features, labels):
        digest.update(tensor.numpy().tobytes())
    path = folder / f"dcnv2-{digest.hexdigest()[:16]}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(train(recipe, features, labels).state_dict()))
    model = DCNv2(recipe, _count(features), features.shape[1])
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def train(recipe: Recipe, features: Tensor, labels: Tensor) -> DCNv2:
    """A model in evaluation mode, with the weights of its best epoch on the validation rows.

    features: int64 [rows, fields], numbered over all fields. labels: float32 [rows], 0 or 1. The global random state
    and the number of threads are as before afterwards.
    """
    with _alone(recipe.seed):
        order = torch.randperm(len(features))
        kept = int(len(features) * recipe.validation_share)
        validation, training = order[:kept], order[kept:]
        model = DCNv2(recipe, _count(features), features.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
        best, waited, weights = float("inf"), 0, model.state_dict()
        for _ in range(recipe.epochs):
            model.train()
            for rows in torch.split(training[torch.randperm(len(training))], recipe.batch_size):
                optimizer.zero_grad()
                loss = F.binary_cross_entropy_with_logits(model(features[rows]), labels[rows])
                torch.autograd.backward(loss)
                optimizer.step()
            judged = _loss(model.eval(), features[validation], labels[validation])
            waited = 0 if judged < best else waited + 1
            if judged < best:
                best, weights = judged, {name: value.clone() for name, value in model.state_dict().items()}
            if waited == recipe.patience:
                break
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _count(features: Tensor) -> int:
    """Rows of the embedding table: features must be numbered without regard to a split, as frappe's are."""
    return int(features.max()) + 1


@torch.no_grad()
def _loss(model: DCNv2, features: Tensor, labels: Tensor) -> float:
    return float(F.binary_cross_entropy_with_logits(model(features), labels))


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """One thread, because sums over threads change their order, and a random state of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
