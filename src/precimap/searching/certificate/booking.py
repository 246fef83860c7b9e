"""Asking a certify split: what it has given away is booked first, then it is looked at, then its answer is written down.

Invariant: every look at a certify split goes through `judged`, so that none is free that was not paid for: not a map's own
certificate, which anyone may have written, but the ledger says what was asked.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from precimap.certificate import Certificate, Earlier
from precimap.decisions import UnitSketch
from precimap.layers.target import Target
from precimap.precision_map import PrecisionMap
from precimap.searching.certificate.account import Answer
from precimap.searching.certificate.account import Judged as Entry
from precimap.searching.certificate.certify import Judged, Look, baseline_to_certify, certify, check_still, too_small
from precimap.searching.certificate.known_units import IN_MAP, Sketch, shared_units
from precimap.searching.certificate.ledger import FRESH, AskedSplit, Ledger
from precimap.searching.certificate.older_prints import older_print
from precimap.searching.comparison import Comparison
from precimap.searching.preflight.batch_invariance import shares_a_scale
from precimap.searching.preflight.checks import check_baseline
from precimap.searching.question import Question, chain_fingerprint
from precimap.searching.run import Run
from precimap.searching.same_task import question_terms
from precimap.searching.splits.split_print import SplitPrint
from precimap.searching.splits.three_splits import SplitPrints
from precimap.task import Scored, Task

_SAID = re.compile(r".*: (?:(\d+) maps|one map) for (.+), margin (\S+)", re.DOTALL)  # what ledgers call a question


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Booking:
    """The splits of a task, and the directory of the ledgers.

    first: the first search batch, by the base model. made: maps as they run on the target, by fingerprint, where they were
    made already.
    """

    task: Task
    prints: SplitPrints
    first: Scored
    directory: Path
    made: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def split(self) -> SplitPrint:
        """The certify split."""
        return self.prints.certify

    def ledger(self, budget: float) -> Ledger:
        """The split's account. Raises what `Ledger.open` raises."""
        asked = AskedSplit(self.split.whole, self.split.judged_views, lambda: older_print(self.task.splits.certify))
        return Ledger.open(self.directory, asked, budget)

    def notes(self, question: Question) -> tuple[str, ...]:
        """Said before the long work: whether the split can still answer new questions, and where it is known from."""
        if not self.directory.is_dir():
            return ()
        ledger = self.ledger(question.budget)
        spent, notes = ledger.spent(), ledger.notes()
        if spent + question.alpha <= question.budget * (1 + 1e-9):
            return notes
        return (
            *notes,
            f"the certify split has used alpha {spent:g}. Any new question needs fresh data or an alpha budget of "
            f"{spent + question.alpha:g} (--alpha-budget); {FRESH}",
        )

    def check_left(self, target: Target, question: Question) -> None:
        """Raises AlphaSpent where the split can answer nothing that a search may still ask, so that none need be made.

        What a search will ask is known but for its maps: margin, target, metric, guards and data. A booked question of
        another margin or target is another one; so is one whose maps are all known, and which is not what these maps would
        be with the metric, guards and data of now. Every other one may be asked again, which is free: only once no such is
        left, and a new one would cost too much, is there nothing to search for. Maps of other schemes at the same margin
        are therefore refused in the end only: until then they may turn out to be the maps that were judged.
        """
        if not self.directory.is_dir():
            return
        margin = f"{question.margin:g}"
        terms = [question_terms(self.task, self.first, self.prints, coupled) for coupled in (False, True)]

        def may_be(entry: Entry, maps: Sequence[str]) -> bool:
            said = _SAID.fullmatch(entry.description)
            if said is None:
                return True
            if said.group(2, 3) != (target.name, margin):
                return False
            all_known = len(maps) == int(said.group(1) or 1)
            return not all_known or entry.chain in {chain_fingerprint(maps, question.margin, one) for one in terms}

        said = f"{self.task.name}: any maps for {target.name}, margin {margin}"
        self.ledger(question.budget).check_left(may_be, question.alpha, said)

    def _spent(self, question: Question) -> float:
        """What the split has given away so far; no directory is made to find out."""
        return self.ledger(question.budget).spent() if self.directory.is_dir() else 0.0

    def judged(
        self,
        run: Run,
        target: Target,
        asked: Sequence[tuple[Judged, Comparison | None]],
        question: Question,
        said: str,
    ) -> tuple[Certificate, ...]:
        """Book the question, then ask it: one certificate for each map that was tested.

        asked: the maps, safest first, each with what it did on the search split, as `certify` takes them. said: what the
        ledger calls the question. Alpha is booked only when a comparison can be made: the baseline is scored first, which no
        map depends on; where the split is too small to certify any map, the one certificate says so, no map is scored
        there, and nothing is booked.

        Raises AlphaSpent where the split has given away too much, and what `check_baseline` and `certify` raise.
        """
        chain = [one for one, _ in asked]
        look = Look(
            target=target,
            margin=question.margin,
            alpha=question.alpha,
            spent_alpha=question.alpha,
            split=self.split.whole,
            known=self.split,
            made=self.made,
        )
        baseline = baseline_to_certify(run, look)
        check_baseline(self.task, baseline, "certify")
        check_still(run, look)
        unbooked = replace(look, spent_alpha=self._spent(question))
        if (short := too_small(self.task, baseline, unbooked, chain[0].fingerprint)) is not None:
            return (short,)
        ledger = self.ledger(question.budget)
        name = chain_fingerprint([one.fingerprint for one in chain], question.margin, self._terms(chain))
        spent = ledger.spend(name, question.alpha, f"{said}, margin {question.margin:g}")
        certificates = certify(run, replace(look, spent_alpha=spent), asked)
        before = ledger.answers_before(name)
        ledger.answer([_answer(name, certificate) for certificate in certificates])
        return tuple(c.model_copy(update={"earlier": _earlier(before, c.map)}) for c in certificates)

    def _terms(self, chain: Sequence[Judged]) -> dict[str, str]:
        schemes = {one.scheme_of(name) for one in chain if isinstance(one, PrecisionMap) for name in one.low}
        coupled = any(scheme is not None and shares_a_scale(scheme) for scheme in schemes)
        return question_terms(self.task, self.first, self.prints, coupled)


def chosen_on(split: SplitPrint) -> tuple[UnitSketch, ...]:
    """What a map keeps of the split that chose it."""
    sketches = [Sketch.of(view, IN_MAP) for view in split.views]
    return tuple(UnitSketch(n=sketch.n, prints=sketch.text()) for sketch in sketches)


def share_that_chose(precision_map: PrecisionMap, split: SplitPrint) -> float:
    """The share of a split's units that chose the map, as far as its sketch tells. Raises ValueError for a broken one."""
    return shared_units([Sketch.parse(known.prints, known.n) for known in precision_map.chosen_on], split.views)


def _answer(chain: str, found: Certificate) -> Answer:
    return Answer(
        chain=chain,
        map=found.map,
        margin=found.margin,
        alpha=found.alpha,
        upper=found.upper,
        certified=found.certified,
    )


def _earlier(before: Sequence[tuple[str, Answer]], fingerprint: str) -> tuple[Earlier, ...]:
    return tuple(
        Earlier(split=split, margin=row.margin, alpha=row.alpha, upper=row.upper, certified=row.certified)
        for split, row in before
        if row.map == fingerprint
    )
