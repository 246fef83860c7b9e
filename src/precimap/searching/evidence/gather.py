"""All that is found out about single layers: the screen, its audit, and the probes that it takes.

Invariant: what the screen predicts and what a probe measured stay apart (`Known`); a layer that the screen cannot see,
or of a kind in which the audit caught it, is decided by its probe alone. With `probe_all` nothing is screened: the
literal one-at-a-time measurement.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from precimap.layers.inventory import Inventory
from precimap.metrics.paired import drop_of
from precimap.numerics.schemes import Scheme
from precimap.searching.allocation.rules import Rule, cutoff_of
from precimap.searching.calibrate import Calibration
from precimap.searching.evidence.audit import Audit, ambiguous, audit, to_audit
from precimap.searching.evidence.input_rates import InputRates, input_rates
from precimap.searching.evidence.known import Known, costs_of, gain, price
from precimap.searching.evidence.means import kind_of
from precimap.searching.evidence.own_rounding import own_rounding
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import Probe, probe
from precimap.searching.evidence.screen import Screen, screen
from precimap.searching.evidence.screen_plan import Key, Pair
from precimap.searching.latency.savings import Savings
from precimap.searching.limits import Effort, Limits
from precimap.searching.run import Parts, Run, batch_subject
from precimap.searching.whole.whole_maps import bound

AUDIT_SEED = 8
MOST_AMBIGUOUS = 4


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Evidence:
    """known: one row for each open (layer, scheme). predictor, audit: None where nothing was screened.

    rates: what each scheme does to a layer's input, on one screened batch. suspects: audits these layers, too, where a map
    of them lost more than was predicted, and names those that the screen is wrong about.
    """

    known: tuple[Known, ...]
    predictor: Predictor | None
    audit: Audit | None
    rates: Mapping[Key, InputRates] = field(default_factory=dict)
    suspects: Callable[[Iterable[Key]], frozenset[Key]] = lambda keys: frozenset()

    def __repr__(self) -> str:
        trusted = sum(found.trusted for found in self.known)
        return f"Evidence({len(self.known)} pairs of layer and scheme, {trusted} by the screen)"

    def __reduce__(self) -> tuple[Any, ...]:
        """To a file goes what was found, not what would find more: the predictor holds the whole task."""
        return Evidence, (self.known, None, self.audit, dict(self.rates))

    def by_key(self) -> dict[Key, Known]:
        return {(found.layer, found.scheme): found for found in self.known}


def gather(
    run: Run,
    inventory: Inventory,
    calibration: Calibration,
    baseline: Parts,
    pairs: Sequence[Pair],
    rule: Rule,
    limits: Limits,
    effort: Effort,
    realigned: int = 0,
    savings: Savings | None = None,
) -> Evidence:
    """Screen, audit and probe the pairs; with `effort.probe_all` probe each of them on the whole search split.

    realigned: of how many outputs maps are served with realigned scores; predictions are of such. savings: of the
    pairs, where layers were timed.
    """
    probing = _Probing(run, inventory, calibration, baseline, limits.alpha, effort)
    if effort.probe_all or not pairs:
        numbers = tuple(range(len(baseline.sizes)))
        return _written(run, Evidence(_timed(_probed_only(baseline, probing.on(pairs, numbers)), savings), None, None))
    sizes, units = baseline.sizes, effort.screen_units
    screened = screen(run, inventory, calibration, pairs, effort.screen_memory, sizes, units, baseline.scattered)
    numbers = tuple(sorted(screened.batches)) or baseline.scattered(effort.screen_units)
    batches = {n: batch for n, batch in enumerate(run.task.splits.search) if n in screened.batches}
    predictor = Predictor(run.task, screened, baseline, batches, limits.alpha, realigned=realigned)
    seen = [pair for pair in pairs if (pair[0], pair[1].name) in screened.pairs]
    few = baseline.scattered(effort.audit_units, among=numbers)
    audits = probing.on(to_audit(inventory, seen, AUDIT_SEED), few) if seen else ()
    rounding = probing.rounding(audits)
    found = audit(inventory, predictor, audits, screened.pairs, limits.margin, rounding)
    direct = [pair for pair in pairs if pair not in seen or _distrusted(inventory, pair, found)]
    probes = {(p.layer, p.scheme): p for p in (*audits, *probing.on(direct, numbers))}
    known = _timed(_table(inventory, pairs, predictor, screened, probes, found, baseline), savings)
    believed = predictor.believed([(row.layer, row.scheme) for row in known if row.trusted], probes.values())

    def suspects(keys: Iterable[Key]) -> frozenset[Key]:
        asked = set(keys) & set(believed.screen.pairs)
        more = probing.on([pair for pair in seen if (pair[0], pair[1].name) in asked], few)
        usual = max(
            rounding.values(), default=0.0
        )  # a culprit stands out of it; to nudge each layer costs as much again
        own = {one.layer: rounding.get(one.layer, usual) for one in more}
        rows = audit(inventory, predictor, more, asked, limits.margin, own).rows
        return frozenset((row.layer, row.scheme) for row in rows if not row.agrees)

    evidence = Evidence(known, believed, found, _rates(run, screened), suspects)
    flipping = _flipping(evidence, inventory, {s.name: s for _, s in pairs}, rule, limits)
    if flipping:
        asked = [pair for pair in pairs if (pair[0], pair[1].name) in flipping]
        probes |= {(p.layer, p.scheme): p for p in probing.on(asked, few)}
        known = _timed(_table(inventory, pairs, predictor, screened, probes, found, baseline), savings)
        evidence = replace(evidence, known=known)
    return _written(run, evidence)


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
    run: Run
    inventory: Inventory
    calibration: Calibration
    baseline: Parts
    alpha: float
    effort: Effort

    def on(self, pairs: Sequence[Pair], numbers: Sequence[int]) -> tuple[Probe, ...]:
        if not pairs:
            return ()
        memory = self.effort.replay_memory
        return probe(self.run, self.inventory, self.calibration, self.baseline, pairs, numbers, self.alpha, memory)

    def rounding(self, probes: Sequence[Probe]) -> dict[str, float]:
        """Of the model's own, on the batches that all these probes saw."""
        numbers = probes[0].numbers if probes else ()
        layers = [one.layer for one in probes]
        return own_rounding(self.run, self.baseline, layers, numbers, self.effort.replay_memory)


