"""Does deployment serve models that nobody here wrote?

    python bench/zoo.py [--quick] [--only WORD] [--json FILE]

Each model is accounted for to the FLOP, deployed in INT8 with every layer that this CPU takes and emulated in FP8 and INT8,
compared with the emulation that a search measures, copied, pickled, saved, read into a tree of zeros, asked for what its
library calls, and compared bit by bit with what it was (`tests/helpers/zoo_deployed.py`). The models: those of the tests,
and of libraries that the tests do not install; those that are not installed are named and not counted. Quick: every eighth
model. Exits with 1 when a claim fails.
"""

import contextlib
import io
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import pytest
import torch

from harness import Claim, at_least, at_most, command_line, finished, print_machine
from helpers import zoo_language, zoo_senses
from helpers.specimen import Builder
from helpers.zoo_deployed import Outcome, examined
from models import zoo_more, zoo_recommenders

OURS = (
    *(*zoo_language.DECODERS, *zoo_language.STATES, *zoo_language.ENCODERS, *zoo_language.PAIRS),
    *(*zoo_senses.PICTURES, *zoo_senses.SIGNALS),
)
MODELS: tuple[Builder, ...] = (*OURS, *zoo_more.BUILDERS, *zoo_recommenders.BUILDERS)


@dataclass(frozen=True, slots=True)
class Row:
    """One model: what was deployed of it, or why it was not. absent: its library is not installed."""

    model: str
    outcome: Outcome | None
    fault: str | None = None
    absent: bool = False


def _row(build: Builder) -> Row:
    said = io.StringIO()  # what a library prints
    try:
        with contextlib.redirect_stdout(said), tempfile.TemporaryDirectory() as folder:
            return Row(build.__name__, examined(build(), Path(folder)))
    except (ImportError, pytest.skip.Exception) as error:
        return Row(build.__name__, None, str(error).splitlines()[0], absent=True)
    except Exception as error:  # noqa: BLE001 - any of them is a fault, and the next model's turn comes
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0]
        return Row(build.__name__, None, f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})")


def _printed(row: Row) -> str:
    if row.outcome is None:
        return f"{row.model:36} {'absent' if row.absent else 'FAULT'}: {row.fault}"
    found = row.outcome
    return (
        f"{row.model:36}{found.layers:>7}{found.covered:>9.1%}{found.low:>6}{found.tables:>7}{found.emulated:>9}"
        f"{found.added:>10.1e}  {', '.join(found.methods)}"
    )


def _claims(rows: list[Row], quick: bool) -> list[Claim]:
    found = [row.outcome for row in rows if row.outcome is not None]
    layers = sum(outcome.layers for outcome in found)
    return [
        at_most("models with a fault", sum(row.fault is not None and not row.absent for row in rows), 0),
        at_least("models deployed", len(found), 10 if quick else 100),
        at_least("of their layers, in INT8 or packed rows", sum(o.low + o.tables for o in found) / layers, 0.7),
        at_least("of their layers, in the emulated deployment", sum(o.emulated for o in found) / layers, 0.9),
        at_least(
            "models whose INT8 outputs are the emulation's to a thousandth of what quantising does",
            sum(o.added < 1e-3 for o in found) / len(found),
            0.8,
        ),
    ]


def main() -> int:
    parser = command_line(__doc__, "every eighth model")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of maps made by hand, and of the libraries about their own parts
    zoo_more.without_operators()
    print_machine()
    print(f"{'model':36}{'layers':>7}{'of FLOPs':>9}{'INT8':>6}{'tables':>7}{'emulated':>9}{'added':>10}  methods")
    rows = []
    for build in (build for build in MODELS[:: 8 if options.quick else 1] if options.only in build.__name__):
        rows.append(_row(build))
        print(_printed(rows[-1]), flush=True)
    claims = _claims(rows, options.quick)
    return finished(options.json, rows, claims)


if __name__ == "__main__":
    sys.exit(main())
