"""Specimens for discovery: models nobody here wrote (torch, torchrec, transformers), and small faithful ones.

A builder returns a fresh model in evaluation mode with one batch, the same on every call, and leaves the global random
state alone. `dead` is held to the truth in test_zoo.py, by changing each weight and looking at the output.
"""

from typing import Any

import torch
from torch import Tensor, nn

from helpers import zoo_flops, zoo_models
from helpers.specimen import ROWS, Builder, Specimen, call, call_all, seeded
from helpers.zoo_libraries import (
    bert_bi_encoder,
    bert_cross_encoder,
    minilm,
    mixtral,
    qwen3_moe,
    torchrec_dlrm,
    torchrec_dlrm_dcn,
    torchrec_embedding_bags,
)
from helpers.zoo_rankers import dcnv2, deepfm, hstu, mmoe, ple, sasrec, two_tower, wukong


def flops_by_op(specimen: Specimen) -> dict[str, int]:
    """FLOPs of one forward by ATen op; see zoo_flops."""
    return zoo_flops.count(specimen)


def matmul_flops(specimen: Specimen) -> int:
    """The sum of `flops_by_op`."""
    return sum(flops_by_op(specimen).values())


def _attend(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch, need_weights=False)[0]


# --- torch ---


@seeded
def transformer_encoder() -> Specimen:
    layer = nn.TransformerEncoderLayer(d_model=32, nhead=4, dim_feedforward=64, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2)
    return Specimen("transformer_encoder", model, call, torch.randn(ROWS, 6, 32))


@seeded
def attention_packed() -> Specimen:
    x = torch.randn(ROWS, 6, 32)
    return Specimen("attention_packed", nn.MultiheadAttention(32, 4, batch_first=True), _attend, (x, x, x))


@seeded
def attention_unpacked() -> Specimen:
    model = nn.MultiheadAttention(32, 4, kdim=48, vdim=16, batch_first=True)
    batch = (torch.randn(ROWS, 6, 32), torch.randn(ROWS, 5, 48), torch.randn(ROWS, 5, 16))
    return Specimen("attention_unpacked", model, _attend, batch)


@seeded
def pointwise_conv1d() -> Specimen:
    model = nn.Sequential(nn.Conv1d(16, 32, 1), nn.ReLU(), nn.Conv1d(32, 16, 1))
    return Specimen("pointwise_conv1d", model, call, torch.randn(ROWS, 16, 12))


@seeded
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
    return Specimen("conv2d_net", model, call, torch.randn(ROWS, 3, 12, 12))


@seeded
def lstm() -> Specimen:
    return Specimen("lstm", zoo_models.RecurrentScorer(16, 32), call, torch.randn(ROWS, 5, 16))


@seeded
def weight_norm_mlp() -> Specimen:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 1)))
    return Specimen("weight_norm_mlp", model, call, torch.randn(ROWS, 16))


@seeded
def inplace_relu() -> Specimen:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(inplace=True), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 1)
    )
    return Specimen("inplace_relu", model, call, torch.randn(ROWS, 16))


# --- small faithful ones ---


@seeded
def left_cross() -> Specimen:
    return Specimen("left_cross", zoo_models.LeftCross(3, 32), call, torch.randn(ROWS, 32))


@seeded
def low_rank_cross() -> Specimen:
    return Specimen("low_rank_cross", zoo_models.LowRankCross(3, 32, 16), call, torch.randn(ROWS, 32))


@seeded
def autoint() -> Specimen:
    model = nn.Sequential(zoo_models.FieldAttention(16, 2), nn.Flatten(), nn.Linear(16 * 6, 1))
    return Specimen("autoint", model, call, torch.randn(ROWS, 6, 16))


@seeded
def tied_language_model() -> Specimen:
    model = zoo_models.TiedLanguageModel(64, 32)
    return Specimen("tied_language_model", model, call, torch.randint(64, (ROWS, 6)))


@seeded
def tied_autoencoder() -> Specimen:
    return Specimen("tied_autoencoder", zoo_models.TiedAutoencoder(64, 16), call, torch.randn(ROWS, 64))


@seeded
def embedding_bag() -> Specimen:
    batch = (torch.randint(100, (3 * ROWS,)), torch.arange(0, 3 * ROWS, 3))
    return Specimen("embedding_bag", zoo_models.BagScorer(100, 16), call_all, batch)


@seeded
def stacked_experts() -> Specimen:
    return Specimen("stacked_experts", zoo_models.StackedExperts(16, 32, experts=4), call, torch.randn(ROWS, 16))


@seeded
def without_gradient() -> Specimen:
    return Specimen("without_gradient", zoo_models.WithoutGradient(16), call, torch.randn(ROWS, 16))


@seeded
def unused_head() -> Specimen:
    dead = frozenset({"auxiliary.weight", "retired.weight"})
    return Specimen("unused_head", zoo_models.UnusedHead(16), call, torch.randn(ROWS, 16), dead)


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
    autoint,
    tied_language_model,
    tied_autoencoder,
    embedding_bag,
    stacked_experts,
    without_gradient,
    unused_head,
    dcnv2,
    deepfm,
    hstu,
    mmoe,
    ple,
    sasrec,
    two_tower,
    wukong,
    torchrec_embedding_bags,
    torchrec_dlrm,
    torchrec_dlrm_dcn,
    qwen3_moe,
    mixtral,
    bert_cross_encoder,
    bert_bi_encoder,
    minilm,
)
