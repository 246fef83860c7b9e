"""How much of the best map that could have been certified does a search find? Regret against all 1,024 maps of 10 layers.

    python bench/regret.py [--quick] [--search-rows ROWS] [--splits N] [--json FILE]

Ten linear layers, 3-bit weights, so coarse that layers interact. Two kinds of labels for the same weights: *calibrated*,
drawn from the model's own probabilities, so that every error costs; *overconfident*, those of the data that it was fitted to
too closely, so that some errors improve it. All 1,024 maps are scored on a population; search and certify splits are drawn
from it, and `search()` runs as a user runs it.

Invariant: regret is the gain (share of the weight FLOPs) of the best map less that of the certified one, 0 if none is, where
the best map is the one with the most gain of those whose bound on that very certify split keeps the margin. That
oracle has looked at the certify split 1,024 times and takes what is lucky there; the other one, the most gain of the maps
whose true drop keeps the margin, no certificate of so many units reaches: both stand in the table.
A claim that fails is printed and written as such; the exit code is 0.
"""

import itertools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from harness import Claim, at_most, command_line, finished, print_machine
from precimap import Effort, Splits, Task, discover, search
from precimap.layers.target import EMULATED
from precimap.metrics import LogLoss
from precimap.metrics.paired import upper_bound
from precimap.metrics.units import Units
from precimap.numerics.formats import FORMATS
from precimap.searching.calibrate import InputRanges, prepare
from precimap.task import score
from tasks.finite_population import narrow

ALPHA = 0.05
SCHEME = narrow(3)
FEATURES, WIDTH, BLOCKS, COLUMNS = 16, 32, 8, 16
TRAINED_ON, STEPS = 600, 500
CALIBRATION, SEARCH, CERTIFY = 200, 4000, 4000
MARGINS = {"calibrated": (0.01, 0.03, 0.1), "overconfident": (0.03, 0.1, 0.3)}  # of a log-loss of about .07 and 3.4
BOUNDS = {"calibrated": 0.05, "overconfident": 0.10}
Batch = dict[str, Tensor]


class Residual(nn.Module):
    """Ten linear layers, all of which can be quantised: float32 [n, 16] -> logits [n]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(BLOCKS))
        self.last = nn.Linear(WIDTH, COLUMNS)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        for block in self.blocks:
            hidden = hidden + torch.relu(block(hidden))
        logits: Tensor = self.last(hidden).sum(1) / 4
        return logits


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """A model with its population. d: float32 [1024, rows], what every row loses under every map, in the order of `maps`."""

    kind: str
    seed: int
    model: Residual
    x: Tensor
    labels: Tensor
    layers: tuple[str, ...]
    maps: tuple[frozenset[str], ...]
    gains: NDArray[np.float64]
    d: NDArray[np.float32]

    def task(self, *rows: NDArray[np.int64]) -> Task:
        """rows: of the calibration, the search and the certify split."""
        return task_of(self.model, *(batches(self.x[part], self.labels[part]) for part in rows))


@dataclass(frozen=True, slots=True)
class Row:
    """One search. gain: certified; best, reachable: of the two oracles. drop: true, of the certified map. looks: whole maps
    measured on the search split; sent: judged on the certify split."""

    kind: str
    model: int
    margin: float
    split: int
    gain: float
    best: float
    reachable: float
    drop: float
    looks: int
    sent: int

    @property
    def regret(self) -> float:
        return self.best - self.gain

    @property
    def false(self) -> bool:
        return self.gain > 0 and self.drop > self.margin


def task_of(model: nn.Module, calibration: list[Batch], searched: list[Batch], certified: list[Batch]) -> Task:
    return Task(
        model,
        splits=Splits(calibration, searched, certified),
        forward=lambda m, batch: m(batch["x"]),
        loss=lambda z, batch: F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none"),
        metric=LogLoss(),
    )


def batches(x: Tensor, labels: Tensor, size: int = 250) -> list[Batch]:
    return [{"x": x[at : at + size], "labels": labels[at : at + size]} for at in range(0, len(x), size)]


def truth(x: Tensor) -> Tensor:
    """The probabilities that labels are drawn with: a random network, steep."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(77)
        sizes = (FEATURES, 64, 64, 1)
        net = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())][:-1]
        return torch.sigmoid(8 * nn.Sequential(*net)(x)[:, 0])


