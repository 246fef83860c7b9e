"""search(): a model and a Task in, a certified precision map out.

Invariant: one way through - discover, calibrate, probe, allocate, certify - each step a value for the next, and nothing
that the certify split says flows back into a choice. The model is never modified.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from precimap.errors import InputError
from precimap.fingerprints import of_weights
from precimap.journal import Journal, new_journal
from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import quantize_map, quantized
from precimap.layers.target import EMULATED, Target
from precimap.numerics.schemes import Scheme
from precimap.numerics.schemes import scheme as scheme_by_name
from precimap.precision_map import Certificate, PrecisionMap, Premise
from precimap.search import preflight
from precimap.search.allocate import Candidate, Step, default_cutoff, threshold
from precimap.search.assemble import Findings, assemble, premise_of
from precimap.search.calibrate import Calibration, calibrate
from precimap.search.certify import Question, certify
from precimap.search.eligibility import Eligibility, eligibility
from precimap.search.ledger import Ledger
from precimap.search.limits import Limits, chain_fingerprint, state_directory
from precimap.search.probe import Comparison, Probe, compare, probe, rounding_floor, score_baseline
from precimap.search.progress import Progress, silent
from precimap.task import Scored, Task, first_batch, score


@dataclass(frozen=True, slots=True)
class Joint:
    """One map of the chain, measured as a whole on the search split. `passed`: its upper bound is within the margin."""

    map: PrecisionMap
    cutoff: float
    comparison: Comparison
    passed: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer, and everything it rests on.

    map: the certified one, or all base precision when none passed. certificate: of that map, or of the first map that
    failed; None when no map got as far as the certify split. `answer` says it in a sentence.
    """

    map: PrecisionMap
    certificate: Certificate | None
    answer: str
    preflight: preflight.Preflight
    inventory: Inventory
    floor: Comparison
    probes: tuple[Probe, ...]
    chain: tuple[Joint, ...]
    certificates: tuple[Certificate, ...]

    @property
    def certified(self) -> bool:
        return self.certificate is not None and self.certificate.certified


def search(
    task: Task,
    *,
    schemes: Sequence[str | Scheme],
    margin: float,
    confidence: float = 0.95,
    cutoff: float | None = None,
    target: Target = EMULATED,
    pinned: Sequence[str] = (),
    alpha_budget: float | None = None,
    run: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: Progress = silent,
    on_preflight: Callable[[preflight.Preflight], None] | None = None,
) -> SearchResult:
    """Find the most aggressive precision map that the metric cannot tell from the model as given.

    schemes: names or Schemes, the preferred first. margin: the largest drop you accept, in units of the metric.
    cutoff: a layer is tolerant when its own drop is surely below it (default: margin / number of candidate layers).
    pinned: shell patterns of layers to keep. alpha_budget: what the certify split may give away in all (default
    1 - confidence). run: a new directory for measurements and maps. ledger: directory of the alpha ledgers
    (default `state_directory()`). on_preflight: told what this many units can detect, before the long work.

    Raises InputError (with TaskError, ModelError, SchemeError) for what is wrong with the input, AlphaSpent when the
    certify split has judged other maps before. The model is as before in every case.
    """
    limits = Limits(margin, confidence, cutoff, alpha_budget)
    chosen = tuple(scheme_by_name(s) if isinstance(s, str) else s for s in schemes)
    if not chosen:
        raise InputError("expected at least one scheme, got none")
    preflight.check_weights(task)
    prints = preflight.fingerprint_splits(task)
    note = preflight.check_task(task)
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    allowed = eligibility(inventory, chosen, target, pinned)
    premise = premise_of(task, of_weights(task.model), prints, version("precimap"))
    with ExitStack() as stack:
        journal = None if run is None else stack.enter_context(new_journal(Path(run), premise.model_dump()))
        steps = _Steps(task, chosen, limits, target, premise, journal, progress, on_preflight)
        seen = _Seen(prints, note, inventory, allowed)
        result = _searched(steps, seen, Path(ledger) if ledger else state_directory())
        if run is not None:
            result.map.save(Path(run) / "map.json")
        return result


