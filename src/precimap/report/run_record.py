"""A run directory, read back into values: what `report` prints, and `search` too.

Invariant: a finished search prints from here, so that what is printed is what was written down.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precimap.journal import Measurement, open_journal
from precimap.precision_map import Certificate, PrecisionMap


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a run measured. `map` and `answer` are None for a run that did not finish."""

    directory: Path
    premise: dict[str, str]
    preflight: dict[str, Any] | None
    inventory: dict[str, Any] | None
    floor: dict[str, Any] | None
    probes: tuple[Measurement, ...]
    joints: tuple[Measurement, ...]
    certificates: tuple[Certificate, ...]
    deployments: tuple[Measurement, ...]
    map: PrecisionMap | None
    answer: str | None

    def as_row(self) -> dict[str, Any]:
        """For machines."""
        return {
            "run": str(self.directory),
            "answer": self.answer,
            "certified": bool(self.certificates and self.certificates[0].certified),
            "map": None if self.map is None else self.map.model_dump(mode="json"),
            "certificates": [certificate.model_dump() for certificate in self.certificates],
            "preflight": self.preflight,
            "floor": self.floor,
            "whole_maps": [measurement.value for measurement in self.joints],
            "deployments": [measurement.value for measurement in self.deployments],
        }


def read_run(directory: str | Path) -> RunRecord:
    """Read the journal in `directory`. Raises JournalError when there is none."""
    directory = Path(directory)
    with open_journal(directory) as journal:
        summary = journal.measurements("summary")
        return RunRecord(
            directory=directory,
            premise=journal.premise(),
            preflight=_only(journal.measurements("preflight")),
            inventory=_only(journal.measurements("inventory")),
            floor=_only(journal.measurements("floor")),
            probes=journal.measurements("probe"),
            joints=journal.measurements("joint"),
            certificates=tuple(
                Certificate.model_validate_json(json.dumps(m.value)) for m in journal.measurements("certificate")
            ),
            deployments=journal.measurements("deployment"),
            map=PrecisionMap.parse(json.dumps(summary[-1].value["map"]), str(directory)) if summary else None,
            answer=str(summary[-1].value["answer"]) if summary else None,
        )


def _only(rows: tuple[Measurement, ...]) -> dict[str, Any] | None:
    return rows[-1].value if rows else None
