"""From a chain of maps to those that go to the certificate: look, give back where all fail, grow where one passed.

Invariant: everything here looks at the search split only, and every map that leaves was measured there as a whole or is
nested below one that was.
"""

from collections.abc import Mapping
from dataclasses import replace

from precimap.errors import InputError
from precimap.metrics.metric import Loss
from precimap.searching.allocation.knapsack import Step
from precimap.searching.allocation.ladders import settled, total_gain
from precimap.searching.allocation.table import Table
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.predict import Predictor
from precimap.searching.maps.assemble import MapWriter
from precimap.searching.maps.candidates import (
    Chain,
    Looking,
    MapCandidate,
    candidate_of,
    choose,
    measure,
    sequence,
)
from precimap.searching.maps.growing import eager, grown
from precimap.searching.maps.rescore import contributions, halved, reverted
from precimap.searching.question import Question
from precimap.searching.run import Parts

MOST_GIVEN_BACK = 2


def chosen_maps(writer: MapWriter, question: Question, evidence: EvidenceTable, baseline: Parts) -> Chain:
    """The chain of the rule, and which of its maps passed on the search split; with what could be added to the best."""
    run, rule, table, known = writer.subject.run, question.rule, writer.table, evidence.by_key()
    screened = () if evidence.predictor is None else evidence.predictor.numbers
    looking = Looking(
        inventory=table.inventory,
        rule=rule,
        known=known,
        margin=question.margin,
        look=lambda candidate: measure(run, _written(writer, candidate), baseline, question.alpha, screened),
        out_of_time=lambda: run.out_of_time,
    )
    candidates = [candidate_of(evidence.predictor, known, step) for step in rule.steps(table)]
    found = choose(candidates, evidence.predictor, looking)
    if found.best is None:
        found = _given_back(writer, looking, found)
    if not found.candidates:
        return found
    open_ones = table.of([row for row in table.known if rule.may_add(row, writer.cutoff)])
    rows = open_ones.options(rule.bytes_worth, table.price)
    return grown(looking, found, evidence, eager(rows, known, table.price))


def _given_back(writer: MapWriter, looking: Looking, found: Chain) -> Chain:
    """When no map passed: give back what adds most where the safest measured map runs, and look again."""
    run, table, predictor = writer.subject.run, writer.table, found.predictor
    failed = next((one for one in found.candidates if one.measured is not None), None)
    fused = {layer.name: layer.fused for layer in table.inventory.layers}
    for _ in range(MOST_GIVEN_BACK):
        if failed is None or predictor is None or not predictor.screen.pairs or looking.out_of_time():
            break
        assert failed.measured is not None
        try:
            added = contributions(run, predictor, failed.step)
        except (RuntimeError, TypeError):  # scores were screened, but the loss carries no gradient
            break
        if isinstance(table.metric, Loss) and failed.measured.upper > looking.margin:
            choice = reverted(failed.step, failed.measured, added, fused, looking.margin)
        else:
            choice = halved(failed.step, added, fused)
        if choice is None:
            break
        step = _priced(table, choice, looking.rule.bytes_worth)
        if not step.choice:
            break
        failed = looking.look(candidate_of(predictor, looking.known, step))
        found = replace(found, candidates=(failed, *found.candidates))
        if looking.passed(failed) and looking.rule.accepts(table.inventory, step):
            below = _below(table, looking, failed, predictor)
            return replace(found, candidates=(*below, *found.candidates), best=len(below))
    return found


def _below(table: Table, looking: Looking, top: MapCandidate, predictor: Predictor) -> tuple[MapCandidate, ...]:
    """The chain of the rule anew, of nothing but what `top` holds: a map that fails the proof has others below it."""
    held = table.of([looking.known[key] for key in top.step.choice.items()])
    try:
        steps = looking.rule.steps(held)
    except InputError:  # nothing smaller is small enough
        return ()
    smaller = [step for step in steps if step.choice.items() < top.step.choice.items()]
    return tuple(candidate_of(predictor, looking.known, step) for step in smaller)


def _written(writer: MapWriter, candidate: MapCandidate) -> MapCandidate:
    """With its map; one of a thousand layers takes a while to write down, and few of a chain are needed."""
    if candidate.map is not None:
        return candidate
    made = writer.written(candidate.step.choice)
    return replace(candidate, map=made, fingerprint=made.fingerprint)


def to_certify(writer: MapWriter, found: Chain) -> Chain:
    """The chain with the maps of the sequence that is certified."""
    wanted = {id(one) for one in sequence(found)}
    candidates = tuple(_written(writer, one) if id(one) in wanted else one for one in found.candidates)
    return replace(found, candidates=candidates)


def _priced(table: Table, choice: Mapping[str, str], bytes_worth: float) -> Step:
    """A step for a choice that no chain gave, less the siblings that only pay beside those which are gone."""
    rows = table.options(bytes_worth, table.price)
    left = settled(rows, choice)
    low = [row for row in rows if left.get(row.layer) == row.scheme]
    sizes = table.base_bytes | {row.layer: row.bytes for row in low}
    return Step(left, total_gain(low), sum(row.cost for row in low), sum(sizes.values()))
