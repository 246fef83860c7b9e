"""What the splits can tell, before the long work: which margins they can certify, and how many units a margin takes.

Invariant: what is planned with is the bound that certifies, with its unseen cluster, at the size of the real splits; a
search that no map can pass is ended here, and says what it would take. Spread is that of the noisiest map there is, every
layer low: most maps do better, so that only what even a map without any change cannot pass counts as impossible.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from precimap.errors import FAILURES, first_line
from precimap.layers.target import EMULATED
from precimap.metrics.guard import Guard
from precimap.metrics.metric import PairedDrops
from precimap.metrics.paired import paired_drop
from precimap.metrics.power import least_margin, smallest_margin, units_for
from precimap.metrics.sight import LEAST_RARE, Sight, sight_of
from precimap.metrics.totals import totals_of
from precimap.numerics.schemes import Scheme, scheme_key
from precimap.searching.question import Question
from precimap.searching.run import Parts, Pass, scattered, scored
from precimap.searching.subject import Subject
from precimap.task import Scored, Task

PILOT_UNITS = 256
_MOST_UNITS = 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What the splits can tell of one metric: of the gate, or of a guard, by `label`.

    least: the margin below which the certify split certifies no map, not even one that changes nothing. detectable: the
    margin at which it certifies a map without a drop with 80 % power, if that is as noisy as everything low is; infinite
    where that could not be measured, and `unmeasured` says why. enough:
    units that each split needs for `least` to reach the margin; about: for such a map to be certified at it; None: no number
    does.
    impossible: why no map can be certified, None where one can.
    """

    label: str
    unit: str
    margin: float
    search_units: int
    certify_units: int
    least: float
    detectable: float
    enough: int | None
    about: int | None
    unmeasured: str | None
    impossible: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Pilot:
    """One metric of a task, measured on some units; of a guard with its own margin, None for the gate.

    nothing: the baseline against itself, on the search split. noisy: everything low against the baseline, on
    `PILOT_UNITS` of it; None where no scheme can be computed in all its layers at once, and `unmeasured` says why.
    """

    label: str
    unit: str
    margin: float | None
    nothing: PairedDrops
    noisy: PairedDrops | None
    unmeasured: str | None

    @cached_property
    def sight(self) -> Sight:
        return sight_of(self.nothing, totals_of(self.nothing.d, self.nothing.units))

    @property
    def fewest_units(self) -> int:
        """Without which nothing is certified: enough clusters, and enough of the rarer class."""
        sight, rows = self.sight, self.nothing.rows
        rare = 0.0 if not sight.rare else LEAST_RARE * rows / sight.rare
        return max(2, math.ceil(max(sight.least * rows / sight.effective, rare)))

    def least(self, units: float, alpha: float) -> float:
        """The margin that not even a map without any change keeps, with so many units."""
        blocks = self.nothing.stakes.within is not None  # their number stays the same in a split of any size
        clusters = self.nothing.units.n if blocks else units * self.sight.effective / self.nothing.rows
        return least_margin(self.nothing, int(clusters), alpha)

    def detectable(self, units: float, alpha: float) -> float:
        """The margin at which a map without a drop is certified with 80 % power, if it is as noisy as everything low."""
        if self.noisy is None:
            return math.inf
        totals = totals_of(self.noisy.d, self.noisy.units)
        return smallest_margin(self.noisy, int(units * totals.effective / self.noisy.rows), alpha)


def pilots(subject: Subject, baseline: Parts) -> tuple[Pilot, ...]:
    """The gate and every guard, under the noisiest of the schemes: each in all layers that can take it."""
    task = subject.task
    numbers = scattered(baseline.sizes, PILOT_UNITS)
    before, whole = baseline.only(numbers), baseline.whole
    low, why = [before], None
    for scheme in dict.fromkeys(scheme for _, scheme in subject.pairs):
        try:
            low.append(_all_low(subject, numbers, scheme))
        except FAILURES as error:  # layers that pass one by one may not do so together
            why = why or f"all layers at once in {scheme.name}: {first_line(error)}"
    known = why is None or len(low) > 1
    gate = Pilot(
        label=task.metric.name,
        unit=task.metric.unit,
        margin=None,
        nothing=_of_gate(task, whole, whole),
        noisy=max((_of_gate(task, before, other) for other in low), key=_error) if known else None,
        unmeasured=why,
    )
    guards = [
        Pilot(
            label=f"the guard {guard.label}",
            unit=guard.metric.unit,
            margin=guard.margin,
            nothing=_of_guard(guard, whole, whole),
            noisy=max((_of_guard(guard, before, other) for other in low), key=_error) if known else None,
            unmeasured=why,
        )
        for guard in task.guarded
        if guard.where is None or before.slices[guard.label].any()
    ]
    return (gate, *guards)


