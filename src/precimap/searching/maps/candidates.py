"""Which maps of the chain go to the certificate: predicted first, then measured as wholes on the search split.

Invariant: a map is sent on because it was measured as a whole there, or lies below one that was; single layers decide
the order and nothing else. Few maps are measured: the most aggressive one that is predicted to keep the margin, then
its neighbours as the measurements correct the prediction (a bisection where nothing can be predicted). Looking at the
search split in any order costs no certainty; the certify split is another matter (`certify`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

from pydantic import TypeAdapter
from torch import nn

from precimap.layers.inventory import Inventory
from precimap.layers.prepared import prepared
from precimap.layers.target import EMULATED
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.knapsack import Step
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.rules import Rule
from precimap.searching.comparison import Comparison, compare
from precimap.searching.evidence.bound import bound
from precimap.searching.evidence.predict import Predictor
from precimap.searching.pairs import Key
from precimap.searching.run import Parts, Pass, Run, scored

MOST_LOOKS = 5
CERTIFIED_BELOW = 2  # the fixed sequence starts this many maps below the best one of the search split


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MapCandidate:
    """One map as a whole. predicted: by the screen; measured: on the search split; either may be missing.

    map: written down for those that are looked at or certified, known by its `fingerprint`. on_screened: the measurement on
    the units that the prediction is about. singles: the sum of its layers' own drops. drift: predicted mean change of the
    scores (or losses).
    """

    step: Step
    predicted: Comparison | None = None
    singles: float | None = None
    drift: float | None = None
    map: PrecisionMap | None = field(default=None, compare=False)  # what its fingerprint says
    fingerprint: str | None = None
    measured: Comparison | None = None
    on_screened: Comparison | None = None

    def __repr__(self) -> str:
        drops = {"predicted": self.predicted, "measured": self.measured}
        said = [f"{name} drop {found.drop.estimate:+.3g}" for name, found in drops.items() if found is not None]
        return f"MapCandidate({', '.join([f'{len(self.step.choice)} layers low', *said])})"

    def passed(self, margin: float) -> bool:
        return self.measured is not None and self.measured.within(margin)

    def row(self, margin: float) -> dict[str, object]:
        """For the journal."""
        return {
            "map": self.fingerprint,
            "low": list(self.step.choice),
            "gain": self.step.gain,
            "singles": self.singles,
            "drift": self.drift,
            "predicted": None if self.predicted is None else _bounds(self.predicted),
            "measured": None if self.measured is None else _bounds(self.measured),
            "passed": None if self.measured is None else self.passed(margin),
            "step": asdict(self.step),
            "comparisons": {name: found and asdict(found) for name, found in self._comparisons().items()},
        }

    def _comparisons(self) -> dict[str, Comparison | None]:
        return {"predicted": self.predicted, "measured": self.measured, "on_screened": self.on_screened}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "MapCandidate":
        """What `row` made, read back: without the map itself, but with its fingerprint."""
        told = {key: row[key] for key in ("singles", "drift")}
        return _READER.validate_python({"step": row["step"], "fingerprint": row["map"], **told, **row["comparisons"]})


_READER = TypeAdapter(MapCandidate)


def _bounds(found: Comparison) -> dict[str, object]:
    return {
        "drop": found.drop.estimate,
        "error": found.drop.error,
        "upper": found.upper if found.upper != float("inf") else None,
        "n": found.drop.n,
        "guards": {label: guard.filled for label, guard in found.guards.items()},
    }


def measure(run: Run, candidate: MapCandidate, baseline: Parts, alpha: float, screened: Sequence[int]) -> MapCandidate:
    """Measure a map as a whole on the search split; `screened`: the numbers of the batches that the screen saw."""
    assert candidate.map is not None
    parts = scored_map(run, candidate.map)
    there = compare(run.task, baseline.only(screened), parts.only(screened), alpha) if screened else None
    return replace(candidate, measured=compare(run.task, baseline.whole, parts.whole, alpha), on_screened=there)


def scored_map(run: Run, precision_map: PrecisionMap) -> Parts:
    """The search split, scored under a map by emulation."""
    split = run.task.splits.search

    def running() -> AbstractContextManager[nn.Module]:
        return EMULATED.running(*prepared(run.task.model, precision_map))

    def told(done: int) -> None:
        run.progress("whole maps", done, len(split) if isinstance(split, Sequence) else done)

    asked = Pass(kind="joint", of=precision_map.fingerprint, batches=split, running=running, after_batch=told)
    return scored(run, asked)


def hoped(predictor: Predictor, base: MapCandidate, choice: Mapping[str, str], margin: float) -> float:
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


def candidate_of(predictor: Predictor | None, known: Mapping[Key, LayerEvidence], step: Step) -> MapCandidate:
    """A map with what the screen says of it as a whole."""
    keys = list(step.choice.items())
    decisive = [known[key].decisive for key in keys]
    singles = sum(d.drop.estimate for d in decisive if d is not None) if all(d is not None for d in decisive) else None
    comparison = None if predictor is None else predictor.comparison(keys)
    if predictor is None or any(key not in predictor.screen.pairs for key in keys):
        return MapCandidate(step=step, predicted=comparison, singles=singles)
    return MapCandidate(step=step, predicted=comparison, singles=singles, drift=predictor.drift(keys))


@dataclass(frozen=True, slots=True)
class Casts:
    """What the search split says of casts of the whole model, the fastest first. refused: why there are no more."""

    candidates: tuple[MapCandidate, ...] = ()
    refused: str | None = None

    def best(self, margin: float) -> MapCandidate | None:
        """The first that passed there, and so the fastest of them."""
        return next((one for one in self.candidates if one.passed(margin)), None)

    def row(self, margin: float) -> dict[str, Any]:
        return {"maps": [one.row(margin) for one in self.candidates], "refused": self.refused}

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Self:
        return cls(tuple(MapCandidate.of_row(one) for one in row["maps"]), row["refused"])


NO_CASTS = Casts()


@dataclass(frozen=True, slots=True)
class Chain:
    """The chain as far as it was looked at, safest first. best: the place of the most aggressive map that passed on the
    search split, or None. casts: of the whole model, beside it."""

    candidates: tuple[MapCandidate, ...]
    best: int | None
    predictor: Predictor | None
    casts: Casts = NO_CASTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Looking:
    """How maps are looked at on the search split, and what they have to keep.

    known: of single layers. margin: of the gate. look: measures a map as a whole. out_of_time: no new look may begin.
    """

    inventory: Inventory
    rule: Rule
    known: Mapping[Key, LayerEvidence]
    margin: float
    look: Callable[[MapCandidate], MapCandidate]
    out_of_time: Callable[[], bool] = lambda: False

    def passed(self, candidate: MapCandidate) -> bool:
        return candidate.passed(self.margin)


def choose(candidates: Sequence[MapCandidate], predictor: Predictor | None, looking: Looking) -> Chain:
    """Find the most aggressive map of a chain that passes on the search split, in at most `MOST_LOOKS` looks.

    A map that fails although it was predicted to pass says that the prediction is wrong, not by how much: the next one is
    at most half as far.
    """
    found = list(candidates)
    low, high = -1, len(found)
    for _ in range(MOST_LOOKS):
        at = _next(found[low + 1 : high], predictor, looking, low < 0)
        at = None if at is None else low + 1 + at
        if at is not None and high < len(found):
            at = min(at, (low + high) // 2)
        if at is None or looking.out_of_time():
            break
        found[at] = looking.look(found[at])
        there = found[at].on_screened
        if predictor is not None and there is not None:
            predictor = predictor.fitted(list(found[at].step.choice.items()), there)
        low, high = (at, high) if looking.passed(found[at]) else (low, at)
    return Chain(tuple(found), low if low >= 0 else None, predictor)


def _next(
    between: Sequence[MapCandidate], predictor: Predictor | None, looking: Looking, none_passed: bool
) -> int | None:
    """Which of the maps between one that passed and one that failed: the most aggressive that is predicted to pass."""
    if not between:
        return None
    middle = (len(between) - 1) // 2
    if predictor is None or not predictor.predicts_metric:
        return middle
    for at in reversed(range(len(between))):
        if bound(predictor, looking.known, between[at].step.choice, looking.margin) <= looking.margin:
            return at
    return middle if none_passed else None


def sequence(chain: Chain) -> tuple[MapCandidate, ...]:
    """The maps that are certified in this order: one of about half the gain, then from two below the best one on.

    Where the certify split is unlucky with the second, the first is still an answer; it costs a pass and no certainty.
    """
    if chain.best is None:
        return ()
    first = max(0, chain.best - CERTIFIED_BELOW)
    half = chain.candidates[chain.best].step.gain / 2
    safer = min(range(first), key=lambda at: abs(chain.candidates[at].step.gain - half), default=None)
    return (*(() if safer is None else (chain.candidates[safer],)), *chain.candidates[first : chain.best + 1])


def seen_on_search(candidates: Sequence[MapCandidate]) -> tuple[Comparison | None, ...]:
    """What each map of a sequence did on the search split; one that was not measured, as the next one above it that was."""
    found: list[Comparison | None] = []
    above: Comparison | None = None
    for candidate in reversed(candidates):
        above = candidate.measured or above
        found.append(above)
    return tuple(reversed(found))
