"""A run directory, read back into values: what `report` prints, and `search` too.

Invariant: a finished search prints from here, so that what is printed is what was written down.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from precimap.certificate import Certificate
from precimap.end_to_end import EndToEnd
from precimap.errors import JournalError, MapError
from precimap.journal import Journal, open_journal
from precimap.precision_map import PrecisionMap

SAVED = "search.yaml"  # the options of the command line, beside the measurements
STAGES = ("baseline", "floor", "screen", "probe", "nudge", "joint", "certify", "draw")


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything a run found. `map` and `answer` are None for a run that did not finish.

    evidence: what was predicted and probed of single layers, and the audit. chain: the maps as wholes, safest first.
    latency: what layers take and save, None where time is counted in FLOPs. end_to_end: of the last map that was timed.
    batches: how many were scored so far, by stage. asked: the options of the command that began it, as far as it holds them.
    """

    directory: Path
    premise: dict[str, str]
    preflight: dict[str, Any] | None
    inventory: dict[str, Any] | None
    floor: dict[str, Any] | None
    evidence: dict[str, Any] | None
    chain: tuple[dict[str, Any], ...]
    certificates: tuple[Certificate, ...]
    deployment: dict[str, Any] | None
    latency: dict[str, Any] | None
    end_to_end: EndToEnd | None
    map: PrecisionMap | None
    answer: str | None
    batches: dict[str, int]
    asked: dict[str, Any]

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
            "evidence": self.evidence,
            "whole_maps": list(self.chain),
            "deployment": self.deployment,
            "latency": self.latency,
            "end_to_end": None if self.end_to_end is None else self.end_to_end.model_dump(mode="json"),
            "batches_scored": self.batches,
        }


def read_run(directory: str | Path) -> RunRecord:
    """Read the journal in `directory`. Raises JournalError when there is none, or it does not hold what a search writes."""
    directory = Path(directory)
    try:
        return _read(directory)
    except (ValidationError, MapError, LookupError, TypeError, AttributeError, RecursionError) as error:
        said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise JournalError(
            f"{directory}: expected what a search wrote down, got something else ({said}); the run was edited or damaged: "
            "restore it from a backup, or choose another run directory"
        ) from error


def _read(directory: Path) -> RunRecord:
    with open_journal(directory) as journal:
        summary, whole = _only(journal, "summary"), _only(journal, "whole model")
        return RunRecord(
            directory=directory,
            premise=journal.premise(),
            preflight=_only(journal, "preflight"),
            inventory=_only(journal, "inventory"),
            floor=_only(journal, "floor"),
            evidence=_only(journal, "evidence"),
            chain=tuple((_only(journal, "chain") or {"maps": []})["maps"]),
            certificates=tuple(
                Certificate.model_validate_json(json.dumps(row))
                for row in (_only(journal, "certificates") or {"certificates": []})["certificates"]
            ),
            deployment=_only(journal, "deployment"),
            latency=_only(journal, "latency"),
            end_to_end=None if not whole else EndToEnd.model_validate_json(json.dumps(whole)),
            map=None if summary is None else PrecisionMap.parse(json.dumps(summary["map"]), str(directory)),
            answer=None if summary is None else str(summary["answer"]),
            batches={kind: count for kind in STAGES if (count := journal.count(kind))},
            asked=_asked(directory),
        )


def _only(journal: Journal, kind: str) -> dict[str, Any] | None:
    rows = journal.conclusions(kind)
    return rows[-1].value if rows else None


def _asked(directory: Path) -> dict[str, Any]:
    """Of `search.yaml`, which the command line writes; nothing where it is missing or was edited into something else."""
    import yaml

    try:
        found = yaml.safe_load((directory / SAVED).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
