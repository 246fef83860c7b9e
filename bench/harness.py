"""What every benchmark here needs: a description of the machine, claims, and the JSON they end in.

Invariant: a figure never leaves without the machine and the versions. Timing itself is `precimap.runtime.timing`.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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


def write_json(path: Path, rows: Sequence[dict[str, object]], claims: Sequence[Claim]) -> None:
    document = {"machine": machine(), "rows": list(rows), "claims": [asdict(claim) for claim in claims]}
    path.write_text(json.dumps(document, indent=2) + "\n")


def print_machine() -> None:
    print(", ".join(f"{key} {value}" for key, value in machine().items() if value is not None))


def print_claims(claims: Sequence[Claim]) -> None:
    for claim in claims:
        print(f"{'holds' if claim.holds else 'FAILS'}: {claim.name}: {claim.value:.4g} (bound {claim.bound:g})")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
