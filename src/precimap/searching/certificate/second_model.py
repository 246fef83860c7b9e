"""compare(): is another model as good as the task's own, by the same bound, ledger and certificate as a map?

A cast to BF16, the scores of another engine, a retrained or distilled model: whatever gives one row of scores for each unit.

Invariant: the second model is a question like any other. It is known by what it makes of the search split, to three
digits, and by its weights where it has any, so that asking again is free and another model is another question. The
alternative, to know a callable by its code, would take two engines behind one function for one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np
from torch import Tensor, nn

from precimap.certificate import Certificate
from precimap.errors import InputError
from precimap.fingerprints import of_weights
from precimap.journal import run_journal
from precimap.layers.inventory import Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.numerics.schemes import Scheme
from precimap.searching.certificate.booking import Booking
from precimap.searching.certificate.certify import SecondModel
from precimap.searching.certificate.one_map import on_search
from precimap.searching.preflight.checks import check_task, check_unchanged, doubts
from precimap.searching.progress import Progress, silent
from precimap.searching.question import Question, Terms, margin_of
from precimap.searching.run import Pass, Run, scored
from precimap.searching.splits.three_splits import fingerprint_splits, unchanging
from precimap.task import Scored, Task


@dataclass(frozen=True, slots=True)
class _AsItIs:
    """Where a second model runs: wherever it does. Both models are scored as they are given."""

    name = "a second model"
    claim = "The scores of the second model as it ran here."
    timer = None
    whole_timer = None

    def refusal(self, layer: Layer, scheme: Scheme) -> str | None:
        return "a second model is no map"

    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> AbstractContextManager[nn.Module]:
        return nullcontext(model)


@dataclass(frozen=True, slots=True, eq=False)
class _Scores:
    """A function of a batch that stands where forward expects a model."""

    of: Callable[[Any], Tensor]


def compare(
    task: Task,
    second: nn.Module | Callable[[Any], Tensor],
    *,
    margin: float | str,
    progress: Progress = silent,
    on_note: Callable[[str], None] = lambda _: None,
    **terms: Unpack[Terms],
) -> Certificate:
    """Certify that `second` loses at most `margin` against the task's model, or say that it does, or that one cannot tell.

    second: a model in evaluation mode, which the task's forward is called with; or any callable that takes a batch of the
    task and returns its scores, one row for each unit, as forward does. The certify split must not have trained or chosen
    it. margin, and terms (confidence, alpha_budget, ledger): as `search` takes them. The certificate's `map` is the
    fingerprint of the second model. Both models stay as they were.

    Raises InputError for what is neither a model nor callable, TaskError for scores of another shape than the task's own
    and as `search` does, AlphaSpent when the split has judged other questions.
    """
    question = Question(margin=margin_of(margin, task.metric), **terms)
    first = check_task(task)
    if isinstance(second, nn.Module):
        check_task(replace(task, model=second))
    elif not callable(second):
        raise InputError(f"expected a model, or a function of a batch that returns scores, got {second!r:.60}")
    prints = fingerprint_splits(task, first.reads)
    for note in (*first.notes, *prints.notes, *doubts(task, first.scored, question.margin)):
        on_note(note)
    held = unchanging(task, prints)
    booking = Booking(task=held, prints=prints, first=first.scored, directory=question.ledger_directory)
    given: Any = second if isinstance(second, nn.Module) else _Scores(second)
    here = _AsItIs()
    with run_journal(None, {}) as journal:
        run = Run(replace(held, forward=_forward(task.forward)), journal, progress)
        searched = scored(
            run, Pass(kind="search", of="map", batches=held.splits.search, running=lambda: nullcontext(given))
        ).whole
        judged = SecondModel(given, _fingerprint(second, searched))
        seen = on_search(run, here, judged, question.alpha)
        said = f"{task.name}: one map for {here.name}"
        (certificate,) = booking.judged(run, here, [(judged, seen)], question, said)
    check_unchanged(task, first.scored)
    return certificate


def _forward(own: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The task's forward, that gives a function of a batch the batch alone."""

    def forward(model: Any, batch: Any) -> Tensor:
        return model.of(batch) if isinstance(model, _Scores) else own(model, batch)

    return forward


def _fingerprint(second: Any, searched: Scored) -> str:
    """Of its weights, where it has any, and of what it made of the search split."""
    weights = of_weights(second) if isinstance(second, nn.Module) else ""
    kept = np.char.mod("%.2e", np.concatenate([searched.losses, searched.values.reshape(-1)]))
    return hashlib.sha256(json.dumps([weights, kept.tolist()]).encode()).hexdigest()[:16]
