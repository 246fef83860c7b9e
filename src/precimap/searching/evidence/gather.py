"""All that is found out about single layers: the screen, its audit, and the probes that it takes.

Invariant: what the screen predicts and what a probe measured stay apart (`LayerEvidence`); a layer that the screen cannot
see, or of a kind in which the audit caught it, is decided by its probe alone. With `probe_all` nothing is screened: the
literal one-at-a-time measurement.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from precimap.metrics.paired import drop_of
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.price import costs_of
from precimap.searching.allocation.table import Table
from precimap.searching.evidence.audit import Audit, ambiguous, audit, to_audit
from precimap.searching.evidence.bound import bound
from precimap.searching.evidence.input_rates import InputRates, input_rates
from precimap.searching.evidence.means import kind_of
from precimap.searching.evidence.own_rounding import own_rounding
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import Probe, probe
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.latency.savings import Savings
from precimap.searching.pairs import Key, Pair, key_of
from precimap.searching.question import Question, bytes_of
from precimap.searching.run import Parts, Run, batch_subject
from precimap.searching.subject import Subject

AUDIT_SEED = 8
MOST_AMBIGUOUS = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class EvidenceTable:
    """known: one row for each open (layer, scheme). predictor, audit: None where nothing was screened.

    unseen: layers that the screen could not see, and why. screened_units: of the search split. batch_bytes: what screening
    a batch took. rates: what each scheme does to a layer's input, on one screened batch. suspects: audits these layers,
    too, where a map of them lost more than was predicted, and names those that the screen is wrong about.
    """

    known: tuple[LayerEvidence, ...]
    predictor: Predictor | None = None
    audit: Audit | None = None
    unseen: Mapping[str, str] = field(default_factory=dict)
    screened_units: int = 0
    batch_bytes: int | None = None
    rates: Mapping[Key, InputRates] = field(default_factory=dict)
    suspects: Callable[[Iterable[Key]], frozenset[Key]] = lambda keys: frozenset()

    def __repr__(self) -> str:
        trusted = sum(found.trusted for found in self.known)
        return f"EvidenceTable({len(self.known)} pairs of layer and scheme, {trusted} by the screen)"

    def __reduce__(self) -> tuple[Any, ...]:
        """To a file goes what was found, not what would find more: the predictor holds the whole task."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("predictor", "suspects")}
        return _found_before, (found,)

    def by_key(self) -> dict[Key, LayerEvidence]:
        return {found.key: found for found in self.known}


def _found_before(found: dict[str, Any]) -> EvidenceTable:
    return EvidenceTable(**found)


def table_of(subject: Subject, question: Question, known: Sequence[LayerEvidence]) -> Table:
    """What a map is chosen from."""
    return Table(
        inventory=subject.inventory,
        metric=subject.task.metric,
        schemes=subject.by_name,
        known=tuple(known),
        margin=question.margin,
        given_cutoff=question.cutoff,
    )


def gather(subject: Subject, question: Question, baseline: Parts, realigned: int = 0) -> EvidenceTable:
    """Screen, audit and probe the pairs; with `Effort.probe_all` probe each of them on the whole search split.

    realigned: of how many outputs maps are served with realigned scores; predictions are of such.
    """
    pairs, effort, run = subject.pairs, question.effort, subject.run
    probing = _Probing(subject, question, baseline)
    if effort.probe_all or not pairs:
        probed = probing.on(pairs, tuple(range(len(baseline.sizes))))
        return _written(run, EvidenceTable(known=_timed(subject, [_measured(baseline, found) for found in probed])))
    screened = screen(subject, pairs, bytes_of(effort.screen_memory), effort.screen_units, baseline.scattered)
    numbers = tuple(sorted(screened.batches)) or baseline.scattered(effort.screen_units)
    predictor = _predictor(subject, question, baseline, screened, realigned)
    seen = [pair for pair in pairs if key_of(pair) in screened.pairs]
    few = baseline.scattered(effort.audit_units, among=numbers)
    audits = probing.on(to_audit(subject.inventory, seen, AUDIT_SEED), few) if seen else ()
    rounding = probing.rounding(audits)
    kinds = {key: kind_of(subject.inventory, key) for key in screened.pairs}
    found = audit(predictor, audits, kinds, question.margin, rounding)
    direct = [pair for pair in pairs if pair not in seen or kinds[key_of(pair)] in found.distrusted]
    probes = {(p.layer, p.scheme): p for p in (*audits, *probing.on(direct, numbers))}
    known = _timed(subject, _rows(subject, predictor, found, probes))
    believed = predictor.believed([row.key for row in known if row.trusted], probes.values())

    def suspects(keys: Iterable[Key]) -> frozenset[Key]:
        asked = set(keys) & set(believed.screen.pairs)
        more = probing.on([pair for pair in seen if key_of(pair) in asked], few)
        # A culprit stands out of what is usual; to nudge each layer costs as much again.
        usual = max(rounding.values(), default=0.0)
        own = {one.layer: rounding.get(one.layer, usual) for one in more}
        rows = audit(predictor, more, {key: kinds[key] for key in asked}, question.margin, own).rows
        return frozenset((row.layer, row.scheme) for row in rows if not row.agrees)

    evidence = EvidenceTable(
        known=known,
        predictor=believed,
        audit=found,
        unseen=dict(screened.unseen),
        screened_units=sum(baseline.sizes[number] for number in predictor.numbers),
        batch_bytes=screened.plan.bytes,
        rates=_rates(run, screened),
        suspects=suspects,
    )
    flipping = _flipping(evidence, subject, question)
    if flipping:
        asked = [pair for pair in pairs if key_of(pair) in flipping]
        probes |= {(p.layer, p.scheme): p for p in probing.on(asked, few)}
        evidence = replace(evidence, known=_timed(subject, _rows(subject, predictor, found, probes)))
    return _written(run, evidence)


