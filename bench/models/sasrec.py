"""SASRec, a next-item model over a user's history, and how it is trained: a few minutes on one core.

Kang & McAuley 2018, "Self-Attentive Sequential Recommendation" (arXiv 1808.09781), in the form of pmixer/SASRec.pytorch,
in which no weight of a block is an nn.Linear's: the feed-forward layers are Conv1d with a kernel of one, and
nn.MultiheadAttention keeps a packed projection, of which query and key here read different inputs. Otherwise than there,
a position does not attend to padding, so that a score does not depend on how far its batch is padded; and training is
by a sampled softmax, which needs a tenth of the epochs that one negative per position does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.trained import BestEpoch, alone, kept

PAD = 0  # items are numbered from 1
VALIDATION_NEGATIVES = 4096  # the same for all users: fewer make epochs differ by what was drawn


@dataclass(frozen=True, slots=True)
class SASRecRecipe:
    """Architecture and training: `negatives` uniform items, shared by a batch of `batch_size` users, oppose each target."""

    width: int = 64
    blocks: int = 2
    heads: int = 2
    longest: int = 50
    dropout: float = 0.3
    learning_rate: float = 1e-3
    batch_size: int = 128
    negatives: int = 512
    epochs: int = 14
    patience: int = 2
    seed: int = 0


class PointwiseFeedForward(nn.Module):
    """Two convolutions over time with a kernel of one, and the residual."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, kernel_size=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[n, tokens, width] -> the same."""
        hidden = self.dropout(torch.relu(self.conv1(x.transpose(1, 2))))
        return x + self.dropout(self.conv2(hidden)).transpose(1, 2)


class SASRec(nn.Module):
    """Histories are padded with PAD on the left, and positions are counted from the right: the last item has the same."""

    def __init__(self, recipe: SASRecRecipe, items: int) -> None:
        super().__init__()
        width, blocks = recipe.width, range(recipe.blocks)
        self.longest, self.heads = recipe.longest, recipe.heads
        self.item_emb = nn.Embedding(items + 1, width, padding_idx=PAD)
        self.pos_emb = nn.Embedding(recipe.longest, width)
        self.dropout = nn.Dropout(recipe.dropout)
        self.attention_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in blocks)
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, recipe.heads, recipe.dropout, batch_first=True) for _ in blocks
        )
        self.forward_norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-8) for _ in blocks)
        self.forwards = nn.ModuleList(PointwiseFeedForward(width, recipe.dropout) for _ in blocks)
        self.last_norm = nn.LayerNorm(width, eps=1e-8)
        for table in (self.item_emb, self.pos_emb):
            nn.init.xavier_normal_(table.weight)
        with torch.no_grad():
            self.item_emb.weight[PAD] = 0

    def states(self, history: Tensor) -> Tensor:
        """int64 [n, tokens] -> [n, tokens, width]: what is known after each item."""
        tokens, padding = history.shape[1], history == PAD
        x = self.item_emb(history) * self.item_emb.embedding_dim**0.5
        x = x + self.pos_emb(torch.arange(self.longest - tokens, self.longest, device=history.device))
        real = ~padding.unsqueeze(2)
        x = self.dropout(x) * real
        itself = torch.eye(tokens, dtype=torch.bool, device=history.device)
        ahead = torch.ones(tokens, tokens, dtype=torch.bool, device=history.device).triu(1)
        unseen = (ahead | (padding.unsqueeze(1) & ~itself)).repeat_interleave(self.heads, dim=0)
        blocks = zip(self.attention_norms, self.attentions, self.forward_norms, self.forwards, strict=True)
        for attention_norm, attention, forward_norm, feed_forward in blocks:
            query = attention_norm(x)
            attended, _ = attention(query, x, x, attn_mask=unseen, need_weights=False)
            x = feed_forward(forward_norm(query + attended)) * real
        states: Tensor = self.last_norm(x)
        return states

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """int64 [n, tokens], int64 [n, candidates] -> logits float32 [n, candidates] of the next item."""
        last = self.states(history)[:, -1].unsqueeze(2)
        return torch.matmul(self.item_emb(candidates), last).squeeze(2)


def cached(recipe: SASRecRecipe, sequences: Tensor, items: int, folder: Path | None) -> SASRec:
    """What `train` gives, from `folder` where it is there already; see `trained.kept`."""
    model = SASRec(recipe, items)
    weights = kept("sasrec", recipe, (sequences,), (SASRec,), folder, lambda: train(recipe, sequences, items))
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def train(recipe: SASRecRecipe, sequences: Tensor, items: int) -> nn.Module:
    """A model in evaluation mode, with the weights of the epoch that best foretold each user's last item.

    sequences: int64 [users, longest + 2], items from 1 to `items` in the order of time, PAD on the left; the last one is
    for validation only. The global random state and the number of threads are as before afterwards.
    """
    with alone(recipe.seed):
        model = SASRec(recipe, items)
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
        sample = torch.randint(1, items + 1, (VALIDATION_NEGATIVES,))
        best = BestEpoch(model, recipe.patience)
        for _ in range(recipe.epochs):
            model.train()
            for history in _batches(sequences[:, :-1], recipe.batch_size):
                optimizer.zero_grad()
                negatives = torch.randint(1, items + 1, (recipe.negatives,))
                loss = _sampled_softmax(model, history[:, :-1], history[:, 1:], negatives)
                torch.autograd.backward(loss)
                optimizer.step()
            with torch.no_grad():
                model.eval()
                each = [_last_loss(model, part, sample) for part in torch.split(sequences, 1000)]
            if best.enough(float(torch.cat(each).mean())):
                break
    return best.restored()


def _batches(sequences: Tensor, size: int) -> Iterator[Tensor]:
    """All users once in random order, users of like length together, so that little padding is computed."""
    length = (sequences != PAD).sum(dim=1)
    shuffled = torch.randperm(len(sequences))
    shuffled = shuffled[length[shuffled] > 1]
    groups = [rows[length[rows].argsort()] for rows in torch.split(shuffled, 32 * size)]
    batches = [rows for group in groups for rows in torch.split(group, size)]
    for number in torch.randperm(len(batches)).tolist():
        rows = batches[number]
        yield sequences[rows, -int(length[rows].max()) :]


def _sampled_softmax(model: SASRec, history: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
    """Mean over all items that have one before them of -log of the item's share among itself and the negatives."""
    real = history != PAD
    return _loss(model, model.states(history)[real], targets[real], negatives).mean()


def _last_loss(model: SASRec, sequences: Tensor, negatives: Tensor) -> Tensor:
    """The same for the last item of each user, [users]."""
    return _loss(model, model.states(sequences[:, -model.longest - 1 : -1])[:, -1], sequences[:, -1], negatives)


def _loss(model: SASRec, states: Tensor, wanted: Tensor, negatives: Tensor) -> Tensor:
    own = (states * model.item_emb(wanted)).sum(dim=1, keepdim=True)
    others = states @ model.item_emb(negatives).T
    others = others.masked_fill(wanted.unsqueeze(1) == negatives, -torch.inf)
    return torch.cat([own, others], dim=1).logsumexp(dim=1) - own.squeeze(1)
