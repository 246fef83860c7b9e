"""How often is a certificate false, on populations that break bounds? At the true drop as the margin every one is.

    python bench/false_certificates.py [--quick] [--json FILE]

Each cell is drawn again and again, a search and a certify split of the same size, and judged as a certificate is: bound,
floors, blind spot (`false_cells.py`). A cell keeps the promise where at most alpha of its draws are certified, or where
the certificates say in their blind spot that just such a population would escape them. Exits with 1 when a claim fails.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from false_cells import ALPHA, Cell, click_cells, cluster_cells, independent_cells, outcome
from harness import Claim, at_most, print_claims, print_machine, write_json

QUICK_DRAWS, DRAWS = 100, 500


def allowed(draws: int) -> float:
    """alpha and three standard errors of the simulation."""
    return ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / draws)


def rows_of(cells: Iterable[Cell], sizes: tuple[int, ...], draws: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer draws and label rates, under a minute")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    draws = QUICK_DRAWS if asked.quick else DRAWS
    print_machine()
    rows = rows_of(independent_cells(), (200,) if asked.quick else (100, 500, 2000), draws)
    rows += rows_of(cluster_cells(), (100,) if asked.quick else (100, 300), draws)
    rates = (0.02,) if asked.quick else (0.3, 0.02, 0.001)
    rows += rows_of(click_cells(rates), (2000,) if asked.quick else (1000, 10_000), draws)
    worst = max(rows, key=lambda row: float(str(row["false"])) - float(str(row["warned"])))
    lost = [
        float(str(row["power_alone"])) - float(str(row["power"]))
        for row in rows
        if row["ordinary"] and not float(str(row["refused"]))
    ]
    claims: list[Claim] = [
        at_most(
            f"false certificates that their own blind spot does not name, in the worst cell ({worst['cell']})",
            float(str(worst["false"])) - float(str(worst["warned"])),
            allowed(draws),
        ),
        at_most("power that the search split's worst unit costs, at most, on ordinary drops", max(lost), 0.05),
    ]
    print_claims(claims)
    if asked.json is not None:
        write_json(asked.json, rows, claims)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
