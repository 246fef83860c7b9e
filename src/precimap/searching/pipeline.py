"""search(): a model and a Task in, a certified precision map out.

Invariant: one way through - discover, calibrate, screen and probe, allocate, look at whole maps, certify - each step a
value for the next, and nothing that the certify split says flows back into a choice. The model is never modified. Every
measurement is in the journal before it is used: the same call takes up a run that was killed.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from precimap.certificate import Rounding
from precimap.fingerprints import of_weights
from precimap.journal import run_journal
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import codes_kept
from precimap.layers.realign import score_layer
from precimap.layers.target import EMULATED, Target
from precimap.numerics import NUMERICS_VERSION
from precimap.numerics.schemes import Scheme, schemes_of
from precimap.precision_map import PrecisionMap, Premise
from precimap.searching import preflight
from precimap.searching.allocation.rules import KNAPSACK, Rule, cutoff_of, kept_for_time
from precimap.searching.asked import Asked
from precimap.searching.batch_invariance import batch_dependence
from precimap.searching.calibrate import Calibration, calibrated
from precimap.searching.certificate.booking import Booking, chosen_on
from precimap.searching.certificate.rounding_draws import rounding_of
from precimap.searching.eligibility import NO_PATTERNS, Eligibility, eligibility, open_pairs, refusing
from precimap.searching.evidence.floor import floor_pairs, rounding_floor
from precimap.searching.evidence.gather import Evidence, gather
from precimap.searching.evidence.probe import failures
from precimap.searching.inventories import inventory_of
from precimap.searching.latency.planned import Latency
from precimap.searching.latency.serving import HERE, Serving, foreseen, timed_here
from precimap.searching.latency.whole import Stand
from precimap.searching.limits import USUAL_EFFORT, Effort, Limits, margin_of, state_directory
from precimap.searching.progress import Progress, silent
from precimap.searching.proof import Proof, check_left, conclude, proved, stand_of
from precimap.searching.realign import Realigner
from precimap.searching.result import SearchResult, saved
from precimap.searching.run import Parts, Run, scored
from precimap.searching.same_task import check_first_batch, terms
from precimap.searching.sample_size import Outlook, outlook, pilots
from precimap.searching.splits.three_splits import SplitPrints, fingerprint_splits, unchanging
from precimap.searching.trial import tried
from precimap.searching.whole.assemble import Findings, assemble, premise_of
from precimap.searching.whole.choosing import chosen_maps, to_certify
from precimap.targets import target_of
from precimap.task import Task, first_batch


@codes_kept()
def search(
    task: Task,
    *,
    schemes: str | Scheme | Sequence[str | Scheme],
    margin: float | str,
    confidence: float = 0.95,
    rule: Rule = KNAPSACK,
    cutoff: float | None = None,
    target: Target | str = EMULATED,
    pinned: Sequence[str] = (),
    allowed: Mapping[str, Sequence[str]] = NO_PATTERNS,
    alpha_budget: float | None = None,
    effort: Effort = USUAL_EFFORT,
    serving: Serving = HERE,
    run: str | Path | None = None,
    ledger: str | Path | None = None,
    realign: bool = False,
    progress: Progress = silent,
    on_preflight: Callable[[preflight.Preflight], None] | None = None,
) -> SearchResult:
    """Find the most aggressive precision map that the metric cannot tell from the model as given.

    schemes: names or Schemes; of several each layer takes one (on equal terms, the first). margin: the largest drop you
    accept, in units of the metric, or "0.1%" of a metric whose drop is relative. target: what the map is for, an object or
    its name (`precimap.targets`). rule: `Knapsack(...)` or `Threshold()`. cutoff: a layer is called tolerant when its
    own drop is surely below it (default: margin / number of candidate layers). pinned: layers to keep, by name or
    shell pattern. allowed: name or pattern -> the only schemes for these layers. A name means that layer alone,
    whatever it holds. alpha_budget: what the certify split may give away in all (default 1 - confidence). effort:
    how hard to look, see `Effort`. serving: batch sizes and hardware, see `Serving`; by default layers are timed
    here if the target has kernels here. run: a directory for measurements and maps; one that holds measurements of
    the same model, data and schemes is taken up again, also with another margin or rule. ledger: directory of the
    alpha ledgers (default `state_directory()`).
    realign: bring each map's scores, which must be logits, back to the baseline's by a scale and a shift that are fitted
    without labels on the calibration split and folded into the last nn.Linear; part of the map and of what is certified.
    on_preflight: told what this many units can detect, before the long work.

    Raises InputError (with TaskError, ModelError, SchemeError) for what is wrong with the input, JournalError for a run
    with another premise, AlphaSpent when the certify split has judged other maps before: before the long work, where it is
    known by then that nothing can be asked (`Booking.check_left`). The model stays as it was.
    """
    limits = Limits(margin_of(margin, task.metric), confidence, cutoff, alpha_budget)
    chosen, target = schemes_of(schemes), target_of(target)
    first = preflight.check_task(task)
    prints = fingerprint_splits(task, first.reads)
    task = unchanging(task, prints)
    inventory = inventory_of(task)
    eligible = eligibility(inventory, chosen, target, pinned, allowed)
    by_profile = foreseen(inventory, open_pairs(eligible, chosen), target, serving)
    seen = _Seen(prints, (*first.notes, *prints.notes), inventory, eligible, by_profile)
    premise = premise_of(task, of_weights(task.model), prints, version("precimap"))
    last = score_layer(task.model, task.forward, inventory, first_batch(task, task.splits.search)) if realign else None
    ends_at = None if effort.minutes is None else time.monotonic() + 60 * effort.minutes
    with ExitStack() as stack:
        bound = _bound_to(premise, task, target, prints)
        journal = stack.enter_context(run_journal(None if run is None else Path(run), bound))
        check_first_batch(journal, task, first.scored)
        booking = Booking(task, prints, first.scored, Path(ledger) if ledger else state_directory())
        made = Run(task, journal, progress, ends_at)
        asked = Asked(made, chosen, limits, rule, target, effort, premise, on_preflight, serving, last)
        return saved(_searched(asked, seen, booking), run)


def _bound_to(premise: Premise, task: Task, target: Target, prints: SplitPrints) -> dict[str, str]:
    """What a run belongs to. Not to the certify split: what was measured on the search split serves fresh data, too."""
    found = premise.model_dump(exclude={"certify", "architecture"}) | {
        "target": target.name,
        "numerics": NUMERICS_VERSION,
    }
    return {**found, "metrics beside it": task.kept_beside, **terms(task, prints.search)}


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known before a run directory is made: wrong input leaves none behind."""

    prints: SplitPrints
    notes: tuple[str, ...]
    inventory: Inventory
    allowed: Eligibility
    latency: Latency | None
    failed: Mapping[tuple[str, str], str] = field(default_factory=dict)  # what the trial refused


