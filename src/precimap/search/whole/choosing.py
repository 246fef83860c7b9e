"""From a chain of maps to those that go to the certificate: look, give back where all fail, fill up where room is left.

Invariant: everything here looks at the search split only, and every map that leaves was measured there as a whole or is
nested below one that was.
"""

from collections.abc import Mapping
from dataclasses import replace

from precimap.metrics.metric import Loss, Metric
from precimap.search.allocation.knapsack import Step
from precimap.search.allocation.ladders import settled, total_gain
from precimap.search.allocation.repair import repair
from precimap.search.allocation.rules import Rule
from precimap.search.evidence.gather import Evidence
from precimap.search.evidence.known import options, price
from precimap.search.limits import Limits
from precimap.search.run import Parts, Run
from precimap.search.whole.assemble import Findings, assemble
from precimap.search.whole.rescore import contributions, halved, reverted
from precimap.search.whole.whole_maps import Chosen, Joint, bound, choose, measure, predicted_joint, sequence

MOST_GIVEN_BACK = 2
WORTH_A_LOOK = 0.02  # of the gain of everything: a smaller one is not worth a pass
MOST_PREDICTIONS = 64


def chosen_maps(
    run: Run, findings: Findings, rule: Rule, evidence: Evidence, baseline: Parts, limits: Limits
) -> Chosen:
    """The chain of `rule`, and which of its maps passed on the search split."""
    known = evidence.by_key()
    schemes = {scheme.name: scheme for scheme in findings.schemes}
    steps = rule.steps(findings.inventory, run.task.metric, evidence.known, schemes, limits.margin, findings.cutoff)
    joints = [predicted_joint(evidence.predictor, known, step) for step in steps]
    screened = () if evidence.predictor is None else evidence.predictor.numbers

    def look(joint: Joint) -> Joint:
        return measure(run, _written(findings, joint), baseline, limits.alpha, screened)

    chosen = choose(joints, evidence.predictor, known, limits.margin, look, lambda: run.out_of_time)
    if chosen.best is None:
        return _given_back(run, findings, rule, chosen, evidence, baseline, limits)
    return _filled_up(run, findings, rule, chosen, evidence, baseline, limits)


def _given_back(
    run: Run, findings: Findings, rule: Rule, chosen: Chosen, evidence: Evidence, baseline: Parts, limits: Limits
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
        if isinstance(run.task.metric, Loss) and failed.measured.upper > limits.margin:
            choice = reverted(failed.step, failed.measured, added, fused, limits.margin)
        else:
            choice = halved(failed.step, added, fused)
        if choice is None:
            break
        step = _priced(findings, rule, run.task.metric, choice, limits.margin)
        if not step.choice:
            break
        joint = _written(findings, predicted_joint(predictor, evidence.by_key(), step))
        failed = measure(run, joint, baseline, limits.alpha, predictor.numbers)
        chosen = replace(chosen, joints=(failed, *chosen.joints))
        if failed.passed(limits.margin) and rule.accepts(findings.inventory, step):
            return replace(chosen, best=0)
    return chosen


def _filled_up(
    run: Run, findings: Findings, rule: Rule, chosen: Chosen, evidence: Evidence, baseline: Parts, limits: Limits
) -> Chosen:
    """Between the best map and the next one, what fits by superposition; taken if it passes as a whole."""
    predictor, best = chosen.predictor, chosen.best
    assert best is not None
    if predictor is None or not predictor.predicts_metric or best + 1 == len(chosen.joints) or run.out_of_time:
        return chosen
    known, start = evidence.by_key(), chosen.joints[best].step
    rows = options(
        findings.inventory,
        [found for found in evidence.known if (found.layer, found.scheme) in predictor.screen.pairs],
        {scheme.name: scheme for scheme in findings.schemes},
        price(run.task.metric, evidence.known, limits.margin),
        rule.bytes_worth,
    )
    seen = all(key in predictor.screen.pairs for key in start.choice.items())
    if not seen or bound(predictor, known, start.choice, limits.margin) > limits.margin:
        return chosen
    base = {layer.name: layer.bytes for layer in findings.inventory.layers}

    def predicted(choice: Mapping[str, str]) -> float:
        return bound(predictor, known, choice, limits.margin)

    step = repair(start, rows, base, predicted, limits.margin, most_tries=MOST_PREDICTIONS)
    grown = start.choice.items() <= step.choice.items()
    if (
        not grown
        or not rule.accepts(findings.inventory, step)
        or step.gain - start.gain < WORTH_A_LOOK * chosen.joints[-1].step.gain
    ):
        return chosen
    joint = _written(findings, predicted_joint(predictor, known, step))
    joint = measure(run, joint, baseline, limits.alpha, predictor.numbers)
    at = best + 1
    # Of the maps above it those stay in the chain that hold it, and those that were looked at.
    above = [j for j in chosen.joints[at:] if j.measured or step.choice.items() <= j.step.choice.items()]
    joints = (*chosen.joints[:at], joint, *above)
    return replace(chosen, joints=joints, best=at if joint.passed(limits.margin) else best)


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
