"""What low precision does to real rankers: as given, in BF16, all in FP8, and under the map that a search certifies.

    python bench/ranking.py [--quick] [--json FILE]

NCF-MLP and GMF with their authors' weights on all 6,040 users of MovieLens; a DCNv2 and a Wukong trained on frappe; a SASRec
trained on Amazon's video games; MiniLM on questions of StackExchange. Every drop is paired, on the certify split, with
its standard error over clusters; of the first metric also with its standard deviation over shifted rounding grids. "All
FP8" quantises every product, a static scale per tensor, also those that no kernel takes. Tasks without their data are
left out and said to be. --quick: NCF-MLP and GMF on fewer users. Exits with 1 when a claim fails.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from models.variants import BASELINE, Judge, Measured, Subject, measured, told_apart, ways_of
from precimap import Knapsack, SearchResult, Task, search
from precimap.metrics import (
    AUC,
    GAUC,
    MRR,
    NDCG,
    NE,
    Calibration,
    HitRate,
    LogLoss,
    Loss,
    Metric,
    OrderFlips,
    RecalibratedNE,
)
from precimap.metrics.metric import RELATIVE
from precimap.searching.question import Effort
from tasks.real_tasks import amazon_sasrec, frappe_dcnv2, frappe_wukong, gmf, ncf, stackfaq_minilm

GRIDS = 8
BYTES_WORTH = 0.2
MLP = "MovieLens-1M, NCF-MLP"
SCHEMES = ("fp8-static", "fp8", "int8-row")
CLICKS: tuple[Metric, ...] = (NE(), LogLoss(), Calibration(), AUC(), GAUC(), RecalibratedNE())


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A task, how large a drop of its gate is accepted as a share of the baseline's, and who judges. The first is the gate.

    margin: of the gate's baseline where that is a loss in nats; NE is relative by itself.
    """

    make: Callable[[], Task]
    margin: float
    judges: tuple[Judge, ...]
    realign: bool = False


def films(make: Callable[[], Task]) -> Case:
    """100 candidates of each user: order within the user, clicks over all rows."""
    order = (Judge(NDCG(10)), Judge(HitRate(10)), Judge(OrderFlips()))
    clicks = tuple(Judge(metric, flat=True) for metric in CLICKS)
    return Case(make, 0.002, (Judge(Loss("log-loss of users")), *clicks, *order))


def clicked(make: Callable[[], Task]) -> Case:
    """Rows with a click or without, NE as the gate and calibration as a guard."""

    def task() -> Task:
        return replace(make(), metric=NE(), guards={"calibration": 0.005}, reported=(AUC(), GAUC()))

    return Case(task, 0.001, tuple(map(Judge, CLICKS)))


def cases(quick: bool) -> list[Case]:
    sizes = (250, 1500, 4290) if not quick else (100, 500, 1000)
    users = {"calibration_users": sizes[0], "search_users": sizes[1], "certify_users": sizes[2]}
    found = [
        films(lambda: ncf(**users)),
        replace(films(lambda: ncf(**users)), realign=True),
        films(lambda: gmf(**users)),
    ]
    if quick:
        return found
    retrieval = (Judge(Loss("log-loss")), Judge(NDCG(10)), Judge(MRR(10)), Judge(OrderFlips()))
    sequence = (Judge(Loss("log-loss")), Judge(NDCG(10)), Judge(HitRate(10)), Judge(OrderFlips()))
    return [
        *found,
        clicked(frappe_dcnv2),
        clicked(frappe_wukong),
        Case(amazon_sasrec, 0.002, sequence),
        Case(stackfaq_minilm, 0.02, retrieval),
    ]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """One case, searched and measured; text: what fails, and what cannot be told apart."""

    name: str
    gate: str
    margin: float
    answer: str
    rows: list[Measured]
    text: list[str]

    def row(self, name: str) -> Measured:
        return next(row for row in self.rows if row.way.name == name)


def run(case: Case, grids: int) -> Found:
    """Search, then measure every way on the certify split."""
    task = case.make()
    subject = Subject.of(task)
    margin = case.margin
    if task.metric.unit != RELATIVE:
        margin *= case.judges[0].metric.value(*subject.scored(BASELINE).kept(case.judges[0]))
    with tempfile.TemporaryDirectory() as folder:  # a bench asks one split again and again; users may not
        result = search(
            task,
            schemes=SCHEMES,
            margin=margin,
            rule=Knapsack(bytes_worth=BYTES_WORTH),
            effort=Effort(rounding_draws=0),
            realign=case.realign,
            ledger=folder,
        )
    rows = measured(subject, ways_of(subject, result.map), case.judges, grids)
    name = f"{task.name}{', last logit realigned' if case.realign else ''}"
    text = told(subject, case.judges[0], rows, margin, result)
    return Found(name, task.metric.name, margin, result.answer, rows, text)


