"""When even the safest map fails on the search split: which of its layers to give back.

Single layers were scored at the baseline; in a whole map, upstream errors re-draw what is rounded downstream. The
gradient and the local errors *at the jointly quantised point* predict a unit's joint change much better (measured:
correlation .99 against .60 to .78 for the sum of singles). Layers are given back in the order of what they add there
until the rest is predicted to keep the margin; that map is then measured. Looks at the search split only.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from precimap.searching.allocation.knapsack import Step
from precimap.searching.comparison import Comparison
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen import add_changes, find_routed
from precimap.searching.evidence.screen_plan import decode, first_order, located
from precimap.searching.run import Run
from precimap.task import to_device

Floats = NDArray[np.float64]


def contributions(run: Run, predictor: Predictor, step: Step) -> dict[str, Floats]:
    """What each layer of a map adds to the units' losses where the whole map runs, float64 [units], to first order.

    On the screened batches. A layer that the screen cannot see has no entry and stays at base precision meanwhile.
    Raises RuntimeError when the losses carry no gradient.
    """
    plan, task = predictor.screen.plan, run.task
    seen = {name for name, _ in predictor.screen.pairs}
    candidates = [layer for one in plan.passes for layer in one if layer.name in seen]
    layers = [layer for layer in candidates if step.choice.get(layer.name) == layer.scheme.name]
    decoded = decode(layers)
    found: dict[str, list[Floats]] = {layer.name: [] for layer in layers}
    for done, number in enumerate(predictor.numbers):
        run.progress("scores at the joint point", done, len(predictor.numbers))
        batch = to_device(predictor.batches[number], task.device)
        mode = first_order(task, layers, decoded, step.choice)
        with torch.enable_grad(), mode:
            scores = task.forward(task.model, batch)
        with torch.enable_grad():
            losses = task.loss(scores, batch).float()
            total = losses.sum()
            rows = located(plan.what.values(task, scores, batch))
        routed = find_routed(mode, plan, rows)
        mode.backward(total)
        changes = np.zeros((len(plan.rows), len(rows)))
        add_changes(mode, plan, routed, changes, len(rows))
        by_unit = changes.reshape(len(changes), len(losses), -1).sum(2)
        sums = {layer.name: by_unit[plan.rows[layer.name, layer.scheme.name]] for layer in layers}
        for name, values in sums.items():
            found[name].append(values)
        mode.clear()
    run.progress("scores at the joint point", len(predictor.numbers), len(predictor.numbers))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def reverted(
    step: Step, measured: Comparison, added: dict[str, Floats], fused: Mapping[str, str | None], margin: float
) -> dict[str, str] | None:
    """The choice without the layers that add most, until its bound is predicted to be within the margin; None if none is.

    Must-share groups go back as one. The measured drop stays the base of the prediction: only what is given back is
    taken off, and giving back a layer that improves the metric is never counted as an improvement.
    """
    groups = _groups(step, fused)
    means = {
        group: sum(float(added[name].mean()) for name in names if name in added) for group, names in groups.items()
    }
    upper, kept = measured.upper, dict(step.choice)
    for group in sorted(means, key=lambda group: -means[group]):
        if upper <= margin:
            break
        if means[group] <= 0:
            return None
        upper -= means[group]
        kept = {name: scheme for name, scheme in kept.items() if name not in groups[group]}
    return kept if kept and upper <= margin else None


def halved(step: Step, added: Mapping[str, Floats], fused: Mapping[str, str | None]) -> dict[str, str] | None:
    """The choice without that half of its groups which moves the losses most, for a metric that is no loss; or None.

    What a layer adds to the losses says nothing about the units of another metric; how much it moves them ranks it.
    """
    groups = _groups(step, fused)
    energy = {
        group: sum(float(np.square(added[name]).mean()) for name in names if name in added)
        for group, names in groups.items()
    }
    most = sorted(groups, key=lambda group: (-energy[group], group))[: -(-len(groups) // 2)]
    gone = {name for group in most for name in groups[group]}
    return {name: scheme for name, scheme in step.choice.items() if name not in gone} or None


def _groups(step: Step, fused: Mapping[str, str | None]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in step.choice:
        groups.setdefault(fused.get(name) or name, []).append(name)
    return groups
