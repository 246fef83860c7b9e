"""The real tasks on which the benchmarks measure: semantic search, film recommendation, click prediction.

    python bench/real_tasks.py

prints the baseline of each. Invariant: a task is the same on every call, splits share no cluster (thread, user), and
what is missing raises FileNotFoundError with the file's name; nothing is replaced by made-up data. The data lie beside
the checkout and are no part of the project. Random weights, which need no data, were not taken: what low precision does
to them says little of a trained model.
"""

import gzip
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from click_model import DCNv2, Recipe, cached
from numpy.typing import NDArray
from rival_scores import eligible
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import Splits, Task, discover
from precimap.data import split_by_cluster
from precimap.demos.minilm import batches_by_length, embed, load_encoder, load_tokenizer
from precimap.metrics import MRR, NDCG, LogLoss, Loss
from precimap.numerics.schemes import scheme
from precimap.task import first_batch, score

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from real_models import DATA, ncf_candidates, ncf_mlp

# The temperature with which sentence-transformers trains and scores cosine similarities (scale 20).
SCALE = 20.0
TOKENS = 32

Rows = NDArray[np.int64]


def stackfaq_minilm(search: int = 480, certify: int = 800, calibration: int = 64) -> Task:
    """all-MiniLM-L6-v2 finding the answers to questions of StackExchange, against a frozen index of all 719 answers.

    A unit is a query (a question or one of its rephrasings), a cluster its thread; relevant are the thread's answers.
    Scores: 20 * cosine, [units, 719]; loss: -log of the softmax mass of the relevant answers.
    Raises FileNotFoundError without the data, ImportError without the `demo` extra, InputError for too many units.
    """
    queries, answers = _threads(json.loads(gzip.decompress(_read("stackfaq/stackExchange-FAQ.json.gz"))))
    thread = np.array([number for number, _ in queries])
    relevant = torch.from_numpy(thread[:, None] == np.array([number for number, _ in answers]))
    encoder, tokenizer = load_encoder(), load_tokenizer()
    index = embed(encoder, batches_by_length(tokenizer, [text for _, text in answers], max_tokens=TOKENS))

    def batches(rows: Rows) -> list[dict[str, Tensor]]:
        own = torch.from_numpy(rows)
        found = batches_by_length(tokenizer, [queries[row][1] for row in rows], max_tokens=TOKENS, batch_size=32)
        return [
            {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": relevant[own[batch["rows"]]],
                "thread": torch.from_numpy(thread)[own[batch["rows"]]],
            }
            for batch in found
        ]

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        embeddings: Tensor = model(batch["input_ids"], batch["attention_mask"])
        return SCALE * embeddings @ index.T

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return scores.logsumexp(dim=1) - scores.masked_fill(~batch["labels"], -torch.inf).logsumexp(dim=1)

    return Task(
        encoder,
        splits=Splits(*(batches(rows) for rows in split_by_cluster(thread, (calibration, search, certify)))),
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        clusters=lambda batch: batch["thread"],
        reported=(NDCG(10), MRR(10)),
        name="StackExchange questions, all-MiniLM-L6-v2",
    )


def ncf(search_users: int = 1000, certify_users: int = 2000, calibration_users: int = 250) -> Task:
    """The published NCF-MLP on MovieLens-1M: a unit is a user with one held-out film and 99 others.

    Scores: logits [users, 100], candidate 0 is the relevant one; loss: mean binary log-loss of the 100 candidates.
    Raises FileNotFoundError without the data, InputError for more than 6,040 users.
    """
    for name in ("mlp.safetensors", "candidates.npz"):
        _present(f"ncf_ml1m/{name}")
    users, items = ncf_candidates()

    def batches(rows: Rows) -> list[dict[str, Tensor]]:
        return [
            {"user": users[chosen], "item": items[chosen], "labels": torch.zeros(len(chosen), dtype=torch.long)}
            for chosen in torch.split(torch.from_numpy(rows), 250)
        ]

    def forward(model: Callable[[Tensor, Tensor], Tensor], batch: dict[str, Tensor]) -> Tensor:
        flat = model(batch["user"].repeat_interleave(batch["item"].shape[1]), batch["item"].reshape(-1))
        return flat.reshape(batch["item"].shape)

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        clicked = F.one_hot(batch["labels"], scores.shape[1]).to(scores.dtype)
        return F.binary_cross_entropy_with_logits(scores, clicked, reduction="none").mean(dim=1)

    sizes = (calibration_users, search_users, certify_users)
    return Task(
        ncf_mlp(),
        splits=Splits(*(batches(rows) for rows in split_by_cluster(np.arange(len(users)), sizes))),
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        reported=(NDCG(10),),
        name="MovieLens-1M, NCF-MLP",
    )


