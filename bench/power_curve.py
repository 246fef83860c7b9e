"""How often is a map certified that saves much, and how often one that must not be? As a function of the certify split.

    python bench/power_curve.py [--quick] [--json FILE]

From a population with known truth (users of MovieLens-1M under the published NCF-MLP) a search split and a certify
split are drawn again and again, with replacement, and the pipeline decides on them. Invariant: what decides is
precimap's own code, from the costs to the certificate; only what measures is replaced, by the population's table.
Exits with 1 when a claim fails.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import numpy as np
import torch

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from precimap.layers.target import EMULATED
from precimap.metrics.units import Floats
from precimap.precision_map import PrecisionMap
from precimap.searching.allocation.knapsack import Step
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.certificate import certify
from precimap.searching.comparison import Comparison, compare
from precimap.searching.evidence.gather import EvidenceTable, table_of
from precimap.searching.evidence.predict import Predictor
from precimap.searching.maps import choosing
from precimap.searching.maps.assemble import MapWriter
from precimap.searching.maps.candidates import Chain, MapCandidate, sequence
from precimap.searching.pairs import Key
from precimap.searching.question import Question
from precimap.searching.run import Parts, Run
from precimap.task import Scored
from tasks.finite_population import ALPHA, SCHEMES, TRADING, Choice, Population, Sample, population
from tasks.real_tasks import ncf

SEARCH_UNITS = 1000
CERTIFY_UNITS = (100, 200, 500, 1000, 2000, 5000)
MARGINS = (0.0003, 0.001, 0.003, 0.01, 0.04)  # of the baseline's log-loss
SHARES = (0.5, 0.8)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampledPredictor(Predictor):
    """A predictor that has screened the sampled units only: what it adds up was added up for the population before."""

    population: Population
    sample: Sample
    asked: dict[tuple[Key, ...], Comparison | None] = field(default_factory=dict)

    @property
    def reference(self) -> Scored:
        return self.population.taken(self.population.baseline, self.sample)

    def scored(self, keys: Sequence[Key]) -> Scored:
        return self.population.taken(self.population.predicted(keys), self.sample)

    def comparison(self, keys: Sequence[Key]) -> Comparison | None:
        """Remembered: the same map is asked for several times in a search."""
        key = tuple(keys)
        if key not in self.asked:
            self.asked[key] = Predictor.comparison(self, keys)
        return self.asked[key]

    def drift(self, keys: Sequence[Key]) -> float:
        """Of the losses; it is shown and decides nothing."""
        return float(self.loss_changes(keys).mean())


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """What a search has found out about single layers on its split; the margin plays no part in it yet."""

    population: Population
    sample: Sample
    evidence: EvidenceTable
    alpha: float


def searched(population: Population, sample: Sample, alpha: float) -> Seen:
    """Screen the sampled units."""
    task, screened = population.task, population.predictor
    predictor = SampledPredictor(
        task=task,
        screen=screened.screen,
        baseline=screened.baseline,
        batches=screened.batches,
        alpha=alpha,
        population=population,
        sample=sample,
    )
    known = tuple(
        LayerEvidence(
            layer=key[0],
            scheme=key[1],
            predicted=predictor.comparison([key]),
            probed=None,
            loss_square=float(np.mean(predictor.loss_changes([key]) ** 2)),
            output_error=None,
            drift=predictor.drift([key]),
            trusted=True,
        )
        for key in population.pairs
    )
    return Seen(population, sample, EvidenceTable(known=known, predictor=predictor, audit=None), alpha)


def chosen_at(seen: Seen, margin: float) -> Chain:
    """`choosing.chosen_maps` with the knapsack, every measurement of the search split read from the population's table."""
    population, sample, task = seen.population, seen.sample, seen.population.task
    baseline = population.taken(population.baseline, sample)

    def measure(run: Run, candidate: MapCandidate, parts: Parts, alpha: float, screened: Sequence[int]) -> MapCandidate:
        other = population.looked_at(candidate.step.choice, sample)
        return replace(candidate, measured=compare(task, baseline, other, alpha))

    def added(run: Run, predictor: Predictor, step: Step) -> dict[str, Floats]:
        return {name: values[sample.rows] for name, values in population.added(step).items()}

    class Writer(MapWriter):
        def written(self, choice: Choice) -> PrecisionMap:
            return population.map_of(choice)

    given, question = population.writer, Question(margin=margin, confidence=1 - seen.alpha)
    run = replace(population.run, task=task)
    subject = replace(given.subject, run=run)
    table = table_of(subject, question, seen.evidence.known)
    writer = Writer(subject=subject, table=table, premise=given.premise, alpha=seen.alpha, cutoff=math.inf)
    with patch.multiple(choosing, measure=measure, contributions=added):
        return choosing.chosen_maps(writer, question, seen.evidence, population.predictor.baseline)