def _predictor(subject: Subject, question: Question, baseline: Parts, screened: Screen, realigned: int) -> Predictor:
    task = subject.task
    batches = {n: batch for n, batch in enumerate(task.splits.search) if n in screened.batches}
    return Predictor(
        task=task, screen=screened, baseline=baseline, batches=batches, alpha=question.alpha, realigned=realigned
    )


def _rates(run: Run, screened: Screen) -> dict[Key, InputRates]:
    """On one screened batch; from the journal where it holds them."""
    if not screened.batches:
        return {}
    number = min(screened.batches)
    subject = batch_subject("inputs", number)
    row = run.journal.find("rates", subject, screened.plan.digest)
    if row is None:
        batch = next(batch for at, batch in enumerate(run.task.splits.search) if at == number)
        layers = [layer for one in screened.plan.passes for layer in one]
        found = [(*key, asdict(rates)) for key, rates in input_rates(run.task, layers, batch).items()]
        run.journal.record("rates", subject, {"rates": found}, screened.plan.digest)
        row = run.journal.find("rates", subject, screened.plan.digest)
    assert row is not None
    return {(layer, scheme): InputRates(**rates) for layer, scheme, rates in row.value["rates"]}


@dataclass(frozen=True, slots=True)
class _Probing:
    subject: Subject
    question: Question
    baseline: Parts

    def on(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> tuple[Probe, ...]:
        return probe(self.subject, self.question, self.baseline, pairs, numbers) if pairs else ()

    def rounding(self, probes: Sequence[Probe]) -> dict[str, float]:
        """Of the model's own, on the batches that all these probes saw."""
        numbers = probes[0].numbers if probes else ()
        layers = [one.layer for one in probes]
        memory = bytes_of(self.question.effort.replay_memory)
        return own_rounding(self.subject.run, self.baseline, layers, numbers, memory)


def _flipping(evidence: EvidenceTable, subject: Subject, question: Question) -> tuple[Key, ...]:
    """The trusted pairs that are in or out of the map predicted best only by the screen's approximation."""
    predictor, found, rule, margin = evidence.predictor, evidence.audit, question.rule, question.margin
    if predictor is None or found is None or not predictor.predicts_metric:
        return ()
    table, known, inventory = table_of(subject, question, evidence.known), evidence.by_key(), subject.inventory
    steps = rule.steps(table)
    best = next((s for s in reversed(steps) if bound(predictor, known, s.choice, margin) <= margin), None)
    if best is None:
        return ()
    costs = costs_of([row for row in evidence.known if row.trusted], table.price)
    readers = Counter((inventory.layer(layer).siblings, scheme) for layer, scheme in best.choice.items())
    gains = {}
    for key in costs:
        others = readers[inventory.layer(key[0]).siblings, key[1]] - (best.choice.get(key[0]) == key[1])
        gains[key] = table.gain(known[key], rule.bytes_worth) + (known[key].shared if others else 0.0)
    return ambiguous(costs, gains, best.choice, found.approximation, MOST_AMBIGUOUS)


def _rows(
    subject: Subject, predictor: Predictor, found: Audit, probes: Mapping[Key, Probe]
) -> tuple[LayerEvidence, ...]:
    """Of the pairs that are predicted or probed, in their order."""
    rows = []
    for key in map(key_of, subject.pairs):
        probed = probes.get(key)
        if key in predictor.screen.pairs:
            trusted = kind_of(subject.inventory, key) not in found.distrusted
            rows.append(_predicted(predictor, key, probed, trusted))
        elif probed is not None:
            rows.append(_measured(predictor.baseline, probed))
    return tuple(rows)


def _predicted(predictor: Predictor, key: Key, probed: Probe | None, trusted: bool) -> LayerEvidence:
    """A pair that the screen saw, with its probe, if there is one. trusted: by the audit."""
    square = float(np.mean(predictor.loss_changes([key]) ** 2))
    if not trusted and probed is not None:
        square = _loss_square(predictor.baseline, probed)
    return LayerEvidence(
        layer=key[0],
        scheme=key[1],
        predicted=predictor.comparison([key]),
        probed=None if probed is None else probed.comparison,
        loss_square=square,
        output_error=predictor.screen.output_error(key),
        drift=predictor.drift([key]),
        trusted=trusted,
        correction=_correction(predictor, probed) if trusted and probed is not None else None,
    )


def _timed(subject: Subject, known: Sequence[LayerEvidence]) -> tuple[LayerEvidence, ...]:
    """With what each saves, where layers were timed."""
    if subject.latency is None:
        return tuple(known)
    return tuple(_with_time(found, subject.latency.savings) for found in known)


def _with_time(found: LayerEvidence, savings: Savings) -> LayerEvidence:
    shared = savings.sharing(found.key)
    return replace(found, saved=savings.counted(found.key), shared=0.0 if shared is None else shared.share)


def _correction(predictor: Predictor, probed: Probe) -> tuple[float, float] | None:
    """Mean of probed - predicted in the metric, where it is predicted, and its error over the units of the probe."""
    if not predictor.predicts_metric:
        return None
    on = predictor.on(probed.numbers)
    predicted = on.scored([(probed.layer, probed.scheme)])
    sample = predictor.task.metric.paired(predicted.values, probed.scored.values, on.reference.units)
    found = drop_of(sample)
    return found.estimate, found.error


def _measured(baseline: Parts, found: Probe) -> LayerEvidence:
    """A pair of which nothing but its probe is known."""
    return LayerEvidence(
        layer=found.layer,
        scheme=found.scheme,
        predicted=None,
        probed=found.comparison,
        loss_square=_loss_square(baseline, found),
        output_error=None,
        drift=float((found.scored.losses - baseline.only(found.numbers).losses).mean()),
        trusted=False,
    )


def _loss_square(baseline: Parts, found: Probe) -> float:
    return float(np.mean((found.scored.losses - baseline.only(found.numbers).losses) ** 2))


def _written(run: Run, evidence: EvidenceTable) -> EvidenceTable:
    """Conclude what was found, for the report."""
    rows = [
        {
            "layer": found.layer,
            "scheme": found.scheme,
            "predicted": None if found.predicted is None else asdict(found.predicted),
            "probed": None if found.probed is None else asdict(found.probed),
            "loss_square": found.loss_square,
            "output_error": found.output_error,
            "drift": found.drift,
            "trusted": found.trusted,
            "correction": found.correction,
            "saved": found.saved,
            "shared": found.shared,
            "input": asdict(evidence.rates[found.key]) if found.key in evidence.rates else None,
        }
        for found in evidence.known
    ]
    value = {
        "layers": rows,
        "audit": None if evidence.audit is None else evidence.audit.row(),
        "unseen": dict(evidence.unseen),
        "screened_units": evidence.screened_units,
        "batch_bytes": evidence.batch_bytes,
    }
    run.journal.conclude("evidence", "search", value)
    return evidence


def evidence_of(row: Mapping[str, Any]) -> EvidenceTable:
    """What `_written` concluded, read back; without the predictor, which holds the whole task."""
    known, rates = [], {}
    for found in row["layers"]:
        values = {name: value for name, value in found.items() if name != "input"}
        known.append(_EVIDENCE.validate_python(values))
        if found["input"] is not None:
            rates[known[-1].key] = InputRates(**found["input"])
    return EvidenceTable(
        known=tuple(known),
        audit=None if row["audit"] is None else Audit.of_row(row["audit"]),
        unseen=row["unseen"],
        screened_units=row["screened_units"],
        batch_bytes=row["batch_bytes"],
        rates=rates,
    )


_EVIDENCE = TypeAdapter(LayerEvidence)