def frappe_dcnv2(
    search: int = 8000,
    certify: int = 16000,
    calibration: int = 2048,
    cache: Path | None = None,
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
) -> Task:
    """A DCNv2 trained here on frappe's training file, judged on its test file: will this user use this app now?

    A unit is a row, a cluster its user; scores: logits [rows]; metric: log-loss. Calibration rows are training rows.
    The weights are kept in the folder `cache` (a temporary one by default), under a key of recipe, data and code.
    Raises FileNotFoundError without the data, InputError for too many units.
    """
    sources = [_read(f"frappe/frappe.{part}.libfm.gz") for part in ("validation", "test")]
    (features, labels), (test_features, test_labels) = (_libfm(source) for source in sources)
    model = cached(recipe, features, labels, cache)

    def batches(x: Tensor, y: Tensor, rows: Rows) -> list[dict[str, Tensor]]:
        return [{"features": x[chosen], "labels": y[chosen]} for chosen in torch.split(torch.from_numpy(rows), 1000)]

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")

    def forward(model: DCNv2, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = model(batch["features"])
        return scores

    (own,) = split_by_cluster(np.arange(len(features)), (calibration,))
    chosen = split_by_cluster(test_features[:, 0].numpy(), (search, certify))
    return Task(
        model,
        splits=Splits(batches(features, labels, own), *(batches(test_features, test_labels, rows) for rows in chosen)),
        forward=forward,
        loss=loss,
        metric=LogLoss(),
        clusters=lambda batch: batch["features"][:, 0],
        name="frappe, DCNv2",
    )


def _threads(document: dict[str, dict[str, list[dict[str, object]]]]) -> tuple[list[tuple[int, str]], ...]:
    """Queries and answers, each as (number of its thread, text)."""
    queries: list[tuple[int, str]] = []
    answers: list[tuple[int, str]] = []
    for number, thread in enumerate(document["root"]["qapair"]):
        rephrasings, given = thread["rephr"], thread["answer"]
        assert isinstance(rephrasings, list)
        texts = [thread["question"], *rephrasings]
        # "*" separates rephrasings; one thread has no question, and a single answer is not in a list.
        queries.extend((number, str(text)) for text in texts if text is not None and text != "*")
        answers.extend((number, str(text)) for text in (given if isinstance(given, list) else [given]))
    return queries, answers


def _libfm(source: bytes) -> tuple[Tensor, Tensor]:
    """Lines `label feature:1 ...` -> features int64 [rows, fields] and labels float32 [rows], 0 or 1."""
    lines = [line.split() for line in gzip.decompress(source).decode().splitlines()]
    features = [[int(item.partition(":")[0]) for item in line[1:]] for line in lines]
    return torch.tensor(features), torch.tensor([float(line[0] == "1") for line in lines])


def _read(name: str) -> bytes:
    return _present(name).read_bytes()


def _present(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        raise FileNotFoundError(f"expected the data of a benchmark at {path}, found none")
    return path


def _print(make: Callable[[], Task]) -> None:
    started = time.perf_counter()
    try:
        task = make()
    except FileNotFoundError as error:
        print(error)
        return
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    print(f"{task.name}: built in {time.perf_counter() - started:.1f} s")
    lookups, dead = (sum(map(bool, of)) for of in zip(*((x.lookup, x.dead) for x in inventory.layers), strict=True))
    fp8 = len(eligible(inventory, scheme("fp8")))
    print(f"  {len(inventory.layers)} layers, {fp8} of them take FP8, {lookups} are lookups, {dead} dead")
    for name in ("search", "certify"):
        scored = score(task, task.model, getattr(task.splits, name))
        clusters = scored.units.n if scored.units.clusters is None else len(np.unique(scored.units.clusters))
        reported = "".join(f", {metric} {values.mean():.4f}" for metric, values in scored.reported.items())
        print(
            f"  {name}: {scored.units.n} units in {clusters} clusters, "
            f"{task.metric.name} {scored.values.mean():.5f}{reported}"
        )


def main() -> None:
    torch.set_num_threads(1)
    for make in (stackfaq_minilm, ncf, frappe_dcnv2):
        _print(make)


if __name__ == "__main__":
    main()
