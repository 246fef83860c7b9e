"""search(): a model and a Task in, a certified precision map out.

Invariant: one way through - discover, calibrate, screen and probe, allocate, look at whole maps, certify - each step a
value for the next, and nothing that the certify split says flows back into a choice. The model is never modified. Every
measurement is in the journal before it is used: the same call takes up a run that was killed.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

from precimap.certificate import Rounding
from precimap.fingerprints import of_weights
from precimap.journal import run_journal
from precimap.layers.quantized import codes_kept
from precimap.layers.realign import score_layer
from precimap.layers.target import EMULATED, Hardware, Target
from precimap.numerics import NUMERICS_VERSION
from precimap.numerics.schemes import Scheme, schemes_of
from precimap.precision_map import PrecisionMap, Premise
from precimap.searching.allocation.rules import kept_for_time
from precimap.searching.calibrate import calibrated
from precimap.searching.certificate.booking import Booking, chosen_on
from precimap.searching.certificate.rounding_draws import rounding_of
from precimap.searching.eligibility import eligibility, open_pairs
from precimap.searching.evidence.floor import floor_pairs, rounding_floor
from precimap.searching.evidence.gather import EvidenceTable, gather, table_of
from precimap.searching.evidence.probe import failures
from precimap.searching.latency.planned import Latency
from precimap.searching.maps.assemble import MapWriter, assemble, premise_of
from precimap.searching.maps.candidates import NO_CASTS
from precimap.searching.maps.casting import looked_at_casts
from precimap.searching.maps.choosing import chosen_maps, to_certify
from precimap.searching.preflight.batch_invariance import batch_dependence
from precimap.searching.preflight.checks import (
    Preflight,
    check_baseline,
    check_task,
    check_unchanged,
    doubts,
    model_notes,
)
from precimap.searching.preflight.sample_size import Outlook, outlooks
from precimap.searching.preflight.trial import tried
from precimap.searching.progress import Progress, silent
from precimap.searching.proof import Proof, bench_of, check_left, conclude, proved
from precimap.searching.question import Asked, Question, margin_of
from precimap.searching.realigner import Realigner
from precimap.searching.result import SearchResult, saved
from precimap.searching.run import Parts, Run, scored_baseline
from precimap.searching.same_task import check_first_batch, terms
from precimap.searching.splits.three_splits import SplitPrints, fingerprint_splits, unchanging
from precimap.searching.subject import Subject, inventory_of
from precimap.searching.timing.form import form_asked, in_fastest_form
from precimap.searching.timing.times import times_from_profile, times_measured
from precimap.searching.timing.whole import WholeModelBench
from precimap.targets import hardware_of
from precimap.task import Task, first_batch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Search:
    """What stays the same from the first step to the last.

    notes: for the reader, of the task and its splits. foreseen: the times of a profile. realigner: of maps whose scores are
    brought back to the baseline's. hardware: whose faster form is to be found.
    """

    question: Question
    booking: Booking
    premise: Premise
    notes: tuple[str, ...]
    foreseen: Latency | None
    realigner: Realigner | None
    hardware: Hardware | None
    on_preflight: Callable[[Preflight], None]


@codes_kept()
def search(
    task: Task,
    *,
    schemes: str | Scheme | Sequence[str | Scheme],
    margin: float | str,
    target: Target | Hardware | str = EMULATED,
    run: str | Path | None = None,
    progress: Progress = silent,
    on_preflight: Callable[[Preflight], None] = lambda _: None,
    **asked: Unpack[Asked],
) -> SearchResult:
    """Find the most aggressive precision map that the metric cannot tell from the model as given.

    schemes: names or Schemes; of several each layer takes one (on equal terms, the first). margin: the largest drop you
    accept, in units of the metric, or "0.1%" of a metric whose drop is relative. target: what the map is for, an object or
    its name (`precimap.targets`); of `cpu` and `cuda` the faster form is found, if `serving` says none. run: a directory
    for measurements and maps; one that holds measurements of the same model, data and schemes is taken up again, also with
    another margin or rule. on_preflight: told what this many units can detect, before the long work.

    asked, by name: confidence, alpha_budget, ledger, pinned, allowed, rule, cutoff, realign, effort and serving, with the
    meaning and the defaults that `Question` gives them.

    Raises InputError (with TaskError, ModelError, SchemeError) for what is wrong with the input, JournalError for a run
    with another premise, AlphaSpent when the certify split has judged other maps before: before the long work, where it is
    known by then that nothing can be asked (`Booking.check_left`). The model stays as it was.
    """
    question = Question(margin=margin_of(margin, task.metric), **asked)
    chosen, (hardware, where) = schemes_of(schemes), form_asked(hardware_of(target), question)
    first = check_task(task)
    prints = fingerprint_splits(task, first.reads)
    task = unchanging(task, prints)
    inventory = inventory_of(task)
    eligible = eligibility(inventory, chosen, where, question.pinned, question.allowed)
    foreseen = times_from_profile(inventory, open_pairs(eligible, chosen), where, question.serving)
    premise = premise_of(task, of_weights(task.model), prints, version("precimap"))
    realigner = None
    if question.realign:
        last = score_layer(task.model, task.forward, inventory, first_batch(task, task.splits.search))
        realigner = Realigner(task, last)
    minutes = question.effort.minutes
    ends_at = None if minutes is None else time.monotonic() + 60 * minutes
    with run_journal(
        None if run is None else Path(run), _bound_to(premise, task, hardware or where, prints)
    ) as journal:
        check_first_batch(journal, task, first.scored)
        made = Run(task, journal, progress, ends_at)
        subject = Subject(
            run=made,
            inventory=inventory,
            schemes=chosen,
            target=where,
            eligibility=eligible,
            calibration=calibrated(made, inventory, chosen),
        )
        one = _Search(
            question=question,
            booking=Booking(task=task, prints=prints, first=first.scored, directory=question.ledger_directory),
            premise=premise,
            notes=(*first.notes, *prints.notes),
            foreseen=foreseen,
            realigner=realigner,
            hardware=hardware,
            on_preflight=on_preflight,
        )
        return saved(_searched(one, subject), run)


def _bound_to(premise: Premise, task: Task, target: Target | Hardware, prints: SplitPrints) -> dict[str, str]:
    """What a run belongs to. Not to the certify split: what was measured on the search split serves fresh data, too."""
    found = premise.model_dump(exclude={"certify", "architecture"}) | {
        "target": target.name,
        "numerics": NUMERICS_VERSION,
    }
    return {**found, "metrics beside it": task.kept_beside, **terms(task, prints.search)}


def _searched(search: _Search, subject: Subject) -> SearchResult:
    """The way from discovery to proof, as docs/architecture.md draws it."""
    question, run, booking = search.question, subject.run, search.booking
    subject = _tried(subject)
    baseline = scored_baseline(run)
    check_baseline(run.task, baseline.whole)
    share = len(booking.prints.certify.distinct) / len(booking.prints.search.distinct)
    told = outlooks(subject, baseline, share, question)
    if any(outlook.impossible is not None for outlook in told):
        return _too_small(search, subject, _preflight(search, subject, baseline, told))
    check_left(subject, question, booking)
    subject, before = _in_its_form(search, subject)
    subject = _timed(search, subject)
    bench = bench_of(subject, question, before)
    checked = _preflight(search, subject, baseline, told)
    floor = rounding_floor(subject, question, baseline)
    run.journal.conclude("floor", "all layers", asdict(floor))
    evidence = gather(subject, question, baseline, 0 if search.realigner is None else search.realigner.outputs)
    subject, evidence = _without_failures(subject, evidence)
    writer = _writer(search, subject, evidence)
    chain = to_certify(writer, chosen_maps(writer, question, evidence, baseline))
    run.journal.conclude("chain", "search", {"maps": [one.row(question.margin) for one in chain.candidates]})
    if bench is not None:
        chain = replace(chain, casts=looked_at_casts(writer, question, chain, baseline))
    run.journal.conclude("casts", "search", chain.casts.row(question.margin))
    proof = proved(question, writer, chain, bench, booking)
    return SearchResult(
        map=_final(search, subject, proof, baseline),
        certificate=proof.certificate,
        answer=proof.answer,
        preflight=checked,
        inventory=subject.inventory,
        floor=floor,
        evidence=evidence,
        chain=chain.candidates,
        casts=chain.casts,
        certificates=proof.certificates,
        latency=subject.latency,
        end_to_end=proof.end_to_end,
    )


def _tried(subject: Subject) -> Subject:
    """Without the pairs that cannot be computed on the first batch."""
    failed = tried(subject, [*subject.pairs, *floor_pairs(subject.inventory)])
    return replace(subject.without(failed), failed=failed)


def _in_its_form(search: _Search, subject: Subject) -> tuple[Subject, WholeModelBench | None]:
    """On the faster form of the hardware, if that is to be found, and where that was timed."""
    if search.hardware is None or not subject.pairs:
        return subject, None
    bench = bench_of(subject, search.question)
    assert bench is not None, "a search for hardware has no profile, and times whole models"
    return in_fastest_form(subject, search.hardware, bench), bench


def _timed(search: _Search, subject: Subject) -> Subject:
    """With the times of a profile, or of this machine, and without the pairs that save none."""
    times = search.foreseen or times_measured(subject, search.question.serving)
    if times is None:
        return subject
    subject.run.journal.conclude("latency", "search", times.row())
    return subject.timed(times)


def _without_failures(subject: Subject, evidence: EvidenceTable) -> tuple[Subject, EvidenceTable]:
    """Without the pairs that failed when they were probed, and what engines fuse with them."""
    failed = failures(subject.run, subject.pairs)
    if not failed:
        return subject, evidence
    left = subject.without(failed)
    still_open = set(left.eligibility.open_pairs())
    return left, replace(evidence, known=tuple(found for found in evidence.known if found.key in still_open))


def _writer(search: _Search, subject: Subject, evidence: EvidenceTable) -> MapWriter:
    """All that a map is written down from."""
    table = table_of(subject, search.question, evidence.known)
    savings = None if subject.latency is None else subject.latency.savings
    writer = MapWriter(
        subject=subject,
        table=table,
        premise=search.premise,
        alpha=search.question.alpha,
        cutoff=table.cutoff,
        kept_for_time=kept_for_time(search.question.rule, table, savings),
    )
    if search.realigner is None:
        return writer
    return replace(writer, realign=partial(search.realigner.of, subject.run.journal))


def _final(search: _Search, subject: Subject, proof: Proof, baseline: Parts) -> PrecisionMap:
    """The answer's map with its rounding draws and the units that chose it. Raises TaskError for scores that changed."""
    check_unchanged(subject.task, search.booking.first)
    rounding: Rounding | None = None
    if proof.map.low and search.question.effort.rounding_draws:
        rounding = rounding_of(subject.run, proof.map, baseline, search.question.effort, search.realigner)
    final = proof.map.model_copy(update={"rounding": rounding, "chosen_on": chosen_on(search.booking.prints.search)})
    conclude(subject.run, final, proof.answer, proof.certificate)
    return final


