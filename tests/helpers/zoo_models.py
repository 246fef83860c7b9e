"""Small models which keep their weights where `nn.Linear` does not show them, as ranking models in the wild do.

Each is faithful in how it multiplies (which op, which operand is the weight, which weights are shared), and tiny.
Weights are uniform with a fan-in scale; nothing is trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def uniform(*shape: int, fan_in: int) -> nn.Parameter:
    """A weight from U(-1, 1) / sqrt(fan_in) * sqrt(3): unit gain for unit inputs."""
    return nn.Parameter((torch.rand(*shape) * 2 - 1) * (3.0 / fan_in) ** 0.5)


class LeftCross(nn.Module):
    """DCN-v2's matrix cross (Wang et al. 2021): all layers in one parameter, weight on the left of `matmul`."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.kernels = uniform(layers, width, width, fan_in=width)
        self.bias = uniform(layers, width, 1, fan_in=width)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, 1]."""
        start = state = x.unsqueeze(2)
        for layer in range(self.kernels.shape[0]):
            state = start * (torch.matmul(self.kernels[layer], state) + self.bias[layer]) + state
        return self.head(state.squeeze(2))


class LowRankCross(nn.Module):
    """DCN-v2's low-rank cross: W = U V, both in a ParameterList, applied by `F.linear`."""

    def __init__(self, layers: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.ParameterList([uniform(rank, width, fan_in=width) for _ in range(layers)])
        self.up = nn.ParameterList([uniform(width, rank, fan_in=rank) for _ in range(layers)])
        self.bias = nn.ParameterList([uniform(width, fan_in=width) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n]."""
        state = x
        for down, up, bias in zip(self.down, self.up, self.bias, strict=True):
            state = x * F.linear(F.linear(state, down), up, bias) + state
        return state.sum(dim=1)


class FieldAttention(nn.Module):
    """AutoInt's interacting layer (Song et al. 2019): projections of the fields by `tensordot`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.residual = (uniform(width, width, fan_in=width) for _ in range(4))

    def forward(self, fields: Tensor) -> Tensor:
        """[n, fields, width] -> the same."""
        q, k, v = (
            torch.tensordot(fields, weight, dims=([-1], [0])).unflatten(-1, (self.heads, -1))
            for weight in (self.query, self.key, self.value)
        )
        attention = torch.softmax(torch.einsum("nihd,njhd->nhij", q, k), dim=-1)
        mixed = torch.einsum("nhij,njhd->nihd", attention, v).flatten(-2)
        return torch.relu(mixed + torch.tensordot(fields, self.residual, dims=([-1], [0])))


class RecurrentScorer(nn.Module):
    """A two-layer LSTM over a session and a score of its last state."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, sessions: Tensor) -> Tensor:
        """[n, tokens, width] -> [n, 1]."""
        states, _ = self.lstm(sessions)
        return self.head(states[:, -1])


class TiedLanguageModel(nn.Module):
    """Embedding and output head are one parameter."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [n, tokens] -> logits [n, tokens, vocabulary]."""
        return self.lm_head(torch.tanh(self.mix(self.embedding(tokens))))


class TiedAutoencoder(nn.Module):
    """The decoder multiplies by the transpose of the encoder's weight."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.weight = uniform(code, width, fan_in=width)
        self.visible_bias = uniform(width, fan_in=width)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> the same."""
        return F.linear(torch.relu(F.linear(x, self.weight)), self.weight.t(), self.visible_bias)


class BagScorer(nn.Module):
    """Multi-hot ids by `embedding_bag`, then an MLP."""

    def __init__(self, ids: int, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ids, width, mode="sum")
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """int64 [all ids], int64 [n] -> [n, 1]."""
        return self.mlp(self.bag(ids, offsets))


class StackedExperts(nn.Module):
    """All experts in two parameters [experts, in, out], applied by `bmm`; a router weighs them."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.up = uniform(experts, width, hidden, fan_in=width)
        self.down = uniform(experts, hidden, width, fan_in=hidden)
        self.router = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> the same."""
        copies = x.expand(self.up.shape[0], -1, -1)
        outputs = torch.bmm(torch.relu(torch.bmm(copies, self.up)), self.down)
        return torch.einsum("ne,enw->nw", torch.softmax(self.router(x), dim=1), outputs)


class WithoutGradient(nn.Module):
    """A model that its owner serves under its own `no_grad`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, 1]."""
        return self.net(x)


class UnusedHead(nn.Module):
    """A training-time head is still called, and nobody reads it; a second one is not even called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, 32)
        self.score = nn.Linear(32, 1)
        self.auxiliary = nn.Linear(32, 16)
        self.retired = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width] -> [n, 1]."""
        hidden = torch.relu(self.body(x))
        self.auxiliary(hidden)
        return self.score(hidden)
