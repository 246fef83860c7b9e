"""A run directory, read back: the result of its search, and what else the directory holds.

Invariant: a finished search prints from here, so that what is printed is what was written down. What pages show is the
`SearchResult`; `as_row` hands the rows of the journal to machines as they are.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precimap.certificate import Certificate
from precimap.errors import JournalError
from precimap.journal import Journal, open_journal
from precimap.precision_map import PrecisionMap
from precimap.searching.result import SearchResult

SAVED = "search.yaml"  # the options of the command line, beside the measurements
STAGES = ("baseline", "floor", "screen", "probe", "nudge", "joint", "certify", "draw")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """Everything a run found. result: None for a run that did not finish.

    rows: what the journal concluded, by kind. batches: how many were scored so far, by stage. asked: the options of the
    command that began it, as far as it holds them.
    """

    directory: Path
    premise: dict[str, str]
    result: SearchResult | None
    rows: dict[str, dict[str, Any]]
    batches: dict[str, int]
    asked: dict[str, Any]

    @property
    def map(self) -> PrecisionMap | None:
        return None if self.result is None else self.result.map

    @property
    def answer(self) -> str | None:
        return None if self.result is None else self.result.answer

    @property
    def certificates(self) -> tuple[Certificate, ...]:
        return () if self.result is None else self.result.certificates

    def as_row(self) -> dict[str, Any]:
        """For machines."""
        summary, proofs = self.rows.get("summary", {}), self.rows.get("certificates", {})
        certificates = proofs.get("certificates", [])
        return {
            "run": str(self.directory),
            "answer": summary.get("answer"),
            "certified": bool(certificates and certificates[0]["certified"]),
            "map": summary.get("map"),
            "certificates": certificates,
            "preflight": self.rows.get("preflight"),
            "floor": self.rows.get("floor"),
            "evidence": self.rows.get("evidence"),
            "whole_maps": self.rows.get("chain", {}).get("maps", []),
            "deployment": self.rows.get("deployment"),
            "latency": self.rows.get("latency"),
            "end_to_end": self.rows.get("whole model") or None,
            "batches_scored": self.batches,
        }


def read_run(directory: str | Path) -> RunRecord:
    """Read the journal in `directory`. Raises JournalError when there is none, or it does not hold what a search writes."""
    directory = Path(directory)
    with open_journal(directory) as journal:
        rows = {kind: found for kind in _KINDS if (found := _last(journal, kind)) is not None}
        premise = journal.premise()
        batches = {kind: count for kind in STAGES if (count := journal.count(kind))}
    return RunRecord(
        directory=directory,
        premise=premise,
        result=SearchResult.load(directory) if "summary" in rows else None,
        rows=rows,
        batches=batches,
        asked=_asked(directory),
    )


_KINDS = (*"summary certificates preflight floor evidence chain deployment latency".split(), "whole model")


def _last(journal: Journal, kind: str) -> dict[str, Any] | None:
    found = journal.conclusions(kind)
    if found and not isinstance(found[-1].value, dict):
        raise JournalError(
            f"expected {kind} as a search writes it, got {found[-1].value!r:.40}; restore the run from a backup"
        )
    return found[-1].value if found else None


def _asked(directory: Path) -> dict[str, Any]:
    """Of `search.yaml`, which the command line writes; nothing where it is missing or was edited into something else."""
    import yaml

    try:
        found = yaml.safe_load((directory / SAVED).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return dict(found) if isinstance(found, dict) else {}
