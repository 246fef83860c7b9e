"""Is the joint drop of a map predicted from its layers? Predicted against measured, on random maps, for each score.

    python bench/prediction.py [--quick] [--maps N] [--json FILE]

NCF-MLP on MovieLens, DCNv2 on frappe, all-MiniLM-L6-v2 on StackExchange questions. A map takes 20 to 90 % of the layers
that can be quantised, each under a scheme drawn from those it allows. The measured drop is that of the map run as a whole by
emulation, on the units of the search split that were screened; R^2 is about the line prediction = measurement (slope 1,
no intercept: 1 - sum of squared errors / sum of squares about the mean). Beside it stands the search split's prediction
against the drop on the certify split, which no score has seen.
A claim that fails is printed and written as such; the exit code is 0.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from harness import Claim, at_least, command_line, finished, print_machine, write_json
from measuring.search_work import ALPHA, QUESTION, Work, work_of
from precimap.journal import run_journal
from precimap.layers.emulation import quantized
from precimap.numerics.schemes import scheme as scheme_by_name
from precimap.searching.calibrate import prepare
from precimap.searching.comparison import Comparison, compare
from precimap.searching.evidence.predict import Predictor
from precimap.searching.evidence.probe import probe
from precimap.searching.evidence.screen import screen
from precimap.searching.pairs import Key, Pair
from precimap.searching.progress import silent
from precimap.searching.question import USUAL_EFFORT
from precimap.searching.run import Run, scattered, scored_baseline
from precimap.task import Batches, Scored, Task, score
from tasks.real_tasks import frappe_dcnv2, ncf, stackfaq_minilm
from tasks.synthetic import deep_task

SCHEMES = tuple(map(scheme_by_name, ("fp8", "fp8-tensor", "int8")))
SUPERPOSITION, FITTED = "superposition", "superposition, curvature of one map"
FIRST_ORDER, MEASURED, VARIANCE = (
    "sum of first-order singles",
    "sum of measured singles",
    "a * sum E[(change of loss)^2]",
)
CERTIFY = "superposition, against the certify split"
BOUND = 0.87  # of R^2: what superposition reached on a DCNv2 when it was first tried
SEED = 40

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Row:
    """One score on one task. maps: those it is judged on. n: units behind each drop, measured as predicted."""

    task: str
    score: str
    r2: float
    spearman: float
    maps: int
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Drops:
    """What was measured: whole maps on the screened units and on the certify split, and each layer alone."""

    joint: tuple[Comparison, ...]
    certify: tuple[Comparison, ...]
    singles: dict[Key, float]
    certify_units: int


def random_maps(pairs: Sequence[Pair], count: int) -> list[tuple[Pair, ...]]:
    """Each takes between 20 and 90 % of the layers, at least one, with one scheme for each."""
    rng = np.random.default_rng(SEED)
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    maps = []
    for _ in range(count):
        taken = rng.permutation(layers)[: max(1, round(rng.uniform(0.2, 0.9) * len(layers)))]
        maps.append(tuple(_one(rng, [pair for pair in pairs if pair[0] == layer]) for layer in sorted(taken)))
    return maps


def _one(rng: np.random.Generator, pairs: Sequence[Pair]) -> Pair:
    return pairs[int(rng.integers(len(pairs)))]


def keys_of(pairs: Sequence[Pair]) -> list[Key]:
    return [(layer, scheme.name) for layer, scheme in pairs]


def whole(subject: Work, pairs: Sequence[Pair], batches: Batches, before: Scored) -> Comparison:
    """A map, run as a whole, against the baseline."""
    task = subject.task
    with quantized(task.model, prepare(task, subject.inventory, subject.calibration, dict(pairs))):
        return compare(task, before, score(task, task.model, batches), ALPHA)


def estimates(found: Sequence[Comparison]) -> Floats:
    return np.array([each.drop.estimate for each in found])


def measure(
    run: Run, subject: Work, predictor: Predictor, maps: Sequence[tuple[Pair, ...]], pairs: Sequence[Pair]
) -> Drops:
    """Singles by replay, maps as wholes."""
    task, numbers = subject.task, predictor.numbers
    batches = [predictor.batches[number] for number in numbers]
    certify = list(task.splits.certify)
    with quantized(task.model, {}):
        before = score(task, task.model, certify)
    started = time.perf_counter()
    singles = probe(subject.on(run), QUESTION, predictor.baseline, pairs, numbers)
    _say(f"  {len(pairs)} singles measured, {time.perf_counter() - started:.0f} s")
    joint, held_out = [], []
    for number, chosen in enumerate(maps, start=1):
        joint.append(whole(subject, chosen, batches, predictor.reference))
        held_out.append(whole(subject, chosen, certify, before))
        if number % 10 == 0:
            _say(f"  {number} of {len(maps)} maps measured, {time.perf_counter() - started:.0f} s")
    return Drops(
        tuple(joint),
        tuple(held_out),
        {(found.layer, found.scheme): found.comparison.drop.estimate for found in singles},
        before.units.n,
    )


def rows_of(name: str, predictor: Predictor, maps: Sequence[tuple[Pair, ...]], drops: Drops) -> list[Row]:
    """Judge every score on the maps; what is fitted on some maps is judged on the others."""
    n, half = predictor.reference.units.n, len(maps) // 2
    keys, joint = [keys_of(chosen) for chosen in maps], estimates(drops.joint)
    single = {key: _predicted(predictor, [key]) for each in keys for key in each}
    superposed = np.array([_predicted(predictor, each) for each in keys])
    energy = {key: float(np.square(predictor.loss_changes([key])).mean()) for key in single}
    energies = np.array([sum(energy[key] for key in each) for each in keys])
    slope = float(energies[:half] @ joint[:half] / (energies[:half] @ energies[:half]))
    rows = [
        judged(name, SUPERPOSITION, superposed, joint, n),
        judged(name, FIRST_ORDER, np.array([sum(single[key] for key in each) for each in keys]), joint, n),
        judged(name, MEASURED, np.array([sum(drops.singles[key] for key in each) for each in keys]), joint, n),
        judged(name, VARIANCE, slope * energies[half:], joint[half:], n),
        judged(name, CERTIFY, superposed, estimates(drops.certify), drops.certify_units),
    ]
    if not predictor.screen.by_scores:
        rows.insert(1, _fitted(name, predictor, keys, drops.joint))
    return rows


def _fitted(name: str, predictor: Predictor, keys: Sequence[Sequence[Key]], joint: Sequence[Comparison]) -> Row:
    """As a search does after its first look: the curvature is that of the largest map, which is then left out."""
    largest = max(range(len(keys)), key=lambda at: len(keys[at]))
    fitted = predictor.fitted(keys[largest], joint[largest])
    others = np.arange(len(keys)) != largest
    bent = np.array([_predicted(fitted, each) for each in keys])
    return judged(name, FITTED, bent[others], estimates(joint)[others], predictor.reference.units.n)


def _predicted(predictor: Predictor, keys: Sequence[Key]) -> float:
    comparison = predictor.comparison(keys)
    if comparison is None:
        raise RuntimeError(f"expected a screen that predicts {predictor.task.metric.name}")
    return comparison.drop.estimate


def judged(task: str, name: str, predicted: Floats, measured: Floats, n: int) -> Row:
    """R^2 at slope 1 without intercept, and the rank correlation."""
    errors = float(np.square(measured - predicted).sum())
    about_mean = float(np.square(measured - measured.mean()).sum())
    return Row(task, name, 1 - errors / about_mean, float(spearmanr(predicted, measured).statistic), len(measured), n)


def on_task(task: Task, maps: int) -> list[Row]:
    """Screen, measure, compare."""
    subject = work_of(task, SCHEMES)
    with run_journal(None, {"bench": "prediction"}) as journal:
        run = Run(task, journal, silent)
        baseline = scored_baseline(run)
        effort = USUAL_EFFORT
        screened = screen(
            subject.on(run),
            subject.pairs,
            effort.screen_memory,
            effort.screen_units,
            functools.partial(scattered, baseline.sizes),
        )
        batches = {number: batch for number, batch in enumerate(task.splits.search) if number in screened.batches}
        predictor = Predictor(task=task, screen=screened, baseline=baseline, batches=batches, alpha=ALPHA)
        pairs = [pair for pair in subject.pairs if (pair[0], pair[1].name) in screened.pairs]
        what = "changes of scores" if screened.by_scores else "changes of losses"
        _say(f"\n{task.name}: {len(pairs)} of {len(subject.pairs)} pairs screened, by {what}")
        chosen = random_maps(pairs, maps)
        rows = rows_of(task.name, predictor, chosen, measure(run, subject, predictor, chosen, pairs))
    for row in rows:
        _say(f"{row.score:42}{row.r2:9.3f}{row.spearman:9.3f}{row.maps:6}{row.n:8}")
    return rows


def main() -> int:
    parser = command_line(__doc__, "a small synthetic model only: under a minute")
    parser.add_argument("--maps", type=int, default=40, metavar="N", help="random maps of each task, 4 or more")
    arguments = parser.parse_args()
    if arguments.quick:
        torch.set_num_threads(1)
        makes: list[Callable[[], Task]] = [functools.partial(deep_task, 40, 256)]
    else:
        makes = [ncf, frappe_dcnv2, functools.partial(stackfaq_minilm, search=128, certify=128)]
    print_machine()
    print(f"{'score':42}{'R^2':>9}{'Spearman':>9}{'maps':>6}{'n':>8}")
    rows: list[Row] = []
    for make in makes:
        try:
            task = make()
        except FileNotFoundError as error:
            _say(f"not measured: {error}")
            continue
        rows += on_task(task, arguments.maps)
        write_json(arguments.json, rows, claims_of(rows, arguments.quick))
    finished(arguments.json, rows, claims_of(rows, arguments.quick))
    return 0


def claims_of(rows: Sequence[Row], quick: bool) -> list[Claim]:
    """Of the real tasks of which scores are screened: where losses are, a sum of changes has no curvature to predict with.

    A small synthetic model is no evidence for them.
    """
    by_losses = {row.task for row in rows if row.score == FITTED}
    return [
        at_least(f"{row.task}: R^2 of superposition with the joint drop of random maps", row.r2, BOUND)
        for row in rows
        if row.score == SUPERPOSITION and row.task not in by_losses and not quick
    ]


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
