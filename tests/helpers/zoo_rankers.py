"""Specimens of ranking models: those of the papers, and those that the benchmarks train, here with random weights."""

import torch
from torch import nn

from helpers import zoo_ranking_models
from helpers.specimen import ROWS, Specimen, call, call_all, seeded
from models.click_model import Recipe
from models.sasrec import PAD, SASRec, SASRecRecipe
from models.wukong import WukongRecipe

FEATURES, FIELDS, ITEMS, TOKENS, CANDIDATES = 60, 6, 50, 7, 5


@seeded
def dcnv2() -> Specimen:
    model = Recipe(width=16, cross_layers=2, deep=(32, 16)).build(FEATURES, FIELDS)
    nn.init.normal_(model.embedding.weight)  # as after training: the first embeddings are a hundred times smaller
    return Specimen("dcnv2", model, call, torch.randint(FEATURES, (ROWS, FIELDS)))


@seeded
def wukong() -> Specimen:
    model = WukongRecipe(layers=2, hidden=32, head=(32,)).build(FEATURES, FIELDS)
    nn.init.normal_(model.embedding.weight)
    return Specimen("wukong", model, call, torch.randint(FEATURES, (ROWS, FIELDS)))


@seeded
def sasrec() -> Specimen:
    model = SASRec(SASRecRecipe(width=32, longest=TOKENS + 2), ITEMS)
    for table in (model.item_emb, model.pos_emb):
        nn.init.normal_(table.weight)
    history = torch.randint(1, ITEMS + 1, (ROWS, TOKENS))
    history[: ROWS // 2, :2] = PAD
    return Specimen("sasrec", model, call_all, (history, torch.randint(1, ITEMS + 1, (ROWS, CANDIDATES))))


@seeded
def hstu() -> Specimen:
    model = nn.Sequential(*(zoo_ranking_models.SequentialTransducer(32, 2) for _ in range(2)))
    return Specimen("hstu", model, call, torch.randn(ROWS, 6, 32))


@seeded
def mmoe() -> Specimen:
    model = zoo_ranking_models.MultiGateExperts(16, experts=4, tasks=2)
    return Specimen("mmoe", model, call, torch.randn(ROWS, 16))


@seeded
def ple() -> Specimen:
    model = zoo_ranking_models.ProgressiveExtraction(16, tasks=2, experts=2)
    return Specimen("ple", model, call, torch.randn(ROWS, 16))


@seeded
def deepfm() -> Specimen:
    model = zoo_ranking_models.DeepFM(FEATURES, FIELDS, 16)
    return Specimen("deepfm", model, call, torch.randint(FEATURES, (ROWS, FIELDS)))


@seeded
def two_tower() -> Specimen:
    model = zoo_ranking_models.TwoTower(FEATURES, ITEMS, 16)
    batch = (torch.randint(FEATURES, (ROWS,)), torch.randint(ITEMS, (ROWS, CANDIDATES)))
    return Specimen("two_tower", model, call_all, batch)
