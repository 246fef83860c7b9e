"""The one harness of all benchmarks: the command line, the machine, claims, the JSON and the exit code they end in.

A benchmark takes its options from `command_line`, prints the machine, measures and prints its rows, and ends in `finished`.
Invariant: a figure never leaves without the machine and the versions. Timing itself is `precimap.runtime.timing`.
"""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence of the documentation as a number against its bound."""

    name: str
    value: float
    bound: float
    holds: bool


def at_least(name: str, value: float, bound: float) -> Claim:
    return Claim(name, value, bound, value >= bound)


def at_most(name: str, value: float, bound: float) -> Claim:
    return Claim(name, value, bound, value <= bound)


def command_line(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """The options of every benchmark; one with more adds them. doc: its docstring. quick: what its short form leaves out."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and claims to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def finished(path: Path | None, rows: Sequence[object], claims: Sequence[Claim]) -> int:
    """Print the claims, write all where a path was given, and return the exit code: 1 when a claim fails."""
    print_claims(claims)
    write_json(path, rows, claims)
    return 0 if all(claim.holds for claim in claims) else 1


def machine() -> dict[str, object]:
    """Device, its abilities, threads, load and versions."""
    cuda = torch.cuda.is_available()
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "gpu_capability": torch.cuda.get_device_capability() if cuda else None,
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def write_json(path: Path | None, rows: Sequence[object], claims: Sequence[Claim]) -> None:
    """Rows: dataclasses or dictionaries. A long run writes between its parts, so one cut off leaves what it measured."""
    if path is not None:
        document = {"machine": machine(), "rows": [_plain(row) for row in rows], "claims": [asdict(c) for c in claims]}
        path.write_text(json.dumps(document, indent=2) + "\n")


def print_machine() -> None:
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))


def print_claims(claims: Sequence[Claim]) -> None:
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.name}: {claim.value:.4g} (bound {claim.bound:g})")


def _plain(row: object) -> object:
    return asdict(row) if is_dataclass(row) and not isinstance(row, type) else row


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