def trained(seed: int) -> Residual:
    """Fitted to far too few rows, for far too long: its probabilities are near 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Residual()
    x = torch.randn(TRAINED_ON, FEATURES, generator=generator)
    labels = torch.bernoulli(truth(x), generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(STEPS):
        rows = torch.randint(0, TRAINED_ON, (128,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(model(x[rows]), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval().requires_grad_(False)


def world(kind: str, seed: int, rows: int) -> World:
    """Every one of the 1,024 maps, scored on `rows` rows."""
    model, generator = trained(seed), torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    chances = torch.sigmoid(model(x)) if kind == "calibrated" else truth(x)
    labels = torch.bernoulli(chances, generator=generator)
    split = batches(x, labels, 4000)
    task = task_of(model, split, split, split)
    inventory = discover(model, task.forward, split[0])
    layers = tuple(layer.name for layer in inventory.layers)
    shares = np.array([layer.flops / inventory.weight_flops for layer in inventory.layers])
    chosen = np.array(list(itertools.product((False, True), repeat=len(layers))))
    maps = tuple(frozenset(name for name, low in zip(layers, each, strict=True) if low) for each in chosen)
    base = score(task, model, split).losses
    d = np.zeros((len(maps), rows), np.float32)
    for number, names in enumerate(maps):
        if names:
            codes = prepare(task, inventory, InputRanges({}), dict.fromkeys(names, SCHEME))
            with EMULATED.running(model, codes) as low:
                d[number] = score(task, low, split).losses - base
    return World(kind, seed, model, x, labels, layers, maps, chosen @ shares, d)


def searched(found: World, margin: float, split: int, search_rows: int = SEARCH) -> Row:
    """One search on splits of its own, which share no row."""
    order = np.random.default_rng(1000 + split).permutation(len(found.x))
    ends = np.cumsum([CALIBRATION, search_rows, CERTIFY])
    rows = np.split(order[: ends[-1]], ends[:-1])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.dict(FORMATS, {SCHEME.weight.format.name: SCHEME.weight.format}),
    ):
        result = search(
            found.task(*rows),
            schemes=[SCHEME],
            margin=margin,
            confidence=1 - ALPHA,
            ledger=folder,
            effort=Effort(rounding_draws=0),
        )
    at = found.maps.index(frozenset(result.map.low) if result.certified else frozenset())
    return Row(
        found.kind,
        found.seed,
        margin,
        split,
        float(found.gains[at]),
        best_gain(found.d[:, rows[2]], found.gains, margin),
        float(found.gains[found.d.mean(1, dtype=np.float64) <= margin].max()),
        float(found.d[at].mean(dtype=np.float64)),
        sum(joint.measured is not None for joint in result.chain),
        len(result.certificates),
    )


def best_gain(d: NDArray[np.float32], gains: NDArray[np.float64], margin: float) -> float:
    """The most gain of the maps whose bound on these units keeps the margin; d: [maps, units]."""
    means, units = d.mean(1, dtype=np.float64), Units(n=d.shape[1])
    for at in np.argsort(-gains, kind="stable"):
        if means[at] < margin and upper_bound(d[at].astype(np.float64), units, ALPHA, LogLoss().worst) <= margin:
            return float(gains[at])
    return 0.0


def mean_regret(rows: Sequence[Row]) -> tuple[float, float]:
    """The mean, and its standard error over draws of the splits; the models and margins are taken as they are."""
    by_split = [np.mean([row.regret for row in rows if row.split == split]) for split in {row.split for row in rows}]
    error = float(np.std(by_split, ddof=1)) / math.sqrt(len(by_split)) if len(by_split) > 1 else math.inf
    return float(np.mean(by_split)), error


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    claims = []
    for kind, bound in BOUNDS.items():
        found = [row for row in rows if row.kind == kind]
        name = f"regret of the {kind} models, share of the weight FLOPs ({len(found)} searches)"
        claims.append(at_most(name, mean_regret(found)[0], bound))
    allowed = ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / len(rows))
    false = sum(row.false for row in rows) / len(rows)
    return [*claims, at_most("certified maps with a true drop above the margin", false, allowed)]


def print_rows(rows: Sequence[Row]) -> None:
    print(
        f"\n{'labels':15}{'margin':>7}{'best':>7}{'true':>7}{'found':>7}{'regret':>8}{'+-':>7}{'looks':>7}{'sent':>6}{'n':>4}"
    )
    for kind, margins in MARGINS.items():
        for margin in (*margins, None):
            found = [row for row in rows if row.kind == kind and margin in (None, row.margin)]
            mean, error = mean_regret(found)
            best, reachable, gain, looks, sent = (
                float(np.mean([getattr(row, name) for row in found]))
                for name in ("best", "reachable", "gain", "looks", "sent")
            )
            of = "all" if margin is None else f"{margin:g}"
            print(
                f"{kind:15}{of:>7}{best:7.3f}{reachable:7.3f}{gain:7.3f}{mean:8.3f}{error:7.3f}{looks:7.1f}{sent:6.1f}"
                f"{len(found):4}"
            )


def main() -> int:
    parser = command_line(__doc__, "one model and a smaller population: under a minute")
    parser.add_argument("--search-rows", type=int, default=SEARCH, help=f"of the search split (default {SEARCH:,})")
    parser.add_argument("--splits", type=int, help="draws of the splits for each model and margin (default 6, quick 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_machine()
    models, splits, size = (1, 2, 8200) if arguments.quick else (3, 6, 16_000)
    splits, search_rows = arguments.splits or splits, arguments.search_rows
    if not 0 < search_rows <= size - CALIBRATION - CERTIFY:
        parser.error(f"expected search rows from 1 to {size - CALIBRATION - CERTIFY:,}, got {search_rows:,}")
    rows: list[Row] = []
    for kind, margins in MARGINS.items():
        for seed in range(models):
            found = world(kind, seed, size)
            rows += [searched(found, margin, split, search_rows) for margin in margins for split in range(splits)]
            print(
                f"{kind}, model {seed}: regret {np.mean([r.regret for r in rows if r.model == seed]):.3f}", flush=True
            )
    print_rows(rows)
    claims = claims_of(rows)
    finished(arguments.json, [asdict(row) | {"regret": row.regret} for row in rows], claims)
    return 0


if __name__ == "__main__":
    main()
