"""From a chain of maps to those that go to the certificate: look, give back where all fail, grow where one passed.

Invariant: everything here looks at the search split only, and every map that leaves was measured there as a whole or is
nested below one that was.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from precimap.errors import InputError
from precimap.metrics.metric import Loss, Metric
from precimap.searching.allocation.knapsack import Step
from precimap.searching.allocation.ladders import settled, total_gain
from precimap.searching.allocation.rules import Rule
from precimap.searching.evidence.gather import Evidence
from precimap.searching.evidence.known import Known, options, price
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen_plan import Key
from precimap.searching.limits import Limits
from precimap.searching.run import Parts, Run
from precimap.searching.whole.assemble import Findings, assemble
from precimap.searching.whole.growing import eager, grown
from precimap.searching.whole.rescore import contributions, halved, reverted
from precimap.searching.whole.whole_maps import Chosen, Joint, choose, measure, predicted_joint, sequence

MOST_GIVEN_BACK = 2


def chosen_maps(
    run: Run, findings: Findings, rule: Rule, evidence: Evidence, baseline: Parts, limits: Limits
) -> Chosen:
    """The chain of `rule`, and which of its maps passed on the search split; with what could be added to the best."""
    known, margin = evidence.by_key(), limits.margin
    schemes = {scheme.name: scheme for scheme in findings.schemes}
    steps = rule.steps(findings.inventory, run.task.metric, evidence.known, schemes, margin, findings.cutoff)
    joints = [predicted_joint(evidence.predictor, known, step) for step in steps]
    screened = () if evidence.predictor is None else evidence.predictor.numbers

    def look(joint: Joint) -> Joint:
        return measure(run, _written(findings, joint), baseline, limits.alpha, screened)

    def out_of_time() -> bool:
        return run.out_of_time

    chosen = choose(joints, evidence.predictor, known, margin, look, out_of_time)
    if chosen.best is None:
        chosen = _given_back(run, findings, rule, chosen, known, margin, look)
    if not chosen.joints:
        return chosen
    counted = price(run.task.metric, evidence.known, margin)
    open_ones = [found for found in evidence.known if rule.may_add(found, findings.cutoff)]
    rows = options(findings.inventory, open_ones, schemes, counted, rule.bytes_worth)
    return grown(findings, rule, chosen, evidence, eager(rows, known, counted), margin, look, out_of_time)


def _given_back(
    run: Run,
    findings: Findings,
    rule: Rule,
    chosen: Chosen,
    known: Mapping[Key, Known],
    margin: float,
    look: Callable[[Joint], Joint],
) -> Chosen:
    """When no map passed: give back what adds most where the safest measured map runs, and look again."""
    predictor = chosen.predictor
    failed = next((joint for joint in chosen.joints if joint.measured is not None), None)
    fused = {layer.name: layer.fused for layer in findings.inventory.layers}
    for _ in range(MOST_GIVEN_BACK):
        if failed is None or predictor is None or not predictor.screen.pairs or run.out_of_time:
            break
        assert failed.measured is not None
        try:
            added = contributions(run, predictor, failed.step)
        except (RuntimeError, TypeError):  # scores were screened, but the loss carries no gradient
            break
        if isinstance(run.task.metric, Loss) and failed.measured.upper > margin:
            choice = reverted(failed.step, failed.measured, added, fused, margin)
        else:
            choice = halved(failed.step, added, fused)
        if choice is None:
            break
        step = _priced(findings, rule, run.task.metric, choice, margin)
        if not step.choice:
            break
        failed = look(predicted_joint(predictor, known, step))
        chosen = replace(chosen, joints=(failed, *chosen.joints))
        if failed.passed(margin) and rule.accepts(findings.inventory, step):
            below = _below(run, findings, rule, failed, predictor, known, margin)
            return replace(chosen, joints=(*below, *chosen.joints), best=len(below))
    return chosen


def _below(
    run: Run,
    findings: Findings,
    rule: Rule,
    top: Joint,
    predictor: Predictor,
    known: Mapping[Key, Known],
    margin: float,
) -> tuple[Joint, ...]:
    """The chain of the rule anew, of nothing but what `top` holds: a map that fails the proof has others below it."""
    held = [known[key] for key in top.step.choice.items()]
    schemes = {scheme.name: scheme for scheme in findings.schemes}
    try:
        steps = rule.steps(findings.inventory, run.task.metric, held, schemes, margin, findings.cutoff)
    except InputError:  # nothing smaller is small enough
        return ()
    return tuple(
        predicted_joint(predictor, known, step) for step in steps if step.choice.items() < top.step.choice.items()
    )


def _written(findings: Findings, joint: Joint) -> Joint:
    """With its map; one of a thousand layers takes a while to write down, and few of a chain are needed."""
    return (
        joint if joint.map is not None else replace(joint, map=findings.realign(assemble(findings, joint.step.choice)))
    )


def to_certify(findings: Findings, chosen: Chosen) -> Chosen:
    """The chain with the maps of the sequence that is certified."""
    wanted = {id(joint) for joint in sequence(chosen)}
    return replace(chosen, joints=tuple(_written(findings, j) if id(j) in wanted else j for j in chosen.joints))


def _priced(findings: Findings, rule: Rule, metric: Metric, choice: Mapping[str, str], margin: float) -> Step:
    """A step for a choice that no chain gave, less the siblings that only pay beside those which are gone."""
    by_name = {scheme.name: scheme for scheme in findings.schemes}
    counted = price(metric, findings.known, margin)
    rows = options(findings.inventory, findings.known, by_name, counted, rule.bytes_worth)
    left = settled(rows, choice)
    low = [row for row in rows if left.get(row.layer) == row.scheme]
    sizes = {layer.name: layer.bytes for layer in findings.inventory.layers}
    sizes |= {row.layer: row.bytes for row in low}
    return Step(left, total_gain(low), sum(row.cost for row in low), sum(sizes.values()))
