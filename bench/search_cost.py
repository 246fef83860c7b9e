"""What does a search cost, and how good are its scores? The plain loop, the replayed loop and the default search.

    python bench/search_cost.py [--quick] [--units N] [--json FILE]

On semantic search (all-MiniLM-L6-v2, StackExchange questions) with one scheme and with three, then on a synthetic model
of 1,000 layers. The ways take turns in one process: a part of the plain loop's layers is timed before, between and
after the other ways. Of the second and third scheme the plain loop times a random third of the layers, of the synthetic
model 20; their sum is scaled, and the row says so. Certification and rounding draws have columns of their own and are in
no ratio. Peak memory is that of a fresh process for each way, above the peak of scoring the baseline in it.
A claim that fails is printed and written as such; the exit code is 0, for what fails may be the machine's load.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from harness import Claim, at_least, at_most, command_line, finished, print_claims, print_machine, write_json
from measuring.layer_ranking import GRADIENT, KEPT, ORACLE, OURS, Ranking, rankings_of, truth_of
from measuring.peak_memory import peak_above_baseline
from measuring.search_turns import Timed, heading, line, sampled_ways, say, seconds_line, timed
from measuring.search_work import Row, Work, before_certification, work_of
from precimap.numerics.schemes import scheme as scheme_by_name
from precimap.task import Task
from tasks.real_tasks import stackfaq_minilm
from tasks.synthetic import deep_task

SCHEMES = tuple(map(scheme_by_name, ("fp8", "fp8-e5m2", "int8")))
RESIDUAL_UNITS = 256
CERTIFY = 96  # units: certification is in no ratio
SHARE_OF_OTHERS = 1 / 3
DEEP_LAYERS, DEEP_SAMPLE, DEEP_UNITS = 1000, 6, (512, 8192)
CLAIMED_UNITS = 2048
OUTPUT_SLACK = 1.05


def ranking_line(found: Ranking) -> str:
    spearman = "".join(f"{'':>9}" if each is None else f"{each:9.3f}" for each in (found.loss, found.output))
    left = "".join(f"{value:12.5g}" for value in found.left.values())
    return f"{found.score:32}{spearman}{left}"


def speed_claims(rows: Sequence[Row]) -> list[Claim]:
    """The ratios of the table, on the wall and before certification."""
    one, replayed, searched, all_, all_searched = rows
    return [
        at_least("replayed loop: times faster than the plain loop", _ratio(one, replayed), 1.8),
        at_least("default search, one scheme: times faster than the plain loop", _ratio(one, searched), 5),
        at_least("default search, three schemes: times faster than the plain loop", _ratio(all_, all_searched), 10),
    ]


def quality_claims(rankings: Sequence[Ranking]) -> list[Claim]:
    by_name = {found.score: found.left for found in rankings}
    ours, oracle, rival = by_name[OURS], by_name[ORACLE], by_name[GRADIENT]
    claims = []
    for k in ours:
        left = f"error left with the {k} worst layers kept, by the screen's output error"
        claims.append(at_most(f"{left}, over the oracle's", ours[k] / oracle[k], OUTPUT_SLACK))
        over = ours[k] / rival[k]
        claims.append(Claim(f"{left}, below that of the elementwise gradient, as a share of it", over, 1.0, over < 1))
    return claims


def same_bits(subject: Work, measured: Timed) -> Claim:
    apart = sum(
        int((found.scored.losses != measured.singles[found.layer, subject.schemes[0]].losses).sum())
        for found in measured.probes
    )
    return at_most("units whose loss differs between the plain and the replayed loop", apart, 0)


def _ratio(slow: Row, fast: Row) -> float:
    return slow.cost.wall / fast.cost.wall


@dataclass(frozen=True, slots=True)
class Document:
    """What the run ends in; written at every step, so that a run that is cut off leaves what it measured."""

    path: Path | None
    rows: list[dict[str, object]] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)

    def add(self, table: str, rows: Sequence[dict[str, object]], claims: Sequence[Claim] = ()) -> None:
        self.rows.extend({"table": table, **row} for row in rows)
        self.claims.extend(claims)
        print_claims(claims)
        write_json(self.path, self.rows, self.claims)


def on_task(document: Document, make: Callable[[], Task], quick: bool) -> None:
    """Everything on one task: cost with one scheme and with three, quality of the scores, memory."""
    subject = work_of(make(), SCHEMES)
    say(f"\n{subject.task.name}; {', '.join(f'{len(subject.of(s))} layers take {s.name}' for s in SCHEMES)}")
    measured = timed(subject, 1.0 if quick else SHARE_OF_OTHERS)
    say_rows(measured.rows)
    bits = same_bits(subject, measured)
    document.add("cost", cost_rows(measured.rows), [bits] if quick else [bits, *speed_claims(measured.rows)])
    say(
        f"\n{'score':32}{'Spearman':>9}{'Spearman':>9}   E|change of scores|^2 left with k layers kept\n"
        f"{'':32}{'loss^2':>9}{'output':>9}" + "".join(f"{f'k = {k}':>12}" for k in KEPT)
    )
    predictor = measured.searched.result.evidence.predictor
    if predictor is None:
        raise RuntimeError("expected the default search to screen")
    truth = truth_of(measured.singles, SCHEMES[0])
    rankings, n_left = rankings_of(
        subject, SCHEMES[0], truth, predictor, RESIDUAL_UNITS, lambda found: say(ranking_line(found))
    )
    scored = predictor.reference.units.n
    say(f"Spearman with the truth on {truth.n} units; scores on {scored} of them; error left on {n_left}")
    units: dict[str, object] = {"n": truth.n, "n_scored": scored, "n_left": n_left}
    document.add("ranking", [units | asdict(found) for found in rankings], () if quick else quality_claims(rankings))
    say("\npeak memory above that of scoring the baseline, each way in a process of its own")
    peaks: list[dict[str, object]] = []
    one, replayed, searched, _, searched_all = measured.rows  # the plain loop needs one layer at a time in both cases
    for row in (one, replayed, searched, searched_all):
        peak = peak_above_baseline(make, row.way, tuple(map(scheme_by_name, row.schemes)))
        peaks.append({"way": row.way, "schemes": row.schemes, "peak_bytes": peak})
        say(f"{row.way:15}{len(row.schemes):8}" + ("  not known here" if peak is None else f"{peak / 2**20:8.0f} MB"))
    document.add("memory", peaks)


def on_deep(document: Document, layers: int, units: int, sampled: int, quick: bool) -> None:
    """The plain loop and the default search on a synthetic model."""
    rows = sampled_ways(deep_task(layers, units), SCHEMES[0], sampled)
    say(f"\n{rows[0].task}, {rows[0].n} units")
    say_rows(rows)
    name = f"default search, {layers} layers, {units} units: times faster than the plain loop"
    # Of few units the fixed cost of a search (its first batches) is most of it: printed, and not claimed.
    claimed = not quick and units >= CLAIMED_UNITS
    document.add("synthetic", cost_rows(rows), [at_least(name, _ratio(*rows), 100)] if claimed else ())


def cost_rows(rows: Sequence[Row]) -> list[dict[str, object]]:
    return [{**asdict(row), "before_certification": before_certification(row)} for row in rows]


def say_rows(rows: Sequence[Row]) -> None:
    say(f"\n{heading()}")
    for row in rows:
        say(f"{line(row)}  {row.note}")
    say("seconds on the wall, by column")
    for row in rows:
        say(seconds_line(row))
    _say_ratios(rows)


def _say_ratios(rows: Sequence[Row]) -> None:
    plain: Row | None = None
    for row in rows:
        if row.way == "plain loop":
            plain = row
        elif plain is not None:
            say(
                f"{row.way}, {len(row.schemes)} scheme(s): {_ratio(plain, row):.2f}x on the wall, "
                f"{plain.cost.cpu / row.cost.cpu:.2f}x in CPU time, "
                f"{before_certification(plain) / before_certification(row):.2f}x in forward-equivalents"
            )


def main() -> int:
    parser = command_line(__doc__, "small synthetic models only: under a minute")
    parser.add_argument(
        "--units", type=int, default=480, metavar="N", help="units of the search split of the real task"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        torch.set_num_threads(1)
    print_machine()
    document = Document(arguments.json)
    if arguments.quick:
        say("quick: too small for the speeds and errors that are claimed; they are printed and not judged")
        on_task(document, functools.partial(deep_task, 40, 256), True)
        on_deep(document, 80, 256, 8, True)
    else:
        try:
            on_task(document, functools.partial(stackfaq_minilm, arguments.units, CERTIFY), False)
        except FileNotFoundError as error:
            say(f"the real task is not measured: {error}")
        for units in DEEP_UNITS:
            on_deep(document, DEEP_LAYERS, units, DEEP_SAMPLE, False)
    say("")
    finished(document.path, document.rows, document.claims)
    return 0


if __name__ == "__main__":
    main()
