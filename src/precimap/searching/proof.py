"""The end of a search: the chosen maps are timed as they will be served, and certified.

Invariant: a map that saves no time end to end is no answer, whatever its layers save one by one, unless the user asked for
bytes; and the certify split is not asked about it. Time is asked first, for it costs no certainty.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from precimap.certificate import Certificate
from precimap.end_to_end import EndToEnd
from precimap.errors import AlphaSpent
from precimap.layers.inventory import Inventory
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.knapsack import Step
from precimap.searching.answer import answer_of, gain_said, no_gain
from precimap.searching.asked import Asked
from precimap.searching.calibrate import Calibration
from precimap.searching.certificate.booking import Booking
from precimap.searching.eligibility import Eligibility
from precimap.searching.evidence.known import BYTES_WORTH
from precimap.searching.evidence.probe import Comparison
from precimap.searching.latency.planned import Latency
from precimap.searching.latency.whole import Stand
from precimap.searching.run import Run
from precimap.searching.whole.assemble import Findings, assemble
from precimap.searching.whole.whole_maps import Chosen, seen_on_search, sequence


@dataclass(frozen=True, slots=True)
class Proof:
    """The final map, the certificate that decided, if any, the sentence, and all that was tested and timed."""

    map: PrecisionMap
    certificate: Certificate | None
    answer: str
    certificates: tuple[Certificate, ...]
    end_to_end: EndToEnd | None


def check_left(search: Asked, allowed: Eligibility, booking: Booking) -> None:
    """Raises AlphaSpent before anything takes long, where that is known to be all that will come of it.

    Not in a run that has found maps before: it holds what it measured, and may end without a question to the certify split.
    """
    found_before = any(row.value["maps"] for row in search.run.journal.conclusions("chain"))
    if not found_before and allowed.open_pairs():
        booking.check_left(search.target, search.limits)


def stand_of(
    search: Asked, inventory: Inventory, calibration: Calibration, allowed: Eligibility, latency: Latency | None
) -> Stand | None:
    """Where whole maps are timed; None where the target's times are not to be had here, or nobody asked for them.

    Raises InputError for batch sizes that cannot be made of the task's batches.
    """
    timer, seconds = search.target.whole_timer, search.effort.timing_seconds
    if timer is None or not seconds or not search.serving.is_of(timer.device()):
        return None
    stand = Stand(search.run, timer, inventory, calibration, allowed, search.schemes, latency, search.serving, seconds)
    stand.check()
    return stand


def proved(
    search: Asked,
    findings: Findings,
    chosen: Chosen,
    stand: Stand | None,
    latency: Latency | None,
    booking: Booking,
) -> Proof:
    """Time the fastest map that is to be certified, certify the sequence, time the map that passed.

    Raises AlphaSpent, with what was found on the search split written down.
    """
    maps, seen = [joint.map for joint in sequence(chosen) if joint.map is not None], seen_on_search(sequence(chosen))
    times = stand.times(maps[-1]) if stand is not None and maps else None
    if times is not None and not _worthwhile(search, findings.inventory, maps[-1], times):
        maps = []
    _write(search.run, times)
    try:
        certificates = _certified(search, maps, seen, booking)
    except AlphaSpent:
        said = "not certified: the alpha of the certify split is spent; what was found on the search split stays"
        search.run.journal.conclude("certificates", "certify", {"certificates": []})
        conclude(search.run, assemble(findings, {}), said)
        raise
    final, certificate, answer = answer_of(findings, chosen, certificates, search.limits.margin, latency)
    if stand is not None and final.low:
        times = stand.times(final)
        _write(search.run, times)
    if times is not None:
        if not maps or (final.low and not _worthwhile(search, findings.inventory, final, times)):
            return Proof(assemble(findings, {}), None, no_gain(times), certificates, times)
        if final.low:
            final, answer = final.model_copy(update={"end_to_end": times}), f"{answer}; {gain_said(times)}"
    return Proof(final, certificate, answer, certificates, times)


def _worthwhile(search: Asked, inventory: Inventory, precision_map: PrecisionMap, times: EndToEnd) -> bool:
    """Time saved beyond its spread, or bytes, where they are asked for and worth the time that they cost."""
    kept = Step({}, math.inf, 0.0, precision_map.bytes_before)  # refused for its bytes, if at all
    if times.pays or not search.rule.accepts(inventory, kept):
        return True
    bytes_saved = 1 - precision_map.bytes_after / precision_map.bytes_before
    return (
        search.rule.bytes_worth > BYTES_WORTH and 1 - 1 / times.gain.lower + search.rule.bytes_worth * bytes_saved > 0
    )


def _write(run: Run, times: EndToEnd | None) -> None:
    """Of the last map that this question had timed, also where none was: what another question found is not to stay."""
    run.journal.conclude("whole model", "end to end", {} if times is None else times.model_dump(mode="json"))


def conclude(run: Run, final: PrecisionMap, answer: str) -> None:
    run.journal.conclude("summary", "answer", {"answer": answer, "map": json.loads(final.model_dump_json())})


def _certified(
    search: Asked, chain: Sequence[PrecisionMap], seen: Sequence[Comparison | None], booking: Booking
) -> tuple[Certificate, ...]:
    certificates: tuple[Certificate, ...] = ()
    if chain:
        said = f"{search.run.task.name}: {len(chain)} maps for {search.target.name}"
        certificates = booking.judged(search.run, search.target, chain, seen, search.limits, said)
    rows = [certificate.model_dump() for certificate in certificates]
    search.run.journal.conclude("certificates", "certify", {"certificates": rows})
    return certificates
