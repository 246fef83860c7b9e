"""Which maps of the chain go to the certificate: predicted first, then measured as wholes on the search split.

Invariant: a map is sent on because it was measured as a whole there, or lies below one that was; single layers decide
the order and nothing else. Few maps are measured: the most aggressive one that is predicted to keep the margin, then
its neighbours as the measurements correct the prediction (a bisection where nothing can be predicted). Looking at the
search split in any order costs no certainty; the certify split is another matter (`certify`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from torch import nn

from precimap.layers.quantized import quantize_map
from precimap.layers.realign import realigned
from precimap.layers.target import EMULATED
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.knapsack import Step
from precimap.searching.evidence.known import Known
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import Comparison, compare
from precimap.searching.evidence.screen_plan import Key
from precimap.searching.run import Parts, Run, scored

MOST_LOOKS = 5
CERTIFIED_BELOW = 2  # the fixed sequence starts this many maps below the best one of the search split


@dataclass(frozen=True, slots=True, repr=False)
class Joint:
    """One map as a whole. predicted: by the screen; measured: on the search split; either may be missing.

    map: written down for those that are looked at or certified. on_screened: the measurement on the units that the
    prediction is about. singles: the sum of its layers' own drops.
    drift: predicted mean change of the scores (or losses).
    """

    step: Step
    predicted: Comparison | None
    singles: float | None
    drift: float | None
    map: PrecisionMap | None = None
    measured: Comparison | None = None
    on_screened: Comparison | None = None

    def __repr__(self) -> str:
        drops = {"predicted": self.predicted, "measured": self.measured}
        said = [f"{name} drop {found.drop.estimate:+.3g}" for name, found in drops.items() if found is not None]
        return f"Joint({', '.join([f'{len(self.step.choice)} layers low', *said])})"

    def passed(self, margin: float) -> bool:
        return self.measured is not None and self.measured.within(margin)

    def row(self, margin: float) -> dict[str, object]:
        """For the journal."""
        return {
            "map": None if self.map is None else self.map.fingerprint,
            "low": list(self.step.choice),
            "gain": self.step.gain,
            "singles": self.singles,
            "drift": self.drift,
            "predicted": None if self.predicted is None else _bounds(self.predicted),
            "measured": None if self.measured is None else _bounds(self.measured),
            "passed": None if self.measured is None else self.passed(margin),
        }


def _bounds(found: Comparison) -> dict[str, object]:
    return {
        "drop": found.drop.estimate,
        "error": found.drop.error,
        "upper": found.upper if found.upper != float("inf") else None,
        "n": found.drop.n,
        "guards": {label: guard.filled for label, guard in found.guards.items()},
    }


def measure(run: Run, joint: Joint, baseline: Parts, alpha: float, screened: Sequence[int]) -> Joint:
    """Measure a map as a whole on the search split; `screened`: the numbers of the batches that the screen saw."""
    assert joint.map is not None
    parts = joint_parts(run, joint.map)
    there = compare(run.task, baseline.only(screened), parts.only(screened), alpha) if screened else None
    return replace(joint, measured=compare(run.task, baseline.whole, parts.whole, alpha), on_screened=there)


def joint_parts(run: Run, precision_map: PrecisionMap) -> Parts:
    """The search split, scored under a map by emulation."""
    split = run.task.splits.search

    def running() -> AbstractContextManager[nn.Module]:
        model = realigned(run.task.model, precision_map.realignment)
        return EMULATED.running(model, quantize_map(model, precision_map))

    return scored(
        run,
        "joint",
        precision_map.fingerprint,
        split,
        running,
        lambda done: run.progress("whole maps", done, len(split) if isinstance(split, Sequence) else done),
    )


def bound(predictor: Predictor | None, known: Mapping[Key, Known], choice: Mapping[str, str], margin: float) -> float:
    """The predicted upper bound of a whole map's drop, without credit for layers that surely improve it.

    Where a guard fills more of its margin than the gate of `margin`, its bound counts, in units of the gate's. The screen
    speaks for the layers that the audit left to it; others add what their probes measured, unit by unit, or, where those
    saw fewer units, the upper bound of the probe. Infinite where nothing is predicted.
    """
    keys = list(choice.items())
    told = [] if predictor is None else [key for key in keys if predictor.tells(key)]
    comparison = None if predictor is None else predictor.comparison(told)
    if comparison is None:
        return float("inf")
    upper = comparison.strictest(margin)
    for key in keys:
        decisive = known[key].decisive
        if key not in told:
            upper += max(0.0, decisive.upper) if decisive is not None else float("inf")
        elif decisive is not None and decisive.upper < 0:
            upper -= decisive.drop.estimate
    return upper


def hoped(predictor: Predictor, base: Joint, choice: Mapping[str, str], margin: float) -> float:
    """The predicted bound of a map above `base`, with all credit, for a look and for nothing else.

    Superposition says by how much the bound moves, `base` where it starts: what the prediction of `base` was off by is off
    in both. Infinite where a layer cannot be predicted.
    """
    found, there = predictor.comparison(list(choice.items())), predictor.comparison(list(base.step.choice.items()))
    if found is None:
        return float("inf")
    if base.measured is None or there is None:
        return found.strictest(margin)
    return base.measured.strictest(margin) + found.strictest(margin) - there.strictest(margin)


def predicted_joint(predictor: Predictor | None, known: Mapping[Key, Known], step: Step) -> Joint:
    """A map with what the screen says of it as a whole."""
    keys = list(step.choice.items())
    decisive = [known[key].decisive for key in keys]
    singles = sum(d.drop.estimate for d in decisive if d is not None) if all(d is not None for d in decisive) else None
    comparison = None if predictor is None else predictor.comparison(keys)
    if predictor is None or any(key not in predictor.screen.pairs for key in keys):
        return Joint(step, comparison, singles, None)
    return Joint(step, comparison, singles, predictor.drift(keys))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chain as far as it was looked at. `best`: the most aggressive map that passed on the search split, or None."""

    joints: tuple[Joint, ...]
    best: int | None
    predictor: Predictor | None


