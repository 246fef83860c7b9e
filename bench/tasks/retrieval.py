"""Semantic search: a text encoder against a frozen index of answers."""

import gzip
import json

import numpy as np
import torch
from torch import Tensor, nn

from precimap import Splits, Task
from precimap.data import split_by_cluster
from precimap.demos.minilm import batches_by_length, embed, load_encoder, load_tokenizer
from precimap.metrics import MRR, NDCG, Loss
from tasks.real_data import Rows, read

# The temperature with which sentence-transformers trains and scores cosine similarities (scale 20).
SCALE = 20.0
TOKENS = 32


def stackfaq_minilm(search: int = 480, certify: int = 800, calibration: int = 64) -> Task:
    """all-MiniLM-L6-v2 finding the answers to questions of StackExchange, against a frozen index of all 719 answers.

    A unit is a query (a question or one of its rephrasings), a cluster its thread; relevant are the thread's answers.
    Scores: 20 * cosine, [units, 719]; loss: -log of the softmax mass of the relevant answers.
    Raises FileNotFoundError without the data, ImportError without the `demo` extra, InputError for too many units.
    """
    queries, answers = _threads(json.loads(gzip.decompress(read("stackfaq/stackExchange-FAQ.json.gz"))))
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