@dataclass(frozen=True, slots=True)
class _Steps:
    """What every step of one search needs."""

    task: Task
    schemes: tuple[Scheme, ...]
    limits: Limits
    target: Target
    premise: Premise
    journal: Journal | None
    progress: Progress
    on_preflight: Callable[[preflight.Preflight], None] | None

    def record(self, kind: str, subject: str, value: dict[str, Any], scheme: str = "") -> None:
        if self.journal is not None:
            self.journal.record(kind, subject, value, scheme)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What is known before a run directory is made: wrong input leaves none behind."""

    prints: preflight.SplitPrints
    note: str | None
    inventory: Inventory
    allowed: Eligibility


def _searched(steps: _Steps, seen: _Seen, ledger: Path) -> SearchResult:
    task, alpha = steps.task, steps.limits.alpha
    inventory, allowed = seen.inventory, seen.allowed
    calibration = calibrate(task, tuple(layer.name for layer in inventory.layers), steps.progress)
    baseline = score_baseline(task, task.splits.search)
    preflight.check_baseline(task, baseline)
    checked = _preflight(steps, seen, calibration, baseline)
    floor = rounding_floor(task, inventory, baseline, alpha)
    steps.record("floor", "all layers", asdict(floor), "bf16")
    probes = _probe_all(steps, inventory, calibration, baseline, allowed)
    candidates = [
        Candidate(p.layer, p.scheme, p.comparison.lower, p.comparison.upper, inventory.layer(p.layer).fused)
        for p in probes
    ]
    limit = steps.limits.cutoff or default_cutoff(steps.limits.margin, candidates)
    findings = Findings(inventory, steps.schemes, allowed, calibration, probes, limit, steps.target.name, steps.premise)
    chain = _chain(steps, findings, threshold(candidates, [s.name for s in steps.schemes], limit), baseline)
    certificates = _certified(steps, [joint.map for joint in chain if joint.passed], seen.prints, ledger)
    final, certificate, answer = _answer(findings, chain, certificates)
    steps.record("summary", final.fingerprint, {"answer": answer, "map": json.loads(final.model_dump_json())})
    return SearchResult(final, certificate, answer, checked, inventory, floor, probes, chain, certificates)


def _preflight(steps: _Steps, seen: _Seen, calibration: Calibration, baseline: Scored) -> preflight.Preflight:
    inventory = seen.inventory
    units = round(len(baseline.values) * seen.prints.certify.batches / seen.prints.search.batches)
    drop = preflight.detectable(
        steps.task, inventory, calibration, baseline, steps.schemes, steps.limits.alpha, max(2, units)
    )
    notes = preflight.notes(inventory, steps.schemes) + ((seen.note,) if seen.note else ())
    checked = preflight.Preflight(len(baseline.values), units, drop, notes)
    steps.record("preflight", steps.task.name, asdict(checked))
    steps.record("inventory", steps.task.name, asdict(inventory))
    if steps.on_preflight is not None:
        steps.on_preflight(checked)
    return checked


def _probe_all(
    steps: _Steps, inventory: Inventory, calibration: Calibration, baseline: Scored, allowed: Eligibility
) -> tuple[Probe, ...]:
    by_name = {scheme.name: scheme for scheme in steps.schemes}
    pairs = allowed.open_pairs()
    probes = []
    for number, (layer, name) in enumerate(pairs):
        steps.progress("probe", number, len(pairs))
        found = probe(steps.task, inventory, calibration, baseline, layer, by_name[name], steps.limits.alpha)
        steps.record("probe", layer, asdict(found), name)
        probes.append(found)
    steps.progress("probe", len(pairs), len(pairs))
    return tuple(probes)


def _chain(steps: _Steps, findings: Findings, planned: Sequence[Step], baseline: Scored) -> tuple[Joint, ...]:
    """Measure the maps as wholes on the search split, safest first, and back off there: stop at the first that fails."""
    measured: list[Joint] = []
    for number, step in enumerate(planned):
        steps.progress("whole maps", number, len(planned))
        precision_map = assemble(findings, step.choice)
        with quantized(steps.task.model, quantize_map(steps.task.model, precision_map)):
            scored = score(steps.task, steps.task.model, steps.task.splits.search)
        comparison = compare(steps.task, baseline, scored, steps.limits.alpha)
        passed = comparison.upper <= steps.limits.margin
        measured.append(Joint(precision_map, step.cutoff, comparison, passed))
        steps.record("joint", precision_map.fingerprint, {**asdict(comparison), "low": precision_map.low})
        if not passed:
            break
    steps.progress("whole maps", len(planned), len(planned))
    return tuple(measured)


def _certified(
    steps: _Steps, chain: Sequence[PrecisionMap], prints: preflight.SplitPrints, ledger: Path
) -> tuple[Certificate, ...]:
    if not chain:
        return ()
    limits = steps.limits
    spent = Ledger.open(ledger, prints.certify.whole, limits.budget).spend(
        chain_fingerprint(chain), limits.alpha, f"{steps.task.name}: {len(chain)} maps for {steps.target.name}"
    )
    question = Question(limits.margin, limits.alpha, spent, prints.certify.whole)
    certificates = certify(steps.task, steps.target, chain, question, steps.progress)
    for certificate in certificates:
        steps.record("certificate", certificate.map, certificate.model_dump())
    return certificates


def _answer(
    findings: Findings, chain: Sequence[Joint], certificates: Sequence[Certificate]
) -> tuple[PrecisionMap, Certificate | None, str]:
    passed = [certificate for certificate in certificates if certificate.certified]
    if passed:
        final = next(joint.map for joint in chain if joint.map.fingerprint == passed[-1].map)
        share = f"{final.flops_share:.1%} of the weight FLOPs"
        answer = f"certified: {len(final.low)} of {len(final.layers)} layers in low precision, {share}"
        return final.model_copy(update={"certificate": passed[-1]}), passed[-1], answer
    baseline = assemble(findings, {})
    if certificates:
        return (
            baseline,
            certificates[0],
            f"keep the baseline: the safest map was not certified ({certificates[0].verdict})",
        )
    if chain:
        upper = chain[0].comparison.upper
        return (
            baseline,
            None,
            f"keep the baseline: already on the search split the safest map's bound {upper:.2g} is above the margin",
        )
    return baseline, None, "keep the baseline: no layer is both eligible and not sensitive"