def to_certify(seen: Seen, margin: float) -> tuple[Choice, ...]:
    """The maps that the pipeline sends to the certify split, safest first."""
    return tuple(candidate.step.choice for candidate in sequence(chosen_at(seen, margin)))


def certified(
    population: Population, maps: Sequence[Choice], sample: Sample, margin: float, alpha: float
) -> tuple[Choice, ...]:
    """The maps that `certify.certify` certifies on the sampled units."""

    def split(run: Run, look: certify.Look, asked: PrecisionMap | None) -> Scored:
        if asked is None:
            return population.taken(population.baseline, sample)
        return population.looked_at(population.table.choices[asked.fingerprint], sample)

    run = replace(population.run, task=population.task)
    look = certify.Look(target=EMULATED, margin=margin, alpha=alpha, spent_alpha=alpha, split="population")
    with patch.object(certify, "_certify_split", split):
        # Without the worst unit of the search split: the bound is to keep its promise here alone.
        found = certify.certify(run, look, [(population.map_of(choice), None) for choice in maps])
    return tuple(choice for choice, one in zip(maps, found, strict=False) if one.certified)


@dataclass(frozen=True, slots=True)
class Count:
    """certified: certify draws in which a map was. judged: those whose sequence held a map with a true drop at or
    above the margin; false: those of them in which such a map was certified. Only judged draws can be false."""

    searches: int
    draws: int
    certified: int
    judged: int
    false: int

    @property
    def rate(self) -> float:
        return self.false / self.judged if self.judged else math.nan

    def allowed(self, alpha: float) -> float:
        """What a rate of `alpha` stays below but for chance: three binomial standard errors above it."""
        return alpha + 3 * math.sqrt(alpha * (1 - alpha) / self.judged) if self.judged else math.nan


Choosing = Callable[[Seen, float], tuple[Choice, ...]]
Judging = Callable[[Population, Sequence[Choice], Sample, float, float], tuple[Choice, ...]]


def count(
    population: Population,
    margins: Sequence[float],
    n: int,
    alpha: float,
    searches: int,
    judgements: int,
    send: Choosing = to_certify,
    judge: Judging = certified,
) -> Count:
    """Draw `searches` search splits of `n` units, at the margins in turn, and `judgements` certify splits for each.

    Given what a search sent, certify splits are independent and each is falsely certified at most alpha of the time: the
    rate among those judged has to be within a binomial error of alpha however rarely a bad map is sent.
    """
    rng = np.random.default_rng(n)
    draws = passed = judged = false = 0
    for number in range(searches):
        margin = margins[number % len(margins)]
        maps = send(searched(population, population.draw(rng, n), alpha), margin)
        bad = [choice for choice in maps if population.true_drop(choice) >= margin]
        for _ in range(judgements if bad else 1 if maps else 0):
            found = judge(population, maps, population.draw(rng, n), margin, alpha)
            draws, passed, judged = draws + 1, passed + bool(found), judged + bool(bad)
            false += any(choice in bad for choice in found)
    return Count(searches, draws, passed, judged, false)


@dataclass(frozen=True, slots=True)
class Row:
    """One cell. power: share of draws in which a map of at least that share of the reachable gain was certified, and
    its Monte-Carlo standard error."""

    margin: float
    n: int
    draws: int
    reachable: float
    power: dict[str, tuple[float, float]]
    judged: int
    false: int


def reachable(population: Population, margin: float) -> float:
    """The gain of the most aggressive map that the pipeline sends when the search split is the population.

    Not the most of all maps with a true drop below the margin: a search looks at a few of them; `bench/regret.py` measures
    what it misses.
    """
    n = population.baseline.units.n
    chosen = chosen_at(searched(population, Sample(np.arange(n), population.baseline.units), ALPHA), margin)
    return 0.0 if chosen.best is None else chosen.candidates[chosen.best].step.gain