def outlook(pilot: Pilot, margin: float, certify_share: float, alpha: float) -> Outlook:
    """What the splits can tell at a margin. certify_share: units of the certify split for each unit of the search split."""
    sight, units = pilot.sight, pilot.nothing.rows

    def least(of: float) -> float:
        return pilot.least(of, alpha)

    enough = _enough(least, margin, pilot.fewest_units)
    noisy = None if pilot.noisy is None else units_for(pilot.noisy, margin, alpha)
    about = None if enough is None or noisy is None else max(enough, noisy)
    why = None
    for split, share in (("search", 1.0), ("certify", certify_share)):
        shortage, bound = sight.scaled(share).shortage, least(units * share)
        if shortage is not None:
            why = why or f"the {split} split has {shortage}"
        elif bound > margin:
            why = why or (
                f"the {round(units * share):,} units of the {split} split can pass no map at a margin of {margin:g}: even "
                f"one that changes nothing may drop by {bound:.2g}, for all they can tell"
            )
    return Outlook(
        label=pilot.label,
        unit=pilot.unit,
        margin=margin,
        search_units=units,
        certify_units=round(units * certify_share),
        least=least(units * certify_share),
        detectable=pilot.detectable(units * certify_share, alpha),
        enough=enough,
        about=about,
        unmeasured=pilot.unmeasured,
        impossible=None if why is None else f"{pilot.label}: {why}. {_takes(margin, enough, about)}",
    )


def outlooks(subject: Subject, baseline: Parts, certify_share: float, question: Question) -> tuple[Outlook, ...]:
    """What the splits can tell of the gate at the margin that is asked for, and of each guard at its own."""
    return tuple(
        outlook(pilot, question.margin if pilot.margin is None else pilot.margin, certify_share, question.alpha)
        for pilot in pilots(subject, baseline)
    )


def _takes(margin: float, enough: int | None, about: int | None) -> str:
    if enough is None:
        return f"No number of units makes a margin of {margin:g} possible"
    noisy = "" if about is None or about == enough else f" (about {about:,} for a map as noisy as everything low)"
    return f"Each of the two splits needs at least {enough:,} units{noisy}"


def _enough(margin_at: Callable[[float], float], margin: float, fewest: int) -> int | None:
    """The fewest units whose smallest margin is at most `margin`, from `fewest` on, to half a per cent; None for none."""
    low, high = fewest - 1, fewest
    while margin_at(high) > margin:
        low, high = high, 2 * high
        if high > _MOST_UNITS:
            return None
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (middle, high) if margin_at(middle) > margin else (low, middle)
    return high


def _all_low(subject: Subject, numbers: Sequence[int], scheme: Scheme) -> Scored:
    task, choice = subject.task, {layer: taken for layer, taken in subject.pairs if taken == scheme}
    asked = Pass(
        kind="pilot",
        of=f"all in {scheme_key(scheme)}",
        batches=task.splits.search,
        running=lambda: EMULATED.running(task.model, subject.quantized(choice)),
        numbers=numbers,
    )
    return scored(subject.run, asked).whole


def _of_gate(task: Task, before: Scored, after: Scored) -> PairedDrops:
    return task.metric.paired(before.values, after.values, before.units)


def _of_guard(guard: Guard, before: Scored, after: Scored) -> PairedDrops:
    (first, units), (second, _) = before.of_guard(guard.label), after.of_guard(guard.label)
    return guard.metric.paired(first, second, units)


def _error(drops: PairedDrops) -> float:
    return paired_drop(drops.d, drops.units).error
