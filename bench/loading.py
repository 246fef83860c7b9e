"""What memory does it take to load a deployed model? Saves models, and loads each into a skeleton without values, in a
process of its own.

    python bench/loading.py [--quick] [--json FILE]

Private memory above that of the process before the call, the largest of samples a millisecond apart, over the size of the
file; a small model of the same kind is loaded before, so that what libraries set up once is not counted. The file is mapped
while it is read; its pages are the system's cache, which takes them back when others need memory, and are not counted.
Exits with 1 when a claim fails.
"""

import multiprocessing
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import Claim, at_most, command_line, finished, print_machine
from precimap import deploy, discover, load_deployed, save_deployed
from precimap.runtime.x86.target import int8_scheme

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.small_maps import map_over, premise_for

LIMIT = 1.1  # of the file


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """MiB: of the file, and of private memory above the start at its largest and at the end. over_file: peak over file."""

    model: str
    target: str
    scheme: str
    file: float
    peak: float
    kept: float
    over_file: float


@dataclass(frozen=True, slots=True)
class Case:
    """A model of `count` parts of this width, what is low in it, and where it runs."""

    model: str
    target: str
    scheme: str
    width: int
    count: int

    def made(self) -> nn.Module:
        torch.manual_seed(0)
        if self.model == "table":
            return nn.Sequential(nn.EmbeddingBag(self.count, self.width, mode="sum"), nn.Linear(self.width, 1)).eval()
        return nn.Sequential(*[nn.Linear(self.width, self.width) for _ in range(self.count)]).eval()

    def batch(self) -> torch.Tensor:
        return torch.zeros(4, 2, dtype=torch.long) if self.model == "table" else torch.ones(4, self.width)


def cases(quick: bool) -> list[Case]:
    width, count, rows = (3072, 12, 2_000_000) if quick else (6144, 12, 6_000_000)
    return [
        Case("layers", "emulated", "fp8", width, count),
        Case("layers", "cpu-int8", int8_scheme(), width, count),
        Case("table", "cpu-int8", "int8-row", 64, rows),
    ]


def measure(case: Case, folder: Path) -> Row:
    path, small = folder / "model.safetensors", folder / "small.safetensors"
    first = replace(case, width=64, count=min(case.count, 100))
    found = (0, 0)
    for work in (_saved, _loaded):  # each in a fresh process: what one leaves behind is not counted for the other
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(work, ([(first, small), (case, path)],))
    size, (peak, kept) = path.stat().st_size, found
    return Row(
        model=case.model,
        target=case.target,
        scheme=case.scheme,
        file=size / 2**20,
        peak=peak / 2**20,
        kept=kept / 2**20,
        over_file=peak / size,
    )


def _saved(given: list[tuple[Case, Path]]) -> None:
    """The last layer stays as it is."""
    warnings.simplefilter("ignore")  # a map made by hand, which is not certified
    for case, path in given:
        model = case.made()
        inventory = discover(model, lambda model, batch: model(batch), case.batch())
        low = {layer.name: case.scheme for layer in inventory.layers[:-1]}
        save_deployed(deploy(model, map_over(inventory, low, case.target, premise_for(model))), model, path)


def _loaded(given: list[tuple[Case, Path]]) -> tuple[int, int]:
    """Of the last."""
    warnings.simplefilter("ignore")
    for case, path in given:
        with torch.device("meta"):
            skeleton = case.made()
        with _Watched() as watched:
            model = load_deployed(skeleton, path)
        assert model is not None
    return watched.peak - watched.before, watched.after - watched.before


class _Watched:
    """Samples this process's private memory, in bytes, until the block ends."""

    def __enter__(self) -> "_Watched":
        self.before = self.peak = _private()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self.peak = max(self.peak, _private())
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self.after = _private()
        self.peak = max(self.peak, self.after)


def _private() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def claims_of(rows: list[Row]) -> list[Claim]:
    return [
        at_most(f"{row.model} on {row.target}: peak of loading over the file", row.over_file, LIMIT) for row in rows
    ]


def main() -> int:
    arguments = command_line(__doc__, "smaller models: under a minute").parse_args()
    print_machine()
    print(f"{'model':8}{'target':10}{'scheme':18}{'file, MiB':>12}{'peak':>10}{'kept':>10}{'peak over file':>18}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(arguments.quick):
            row = measure(case, Path(folder))
            rows.append(row)
            sizes = "".join(f"{each:10.0f}" for each in (row.peak, row.kept))
            print(f"{row.model:8}{row.target:10}{row.scheme:18}{row.file:12.0f}{sizes}{row.over_file:18.2f}")
    claims = claims_of(rows)
    return finished(arguments.json, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
