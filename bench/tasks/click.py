"""Click prediction on frappe: will this user use this app now? Two models, trained here, on the same rows.

Baltrunas et al. 2015, "Frappe: Understanding the Usage and Perception of Mobile App Recommendations In-The-Wild", with
the negatives of He & Chua 2017 (two for each use).
"""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.click_model import Recipe
from models.click_training import ClickRecipe, cached
from models.wukong import WukongRecipe
from precimap import Splits, Task
from precimap.data import split_by_cluster
from precimap.metrics import LogLoss
from tasks.real_data import Rows, read


def frappe_dcnv2(
    search: int = 8000,
    certify: int = 16000,
    calibration: int = 2048,
    cache: Path | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
) -> Task:
    """A DCNv2 trained here on frappe's training file, judged on its test file.

    A unit is a row, a cluster its user; scores: logits [rows]; metric: log-loss. Calibration rows are training rows
    of users that no other split has.
    The weights are kept in the folder `cache` (a temporary one by default), under a key of recipe, data and code.
    Raises FileNotFoundError without the data, InputError for too many units.
    """
    return _task("DCNv2", recipe, cache, (calibration, search, certify))


def frappe_wukong(
    search: int = 8000,
    certify: int = 16000,
    calibration: int = 2048,
    cache: Path | None = None,
    recipe: WukongRecipe = WukongRecipe(),  # noqa: B008 - frozen
) -> Task:
    """A Wukong trained here; otherwise as `frappe_dcnv2`."""
    return _task("Wukong", recipe, cache, (calibration, search, certify))


def _task(name: str, recipe: ClickRecipe, cache: Path | None, sizes: tuple[int, int, int]) -> Task:
    sources = [read(f"frappe/frappe.{part}.libfm.gz") for part in ("validation", "test")]
    (features, labels), (test_features, test_labels) = (_libfm(source) for source in sources)
    model = cached(recipe, features, labels, cache)

    def batches(x: Tensor, y: Tensor, rows: Rows) -> list[dict[str, Tensor]]:
        return [{"features": x[chosen], "labels": y[chosen]} for chosen in torch.split(torch.from_numpy(rows), 1000)]

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")

    def forward(model: Callable[[Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
        return model(batch["features"])

    chosen = split_by_cluster(test_features[:, 0].numpy(), sizes[1:])
    judged = torch.cat([test_features[rows, 0] for rows in chosen])
    others = (~torch.isin(features[:, 0], judged)).nonzero().flatten().numpy()
    (found,) = split_by_cluster(np.arange(len(others)), sizes[:1])
    own = others[found]
    return Task(
        model,
        splits=Splits(batches(features, labels, own), *(batches(test_features, test_labels, rows) for rows in chosen)),
        forward=forward,
        loss=loss,
        metric=LogLoss(),
        clusters=lambda batch: batch["features"][:, 0],
        name=f"frappe, {name}",
    )


def _libfm(source: bytes) -> tuple[Tensor, Tensor]:
    """Lines `label feature:1 ...` -> features int64 [rows, fields] and labels float32 [rows], 0 or 1."""
    lines = [line.split() for line in gzip.decompress(source).decode().splitlines()]
    features = [[int(item.partition(":")[0]) for item in line[1:]] for line in lines]
    return torch.tensor(features), torch.tensor([float(line[0] == "1") for line in lines])
