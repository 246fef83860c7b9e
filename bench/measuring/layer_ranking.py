"""How well does a score rank layers? Against what was measured directly, and by the error that its choice leaves.

Invariant: every score is computed on the same batches, those that the default search screened; the truth is measured on
the whole search split, the error that is left on the batches that its caller names. Which layers a random choice keeps
follows from fixed seeds.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from measuring.rival_scores import elementwise_gradient, layer_sqnr
from measuring.search_work import Pass, Work, plain_pass
from precimap.numerics.schemes import Scheme
from precimap.searching.evidence.predict import Predictor
from precimap.searching.pairs import Pair
from precimap.searching.run import scattered
from precimap.task import Batches

KEPT = (2, 6, 12)
RANDOM_DRAWS = 5
ORACLE, OURS, OURS_BY_LOSS = "oracle: output error, measured", "screen: output error", "screen: E[(change of loss)^2]"
RANDOM, SQNR, GRADIENT = f"random, mean of {RANDOM_DRAWS}", "layer SQNR", "NVIDIA elementwise gradient"

Scores = Mapping[str, float]  # layer -> how much it suffers; a higher score is kept in high precision first


@dataclass(frozen=True, slots=True)
class Truth:
    """What quantising one layer alone was measured to do on the whole search split, by layer."""

    loss_square: Scores
    output_error: Scores
    n: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """One score, judged.

    loss, output: Spearman with the measured E[(change of loss)^2] and output error; None at random. left: k ->
    E||change of the scores||^2 with the k worst layers kept and all others quantised.
    """

    score: str
    loss: float | None
    output: float | None
    left: Mapping[int, float]


def distance(scores: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Mean over units of the squared distance between a unit's scores and its scores in `base`."""
    changes = torch.cat([(one - other).double() for one, other in zip(scores, base, strict=True)])
    return float(changes.square().sum()) / len(changes)


def scores_of(
    subject: Work, scheme: Scheme, predictor: Predictor, truth: Truth, batches: Sequence[Any]
) -> dict[str, Scores]:
    """Every score but the random ones, for the layers of the truth that the screen sees."""
    layers = [layer for layer in truth.output_error if (layer, scheme.name) in predictor.screen.pairs]
    task, inventory, calibration = subject.task, subject.inventory, subject.calibration
    found: dict[str, Scores] = {
        ORACLE: truth.output_error,
        OURS: {layer: predictor.screen.output_error((layer, scheme.name))[0] for layer in layers},
        OURS_BY_LOSS: {
            layer: float(np.square(predictor.loss_changes([(layer, scheme.name)])).mean()) for layer in layers
        },
        SQNR: layer_sqnr(task, inventory, calibration, scheme, batches),
        GRADIENT: elementwise_gradient(task, inventory, calibration, scheme, batches),
    }
    return {name: {layer: scores[layer] for layer in layers} for name, scores in found.items()}


class Residuals:
    """Measures the error that is left, each set of kept layers once."""

    def __init__(self, subject: Work, scheme: Scheme, batches: Sequence[Any]) -> None:
        self._subject, self._pairs, self._batches = subject, subject.of(scheme), batches
        self._base = plain_pass(subject, (), batches).scores
        self._known: dict[frozenset[str], float] = {}
        self.n = sum(map(len, self._base))

    def left(self, kept: frozenset[str]) -> float:
        """E||change of the scores||^2 per unit, every layer quantised but those in `kept`."""
        if kept not in self._known:
            pairs = [pair for pair in self._pairs if pair[0] not in kept]
            self._known[kept] = distance(plain_pass(self._subject, pairs, self._batches).scores, self._base)
        return self._known[kept]


def ranked(name: str, scores: Scores, truth: Truth, residuals: Residuals) -> Ranking:
    """Judge one score."""
    layers = list(scores)
    column = [scores[layer] for layer in layers]
    order = sorted(layers, key=lambda layer: -scores[layer])
    return Ranking(
        name,
        float(spearmanr(column, [truth.loss_square[layer] for layer in layers]).statistic),
        float(spearmanr(column, [truth.output_error[layer] for layer in layers]).statistic),
        {k: residuals.left(frozenset(order[:k])) for k in KEPT if k < len(layers)},
    )


def at_random(layers: Sequence[str], residuals: Residuals) -> Ranking:
    """The mean over orders that know nothing. A rank correlation of them would be a draw about zero: none is given."""
    orders = [np.random.default_rng(seed).permutation(layers).tolist() for seed in range(RANDOM_DRAWS)]
    left = {
        k: float(np.mean([residuals.left(frozenset(order[:k])) for order in orders])) for k in KEPT if k < len(layers)
    }
    return Ranking(RANDOM, None, None, left)


def truth_of(singles: Mapping[Pair | None, Pass], scheme: Scheme) -> Truth:
    """From the plain loop's passes; `None` is the baseline's."""
    base = singles[None]
    found = {pair[0]: single for pair, single in singles.items() if pair is not None and pair[1] == scheme}
    return Truth(
        {layer: float(np.square(single.losses - base.losses).mean()) for layer, single in found.items()},
        {layer: distance(single.scores, base.scores) for layer, single in found.items()},
        len(base.losses),
    )


def rankings_of(
    subject: Work, scheme: Scheme, truth: Truth, predictor: Predictor, units: int, told: Callable[[Ranking], None]
) -> tuple[list[Ranking], int]:
    """Every score, judged, and the number of units behind the errors that are left; about `units` are asked for."""
    split = subject.task.splits.search
    scores = scores_of(subject, scheme, predictor, truth, _chosen(split, predictor.numbers))
    residuals = Residuals(subject, scheme, _chosen(split, scattered(predictor.baseline.sizes, units)))
    found = []
    for name, column in scores.items():
        found.append(ranked(name, column, truth, residuals))
        told(found[-1])
    found.append(at_random(list(scores[ORACLE]), residuals))
    told(found[-1])
    return found, residuals.n


def _chosen(split: Batches, numbers: Collection[int]) -> list[Any]:
    return [batch for number, batch in enumerate(split) if number in numbers]