def _searched(search: Asked, seen: _Seen, booking: Booking) -> SearchResult:
    """Up to where the long work begins: what can be tried at all, and what the splits can tell."""
    run, task, inventory = search.run, search.run.task, seen.inventory
    calibration = calibrated(run, inventory, search.schemes)
    seen = _tried(search, seen, calibration)
    baseline = scored(run, "baseline", "search", task.splits.search, lambda: EMULATED.running(task.model, {}))
    preflight.check_baseline(task, baseline.whole)
    told = _outlook(search, seen, calibration, baseline)
    if any(found.impossible is not None for found in told):
        return _too_small(search, seen, calibration, _preflight(search, seen, calibration, baseline, told, booking))
    check_left(search, seen.allowed, booking)
    seen = _with_times(search, seen, calibration)
    stand = stand_of(search, inventory, calibration, seen.allowed, seen.latency)
    checked = _preflight(search, seen, calibration, baseline, told, booking)
    return _decided(search, seen, calibration, baseline, checked, stand, booking)


def _decided(
    search: Asked,
    seen: _Seen,
    calibration: Calibration,
    baseline: Parts,
    checked: preflight.Preflight,
    stand: Stand | None,
    booking: Booking,
) -> SearchResult:
    """From single layers to the proof of a whole map."""
    run, alpha, inventory = search.run, search.limits.alpha, seen.inventory
    savings = None if seen.latency is None else seen.latency.savings
    floor = rounding_floor(run, inventory, baseline, search.effort.check_units, alpha, seen.failed)
    run.journal.conclude("floor", "all layers", asdict(floor))
    pairs = open_pairs(seen.allowed, search.schemes)
    realigner = None if search.realigned_at is None else Realigner(run.task, search.realigned_at)
    evidence = gather(
        run,
        inventory,
        calibration,
        baseline,
        pairs,
        search.rule,
        search.limits,
        search.effort,
        0 if realigner is None else realigner.outputs,
        savings,
    )
    seen, evidence = _without_failures(search, seen, evidence)
    findings = _findings(search, seen, calibration, evidence, realigner)
    chosen = to_certify(findings, chosen_maps(run, findings, search.rule, evidence, baseline, search.limits))
    run.journal.conclude("chain", "search", {"maps": [joint.row(search.limits.margin) for joint in chosen.joints]})
    proof = proved(search, findings, chosen, stand, seen.latency, booking)
    final = _final(search, proof, baseline, realigner, booking)
    return SearchResult(
        final,
        proof.certificate,
        proof.answer,
        checked,
        inventory,
        floor,
        evidence,
        chosen.joints,
        proof.certificates,
        seen.latency,
        proof.end_to_end,
    )


def _findings(
    search: Asked, seen: _Seen, calibration: Calibration, evidence: Evidence, realigner: Realigner | None
) -> Findings:
    """All that a map is written down from."""
    inventory, savings = seen.inventory, None if seen.latency is None else seen.latency.savings
    found = Findings(
        inventory,
        search.schemes,
        seen.allowed,
        calibration,
        evidence.known,
        cutoff_of(search.limits, inventory, evidence.known),
        search.target.name,
        search.premise,
        search.limits.alpha,
        *(() if realigner is None else (partial(realigner.of, search.run.journal),)),
    )
    kept = kept_for_time(search.rule, inventory, evidence.known, search.schemes, savings)
    return replace(found, kept_for_time=kept)