def told(subject: Subject, gate: Judge, rows: Sequence[Measured], margin: float, result: SearchResult) -> list[str]:
    """In words: which ways fail, and whether the map can be told from blanket FP8 at this n."""
    name, text = gate.metric.name, []
    for row in rows[1:]:
        drop = row.drops[name]
        if drop.lower > margin:
            text.append(f"{row.way.name} FAILS: {name} drops by at least {drop.lower:.2g}, margin {margin:.2g}")
        elif drop.upper > margin:
            text.append(
                f"{row.way.name} cannot be certified here: {name} may drop by {drop.upper:.2g}, margin {margin:.2g}"
            )
    if result.certificate is not None:
        for label, guard in result.certificate.guards.items():
            bound = "none" if guard.upper is None else f"{guard.upper:.2g}"
            held = "held" if guard.held else "NOT held"
            text.append(f"guard {label} of the map {held}: bound {bound}, margin {guard.margin:g}")
    ways = {row.way.name: row.way for row in rows}
    if not ways["certified map"].choice:
        return [*text, "no layer is in low precision, so the map is the baseline"]
    between, needed = told_apart(subject, ways["all FP8"], ways["certified map"], gate)
    said = f"{name} of the map less that of all FP8: {between.drop.estimate:+.2g} +- {between.drop.error:.2g}"
    if needed is not None:
        said += f": cannot be told apart at n = {between.drop.n:,}; would be at about {needed:,}"
    return [*text, said]


def show(found: Found) -> None:
    """A table of values, and one of drops with their errors, within 80 columns."""
    print(f"\n{found.name}: {found.answer}")
    print(f"gate {found.gate}, margin {found.margin:.3g}")
    for at in range(0, len(found.rows[0].values), 3):
        names = list(found.rows[0].values)[at : at + 3]
        print(f"  {'':18}" + "".join(f"{name:>20}" for name in names))
        for row in found.rows:
            print(f"  {row.way.name:18}" + "".join(f"{_cell(row, name):>20}" for name in names))
    for row in found.rows[1:]:
        spread = "" if row.over_grids is None else f", sd over {row.over_grids[1]} grids {row.over_grids[0]:.1e}"
        print(f"  {row.way.name}: {row.flops:.0%} of FLOPs, {row.bytes:.0%} of bytes in low precision{spread}")
    for line in found.text:
        print(f"  {line}")


def _cell(row: Measured, name: str) -> str:
    if not row.way.choice:
        return f"{row.values[name]:.5f}"
    drop = row.drops[name].drop
    return f"{drop.estimate:+.1e} ±{drop.error:.0e}"


def claims_of(found: Sequence[Found]) -> list[Claim]:
    """Of NCF-MLP: what blanket FP8 costs, that the map protects, that realigning takes the lottery away."""
    claims = []
    for case in found:
        own = case.row("certified map").drops[next(iter(case.rows[0].drops))]
        share = own.upper / case.margin
        claims.append(at_most(f"{case.name}: bound of the certified map's drop, of the margin", share, 1))
    name, plain = "log-loss of users", next((case for case in found if case.name == MLP), None)
    if plain is not None:
        blanket = plain.row("all FP8")
        cost = blanket.drops[name].drop.estimate / plain.rows[0].values[name]
        claims.append(at_least("NCF-MLP: what all FP8 costs of the log-loss", cost, 0.03))
        fixed = plain.row("all FP8, realigned").over_grids
        if blanket.over_grids is not None and fixed is not None:
            ratio = blanket.over_grids[0] / fixed[0]
            claims.append(at_least("NCF-MLP, all FP8: sd over grids, plain over realigned", ratio, 4))
    return claims


def as_row(found: Found) -> dict[str, object]:
    ways = [
        {
            "way": row.way.name,
            "layers": {layer: chosen.name for layer, chosen in row.way.choice.items()},
            "values": row.values,
            "drops": {name: asdict(drop) for name, drop in row.drops.items()},
            "sd_over_grids": row.over_grids,
            "flops": row.flops,
            "bytes": row.bytes,
        }
        for row in found.rows
    ]
    return {
        "task": found.name,
        "gate": found.gate,
        "margin": found.margin,
        "answer": found.answer,
        "ways": ways,
        "text": found.text,
    }


def main() -> int:
    given = command_line(__doc__, "NCF-MLP and GMF on fewer users").parse_args()
    torch.set_num_threads(1)
    print_machine()
    found: list[Found] = []
    for case in cases(given.quick):
        try:
            found.append(run(case, GRIDS))
        except (FileNotFoundError, ImportError) as error:
            print(f"left out: {error}")
            continue
        show(found[-1])
    claims = claims_of(found)
    return finished(given.json, [as_row(case) for case in found], claims)


if __name__ == "__main__":
    sys.exit(main())
