"""A finite population with known truth: every unit of a real task, scored under every map that is asked for.

Invariant: every number is of the real model: first-order changes by the screen, differences by running it quantised; so
the true drop of a map, its mean over all units, is known, and a simulation that draws splits from the units can count
the certificates that are false. A made-up distribution of differences, the alternative, has made-up tails.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from precimap import Task, discover
from precimap.fingerprints import of_weights
from precimap.journal import run_journal
from precimap.layers.target import EMULATED
from precimap.metrics.metric import Metric
from precimap.metrics.units import Floats, Units
from precimap.numerics.formats import FORMATS, INT8, IntegerFormat
from precimap.numerics.schemes import Granularity, Rounding, Scheme, scheme
from precimap.precision_map import PrecisionMap, Premise
from precimap.searching.allocation.knapsack import Step
from precimap.searching.calibrate import calibrated
from precimap.searching.eligibility import eligibility
from precimap.searching.evidence.gather import table_of
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.screen import screen
from precimap.searching.maps.assemble import MapWriter, assemble
from precimap.searching.maps.rescore import contributions
from precimap.searching.pairs import Key
from precimap.searching.progress import silent
from precimap.searching.question import Question
from precimap.searching.run import Run, scattered, scored_baseline
from precimap.searching.subject import Subject
from precimap.task import Scored, first_batch, score


def narrow(bits: int) -> Scheme:
    """Integer weights of so many bits with a scale per channel, INT8 inputs."""
    most = 2 ** (bits - 1) - 1
    weight = IntegerFormat(name=f"int{bits}", bits=bits, minimum=-most, maximum=most, torch_dtype="int8")
    dynamic = Rounding(INT8, Granularity.PER_TOKEN, dynamic=True)
    return Scheme(f"w{bits}a8", Rounding(weight, Granularity.PER_CHANNEL), dynamic)


# Weights of 4, 5 and 6 bits beside 8: each layer can save more than it should, and true drops span three decades.
SCHEMES = (scheme("fp8"), scheme("int8"), *(narrow(bits) for bits in (6, 5, 4)))
TRADING = ("int8", "w5a8", "w4a8")  # without those that improve NCF so much that no map is bad
ALPHA = 0.05
Rows = NDArray[np.int64]
Choice = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Sample:
    """Units drawn from a population, with replacement: their rows, int64 [n], and what was drawn as one."""

    rows: Rows
    units: Units


@dataclass(frozen=True, slots=True)
class Table:
    """What was found out about the population so far: by the changes that are added, by the map, by its fingerprint."""

    predicted: dict[tuple[Key, ...], Scored] = field(default_factory=dict)
    measured: dict[tuple[Key, ...], Scored] = field(default_factory=dict)
    maps: dict[tuple[Key, ...], PrecisionMap] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)
    added: dict[tuple[Key, ...], dict[str, Floats]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Population:
    """All units of `run.task`'s search split, screened, and scored under a map when it is first asked for.

    gate: the task's metric, or one that it reports. names: of the schemes that a search may use. level: None, or the
    drop that every map is given by shifting its differences, so that each is as bad as the margin allows (losses only).
    """

    run: Run
    writer: MapWriter
    predictor: Predictor
    gate: Metric
    names: tuple[str, ...]
    level: float | None = None
    table: Table = field(default_factory=Table)

    @property
    def pairs(self) -> tuple[Key, ...]:
        return tuple(key for key in self.predictor.screen.pairs if key[1] in self.names)

    @property
    def task(self) -> Task:
        return replace(self.run.task, metric=self.gate, reported=())

    @property
    def baseline(self) -> Scored:
        return self.predictor.reference

    def values(self, of: Scored) -> Floats:
        """The gate's value of every unit."""
        return of.values if self.gate.name == self.run.task.metric.name else of.reported[self.gate.name]

    def predicted(self, keys: Iterable[Key]) -> Scored:
        """By adding first-order changes; empty keys give the baseline."""
        asked = tuple(sorted(keys))
        if asked not in self.table.predicted:
            self.table.predicted[asked] = self.predictor.scored(asked)
        return self.table.predicted[asked]

    def measured(self, choice: Choice) -> Scored:
        """By running the quantised model."""
        asked = tuple(sorted(choice.items()))
        if asked not in self.table.measured:
            task, subject = self.run.task, self.writer.subject
            layers = subject.quantized({layer: subject.by_name[name] for layer, name in asked})
            with EMULATED.running(task.model, layers) as model:
                self.table.measured[asked] = score(task, model, task.splits.search)
        return self.table.measured[asked]

    def true_drop(self, choice: Choice) -> float:
        """Of the whole population; `level` where that is given."""
        return self._true_drop(choice) if self.level is None else self.level

    def _true_drop(self, choice: Choice) -> float:
        other = self.measured(choice)
        return float(self.gate.paired(self.values(self.baseline), self.values(other), self.baseline.units).d.mean())

    def map_of(self, choice: Choice) -> PrecisionMap:
        asked = tuple(sorted(choice.items()))
        if asked not in self.table.maps:
            formats = {one.weight.format.name: one.weight.format for one in self.writer.subject.schemes}
            with patch.dict(FORMATS, formats):  # a map refuses a format that precimap does not ship
                self.table.maps[asked] = assemble(self.writer, dict(asked))
            self.table.choices[self.table.maps[asked].fingerprint] = dict(asked)
        return self.table.maps[asked]

    def added(self, step: Step) -> dict[str, Floats]:
        """`contributions` of a map's layers to every unit's loss."""
        asked = tuple(sorted(step.choice.items()))
        if asked not in self.table.added:
            self.table.added[asked] = contributions(self.run, self.predictor, step)
        return self.table.added[asked]

    def draw(self, rng: np.random.Generator, n: int) -> Sample:
        """`n` units, or `n` whole clusters of a task that has them; one that is drawn twice counts as two."""
        clusters = self.baseline.units.clusters
        if clusters is None:
            return Sample(rng.integers(0, self.baseline.units.n, n), Units(n=n))
        names = np.unique(clusters)
        parts = [np.flatnonzero(clusters == names[at]) for at in rng.integers(0, len(names), n)]
        numbers = np.repeat(np.arange(n), [len(part) for part in parts])
        return Sample(np.concatenate(parts), Units(n=len(numbers), clusters=numbers))

    def taken(self, of: Scored, sample: Sample, shift: float = 0.0) -> Scored:
        """The sampled units of a scoring, with the gate's values in front."""
        return Scored(
            values=self.values(of)[sample.rows] + shift,
            losses=of.losses[sample.rows],
            reported={},
            guards={},
            slices={},
            units=sample.units,
        )

    def looked_at(self, choice: Choice, sample: Sample) -> Scored:
        """The sampled units under a map."""
        shift = 0.0 if self.level is None else self.level - self._true_drop(choice)
        return self.taken(self.measured(choice), sample, shift)


