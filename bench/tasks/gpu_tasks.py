"""Two tasks for a GPU: a click model that is trained there within seconds, and an encoder judged against its own outputs.

Invariant: both are made of what precimap and the benches bring along, offline: generated click logs
(`precimap.demos.click_logs`), a DCNv2, blocks of BERT's size. What differs between a GPU and a test on a CPU is sizes and
the device. Real logs were not taken: nothing can be fetched on such a machine.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.click_model import Recipe
from models.gpu_models import Encoder
from precimap import Splits, Task, metrics
from precimap.demos.click_logs import CARDINALITIES, Clicks, generate

DENSE_FIELDS, BUCKETS = 6, 32  # the first numbers of a row, by their power of two, beside its 26 categorical values
FIELDS = DENSE_FIELDS + len(CARDINALITIES)
WORDS = 30_522  # of BERT's vocabulary
SPREAD = 1.5  # standard deviation of the encoder's logits: most of its clicks are neither sure nor a coin's


@dataclass(frozen=True, slots=True)
class ClickSizes:
    """A DCNv2 of `layers` cross and `layers` deep layers, all of `width` (a multiple of 32), and what it learns from.

    batches: of calibration, search and certify split, `batch` rows each; the rows before them in time are trained on, in
    batches of the same size, for about `seconds` or `epochs`, whichever ends first.
    """

    width: int
    dtype: torch.dtype
    rows: int
    batch: int
    batches: tuple[int, int, int]
    seconds: float
    layers: int = 3
    epochs: int = 2


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """batch: of sequences of `encoder.tokens` words. batches: as of `ClickSizes`."""

    encoder: Encoder
    batch: int
    batches: tuple[int, int, int]


def click_task(sizes: ClickSizes, device: torch.device) -> Task:
    """Rows of a generated log, the last in time judged; a unit is a row, a cluster its user, the metric NE.

    What is judged is in order of users, so that no two splits share more than one.
    """
    log = generate(sizes.rows)
    judged = sizes.rows - sizes.batch * sum(sizes.batches)
    order = np.concatenate([np.arange(judged), judged + np.argsort(log.user[judged:], kind="stable")])
    features, labels, users = (
        column.to(device)[torch.from_numpy(order).to(device)]
        for column in (features_of(log), torch.from_numpy(log.label).float(), torch.from_numpy(log.user))
    )
    recipe = Recipe(width=sizes.width // FIELDS, cross_layers=sizes.layers, deep=(sizes.width,) * sizes.layers)
    torch.manual_seed(0)
    model = recipe.build(int(features.max()) + 1, FIELDS).to(device)
    train(model, features[:judged], labels[:judged], sizes)

    def split(number: int) -> list[dict[str, Tensor]]:
        first = judged + sizes.batch * sum(sizes.batches[:number])
        starts = range(first, first + sizes.batch * sizes.batches[number], sizes.batch)
        columns = {"features": features, "labels": labels, "users": users}
        return [{name: column[i : i + sizes.batch] for name, column in columns.items()} for i in starts]

    return Task(
        model.to(sizes.dtype),
        splits=Splits(split(0), split(1), split(2)),
        forward=lambda m, batch: m(batch["features"]).float(),
        loss=_log_loss,
        metric=metrics.NE(),
        labels=lambda batch: batch["labels"],
        clusters=lambda batch: batch["users"],
        name=f"clicks, {sizes.width} wide, {str(sizes.dtype).removeprefix('torch.')}",
    )


def features_of(log: Clicks) -> Tensor:
    """int64 [n, FIELDS], numbered over all fields; what is missing is a value of its field's own."""
    powers = torch.from_numpy(log.dense[:, :DENSE_FIELDS] + 1).double().add(1).log2().long().clamp(max=BUCKETS - 1)
    values = torch.cat([powers, torch.from_numpy(log.categorical).add(1)], dim=1)
    counts = torch.tensor([BUCKETS] * DENSE_FIELDS + [count + 1 for count in CARDINALITIES])
    return values + (counts.cumsum(0) - counts)


def train(model: nn.Module, features: Tensor, labels: Tensor, sizes: ClickSizes) -> int:
    """Log-loss, Adam, BF16 products under autocast; evaluation mode and no gradients afterwards. Gives the steps it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    until, steps = time.monotonic() + sizes.seconds, 0
    model.train()
    for _ in range(sizes.epochs):
        for rows in torch.randperm(len(features), device=features.device).split(sizes.batch):
            if time.monotonic() > until and steps:
                break
            optimizer.zero_grad()
            with torch.autocast(features.device.type, torch.bfloat16):
                logits = model(features[rows])
            torch.autograd.backward(F.binary_cross_entropy_with_logits(logits.float(), labels[rows]))
            optimizer.step()
            steps += 1
            if steps % 16 == 0:
                logits.sum().item()  # or the host would run ahead of the device, and of the clock
    model.eval().requires_grad_(False)
    return steps


class ScoredEncoder(nn.Module):
    """Words through an encoder to one logit a sequence."""

    def __init__(self, sizes: Encoder, device: torch.device) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, sizes.width, device=device, dtype=torch.bfloat16)
        self.encoder = sizes.build(device)
        self.norm = nn.LayerNorm(sizes.width, device=device, dtype=torch.bfloat16)
        self.logit = nn.Linear(sizes.width, 1, device=device, dtype=torch.bfloat16)

    def forward(self, words: Tensor) -> Tensor:
        """int64 [n, tokens] -> logits [n]."""
        logits: Tensor = self.logit(self.norm(self.encoder(self.words(words))).mean(1)).squeeze(1)
        return logits


@torch.no_grad()
def encoder_task(sizes: EncoderSizes, device: torch.device) -> Task:
    """Random weights in BF16, random words, and clicks drawn from the model's own outputs: its NE is what it can be."""
    torch.manual_seed(0)
    model = ScoredEncoder(sizes.encoder, device).eval().requires_grad_(False)

    def words(seed: int) -> Tensor:
        drawn = torch.randint(WORDS, (sizes.batch, sizes.encoder.tokens), generator=torch.Generator().manual_seed(seed))
        return drawn.to(device)

    given = model(words(0)).float()
    model.logit.weight *= SPREAD / given.std()
    model.logit.bias -= model(words(0)).float().mean()

    def split(number: int) -> list[dict[str, Tensor]]:
        found = []
        for i in range(sizes.batches[number]):
            seed = 1 + sum(sizes.batches[:number]) + i
            chances = torch.sigmoid(model(words(seed)).float()).cpu()
            clicks = torch.bernoulli(chances, generator=torch.Generator().manual_seed(seed)).to(device)
            found.append({"words": words(seed), "labels": clicks})
        return found

    return Task(
        model,
        splits=Splits(split(0), split(1), split(2)),
        forward=lambda m, batch: m(batch["words"]).float(),
        loss=_log_loss,
        metric=metrics.NE(),
        labels=lambda batch: batch["labels"],
        name=f"encoder, {sizes.encoder.width} wide, {sizes.encoder.blocks} blocks",
    )


def _log_loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")
