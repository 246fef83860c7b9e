"""plan(): how many rows do I need? What the splits can tell, as a table over margins, without a search.

Invariant: the same numbers that end a search early (`sample_size`); nothing is searched, certified or booked.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from precimap.journal import run_journal
from precimap.layers.target import EMULATED, Hardware, Target
from precimap.numerics.schemes import Scheme, schemes_of
from precimap.searching.calibrate import calibrated
from precimap.searching.eligibility import eligibility
from precimap.searching.preflight.checks import check_baseline, check_task, doubts
from precimap.searching.preflight.sample_size import Outlook, outlook, pilots
from precimap.searching.preflight.trial import tried
from precimap.searching.progress import Progress, silent
from precimap.searching.question import Question, margin_of
from precimap.searching.run import Run, scored_baseline
from precimap.searching.splits.three_splits import fingerprint_splits, unchanging
from precimap.searching.subject import Subject, inventory_of
from precimap.targets import hardware_of
from precimap.task import Task

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the margin that was asked for


@dataclass(frozen=True, slots=True, repr=False)
class Plan:
    """What a task's splits can tell: of the gate at several margins, then of each guard at its own.

    notes: what is worth knowing of the task. `possible` says whether a map could be certified at the margin asked for.
    """

    margin: float
    confidence: float
    rows: tuple[Outlook, ...]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Plan(margin {self.margin:g}, {'possible' if self.possible else 'no map can be certified'})"

    def as_row(self) -> dict[str, Any]:
        """For machines; what no number of units reaches is None."""
        rows = [
            {name: None if value == math.inf else value for name, value in asdict(row).items()} for row in self.rows
        ]
        told = {"margin": self.margin, "confidence": self.confidence, "possible": self.possible}
        return {**told, "rows": rows, "notes": list(self.notes)}

    @property
    def possible(self) -> bool:
        return not any(row.impossible for row in self.asked)

    @property
    def asked(self) -> tuple[Outlook, ...]:
        """The rows that decide: the gate at the margin asked for, and every guard."""
        gate = self.rows[0].label
        return tuple(row for row in self.rows if row.label != gate or row.margin == self.margin)


def plan(
    task: Task,
    margin: float | str,
    *,
    schemes: str | Scheme | Sequence[str | Scheme] = "fp8",
    confidence: float = 0.95,
    target: Target | Hardware | str = EMULATED,
    progress: Progress = silent,
) -> Plan:
    """How many units the search and the certify split each need, at `margin` and around it.

    One pass over calibration and search split and, for each scheme, one over a few batches with every layer low. Of two
    splits the smaller one decides. Raises InputError (with TaskError, ModelError, SchemeError) for what is wrong with the
    input. The model stays as it was. margin, schemes, target: as `search` takes them.
    """
    question = Question(margin=margin_of(margin, task.metric), confidence=confidence)
    chosen, given = schemes_of(schemes), hardware_of(target)
    where = next(iter(given.forms.values())) if isinstance(given, Hardware) else given  # units are those of any form
    first = check_task(task)
    prints = fingerprint_splits(task, first.reads)
    task = unchanging(task, prints)
    inventory = inventory_of(task)
    with run_journal(None, {}) as journal:
        run = Run(task, journal, progress)
        subject = Subject(
            run=run,
            inventory=inventory,
            schemes=chosen,
            target=where,
            eligibility=eligibility(inventory, chosen, where, ()),
            calibration=calibrated(run, inventory, chosen),
        )
        subject = subject.without(tried(subject, subject.pairs))
        baseline = scored_baseline(run)
        check_baseline(task, baseline.whole)
        gate, *guards = pilots(subject, baseline)
    share, alpha = len(prints.certify.distinct) / len(prints.search.distinct), question.alpha
    rows = [outlook(gate, question.margin * multiple, share, alpha) for multiple in MULTIPLES]
    rows += [outlook(guard, guard.margin or question.margin, share, alpha) for guard in guards]
    doubtful = doubts(task, baseline.whole, question.margin)
    notes = (*first.notes, *prints.notes, *doubtful, *subject.eligibility.idle())
    return Plan(margin=question.margin, confidence=confidence, rows=tuple(rows), notes=notes)
