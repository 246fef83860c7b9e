"""Metrics of an order: nDCG@k, MRR@k, recall@k and hit rate@k, per unit (query, user, session).

Invariant: a tie counts against the model. Low precision makes ties (a recommender went from 156 exact ties with the
relevant item to over 800 in FP8), and an order that depends on which equal item happens to come first is not the
model's doing. The alternative, the mean over the orders of the tied (as scikit-learn), hides the loss of resolution.

One integer key per candidate holds the whole pessimistic order, so that one `topk` ranks: the float32 score, made
ordinal, in the high half, minus the bits of the relevance in the low half.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from precimap.errors import TaskError
from precimap.metrics.metric import UnitMean, refuse_units


@dataclass(frozen=True)
class _AtK(UnitMean):
    """What they share: scores [units, candidates], labels, ties, and values in [0, 1].

    `scores`: float [units, candidates], compared in float32; -inf says "not a candidate" (a pad or a mask): it has no
    rank and its label is not read. `labels`: either the index of the one relevant candidate, integer [units], or
    relevances >= 0, [units, candidates] (relevant means > 0).

    Raises TaskError for k < 1, shapes that do not fit, a NaN score, a relevance that is negative or not finite, an
    index that is out of range, and for a unit without a relevant candidate: its value would be 0/0, and counting it as
    0 for both models would dilute the drop. Leave such units out of the split.
    """

    k: int
    higher_is_better: ClassVar[bool] = True
    worst: ClassVar[float | None] = 1.0

    def __post_init__(self) -> None:
        if type(self.k) is not int or self.k < 1:
            raise TaskError(f"{type(self).__name__}(k) takes a whole number k >= 1; got {self.k!r}.")


@dataclass(frozen=True)
class NDCG(_AtK):
    """Normalised discounted cumulative gain of the first k: gain 2**relevance - 1, discount log2(rank + 1).

    Burges et al. 2005, "Learning to rank using gradient descent"; the ideal order is cut at k, too. For a single
    relevant candidate it is 1 / log2(rank + 1), or 0 below rank k. Shapes, ties and errors: see the base class.
    """

    @property
    def name(self) -> str:
        return f"nDCG@{self.k}"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units], in [0, 1]."""
        relevance = _relevance(scores, labels)
        ideal = _discounted_gain(relevance.topk(min(self.k, relevance.shape[1])).values)
        refuse_units(~torch.isfinite(ideal), "relevances so large that 2**relevance overflows; give grades")
        return _discounted_gain(_first(self.k, scores, relevance)) / ideal


@dataclass(frozen=True)
class MRR(_AtK):
    """Reciprocal rank of the first relevant candidate, 0 when it is below rank k; its mean is MRR@k.

    Shapes, ties and errors: see the base class.
    """

    @property
    def name(self) -> str:
        return f"MRR@{self.k}"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units], in [0, 1]."""
        hits = _first(self.k, scores, _relevant(scores, labels)) > 0
        rank = hits.double().argmax(dim=1) + 1  # argmax returns the first of equals
        return hits.any(dim=1) / rank.double()


@dataclass(frozen=True)
class Recall(_AtK):
    """Share of a unit's relevant candidates that are among the first k; with one relevant candidate the hit rate HR@k.

    Shapes, ties and errors: see the base class.
    """

    @property
    def name(self) -> str:
        return f"recall@{self.k}"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units], in [0, 1]."""
        relevant = _relevant(scores, labels)
        found = _first(self.k, scores, relevant).sum(dim=1, dtype=torch.float64)
        return found / relevant.sum(dim=1, dtype=torch.float64)


@dataclass(frozen=True)
class HitRate(_AtK):
    """1 where any relevant candidate is among the first k, else 0; with one relevant candidate the same as recall.

    Shapes, ties and errors: see the base class.
    """

    @property
    def name(self) -> str:
        return f"hit rate@{self.k}"

    def per_unit(self, scores: Tensor, labels: Any, losses: Tensor) -> Tensor:
        """float64 [units], 0 or 1."""
        return (_first(self.k, scores, _relevant(scores, labels)) > 0).any(dim=1).double()


def _relevance(scores: Tensor, labels: Any) -> Tensor:
    """Labels in either form -> relevance float32 [units, candidates], 0 for what is not a candidate."""
    if scores.dim() != 2:
        raise TaskError(f"an order metric takes scores [units, candidates]; they came as {list(scores.shape)}.")
    refuse_units(torch.isnan(scores).any(dim=1), "a NaN score, which has no rank; use -inf for 'not a candidate'")
    given = torch.as_tensor(labels, device=scores.device)
    if given.shape == scores.shape:
        relevance = given.float()
        refuse_units(~(torch.isfinite(relevance) & (relevance >= 0)).all(dim=1), "a relevance that is not >= 0, finite")
    elif given.shape == scores.shape[:1] and not given.is_floating_point() and given.dtype != torch.bool:
        refuse_units((given < 0) | (given >= scores.shape[1]), f"an index outside 0..{scores.shape[1] - 1} as label")
        relevance = torch.zeros(scores.shape, dtype=torch.float32, device=scores.device).scatter_(
            1, given.long().unsqueeze(1), 1.0
        )
    else:
        raise TaskError(
            f"an order metric on scores {list(scores.shape)} takes integer labels [units] (the index of the relevant "
            f"candidate) or relevances [units, candidates]; the labels are {given.dtype} {list(given.shape)}."
        )
    relevance = relevance.masked_fill(scores == -torch.inf, 0.0)
    refuse_units(
        ~(relevance > 0).any(dim=1),
        "no relevant candidate, so that their value is 0/0. Leave such units out of the split: counted as 0 for both "
        "models they would dilute the drop",
    )
    return relevance


def _relevant(scores: Tensor, labels: Any) -> Tensor:
    """As `_relevance`, each 0 or 1."""
    return (_relevance(scores, labels) > 0).float()


def _first(k: int, scores: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of the first k candidates, [units, min(k, candidates)], the less relevant first among equal scores."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes -0 and +0 the same score
    ordinal = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordinal.long() << 32) - relevance.view(torch.int32)  # bits of a float >= 0 are in its order
    return relevance.gather(1, key.topk(min(k, key.shape[1])).indices)


def _discounted_gain(relevance: Tensor) -> Tensor:
    """sum over ranks 1, 2, ... of (2**relevance - 1) / log2(rank + 1), float64 [units]."""
    rank = torch.arange(1, relevance.shape[1] + 1, device=relevance.device, dtype=torch.float64)
    return ((torch.exp2(relevance.double()) - 1) / torch.log2(rank + 1)).sum(dim=1)
