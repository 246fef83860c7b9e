"""How often is a certificate false, on populations that break bounds? At the true drop as the margin every one is.

    python bench/false_certificates.py [--quick] [--json FILE]

Each cell is drawn again and again, a search and a certify split of the same size, and judged as a certificate is: bound,
floors, blind spot (`tasks/false_cells.py`). A cell keeps the promise where at most alpha of its draws are certified, or
where the certificates say in their blind spot that just such a population would escape them. Exits with 1 when a claim
fails.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from harness import Claim, at_most, command_line, finished, print_machine
from tasks.false_cells import ALPHA, Cell, click_cells, cluster_cells, independent_cells, outcome

QUICK_DRAWS, DRAWS = 100, 500


def allowed(draws: int) -> float:
    """alpha and three standard errors of the simulation."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / draws)


def rows_of(cells: Iterable[Cell], sizes: tuple[int, ...], draws: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell in cells:
        for clusters in sizes:
            found = outcome(cell, clusters, draws)
            row = {"cell": cell.name, "clusters": clusters, "ordinary": cell.ordinary, "draws": draws, **asdict(found)}
            print(
                f"{cell.name:58} {clusters:6} false {found.false:5.1%} (warned {found.warned:5.1%}, refused "
                f"{found.refused:4.0%}) power {found.power:4.0%}, without the search split {found.power_alone:4.0%}",
                flush=True,
            )
            rows.append(row)
    return rows


def claims_of(rows: list[dict[str, Any]], draws: int) -> list[Claim]:
    """What the documentation says of these rows."""
    worst = max(rows, key=lambda row: row["false"] - row["warned"])
    lost = [row["power_alone"] - row["power"] for row in rows if row["ordinary"] and not row["refused"]]
    return [
        at_most(
            f"false certificates that their own blind spot does not name, in the worst cell ({worst['cell']})",
            round(worst["false"] - worst["warned"], 6),
            allowed(draws),
        ),
        at_most(
            "power that the search split's worst unit costs, at most, on ordinary drops", round(max(lost), 6), 0.05
        ),
    ]


def main() -> int:
    asked = command_line(__doc__, "fewer draws and label rates, under a minute").parse_args()
    draws = QUICK_DRAWS if asked.quick else DRAWS
    print_machine()
    rows = rows_of(independent_cells(), (200,) if asked.quick else (100, 500, 2000), draws)
    rows += rows_of(cluster_cells(), (100,) if asked.quick else (100, 300), draws)
    rates = (0.02,) if asked.quick else (0.3, 0.02, 0.001)
    rows += rows_of(click_cells(rates), (2000,) if asked.quick else (1000, 10_000), draws)
    claims = claims_of(rows, draws)
    return finished(asked.json, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
