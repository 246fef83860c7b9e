"""The three ways to learn which layers can be quantised, and what each of them costs.

Plain loop: quantise one layer, score the whole search split, next layer. Replayed loop: the same measurements, without
computing again what does not depend on the layer. Default search: `search()` up to where certification starts.

Invariant: a cost is counted where it arises and nothing is left out: every forward call of a task is counted by the
wrapper around it, and what belongs to no other column is in `rest`. A forward-equivalent is the baseline's forward of one
unit; by convention a backward counts 2, and computing all layers' local errors under one scheme counts 1, which is more
than it takes. What a replayed pass computes is counted by its seconds over the baseline's: only its time tells the
share. Counting FLOPs alone was not taken: it hides what quantising and bookkeeping cost.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precimap import discover
from precimap.journal import Journal, open_journal, run_journal
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Inventory
from precimap.layers.target import EMULATED
from precimap.numerics.schemes import Scheme
from precimap.searching.calibrate import InputRanges, calibrate, prepare
from precimap.searching.eligibility import eligibility
from precimap.searching.evidence.probe import Probe, probe
from precimap.searching.pairs import Pair
from precimap.searching.pipeline import search
from precimap.searching.progress import silent
from precimap.searching.question import USUAL_EFFORT, Effort, Question
from precimap.searching.result import SearchResult
from precimap.searching.run import Run, scored_baseline
from precimap.searching.subject import Subject
from precimap.task import Batches, Task, first_batch, score

ALPHA = 0.05
QUESTION = Question(margin=1.0, confidence=1 - ALPHA)  # no margin plays a part in what is measured
MARGIN = 0.01  # of the baseline's mean loss
BACKWARD = 2.0
SINGLE_POINT = "scores at the joint point"
COLUMNS = ("before", "screen", "probes", "chain", "rest", "certify", "draws")
BEFORE_CERTIFICATION = COLUMNS[:5]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds on the wall, and CPU seconds of this process, which other work on the machine lengthens less."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.wall + other.wall, self.cpu + other.cpu)

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.wall - other.wall, self.cpu - other.cpu)

    def scaled(self, factor: float) -> "Cost":
        return Cost(self.wall * factor, self.cpu * factor)


def now() -> Cost:
    return Cost(time.perf_counter(), time.process_time())


@dataclass(frozen=True, slots=True)
class Row:
    """One way, measured. forwards, seconds: by column, per unit of the search split and in all. note: what was scaled."""

    way: str
    task: str
    schemes: tuple[str, ...]
    n: int
    pairs: int
    cost: Cost
    forwards: Mapping[str, float]
    seconds: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A task that is searched. pairs: every (layer, scheme) that may be tried."""

    task: Task
    inventory: Inventory
    calibration: InputRanges
    schemes: tuple[Scheme, ...]
    pairs: tuple[Pair, ...]

    def on(self, run: Run) -> Subject:
        """What the steps of a search work with, in a run of this task."""
        return Subject(
            run=run,
            inventory=self.inventory,
            schemes=self.schemes,
            target=EMULATED,
            eligibility=eligibility(self.inventory, self.schemes, EMULATED, ()),
            calibration=self.calibration,
        )

    def of(self, scheme: Scheme) -> tuple[Pair, ...]:
        return tuple(pair for pair in self.pairs if pair[1] == scheme)