def _too_small(search: _Search, subject: Subject, checked: Preflight) -> SearchResult:
    """The answer of a search that no map can pass: the baseline, and how many units it would take."""
    run = subject.run
    nothing = _writer(search, subject, EvidenceTable(known=()))
    answer = f"keep the baseline: cannot tell with these splits: {checked.impossible}"
    final = assemble(nothing, {})
    run.journal.conclude("chain", "search", {"maps": []})
    run.journal.conclude("casts", "search", NO_CASTS.row(search.question.margin))
    run.journal.conclude("certificates", "certify", {"certificates": []})
    conclude(run, final, answer, None)
    return SearchResult(
        map=final,
        certificate=None,
        answer=answer,
        preflight=checked,
        inventory=subject.inventory,
        floor=None,
        evidence=None,
        chain=(),
        casts=NO_CASTS,
        certificates=(),
        latency=search.foreseen,
        end_to_end=None,
    )


def _preflight(search: _Search, subject: Subject, baseline: Parts, told: tuple[Outlook, ...]) -> Preflight:
    """What a few batches showed, written down and told."""
    task, inventory = subject.task, subject.inventory
    coupled = batch_dependence(subject)
    timed = () if subject.latency is None else subject.latency.notes
    notes = (
        *doubts(task, baseline.whole, search.question.margin),
        *model_notes(inventory, coupled),
        *subject.eligibility.idle(),
        *search.notes,
        *([] if subject.said is None else [subject.said]),
        *timed,
    )
    checked = Preflight(
        search_units=told[0].search_units,
        certify_units=told[0].certify_units,
        outlook=told,
        notes=notes,
        batch_dependence=coupled,
    )
    subject.run.journal.conclude("preflight", task.name, asdict(checked))
    subject.run.journal.conclude("inventory", task.name, asdict(inventory))
    # Said and not written down: a run that is taken up after it paid is to find what an undisturbed one does.
    search.on_preflight(replace(checked, notes=(*notes, *search.booking.notes(search.question))))
    return checked
