"""Semantic search over the Python documentation, as a Task.

The gate is the log-loss of the right document among all documents, one unit per query. Invariant: the other side is a
*frozen* index of baseline embeddings, so that units do not influence each other. Query and document encoder are the
same weights, so there are two tasks: `queries` quantises the encoder of queries against frozen documents, `documents`
the other way round. Quantising both sides of one comparison at once would let every unit move every other one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap.demos.docstrings import Pair, PairSplits, docstring_pairs, split_by_module
from precimap.demos.minilm import Encoder, batches_by_length, embed, load_encoder, load_tokenizer
from precimap.fingerprints import of_value
from precimap.metrics import MRR, NDCG, Loss
from precimap.searching.progress import Progress, silent
from precimap.task import Splits, Task

# The temperature with which sentence-transformers trains and scores cosine similarities (scale 20).
SCALE = 20.0
QUERY_TOKENS = 32
DOCUMENT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """Units of each split; the pairs that are left over are in the index only. `pairs`: how many there are in all."""

    calibration: int = 128
    search: int = 400
    certify: int = 1000
    pairs: int = 1536


DEFAULT_SIZES = Sizes()


def queries() -> Task:
    """Queries are the units, documents the frozen index: what a search service runs for each request."""
    return query_task(load_encoder(), load_tokenizer())


def documents() -> Task:
    """Documents are the units, queries the frozen index: what the indexing job runs."""
    return document_task(load_encoder(), load_tokenizer())


def query_task(encoder: Encoder, tokenizer: Any, sizes: Sizes = DEFAULT_SIZES, progress: Progress = silent) -> Task:
    """The Task of a given encoder, seen from its queries. Embeds all documents first (about a minute on two cores)."""
    pairs, splits = _pairs(sizes)
    index = _index(encoder, tokenizer, [pair.document for pair in pairs], DOCUMENT_TOKENS, progress)
    batches = [_batches(tokenizer, split, pairs, "query", QUERY_TOKENS) for split in splits]
    return _task(encoder, index, Splits(*batches), "queries")


def document_task(encoder: Encoder, tokenizer: Any, sizes: Sizes = DEFAULT_SIZES, progress: Progress = silent) -> Task:
    """The Task of a given encoder, seen from its documents."""
    pairs, splits = _pairs(sizes)
    index = _index(encoder, tokenizer, [pair.query for pair in pairs], QUERY_TOKENS, progress)
    batches = [_batches(tokenizer, split, pairs, "document", DOCUMENT_TOKENS) for split in splits]
    return _task(encoder, index, Splits(*batches), "documents")


def _pairs(sizes: Sizes) -> tuple[tuple[Pair, ...], PairSplits]:
    """The pairs of the splits, then others up to `sizes.pairs`, so that the index does not grow with the machine."""
    found = docstring_pairs()
    splits = split_by_module(found, calibration=sizes.calibration, search=sizes.search, certify=sizes.certify)
    asked = dict.fromkeys(pair for split in splits for pair in split)
    others = [pair for pair in found if pair not in asked]
    return (*asked, *others[: max(0, sizes.pairs - len(asked))]), splits


def _index(encoder: Encoder, tokenizer: Any, texts: Sequence[str], tokens: int, progress: Progress) -> Tensor:
    batches = batches_by_length(tokenizer, texts, max_tokens=tokens)

    def counted() -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(batches):
            progress("embed the index", number, len(batches))
            yield batch
        progress("embed the index", len(batches), len(batches))

    return embed(encoder, counted())


def _batches(
    tokenizer: Any, split: Sequence[Pair], pairs: Sequence[Pair], side: str, tokens: int
) -> list[dict[str, Tensor]]:
    rows = {pair: row for row, pair in enumerate(pairs)}
    labels = torch.tensor([rows[pair] for pair in split])
    batches = batches_by_length(tokenizer, [getattr(pair, side) for pair in split], max_tokens=tokens)
    return [
        {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels[batch["rows"]],
        }
        for batch in batches
    ]


def _task(encoder: Encoder, index: Tensor, splits: Splits, side: str) -> Task:
    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        embeddings: Tensor = model(batch["input_ids"], batch["attention_mask"])
        return SCALE * embeddings.float() @ index.T

    def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(scores, batch["labels"], reduction="none")

    return Task(
        encoder,
        splits=splits,
        forward=forward,
        loss=loss,
        metric=Loss("log-loss"),
        reported=(MRR(10), NDCG(10)),
        name=f"semantic search over the Python documentation: {side}, index {of_value(index)}",
    )
