"""How fast are logs read, and in how much memory? TSV, gzipped TSV and Parquet against a loop over Python's csv module.

    python bench/reading.py [--quick] [--rows N] [--json FILE]

The logs are generated (`precimap.demos.click_logs`), all 42 columns are read and encoded. The loop does the same work row
by row: 13 logarithms, 26 hexadecimal values modulo the table. Ways take turns, ratios are taken within a turn. Peak
memory is that of a fresh process in which one pass over the file runs, above what it held before, for the file and for
one of a quarter of its rows. A reader that streams needs blocks: of Parquet a page (1 MB) and a buffer for each of the 42
columns, once the file has that much. A claim that fails is printed and written as such; the exit code is 0, for what
fails may be the machine's load.
"""

import csv
import gzip
import math
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from pyarrow import csv as arrow_csv
from pyarrow import parquet, string

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from measuring.peak_memory import peak_bytes, reset_peak
from precimap.data import CRITEO, Encoding, Logs, hex_modulo, log_counts
from precimap.demos.click_logs import generate, lines
from precimap.runtime.timing import interleaved, ratio, spread

COLUMNS = replace(CRITEO, header=(*(CRITEO.header or ()), "user", "time"), user="user", time="time")
TABLE = 2000
FORMATS = ("tsv", "tsv.gz", "parquet")
PEAK_MB = 100
LOOP = "csv module, a loop"


def written(folder: Path, rows: int) -> dict[str, Path]:
    """The same generated logs in each format."""
    paths = {name: folder / f"{rows}.{name}" for name in FORMATS}
    text = "".join(lines(generate(rows))).encode()
    paths["tsv"].write_bytes(text)
    paths["tsv.gz"].write_bytes(gzip.compress(text, compresslevel=6))
    table = arrow_csv.read_csv(
        paths["tsv"],
        arrow_csv.ReadOptions(column_names=COLUMNS.header),
        arrow_csv.ParseOptions(delimiter="\t"),
        arrow_csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS.categorical, string()), strings_can_be_null=True),
    )
    parquet.write_table(table, paths["parquet"])
    return paths


def one_pass(path: Path) -> int:
    """Rows of a file, all read and encoded."""
    columns = replace(COLUMNS, header=None) if path.suffix == ".parquet" else COLUMNS
    logs = Logs([path], columns, Encoding(log_counts, hex_modulo(TABLE)))
    return sum(len(batch["label"]) for batch in logs.batches(size=1000))


def loop(path: Path) -> int:
    """The same by hand: what one writes without a library."""
    rows = 0
    with path.open(newline="") as file:
        for row in csv.reader(file, delimiter="\t"):
            [math.log1p(max(0.0, float(field or 0))) for field in row[1:14]]
            [int(field or "0", 16) % TABLE for field in row[14:40]]
            float(row[0]), int(row[40]), float(row[41])
            rows += 1
    return rows


def peak_of(path: Path) -> int | None:
    """Bytes above those held before one pass, in a fresh process; None where the kernel does not tell."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (path,))


def _peak(path: Path) -> int | None:
    torch.set_num_threads(1)
    small = path.with_name(f"warm.{path.name.partition('.')[2]}")
    one_pass(small)  # what libraries load on first use is not the reader's
    if not reset_peak():
        return None
    before = peak_bytes()
    one_pass(path)
    return max(0, peak_bytes() - before)


def measured(rows: int, turns: int) -> tuple[list[dict[str, object]], list[Claim]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths, quarter = written(folder, rows), written(folder, rows // 4)
        for kind, path in written(folder, 2000).items():
            path.rename(folder / f"warm.{kind}")
        cases: dict[str, Callable[[], object]] = {kind: (lambda p=paths[kind]: one_pass(p)) for kind in FORMATS}
        cases[LOOP] = lambda: loop(paths["tsv"])
        seconds = interleaved(cases, turns)
        table: list[dict[str, object]] = []
        claims: list[Claim] = []
        for kind in FORMATS:
            faster = ratio(seconds[LOOP], seconds[kind])
            size, peak, smaller = paths[kind].stat().st_size, peak_of(paths[kind]), peak_of(quarter[kind])
            a_second = spread([rows / one for one in seconds[kind]])
            table.append(
                {
                    "format": kind,
                    "rows": rows,
                    "bytes": size,
                    "rows_a_second": a_second.median,
                    "times_faster": faster.median,
                    "quartiles": [faster.lower, faster.upper],
                    "turns": turns,
                    "peak_bytes": peak,
                    "peak_bytes_of_a_quarter": smaller,
                }
            )
            print(f"{kind:<8} {size / 1e6:6.1f} MB  {a_second:9,.0f} rows/s  {faster:.2f} times the loop", end="")
            print(
                ""
                if peak is None or smaller is None
                else f"  peak {peak / 1e6:.1f} MB, of a quarter {smaller / 1e6:.1f}"
            )
            claims.append(at_least(f"{kind}: times faster than the loop", faster.median, 1.0))
            if peak is not None:
                claims.append(at_most(f"{kind}: peak MB of a pass", peak / 1e6, PEAK_MB))
    return table, claims


def main() -> None:
    parser = command_line(__doc__, "fewer rows and turns")
    parser.add_argument("--rows", type=int, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    rows, claims = measured(options.rows or (40_000 if options.quick else 400_000), 3 if options.quick else 5)
    finished(options.json, rows, claims)


if __name__ == "__main__":
    main()