def population(task: Task, schemes: Sequence[Scheme], gate: Metric, memory: int = 4 << 30) -> Population:
    """Calibrate and screen `task` under `schemes`, on the whole search split."""
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    split, weights = "population", of_weights(task.model)
    premise = Premise(weights=weights, task=task.name, metric=gate.name, calibration=split, search=split, certify=split,
                      base_precision=task.base_precision, device="cpu", precimap="", torch=torch.__version__)  # fmt: skip
    with run_journal(None, {}) as journal:
        run = Run(task, journal, silent)
        subject = Subject(
            run=run,
            inventory=inventory,
            schemes=tuple(schemes),
            target=EMULATED,
            eligibility=eligibility(inventory, schemes, EMULATED, ()),
            calibration=calibrated(run, inventory, schemes),
        )
        baseline = scored_baseline(run)
        every = sum(baseline.sizes)
        screened = screen(subject, subject.pairs, memory, every, partial(scattered, baseline.sizes))
        batches = dict(enumerate(task.splits.search))
        predictor = Predictor(task=task, screen=screened, baseline=baseline, batches=batches, alpha=ALPHA)
    table = table_of(subject, Question(margin=1.0), ())
    writer = MapWriter(subject=subject, table=table, premise=premise, alpha=ALPHA, cutoff=math.inf)
    return Population(run, writer, predictor, gate, tuple(subject.by_name))
