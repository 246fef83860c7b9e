"""Fitting the scale and the bias that bring a quantised model's scores back to the baseline's.

Invariant: scores are logits, of a click for instance. Label-free, on the calibration split alone; so it repairs what
rounding did and nothing that the baseline got wrong, and a certificate of the repaired map rests on data that chose
nothing. A fit on labels would answer another question: it repairs the baseline, too.
"""

import json
import math
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import nn

from precimap.journal import Journal
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer, quantize_map
from precimap.layers.views import parameter_names
from precimap.metrics.click import platt
from precimap.precision_map import PrecisionMap, Realignment
from precimap.task import Task, to_device

Floats = NDArray[np.float64]


Fit = tuple[tuple[float, ...], tuple[float, ...]]


def realigning(scores: Floats, baseline: Floats) -> Fit:
    """Scale and shift of each column under which its probabilities come nearest to the baseline's; logits [n, columns].

    Nearest in the log-loss against the baseline's own probabilities, so that their means agree (calibration) and an
    error counts where it costs. The least squared distance of the logits, the alternative, is ruled by the far negative
    ones: on NCF-MLP it left three times the spread over rounding grids (docs/log.md). Values that are not finite in
    both are left out.
    """
    fits = [_column(x, y) for x, y in zip(scores.T, baseline.T, strict=True)]
    return tuple(scale for scale, _ in fits), tuple(shift for _, shift in fits)


def _column(x: Floats, y: Floats) -> tuple[float, float]:
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if not len(x):
        return 1.0, 0.0
    scale, shift = platt(x, expit(y), np.ones(len(x)))
    # A model that turned its scores round, or flattened them, is not repaired by a scale.
    return (scale, shift) if math.isfinite(shift) and scale > 0 else (1.0, float(y.mean() - x.mean()))


def by_output(scores: Floats, outputs: int) -> Floats:
    """Scores of any shape as [n, outputs]: with one output every score is its own, with several they are the last dim."""
    return scores.reshape(-1, outputs)


class Realigner:
    """Realigns a task's model at the layer that makes the score; the baseline is scored once."""

    def __init__(self, task: Task, layer: str) -> None:
        self._task = task
        self._layer = layer
        self.outputs = len(parameter_names(task.model)[layer])

    def of(self, journal: Journal, precision_map: PrecisionMap) -> PrecisionMap:
        """The map with its realignment, from the journal where that holds it; a map of nothing stays as it is."""
        if not precision_map.low:
            return precision_map
        subject = precision_map.fingerprint
        row = journal.find("realignment", subject)
        if row is None:
            found = self.fit(quantize_map(self._task.model, precision_map))
            journal.record("realignment", subject, found.model_dump())
            row = journal.find("realignment", subject)
        assert row is not None
        return precision_map.model_copy(update={"realignment": Realignment.model_validate_json(json.dumps(row.value))})

    def fit(self, layers: Mapping[str, QuantizedLayer]) -> Realignment:
        """Of the model with these layers in low precision."""
        model = self._task.model
        with quantized(model, layers):
            scores = self._scores(model)
        scale, shift = realigning(scores, self._baseline)
        return Realignment(layer=self._layer, scale=scale, shift=shift, n=len(scores))

    @cached_property
    def _baseline(self) -> Floats:
        with quantized(self._task.model, {}):
            return self._scores(self._task.model)

    def _scores(self, model: nn.Module) -> Floats:
        """All scores of the calibration split, [n, outputs of the layer]."""
        task, found = self._task, []
        with torch.no_grad():
            for batch in task.splits.calibration:
                scores = task.forward(model, to_device(batch, task.device))
                found.append(by_output(scores.double().cpu().numpy(), self.outputs))
        return np.concatenate(found)