def _tried(search: Asked, seen: _Seen, calibration: Calibration) -> _Seen:
    """Without the pairs that cannot be computed on the first batch."""
    task, inventory = search.run.task, seen.inventory
    pairs = [*open_pairs(seen.allowed, search.schemes), *floor_pairs(inventory)]
    failed = tried(task, inventory, calibration, pairs)
    return replace(seen, allowed=refusing(seen.allowed, failed, inventory, search.schemes), failed=failed)


def _without_failures(search: Asked, seen: _Seen, evidence: Evidence) -> tuple[_Seen, Evidence]:
    """Without the pairs that failed when they were probed, and what engines fuse with them."""
    failed = failures(search.run, open_pairs(seen.allowed, search.schemes))
    if not failed:
        return seen, evidence
    allowed = refusing(seen.allowed, failed, seen.inventory, search.schemes)
    left = set(allowed.open_pairs())
    known = tuple(found for found in evidence.known if (found.layer, found.scheme) in left)
    return replace(seen, allowed=allowed), replace(evidence, known=known)


def _final(search: Asked, proof: Proof, baseline: Parts, realigner: Realigner | None, booking: Booking) -> PrecisionMap:
    """The answer's map with its rounding draws and the units that chose it. Raises TaskError for scores that changed."""
    preflight.check_unchanged(search.run.task, booking.first)
    rounding = _rounding(search, proof.map, baseline, realigner)
    final = proof.map.model_copy(update={"rounding": rounding, "chosen_on": chosen_on(booking.prints.search)})
    conclude(search.run, final, proof.answer)
    return final


def _with_times(search: Asked, seen: _Seen, calibration: Calibration) -> _Seen:
    """With the times of a profile, or of this machine, and without the pairs that save none."""
    run, pairs = search.run, open_pairs(seen.allowed, search.schemes)
    times = seen.latency or timed_here(run, seen.inventory, calibration, pairs, search.target, search.serving)
    if times is None:
        return seen
    run.journal.conclude("latency", "search", times.row())
    refused = refusing(seen.allowed, times.failed, seen.inventory, search.schemes)
    allowed = replace(refused, slower=times.slower)
    return replace(seen, allowed=allowed, latency=times, notes=(*seen.notes, *times.notes))


def _outlook(search: Asked, seen: _Seen, calibration: Calibration, baseline: Parts) -> tuple[Outlook, ...]:
    """What the splits can tell of the gate and of each guard; before anything takes long."""
    pairs, limits = open_pairs(seen.allowed, search.schemes), search.limits
    share = len(seen.prints.certify.distinct) / len(seen.prints.search.distinct)
    return tuple(
        outlook(pilot, limits.margin if pilot.margin is None else pilot.margin, share, limits.alpha)
        for pilot in pilots(search.run, seen.inventory, calibration, baseline, pairs)
    )


def _too_small(search: Asked, seen: _Seen, calibration: Calibration, checked: preflight.Preflight) -> SearchResult:
    """The answer of a search that no map can pass: the baseline, and how many units it would take."""
    run, inventory = search.run, seen.inventory
    nothing = Findings(
        inventory, search.schemes, seen.allowed, calibration, (), 0.0, search.target.name, search.premise, 0.5
    )
    answer = f"keep the baseline: cannot tell with these splits: {checked.impossible}"
    final = assemble(nothing, {})
    run.journal.conclude("chain", "search", {"maps": []})
    run.journal.conclude("certificates", "certify", {"certificates": []})
    conclude(run, final, answer)
    return SearchResult(final, None, answer, checked, inventory, None, None, (), (), seen.latency, None)


def _preflight(
    search: Asked,
    seen: _Seen,
    calibration: Calibration,
    baseline: Parts,
    found: tuple[Outlook, ...],
    booking: Booking,
) -> preflight.Preflight:
    inventory, task = seen.inventory, search.run.task
    coupled = batch_dependence(task, inventory, calibration, search.schemes, seen.allowed.open_pairs())
    doubts = preflight.doubts(task, baseline.whole, search.limits.margin)
    notes = (*doubts, *preflight.notes(inventory, coupled), *seen.allowed.idle(), *seen.notes)
    checked = preflight.Preflight(found[0].search_units, found[0].certify_units, found, notes, coupled)
    search.run.journal.conclude("preflight", task.name, asdict(checked))
    search.run.journal.conclude("inventory", task.name, asdict(inventory))
    if search.on_preflight is not None:
        # Said and not written down: a run that is taken up after it paid is to find what an undisturbed one does.
        search.on_preflight(replace(checked, notes=(*notes, *booking.notes(search.limits))))
    return checked


def _rounding(search: Asked, final: PrecisionMap, baseline: Parts, realigner: Realigner | None) -> Rounding | None:
    draws, effort = search.effort.rounding_draws, search.effort
    if not final.low or not draws:
        return None
    return rounding_of(search.run, final, baseline, draws, effort.check_units, realigner)