def _distrusted(inventory: Inventory, pair: Pair, found: Audit) -> bool:
    return kind_of(inventory, (pair[0], pair[1].name)) in found.distrusted


def _flipping(
    evidence: Evidence, inventory: Inventory, schemes: dict[str, Scheme], rule: Rule, limits: Limits
) -> tuple[Key, ...]:
    """The trusted pairs that are in or out of the map predicted best only by the screen's approximation."""
    predictor, found = evidence.predictor, evidence.audit
    if predictor is None or found is None or not predictor.predicts_metric:
        return ()
    metric = predictor.task.metric
    limit = cutoff_of(limits, inventory, evidence.known)
    steps = rule.steps(inventory, metric, evidence.known, schemes, limits.margin, limit)
    known = evidence.by_key()
    best = next((s for s in reversed(steps) if bound(predictor, known, s.choice, limits.margin) <= limits.margin), None)
    if best is None:
        return ()
    counted = price(metric, evidence.known, limits.margin)
    costs = costs_of([row for row in evidence.known if row.trusted], counted)
    readers = Counter((inventory.layer(layer).siblings, scheme) for layer, scheme in best.choice.items())
    gains = {}
    for key in costs:
        others = readers[inventory.layer(key[0]).siblings, key[1]] - (best.choice.get(key[0]) == key[1])
        own = gain(inventory, key[0], schemes[key[1]], rule.bytes_worth, known[key].saved)
        gains[key] = own + (known[key].shared if others else 0.0)
    return ambiguous(costs, gains, best.choice, found.approximation, MOST_AMBIGUOUS)


def _table(
    inventory: Inventory,
    pairs: Sequence[Pair],
    predictor: Predictor,
    screened: Screen,
    probes: dict[Key, Probe],
    found: Audit,
    baseline: Parts,
) -> tuple[Known, ...]:
    rows = []
    for layer, scheme in pairs:
        key = (layer, scheme.name)
        probed = probes.get(key)
        if key in screened.pairs:
            trusted = kind_of(inventory, key) not in found.distrusted
            square = float(np.mean(predictor.loss_changes([key]) ** 2))
            if not trusted and probed is not None:
                square = _loss_square(baseline, probed)
            rows.append(
                Known(
                    layer,
                    scheme.name,
                    predictor.comparison([key]),
                    None if probed is None else probed.comparison,
                    square,
                    screened.output_error(key),
                    predictor.drift([key]),
                    trusted,
                    _correction(predictor, probed) if trusted and probed is not None else None,
                )
            )
        elif probed is not None:
            rows.append(_known(baseline, probed))
    return tuple(rows)


def _timed(known: Sequence[Known], savings: Savings | None) -> tuple[Known, ...]:
    if savings is None:
        return tuple(known)
    made = []
    for found in known:
        key = (found.layer, found.scheme)
        shared = savings.sharing(key)
        made.append(replace(found, saved=savings.counted(key), shared=0.0 if shared is None else shared.share))
    return tuple(made)


def _correction(predictor: Predictor, probed: Probe) -> tuple[float, float] | None:
    """Mean of probed - predicted in the metric, where it is predicted, and its error over the units of the probe."""
    if not predictor.predicts_metric:
        return None
    on = predictor.on(probed.numbers)
    predicted = on.scored([(probed.layer, probed.scheme)])
    sample = predictor.task.metric.paired(predicted.values, probed.scored.values, on.reference.units)
    found = drop_of(sample)
    return found.estimate, found.error


def _probed_only(baseline: Parts, probes: Sequence[Probe]) -> tuple[Known, ...]:
    return tuple(_known(baseline, found) for found in probes)


def _known(baseline: Parts, found: Probe) -> Known:
    square = _loss_square(baseline, found)
    drift = float((found.scored.losses - baseline.only(found.numbers).losses).mean())
    return Known(found.layer, found.scheme, None, found.comparison, square, None, drift, trusted=False)


def _loss_square(baseline: Parts, found: Probe) -> float:
    return float(np.mean((found.scored.losses - baseline.only(found.numbers).losses) ** 2))


def _written(run: Run, evidence: Evidence) -> Evidence:
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
            "input": asdict(evidence.rates[key]) if (key := (found.layer, found.scheme)) in evidence.rates else None,
        }
        for found in evidence.known
    ]
    predictor = evidence.predictor
    value = {
        "layers": rows,
        "audit": None if evidence.audit is None else evidence.audit.row(),
        "unseen": {} if predictor is None else dict(predictor.screen.unseen),
        "screened_units": 0 if predictor is None else sum(predictor.baseline.sizes[n] for n in predictor.numbers),
        "batch_bytes": None if predictor is None else predictor.screen.plan.bytes,
    }
    run.journal.conclude("evidence", "search", value)
    return evidence