def choose(
    joints: Sequence[Joint],
    predictor: Predictor | None,
    known: Mapping[Key, Known],
    margin: float,
    look: Callable[[Joint], Joint],
    out_of_time: Callable[[], bool],
) -> Chosen:
    """Find the most aggressive map of a chain that passes on the search split, in at most `MOST_LOOKS` looks.

    A map that fails although it was predicted to pass says that the prediction is wrong, not by how much: the next one is
    at most half as far.
    """
    found = list(joints)
    low, high = -1, len(found)
    for _ in range(MOST_LOOKS):
        at = _next(found, low, high, predictor, known, margin)
        if at is not None and high < len(found):
            at = min(at, (low + high) // 2) if low + 1 < high else at
        if at is None or out_of_time():
            break
        found[at] = look(found[at])
        there = found[at].on_screened
        if predictor is not None and there is not None:
            predictor = predictor.fitted(list(found[at].step.choice.items()), there)
        low, high = (at, high) if found[at].passed(margin) else (low, at)
    return Chosen(tuple(found), low if low >= 0 else None, predictor)


def _next(
    joints: Sequence[Joint],
    low: int,
    high: int,
    predictor: Predictor | None,
    known: Mapping[Key, Known],
    margin: float,
) -> int | None:
    """Which map to look at: the most aggressive between `low` and `high` that is predicted to pass."""
    if low + 1 >= high:
        return None
    if predictor is None or not predictor.predicts_metric:
        return (low + high) // 2
    for at in range(high - 1, low, -1):
        if bound(predictor, known, joints[at].step.choice, margin) <= margin:
            return at
    return (low + high) // 2 if low < 0 else None


def sequence(chosen: Chosen) -> tuple[Joint, ...]:
    """The maps that are certified in this order: one of about half the gain, then from two below the best one on.

    Where the certify split is unlucky with the second, the first is still an answer; it costs a pass and no certainty.
    """
    if chosen.best is None:
        return ()
    first = max(0, chosen.best - CERTIFIED_BELOW)
    half = chosen.joints[chosen.best].step.gain / 2
    safer = min(range(first), key=lambda at: abs(chosen.joints[at].step.gain - half), default=None)
    return (*(() if safer is None else (chosen.joints[safer],)), *chosen.joints[first : chosen.best + 1])


def seen_on_search(joints: Sequence[Joint]) -> tuple[Comparison | None, ...]:
    """What each map of a sequence did on the search split; one that was not measured, as the next one above it that was."""
    found: list[Comparison | None] = []
    above: Comparison | None = None
    for joint in reversed(joints):
        above = joint.measured or above
        found.append(above)
    return tuple(reversed(found))
