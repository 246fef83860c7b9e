"""Judge one given map, on the task's certify split: a map from a file, on fresh data, or with another margin.

Invariant: the same question about the same data is free, every other one spends alpha of that split, as the ledger has
it; the certificate that a map brings along is history, and no proof that a question was paid for. A split that is too
small to certify any map is asked nothing: the certificate says that it cannot tell, and names no drop.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Unpack

from torch import nn

from precimap.certificate import Certificate, Earlier
from precimap.errors import MapError, TaskError
from precimap.fingerprints import modules_of, of_weights
from precimap.journal import run_journal
from precimap.layers.target import Hardware, Target, as_given
from precimap.precision_map import PrecisionMap
from precimap.searching.certificate.booking import Booking, share_that_chose
from precimap.searching.certificate.certify import Judged, mapped
from precimap.searching.certificate.older_prints import older_print
from precimap.searching.comparison import Comparison, compare
from precimap.searching.preflight.checks import check_task, check_unchanged, doubts
from precimap.searching.progress import Progress, silent
from precimap.searching.question import Question, Terms, margin_of
from precimap.searching.run import Pass, Run, scored
from precimap.searching.splits.split_print import SplitPrint
from precimap.searching.splits.three_splits import SHARED_UNITS_ALLOWED, fingerprint_splits, unchanging
from precimap.targets import target_of
from precimap.task import Task


def certify(
    task: Task,
    precision_map: PrecisionMap | str | Path,
    *,
    margin: float | str,
    target: Target | Hardware | str | None = None,
    progress: Progress = silent,
    on_note: Callable[[str], None] = lambda _: None,
    **terms: Unpack[Terms],
) -> PrecisionMap:
    """The map with the certificate that the task's certify split gives it.

    precision_map: a map, or its file. target: where it will run, by default the map's own. margin, and terms (confidence,
    alpha_budget, ledger): as `search` takes them. on_note: told what is doubtful of the task.

    Raises PremiseMismatch for other weights, modules or another metric, MapError for a map without a low-precision layer,
    TaskError when the map was chosen on these data, in whatever batches, AlphaSpent when the split has judged other
    questions.
    """
    question = Question(margin=margin_of(margin, task.metric), **terms)
    if not isinstance(precision_map, PrecisionMap):
        precision_map = PrecisionMap.load(precision_map)
    where, model = target_of(target or precision_map.target, precision_map.target), task.model
    precision_map.check(weights=of_weights(model), metric=task.metric.name, architecture=modules_of(model))
    if not precision_map.changes:
        raise MapError("the map keeps every layer at base precision; there is nothing to certify")
    first = check_task(task)
    prints = fingerprint_splits(task, first.reads)
    _check_did_not_choose(task, precision_map, prints.certify)
    for note in (*first.notes, *prints.notes, *doubts(task, first.scored, question.margin)):
        on_note(note)
    task = unchanging(task, prints)
    booking = Booking(task=task, prints=prints, first=first.scored, directory=question.ledger_directory)
    said = f"{task.name}: one map for {precision_map.target}"
    with run_journal(None, {}) as journal:
        run = Run(task, journal, progress)
        seen = on_search(run, where, precision_map, question.alpha) if needs_search(task, prints.certify) else None
        (certificate,) = booking.judged(run, where, [(precision_map, seen)], question, said)
    check_unchanged(task, first.scored)
    before = () if precision_map.certificate is None else _history(precision_map.certificate)
    known = [row for row in before if row not in certificate.earlier and not _same(row, certificate)]
    certificate = certificate.model_copy(update={"earlier": (*known, *certificate.earlier)})
    return precision_map.model_copy(update={"certificate": certificate})


def needs_search(task: Task, certify: SplitPrint) -> bool:
    """Whether the bound looks at the search split: for a loss without a limit, or clusters of unequal size."""
    metrics = [task.metric, *(guard.metric for guard in task.guarded)]
    unequal = task.clusters is not None or task.weights is not None or certify.repeated > 0
    return unequal or any(metric.worst is None for metric in metrics)


def on_search(run: Run, target: Target, judged: Judged, alpha: float) -> Comparison:
    """What a map, or a second model, does on the task's search split: the worst unit there counts in the bound, too."""
    task, split = run.task, run.task.splits.search

    def running() -> AbstractContextManager[nn.Module]:
        return mapped(task.model, target, judged)

    def unchanged() -> AbstractContextManager[nn.Module]:
        return as_given(target, task.model)

    before = scored(run, Pass(kind="search", of="baseline", batches=split, running=unchanged))
    after = scored(run, Pass(kind="search", of="map", batches=split, running=running))
    return compare(task, before.whole, after.whole, alpha)


def _check_did_not_choose(task: Task, precision_map: PrecisionMap, certify: SplitPrint) -> None:
    """Raises TaskError for a certify split that chose the map, in whatever batches; MapError for a broken sketch."""
    try:
        share = share_that_chose(precision_map, certify)
    except ValueError as error:
        raise MapError(f"chosen_on: expected a sketch of the units that chose the map, got {error}") from error
    premise = precision_map.premise.search
    if not precision_map.chosen_on and older_print(task.splits.certify) == premise:
        share = 1.0
    if share > SHARED_UNITS_ALLOWED or certify.whole == premise:
        raise TaskError(
            f"the map was chosen on {100 * share:.3g} % of this certify split's {certify.n:,} units; a certificate needs "
            f"data that the search did not use, and more than {SHARED_UNITS_ALLOWED:.0%} is refused"
        )


def _history(before: Certificate) -> tuple[Earlier, ...]:
    """The certificate that a map brings along, and those before it; one of a split that was too small is no try."""
    if before.drop is None:
        return before.earlier
    fields = {name: getattr(before, name) for name in Earlier.model_fields}
    return (*before.earlier, Earlier(**fields))


def _same(row: Earlier, certificate: Certificate) -> bool:
    """Whether a row of the history is this very certificate, asked again."""
    return all(getattr(row, name) == getattr(certificate, name) for name in Earlier.model_fields)
