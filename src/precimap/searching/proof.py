"""The end of a search: the chosen maps are timed as they will be served, and certified.

Invariant: a map that saves no time end to end is no answer, whatever its layers save one by one, unless the user asked for
bytes; and the certify split is not asked about it. Time is asked first, for it costs no certainty.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from precimap.certificate import Certificate
from precimap.end_to_end import EndToEnd
from precimap.errors import AlphaSpent
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.knapsack import Step
from precimap.searching.allocation.rules import Rule
from precimap.searching.allocation.table import Table
from precimap.searching.answer import answer_of, gain_said, no_gain, why_not_cast
from precimap.searching.certificate.booking import Booking
from precimap.searching.comparison import Comparison
from precimap.searching.maps.assemble import MapWriter, assemble
from precimap.searching.maps.candidates import Chain, seen_on_search, sequence
from precimap.searching.question import Question
from precimap.searching.run import Run
from precimap.searching.subject import Subject
from precimap.searching.timing.forms import ModelForms
from precimap.searching.timing.whole import WholeModelBench
from precimap.searching.worth import worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The final map, the certificate that decided, if any, the sentence, and all that was tested and timed."""

    map: PrecisionMap
    certificate: Certificate | None
    answer: str
    certificates: tuple[Certificate, ...]
    end_to_end: EndToEnd | None


def check_left(subject: Subject, question: Question, booking: Booking) -> None:
    """Raises AlphaSpent before anything takes long, where that is known to be all that will come of it.

    Not in a run that has found maps before: it holds what it measured, and may end without a question to the certify split.
    """
    found_before = any(row.value["maps"] for row in subject.run.journal.conclusions("chain"))
    if not found_before and subject.pairs:
        booking.check_left(subject.target, question)


def bench_of(subject: Subject, question: Question, before: WholeModelBench | None = None) -> WholeModelBench | None:
    """Where whole maps are timed; None where the target's times are not to be had here, or nobody asked for them.

    before: that of another form, whose models serve again. Raises InputError for batch sizes that cannot be made of the
    task's batches.
    """
    timer, seconds, serving = subject.target.whole_timer, question.effort.timing_seconds, question.serving
    if timer is None or not seconds or not serving.is_of(timer.device()):
        return None
    if before is not None:
        return replace(before, forms=replace(before.forms, subject=subject, timer=timer))
    forms = ModelForms(subject=subject, timer=timer)
    bench = WholeModelBench(forms=forms, serving=serving, seconds=seconds)
    bench.check()
    return bench


def proved(
    question: Question, writer: MapWriter, chain: Chain, bench: WholeModelBench | None, booking: Booking
) -> Proof:
    """Time the fastest map that is to be certified, certify the sequence, time the map that passed.

    Raises AlphaSpent, with what was found on the search split written down.
    """
    run, sent = writer.subject.run, sequence(chain)
    asked = [(one.map, seen) for one, seen in zip(sent, seen_on_search(sent), strict=True) if one.map is not None]
    fastest = asked[-1][0] if asked else None
    times = bench.times(fastest) if bench is not None and fastest is not None else None
    if times is not None and fastest is not None and not _worthwhile(question.rule, writer.table, fastest, times):
        asked = []
    cast = chain.casts.best(question.margin)
    if bench is not None and cast is not None and cast.map is not None:
        whole = bench.times(cast.map)
        saved = worth(question.rule, cast.map, whole)
        if saved.pays and (not asked or times is None or saved.above(worth(question.rule, asked[-1][0], times))):
            asked, times = [*asked, (cast.map, cast.measured)], whole
    _write(run, times)
    try:
        made = {} if bench is None else bench.served
        certificates = _certified(writer.subject, question, asked, replace(booking, made=made))
    except AlphaSpent:
        said = "not certified: the alpha of the certify split is spent; what was found on the search split stays"
        run.journal.conclude("certificates", "certify", {"certificates": []})
        conclude(run, assemble(writer, {}), said, None)
        raise
    final, certificate, answer = answer_of(writer, chain, certificates)
    if bench is not None and final.changes:
        times = bench.times(final)
        _write(run, times)
    if times is not None:
        if not asked or (final.changes and not _worthwhile(question.rule, writer.table, final, times)):
            timed = final if final.changes else fastest
            said = "" if timed is None else str(worth(question.rule, timed, times))
            final, certificate, answer = assemble(writer, {}), None, no_gain(times, said)
        elif final.changes:
            why = why_not_cast(chain.casts, question.margin, certificates)
            said = gain_said(times, str(worth(question.rule, final, times)), why)
            final, answer = final.model_copy(update={"end_to_end": times}), f"{answer}; {said}"
    return Proof(map=final, certificate=certificate, answer=answer, certificates=certificates, end_to_end=times)


def _worthwhile(rule: Rule, table: Table, precision_map: PrecisionMap, times: EndToEnd) -> bool:
    """What is saved is worth something beyond the spread of timing; or a bound on bytes refuses the base model."""
    kept = Step({}, math.inf, 0.0, precision_map.bytes_before)  # refused for its bytes, if at all
    return worth(rule, precision_map, times).pays or not rule.accepts(table.inventory, kept)


def _write(run: Run, times: EndToEnd | None) -> None:
    """Of the last map that this question had timed, also where none was: what another question found is not to stay."""
    run.journal.conclude("whole model", "end to end", {} if times is None else times.model_dump(mode="json"))


def conclude(run: Run, final: PrecisionMap, answer: str, certificate: Certificate | None) -> None:
    """Write the answer down, with the certificate that decided, if any."""
    proof = None if certificate is None else json.loads(certificate.model_dump_json())
    value = {"answer": answer, "map": json.loads(final.model_dump_json()), "certificate": proof}
    run.journal.conclude("summary", "answer", value)


def _certified(
    subject: Subject, question: Question, asked: Sequence[tuple[PrecisionMap, Comparison | None]], booking: Booking
) -> tuple[Certificate, ...]:
    certificates: tuple[Certificate, ...] = ()
    if asked:
        said = f"{subject.task.name}: {len(asked)} maps for {subject.target.name}"
        certificates = booking.judged(subject.run, subject.target, asked, question, said)
    rows = [certificate.model_dump() for certificate in certificates]
    subject.run.journal.conclude("certificates", "certify", {"certificates": rows})
    return certificates
