"""Judge one given map, on the task's certify split: a map from a file, on fresh data, or with another margin.

Invariant: the same question about the same data is free, every other one spends alpha of that split. A bound of one map
serves every margin, so a certified map may be asked about a wider margin again.
"""

from pathlib import Path

from precimap.errors import MapError, TaskError
from precimap.fingerprints import of_weights
from precimap.journal import run_journal
from precimap.layers.target import Target
from precimap.precision_map import PrecisionMap
from precimap.search import preflight
from precimap.search.certificate.certify import Question, baseline_to_certify, certify, mapped
from precimap.search.certificate.ledger import Ledger
from precimap.search.evidence.probe import Comparison, compare
from precimap.search.limits import Limits, chain_fingerprint, state_directory
from precimap.search.progress import Progress, silent
from precimap.search.run import Run, scored
from precimap.search.split_checks import check_splits
from precimap.task import Task


def recertify(
    task: Task,
    precision_map: PrecisionMap,
    *,
    target: Target,
    margin: float,
    confidence: float = 0.95,
    alpha_budget: float | None = None,
    ledger: str | Path | None = None,
    progress: Progress = silent,
) -> PrecisionMap:
    """The map with the certificate that the task's certify split gives it.

    Raises PremiseMismatch for other weights or another metric, MapError for a map without a low-precision layer,
    TaskError when the map was chosen on this very data, AlphaSpent when the split has judged other maps.
    """
    limits = Limits(margin, confidence, None, alpha_budget)
    preflight.check_weights(task)
    precision_map.check(weights=of_weights(task.model), metric=task.metric.name)
    if not precision_map.low:
        raise MapError("the map keeps every layer at base precision; there is nothing to certify")
    prints = preflight.fingerprint_splits(task)
    if prints.certify.whole == precision_map.premise.search:
        raise TaskError("the map was chosen on this certify split; a certificate needs data that chose nothing")
    check_splits(task)
    with run_journal(None, {}) as journal:
        run, split = Run(task, journal, progress), prints.certify.whole
        preflight.check_baseline(task, baseline_to_certify(run, target, split), "certify")
        seen = _on_search(run, target, precision_map, limits.alpha) if _needs_search(task) else None
        spent = _spent(task, precision_map, limits, split, Path(ledger) if ledger else state_directory())
        certificates = certify(run, target, [precision_map], Question(margin, limits.alpha, spent, split), [seen])
    return precision_map.model_copy(update={"certificate": certificates[0]})


def _needs_search(task: Task) -> bool:
    """Whether the bound looks at the search split: for a loss without a limit, or clusters of unequal size."""
    metrics = [task.metric, *(guard.metric for guard in task.guarded)]
    return any(metric.worst is None for metric in metrics) or task.clusters is not None or task.weights is not None


def _on_search(run: Run, target: Target, precision_map: PrecisionMap, alpha: float) -> Comparison:
    """What the map does on the task's search split: the worst unit there counts in the bound, too."""
    parts = [
        scored(run, "search", name, run.task.splits.search, running)
        for name, running in (
            ("baseline", lambda: target.running(run.task.model, {})),
            ("map", lambda: mapped(run.task.model, target, precision_map)),
        )
    ]
    return compare(run.task, parts[0].whole, parts[1].whole, alpha)


def _spent(task: Task, precision_map: PrecisionMap, limits: Limits, split: str, ledger: Path) -> float:
    before = precision_map.certificate
    same_question = (
        before is not None
        and (before.map, before.split) == (precision_map.fingerprint, split)
        and before.certified
        and {name: answer.margin for name, answer in before.guards.items()}
        == {guard.label: guard.margin for guard in task.guarded}
        and before.margin <= limits.margin
        and before.alpha <= limits.alpha
    )
    if before is not None and same_question:
        return before.spent_alpha
    book = Ledger.open(ledger, split, limits.budget)
    return book.spend(
        chain_fingerprint([precision_map], task.guarded),
        limits.alpha,
        f"{task.name}: one map for {precision_map.target}",
    )