def work_of(task: Task, schemes: Sequence[Scheme]) -> Work:
    """Discovered and, where a scheme is static, calibrated."""
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    names = tuple(layer.name for layer in inventory.layers if not layer.lookup)
    static = any(scheme.needs_calibration for scheme in schemes)
    by_name = {scheme.name: scheme for scheme in schemes}
    allowed = eligibility(inventory, schemes, EMULATED, ()).open_pairs()
    return Work(
        task,
        inventory,
        calibrate(task, names, silent) if static else InputRanges({}),
        tuple(schemes),
        tuple((layer, by_name[name]) for layer, name in allowed),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The split, scored once. losses: float64 [units]; scores: what forward gave, batch by batch."""

    cost: Cost
    losses: NDArray[np.float64]
    scores: tuple[Tensor, ...]


def plain_pass(subject: Work, pairs: Sequence[Pair], batches: Batches) -> Pass:
    """Quantise these layers (none: the baseline) and score the batches: what a person would write by hand."""
    kept: list[Tensor] = []

    def forward(model: Any, batch: Any) -> Tensor:
        kept.append(subject.task.forward(model, batch))
        return kept[-1]

    task, started = replace(subject.task, forward=forward), now()
    with quantized(task.model, prepare(task, subject.inventory, subject.calibration, dict(pairs))):
        losses = score(task, task.model, batches).losses
    return Pass(now() - started, losses, tuple(kept))


def replayed_loop(subject: Work, pairs: Sequence[Pair]) -> tuple[Row, tuple[Probe, ...]]:
    """Score the baseline and probe every pair on the whole search split by replay."""
    task, started = subject.task, now()
    with run_journal(None, {"bench": "replayed loop"}) as journal:
        run = Run(task, journal, silent)
        baseline = scored_baseline(run)
        numbers = range(len(baseline.sizes))
        probes = probe(subject.on(run), QUESTION, baseline, pairs, numbers)
        cost, seconds = now() - started, _seconds(journal)
    n = sum(baseline.sizes)
    forwards = {"before": 1.0, "probes": 1 + seconds["probe"] / seconds["baseline"]}
    rest = cost.wall - sum(seconds.values())
    schemes = tuple(dict.fromkeys(scheme.name for _, scheme in pairs))
    row = Row(
        "replayed loop",
        task.name,
        schemes,
        n,
        len(pairs),
        cost,
        forwards,
        {"before": seconds["baseline"], "probes": seconds["probe"], "rest": rest},
    )
    return row, probes


@dataclass(slots=True, eq=False)
class Forwards:
    """Counts the units of every forward call, by the step that the search says it is at: with a graph, and without."""

    step: str = ""
    plain: dict[str, int] = field(default_factory=dict)
    instrumented: dict[str, int] = field(default_factory=dict)
    certification: Cost | None = None

    def counting(self, task: Task) -> Task:
        def forward(model: Any, batch: Any) -> Tensor:
            scores = task.forward(model, batch)
            counts = self.instrumented if torch.is_grad_enabled() else self.plain
            counts[self.step] = counts.get(self.step, 0) + len(scores)
            return scores

        return replace(task, forward=forward)

    def progress(self, step: str, done: int, total: int) -> None:
        """A step is over when all of it is done; what follows until the next one speaks has no name."""
        if step == "certify" and self.certification is None:
            self.certification = now()
        self.step = step if done < total else ""


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """The default search. row: without certification and draws; after: what those took."""

    row: Row
    after: Cost
    result: SearchResult


def default_search(task: Task, schemes: Sequence[Scheme], margin: float, effort: Effort = USUAL_EFFORT) -> Searched:
    """`search()` in a fresh run directory, with its costs read from the journal."""
    count = Forwards()
    with tempfile.TemporaryDirectory() as folder:
        started, run = now(), Path(folder) / "run"
        result = search(
            count.counting(task),
            schemes=schemes,
            margin=margin,
            effort=effort,
            run=run,
            ledger=Path(folder) / "ledger",
            progress=count.progress,
        )
        ended = now()
        until = count.certification or ended
        with open_journal(run) as journal:
            seconds = _columns_of(_seconds(journal))
            forwards = _forwards(journal, count, result, len(schemes))
    seconds["rest"] = (until - started).wall - sum(seconds[name] for name in BEFORE_CERTIFICATION if name != "rest")
    row = Row(
        "default search",
        task.name,
        tuple(scheme.name for scheme in schemes),
        result.preflight.search_units,
        len(result.evidence.known),
        until - started,
        forwards,
        seconds,
        result.answer,
    )
    return Searched(row, ended - until, result)


_KINDS = {"baseline": "before", "floor": "before", "screen": "screen", "probe": "probes", "joint": "chain"}
_KINDS |= {"certify": "certify", "draw": "draws"}


def _seconds(journal: Journal) -> dict[str, float]:
    return {kind: sum(float(row.value["seconds"]) for row in journal.measurements(kind)) for kind in _KINDS}


def _columns_of(by_kind: Mapping[str, float]) -> dict[str, float]:
    columns = dict.fromkeys(COLUMNS, 0.0)
    for kind, value in by_kind.items():
        columns[_KINDS[kind]] += value
    return columns


def _forwards(journal: Journal, count: Forwards, result: SearchResult, schemes: int) -> dict[str, float]:
    """Forward-equivalents by column, per unit of the search split."""
    n = result.preflight.search_units
    units = {kind: _units(journal, kind) for kind in _KINDS if kind != "screen"}
    seconds = _seconds(journal)
    columns = _columns_of({kind: float(units[kind]) for kind in units if kind != "probe"} | {"screen": 0.0})
    screens = journal.measurements("screen")
    backwards = int(screens[0].value["backwards"]) if screens else 0
    explored = count.instrumented.get(
        "", 0
    )  # two passes back for each way that is tried, of which there are two at most
    columns["screen"] = count.instrumented.get("screen", 0) * (1 + BACKWARD * backwards)
    columns["screen"] += explored * (1 + BACKWARD * 2 * min(2, backwards))
    columns["screen"] += schemes * (sum(row.arrays["outputs"].shape[1] for row in screens) + explored)
    columns["chain"] += count.instrumented.get(SINGLE_POINT, 0) * (1 + BACKWARD + 1)
    recorded = count.plain.get("probe", 0) - units["probe"]
    per_unit = seconds["baseline"] / n
    columns["probes"] = recorded + (seconds["probe"] / per_unit if per_unit else 0.0)
    known = sum(units.values()) + recorded
    columns["rest"] = sum(count.plain.values()) - known
    return {name: value / n for name, value in columns.items()}


def _units(journal: Journal, kind: str) -> int:
    return sum(int(row.value["units"]) for row in journal.measurements(kind))


def before_certification(row: Row) -> float:
    """Forward-equivalents per unit, without certification and rounding draws."""
    return sum(row.forwards.get(name, 0.0) for name in BEFORE_CERTIFICATION)
