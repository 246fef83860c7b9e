"""Small ranking models from the papers, where no code can be installed: faithful in how they multiply, and tiny.

Weights are uniform with a fan-in scale; nothing is trained. What the benchmarks train themselves (DCNv2, Wukong, SASRec)
is in bench/models/, written once.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.zoo_models import uniform


def tower(width: int) -> nn.Sequential:
    """[n, width] -> the logit of a task, [n, 1]."""
    return nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 1))


class SequentialTransducer(nn.Module):
    """One HSTU block (Zhai et al. 2024): one projection to u, v, q, k by `addmm`, SiLU attention by `einsum`, gate u."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.uvqk = uniform(width, 4 * width, fan_in=width)
        self.uvqk_bias = nn.Parameter(torch.zeros(4 * width))
        self.out = uniform(width, width, fan_in=width)
        self.out_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        n, tokens, width = x.shape
        normed = F.layer_norm(x, (width,)).reshape(n * tokens, width)
        mixed = F.silu(torch.addmm(self.uvqk_bias, normed, self.uvqk))
        u, v, q, k = mixed.reshape(n, tokens, 4, self.heads, width // self.heads).unbind(dim=2)
        weights = F.silu(torch.einsum("nqhd,nkhd->nhqk", q, k)) / tokens
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        attended = torch.einsum("nhqk,nkhd->nqhd", weights * causal, v).reshape(n * tokens, width)
        gated = F.layer_norm(attended, (width,)) * u.reshape(n * tokens, width)
        return x + torch.addmm(self.out_bias, gated, self.out).reshape(n, tokens, width)


class MultiGateExperts(nn.Module):
    """MMoE (Ma et al. 2018): shared experts in a ModuleList, one gate and one tower per task."""

    def __init__(self, width: int, experts: int, tasks: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(width, 32), nn.ReLU()) for _ in range(experts)])
        self.gates = nn.ModuleList([nn.Linear(width, experts, bias=False) for _ in range(tasks)])
        self.towers = nn.ModuleList([tower(32) for _ in range(tasks)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, tasks]."""
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        scores = []
        for gate, head in zip(self.gates, self.towers, strict=True):
            share = torch.softmax(gate(x), dim=1).unsqueeze(2)
            scores.append(head((outputs * share).sum(dim=1)))
        return torch.cat(scores, dim=1)


class Extraction(nn.Module):
    """One level of PLE: each task's gate mixes its own experts and the shared ones, by `bmm`; a shared gate mixes all."""

    def __init__(self, inputs: int, width: int, tasks: int, experts: int, shared_gate: bool) -> None:
        super().__init__()
        self.own = nn.ModuleList([self._experts(inputs, width, experts) for _ in range(tasks)])
        self.shared = self._experts(inputs, width, experts)
        self.gates = nn.ModuleList([nn.Linear(inputs, 2 * experts, bias=False) for _ in range(tasks)])
        self.shared_gate = nn.Linear(inputs, (tasks + 1) * experts, bias=False) if shared_gate else None

    @staticmethod
    def _experts(inputs: int, width: int, count: int) -> nn.ModuleList:
        return nn.ModuleList([nn.Sequential(nn.Linear(inputs, width), nn.ReLU()) for _ in range(count)])

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """[n, inputs] of each task, then of the shared experts -> [n, width] of each task, then of the shared gate."""
        *tasks, common = inputs
        own = [torch.stack([expert(x) for expert in experts], 1) for x, experts in zip(tasks, self.own, strict=True)]
        shared = torch.stack([expert(common) for expert in self.shared], 1)
        mixed = [
            _mixed(gate(x), torch.cat([each, shared], 1)) for gate, x, each in zip(self.gates, tasks, own, strict=True)
        ]
        if self.shared_gate is not None:
            mixed.append(_mixed(self.shared_gate(common), torch.cat([*own, shared], 1)))
        return mixed


def _mixed(gate: Tensor, experts: Tensor) -> Tensor:
    """[n, experts], [n, experts, width] -> [n, width]."""
    return torch.bmm(torch.softmax(gate, dim=1).unsqueeze(1), experts).squeeze(1)


class ProgressiveExtraction(nn.Module):
    """PLE (Tang et al. 2020): two extraction levels, the second without a shared gate, and one tower per task."""

    def __init__(self, width: int, tasks: int, experts: int) -> None:
        super().__init__()
        self.first = Extraction(width, 32, tasks, experts, shared_gate=True)
        self.second = Extraction(32, 32, tasks, experts, shared_gate=False)
        self.towers = nn.ModuleList([tower(32) for _ in range(tasks)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, tasks]."""
        mixed = self.second(self.first([x] * (len(self.towers) + 1)))
        return torch.cat([head(each) for head, each in zip(self.towers, mixed, strict=True)], dim=1)


class DeepFM(nn.Module):
    """Guo et al. 2017: first-order weights, a factorization machine and an MLP over one table of embeddings, added.

    The machine is the square of the sum minus the sum of the squares: elementwise, no product of matrices.
    """

    def __init__(self, features: int, fields: int, width: int) -> None:
        super().__init__()
        self.first_order = nn.Embedding(features, 1)
        self.embedding = nn.Embedding(features, width)
        self.deep = nn.Sequential(
            nn.Linear(fields * width, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        """int64 [n, fields] -> [n]."""
        embedded = self.embedding(features)
        pairs = 0.5 * (embedded.sum(1).square() - embedded.square().sum(1)).sum(1)
        return self.first_order(features).sum((1, 2)) + pairs + self.deep(embedded.flatten(1)).squeeze(1)


class TwoTower(nn.Module):
    """A retrieval model: a tower for the user, one for items, and the cosine of their results by `bmm`."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_tower, self.item_tower = (
            nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 16)) for _ in range(2)
        )

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        """int64 [n], int64 [n, candidates] -> [n, candidates]."""
        queries = F.normalize(self.user_tower(self.users(user)), dim=-1)
        answers = F.normalize(self.item_tower(self.items(item)), dim=-1)
        return torch.bmm(answers, queries.unsqueeze(2)).squeeze(2)
