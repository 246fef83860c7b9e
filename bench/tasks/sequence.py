"""Next-item recommendation on Amazon's reviews of video games: what will this user buy after that history?

McAuley et al. 2015, the file that SASRec's authors made of it: 31,013 users, 23,715 items, in the order of time.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from models.sasrec import PAD, SASRec, SASRecRecipe, cached
from precimap import Splits, Task
from precimap.data import split_by_cluster
from precimap.metrics import NDCG, Loss, Recall
from tasks.real_data import Rows, read

SHORTEST = 4  # one input and one target to train on, one item to stop on, one to judge
NEGATIVES = 100
USERS_IN_A_BATCH = 250

Items = NDArray[np.int64]


def amazon_sasrec(
    search: int = 4000,
    certify: int = 8000,
    calibration: int = 500,
    cache: Path | None = None,
    recipe: SASRecRecipe = SASRecRecipe(),  # noqa: B008 - frozen
) -> Task:
    """A SASRec trained here, leave-one-out by time: each user's last item against 100 others that the user has not met.

    A unit is a user; the model saw all items of all users but the last two (one to stop training on, one to judge).
    Scores: logits [users, 101], candidate 0 is the held-out item; loss: -log of its softmax share among the candidates.
    Only the 30,629 users with four items or more are there. The weights are kept in the folder `cache` (a temporary one
    by default), under a key of recipe, data and code. Raises FileNotFoundError without the data, InputError for too
    many units.
    """
    users, histories = _histories(gzip.decompress(read("amazon_video_seq/Video.txt.gz")))
    items = max(int(history.max()) for history in histories)
    met = [history[:-1] for history in histories]
    model = cached(recipe, _padded(met, recipe.longest + 2), items, cache)
    inputs, candidates = _padded(met, recipe.longest), torch.from_numpy(_candidates(histories, items))

    def batches(rows: Rows) -> list[dict[str, Tensor]]:
        return [
            {
                "user": users[chosen],
                "history": inputs[chosen],
                "candidates": candidates[chosen],
                "labels": torch.zeros(len(chosen), dtype=torch.long),
            }
            for chosen in torch.split(torch.from_numpy(rows), USERS_IN_A_BATCH)
        ]

    def forward(model: SASRec, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["history"], batch["candidates"])
        return scores

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores, batch["labels"], reduction="none")

    return Task(
        model,
        splits=Splits(*(batches(rows) for rows in split_by_cluster(users.numpy(), (calibration, search, certify)))),
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        clusters=lambda batch: batch["user"],
        reported=(NDCG(10), Recall(10)),
        name="Amazon video games, SASRec",
    )


def _histories(source: bytes) -> tuple[Tensor, list[Items]]:
    """Lines `user item`, by user and then by time -> users int64 [users], and the items of each."""
    pairs = np.array(source.split(), dtype=np.int64).reshape(-1, 2)
    users, starts = np.unique(pairs[:, 0], return_index=True)
    histories = np.split(pairs[:, 1], starts[1:])
    kept = [number for number, history in enumerate(histories) if len(history) >= SHORTEST]
    return torch.from_numpy(users[kept]), [histories[number] for number in kept]


def _padded(histories: Sequence[Items], width: int) -> Tensor:
    """The last `width` items of each, int64 [users, width], PAD on the left."""
    padded = np.full((len(histories), width), PAD, dtype=np.int64)
    for row, history in zip(padded, histories, strict=True):
        last = history[-width:]
        row[width - len(last) :] = last
    return torch.from_numpy(padded)


def _candidates(histories: Sequence[Items], items: int) -> Items:
    """int64 [users, 1 + NEGATIVES]: the last item, then uniform ones out of those not in the user's history.

    The same on every call. More are drawn than are wanted, and those that the user has met are left out.
    """
    drawn = np.random.default_rng(0).integers(1, items + 1, (len(histories), 2 * NEGATIVES))
    found = np.empty((len(histories), 1 + NEGATIVES), dtype=np.int64)
    for row, history, others in zip(found, histories, drawn, strict=True):
        row[0] = history[-1]
        row[1:] = others[~np.isin(others, history)][:NEGATIVES]
    return found
