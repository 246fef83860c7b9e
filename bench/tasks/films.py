"""Film recommendation: two published models of one paper, on the candidates that its authors evaluate on.

He et al. 2017, "Neural Collaborative Filtering": for each of 6,040 users of MovieLens-1M one held-out film and 99 others.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.real_models import ncf_candidates, ncf_gmf, ncf_mlp
from precimap import Splits, Task
from precimap.data import split_by_cluster
from precimap.metrics import NDCG, Loss
from tasks.real_data import Rows, present

USERS_IN_A_BATCH = 250


def ncf(search_users: int = 1000, certify_users: int = 2000, calibration_users: int = 250) -> Task:
    """The published NCF-MLP on MovieLens-1M: a unit is a user with one held-out film and 99 others.

    Scores: logits [users, 100], candidate 0 is the relevant one; loss: mean binary log-loss of the 100 candidates.
    Raises FileNotFoundError without the data, InputError for more than 6,040 users.
    """
    return _task("NCF-MLP", "mlp.safetensors", ncf_mlp, (calibration_users, search_users, certify_users))


def gmf(search_users: int = 1000, certify_users: int = 2000, calibration_users: int = 250) -> Task:
    """The published GMF on the same users and candidates; otherwise as `ncf`.

    Two tables and one output column: nothing takes a scheme with low-precision inputs, all take weight-only ones.
    """
    return _task("NCF-GMF", "gmf.safetensors", ncf_gmf, (calibration_users, search_users, certify_users))


def _task(name: str, weights: str, load: Callable[[], nn.Module], sizes: tuple[int, int, int]) -> Task:
    for file in (weights, "candidates.npz"):
        present(f"ncf_ml1m/{file}")
    users, items = ncf_candidates()

    def batches(rows: Rows) -> list[dict[str, Tensor]]:
        return [
            {"user": users[chosen], "item": items[chosen], "labels": torch.zeros(len(chosen), dtype=torch.long)}
            for chosen in torch.split(torch.from_numpy(rows), USERS_IN_A_BATCH)
        ]

    def forward(model: Callable[[Tensor, Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
        flat = model(batch["user"].repeat_interleave(batch["item"].shape[1]), batch["item"].reshape(-1))
        return flat.reshape(batch["item"].shape)

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        clicked = F.one_hot(batch["labels"], scores.shape[1]).to(scores.dtype)
        return F.binary_cross_entropy_with_logits(scores, clicked, reduction="none").mean(dim=1)

    return Task(
        load(),
        splits=Splits(*(batches(rows) for rows in split_by_cluster(np.arange(len(users)), sizes))),
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        reported=(NDCG(10),),
        name=f"MovieLens-1M, {name}",
    )