def power(population: Population, margins: Sequence[float], sizes: Sequence[int], draws: int) -> list[Row]:
    """Every cell of the table; a search split serves all of them, each has certify splits of its own."""
    rng = np.random.default_rng(1)
    reach = {margin: reachable(population, margin) for margin in margins}
    gains: dict[tuple[float, int], list[float]] = {(margin, n): [] for margin in margins for n in sizes}
    bad: dict[tuple[float, int], list[tuple[bool, bool]]] = {cell: [] for cell in gains}
    for _ in range(draws):
        seen = searched(population, population.draw(rng, SEARCH_UNITS), ALPHA)
        for margin in margins:
            candidates = sequence(chosen_at(seen, margin))
            maps, gain = (
                [candidate.step.choice for candidate in candidates],
                [candidate.step.gain for candidate in candidates],
            )
            wrong = [population.true_drop(choice) >= margin for choice in maps]
            for n in sizes:
                found = certified(population, maps, population.draw(rng, n), margin, ALPHA) if maps else ()
                gains[margin, n].append(gain[len(found) - 1] if found else 0.0)
                bad[margin, n].append((any(wrong), any(wrong[: len(found)])))
    return [
        Row(margin, n, draws, reach[margin], {f"{share:.0%}": _share(gains[margin, n], share * reach[margin])
            for share in SHARES}, *(sum(each) for each in zip(*bad[margin, n], strict=True)))
        for margin, n in gains
    ]  # fmt: skip


def _share(gains: Sequence[float], least: float) -> tuple[float, float]:
    found = float(np.mean([gain >= least - 1e-9 and gain > 0 for gain in gains]))
    return found, math.sqrt(found * (1 - found) / len(gains))


def print_power(rows: Sequence[Row], baseline: float, sizes: Sequence[int]) -> None:
    print(
        f"\nlog-loss {baseline:.4f}, {SEARCH_UNITS} units searched; certified at least that share of the reachable gain"
    )
    print(f"{'margin':>8}{'reachable':>11}{'share':>7}" + "".join(f"{f'n = {n}':>17}" for n in sizes))
    for margin in dict.fromkeys(row.margin for row in rows):
        cells = [row for row in rows if row.margin == margin]
        for share in cells[0].power:
            figures = "".join(f"{found:8.3f} +- {error:.3f}" for found, error in (row.power[share] for row in cells))
            print(f"{margin / baseline:8.2%}{cells[0].reachable:11.3f}{share:>7}{figures}")


def claims_of(rows: Sequence[Row], counts: Mapping[str, Count], easy: float) -> list[Claim]:
    claims = [at_most(f"false certificates, {name}", each.rate, each.allowed(ALPHA)) for name, each in counts.items()]
    judged, false = sum(row.judged for row in rows), sum(row.false for row in rows)
    if judged:
        allowed = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / judged)
        claims.append(at_most("false certificates, all cells of the power curve", false / judged, allowed))
    best = next(row for row in rows if row.margin == easy and row.n == max(row.n for row in rows))
    return [
        *claims,
        at_least("power for half of the reachable gain, 1 % margin, 5,000 units", best.power["50%"][0], 0.9),
    ]


def main() -> int:
    arguments = command_line(__doc__, "2,000 users and fewer draws: under a minute").parse_args()
    torch.set_num_threads(1)
    print_machine()
    users, draws = (2000, 100) if arguments.quick else (5940, 500)
    task = ncf(search_users=users, certify_users=2, calibration_users=40)
    whole = population(task, SCHEMES, task.metric)
    trading = replace(whole, names=TRADING)
    baseline = float(whole.baseline.values.mean())
    margins = [share * baseline for share in MARGINS]

    counts = {}
    for n in (200, 2000):
        found = count(replace(whole, level=margins[3]), margins[3:4], n, ALPHA, draws, 20)
        counts[f"every map at the margin, n = {n}"] = found
        print(f"every map at the margin, n = {n}: {found.false} of {found.judged} judged, {found.rate:.3f}")
    rows = power(trading, margins, CERTIFY_UNITS, draws)
    print_power(rows, baseline, CERTIFY_UNITS)
    claims = claims_of(rows, counts, margins[3])
    return finished(arguments.json, [*rows, *counts.values()], claims)


if __name__ == "__main__":
    sys.exit(main())
