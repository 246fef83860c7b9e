"""The ways to search, timed in turns on one task: parts of the plain loop before, between and after the others.

Invariant: every ratio is of one process and one run, and a slow moment of the machine falls on all ways. What is scaled
from some of the layers is so by scheme, and its row says it. Timing one way after the other, the alternative, gives
ratios that follow the machine's other work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from measuring.search_work import (
    COLUMNS,
    MARGIN,
    Cost,
    Pass,
    Row,
    Searched,
    Work,
    before_certification,
    default_search,
    plain_pass,
    replayed_loop,
    work_of,
)
from precimap.numerics.schemes import Scheme
from precimap.searching.evidence.probe import Probe
from precimap.searching.pairs import Pair
from precimap.searching.question import Effort
from precimap.task import Task

SEED = 3
TURNS = 4
FEW = 4  # batches for certification, which is in no ratio


def say(text: str) -> None:
    print(text, flush=True)


def line(row: Row) -> str:
    """One row of the table: seconds on the wall and of the CPU, forward-equivalents in all and by column."""
    return (
        f"{row.way:15}{len(row.schemes):8}{row.pairs:6}{row.cost.wall:9.1f}{row.cost.cpu:9.1f}"
        f"{before_certification(row):10.2f}{_columns(row.forwards)}"
    )


def seconds_line(row: Row) -> str:
    """The same columns in seconds on the wall."""
    return f"{row.way:15}{len(row.schemes):8}{'':34}{_columns(row.seconds)}"


def _columns(values: Mapping[str, float]) -> str:
    return "".join(f"{values[name]:9.2f}" if name in values else f"{'':>9}" for name in COLUMNS)


def heading() -> str:
    columns = "".join(f"{name:>9}" for name in COLUMNS)
    return f"{'way':15}{'schemes':>8}{'pairs':>6}{'wall s':>9}{'CPU s':>9}{'forwards':>10}{columns}"


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """All ways on one task.

    rows: plain, replayed and default with the first scheme; plain and default with all. singles: the passes of the plain
    loop, by pair; `None` is the baseline's.
    """

    rows: tuple[Row, ...]
    singles: dict[Pair | None, Pass]
    probes: tuple[Probe, ...]
    searched: Searched


def timed(subject: Work, share_of_others: float) -> Timed:
    """One scheme, then all: parts of the plain loop in turns with the other ways."""
    one, others = subject.schemes[0], subject.schemes[1:]
    rng = np.random.default_rng(SEED)
    chosen: list[Pair] = list(subject.of(one))
    for scheme in others:
        pairs = subject.of(scheme)
        count = max(1, round(share_of_others * len(pairs)))
        chosen += [pairs[at] for at in sorted(rng.choice(len(pairs), count, replace=False))]
    shuffled = [chosen[at] for at in rng.permutation(len(chosen))]
    singles: dict[Pair | None, Pass] = {None: plain_pass(subject, (), subject.task.splits.search)}
    base = singles[None]
    margin = MARGIN * float(base.losses.mean())
    say(
        f"baseline: loss {base.losses.mean():.4f}, {len(base.losses)} units, {base.cost.wall:.2f} s; margin {margin:.4f}"
    )

    def plain(part: Sequence[Pair]) -> None:
        for pair in part:
            found = plain_pass(subject, [pair], subject.task.splits.search)
            singles[pair] = replace(found, scores=found.scores if pair[1] == one else ())
        spent = sum((each.cost for each in singles.values()), Cost())
        say(f"plain loop: {len(singles) - 1} of {len(shuffled)} passes, {spent.wall:.1f} s, {spent.cpu:.1f} s of CPU")

    parts = [shuffled[at::TURNS] for at in range(TURNS)]
    plain(parts[0])
    replayed, probes = replayed_loop(subject, subject.of(one))
    say(line(replayed))
    plain(parts[1])
    searched = default_search(subject.task, subject.schemes[:1], margin)
    say(line(searched.row))
    plain(parts[2])
    searched_all = default_search(subject.task, subject.schemes, margin)
    say(line(searched_all.row))
    plain(parts[3])
    first, all_ = _plain_row(subject, singles, (one,)), _plain_row(subject, singles, subject.schemes)
    return Timed((first, replayed, searched.row, all_, searched_all.row), singles, probes, searched)


def _plain_row(subject: Work, singles: dict[Pair | None, Pass], schemes: Sequence[Scheme]) -> Row:
    """The baseline and a pass per pair; of schemes that were timed in part the passes are scaled to all layers."""
    base = singles[None]
    cost, notes = base.cost, []
    for scheme in schemes:
        timed_ = [found.cost for pair, found in singles.items() if pair is not None and pair[1] == scheme]
        pairs = len(subject.of(scheme))
        cost = cost + sum(timed_, Cost()).scaled(pairs / len(timed_))
        if len(timed_) < pairs:
            notes.append(f"{scheme.name} scaled from {len(timed_)} of {pairs} layers")
    pairs = sum(len(subject.of(scheme)) for scheme in schemes)
    return Row(
        "plain loop",
        subject.task.name,
        tuple(scheme.name for scheme in schemes),
        len(base.losses),
        pairs,
        cost,
        {"before": 1.0, "probes": float(pairs)},
        {"before": base.cost.wall, "probes": cost.wall - base.cost.wall},
        "; ".join(notes),
    )


def sampled_ways(task: Task, scheme: Scheme, sampled: int) -> tuple[Row, Row]:
    """The plain loop, scaled from a few layers, half of them before and half after the default search."""
    few = list(task.splits.certify)[:FEW]
    subject = work_of(replace(task, splits=replace(task.splits, certify=few)), (scheme,))
    chosen = np.random.default_rng(SEED).choice(len(subject.pairs), sampled, replace=False).tolist()
    singles: dict[Pair | None, Pass] = {None: plain_pass(subject, (), task.splits.search)}

    def plain(part: Sequence[int]) -> None:
        for at in part:
            singles[subject.pairs[at]] = plain_pass(subject, [subject.pairs[at]], task.splits.search)

    plain(chosen[: sampled // 2])
    margin = MARGIN * float(singles[None].losses.mean())
    searched = default_search(subject.task, (scheme,), margin, Effort(rounding_draws=0))
    plain(chosen[sampled // 2 :])
    return _plain_row(subject, singles, (scheme,)), searched.row
