"""What a search returns: the answer, and the values of all steps that it rests on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from precimap.certificate import Certificate
from precimap.decisions import Decision
from precimap.end_to_end import EndToEnd
from precimap.errors import JournalError, MapError
from precimap.journal import open_journal
from precimap.layers.inventory import Inventory
from precimap.precision_map import PrecisionMap
from precimap.searching.comparison import Comparison
from precimap.searching.evidence.gather import EvidenceTable, evidence_of
from precimap.searching.latency.planned import Latency
from precimap.searching.maps.candidates import Casts, MapCandidate
from precimap.searching.preflight.checks import Preflight


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class SearchResult:
    """The answer, and everything it rests on.

    map: the certified one, or all base precision when none passed. certificate: of that map, or of the first map that
    failed; None when no map got as far as the certify split. end_to_end: the times of the last map that was timed as a
    whole, or None. casts: what the search split says of the whole model in 16 bits. floor, evidence: None for a search that
    ended early, because no map could pass with these splits. `answer` says it in a sentence.
    """

    map: PrecisionMap
    certificate: Certificate | None
    answer: str
    preflight: Preflight
    inventory: Inventory
    floor: Comparison | None
    evidence: EvidenceTable | None
    chain: tuple[MapCandidate, ...]
    casts: Casts
    certificates: tuple[Certificate, ...]
    latency: Latency | None
    end_to_end: EndToEnd | None

    @classmethod
    def load(cls, run: str | Path) -> Self:
        """What the search in this run directory returned, read back from what it wrote down.

        All but what holds the task itself: the evidence has no predictor, and the maps of the chain are there by their
        fingerprints; the answer's own map is whole. Raises JournalError for a directory that holds no finished search, or
        one of an older precimap.
        """
        directory = Path(run)
        with open_journal(directory) as journal:
            found = {kind: rows[-1].value for kind in _KINDS if (rows := journal.conclusions(kind))}
        if "summary" not in found:
            raise JournalError(f"{directory}: this search has not finished; the same command goes on")
        try:
            return cls(**_read(found, directory))
        except KeyError as error:
            raise JournalError(
                f"{directory}: an older precimap wrote this run ({error} is not in it); the same search command writes it "
                "anew, from the same measurements"
            ) from error
        except (ValueError, MapError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise JournalError(
                f"{directory}: expected what a search wrote down, got something else ({said}); the run was edited or "
                "damaged: restore it from a backup, or choose another run directory"
            ) from error

    @property
    def certified(self) -> bool:
        return self.certificate is not None and self.certificate.certified

    def __repr__(self) -> str:
        return f"SearchResult({self.answer!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the answer, what the certificate says, and each layer with its reason."""
        proof = "" if self.certificate is None else f"<p>{escape(str(self.certificate))}</p>"
        head = "".join(f"<th>{name}</th>" for name in ("layer", "runs in", "drop alone", "FLOPs", "why"))
        rows = "".join(_row(name, decision, self.map.cast) for name, decision in self.map.layers.items())
        return f"<p><b>{escape(self.answer)}</b></p>{proof}<table><tr>{head}</tr>{rows}</table>"


_KINDS = (*"summary preflight inventory floor evidence chain casts certificates latency".split(), "whole model")
_PREFLIGHT, _INVENTORY, _FLOOR = TypeAdapter(Preflight), TypeAdapter(Inventory), TypeAdapter(Comparison)


def _read(found: Mapping[str, dict[str, Any]], directory: Path) -> dict[str, Any]:
    """The fields of a result, of what was concluded."""
    summary = found["summary"]

    def certificate(row: dict[str, Any] | None) -> Certificate | None:
        return None if row is None else Certificate.model_validate_json(json.dumps(row))

    def of(kind: str, read: Callable[[Any], Any]) -> Any:
        return read(found[kind]) if found.get(kind) else None

    return {
        "map": PrecisionMap.parse(json.dumps(summary["map"]), str(directory)),
        "certificate": certificate(summary["certificate"]),
        "answer": str(summary["answer"]),
        "preflight": _PREFLIGHT.validate_python(found["preflight"]),
        "inventory": _INVENTORY.validate_python(found["inventory"]),
        "floor": of("floor", _FLOOR.validate_python),
        "evidence": of("evidence", evidence_of),
        "chain": tuple(MapCandidate.of_row(row) for row in found["chain"]["maps"]),
        "casts": Casts.of_row(found["casts"]),
        "certificates": tuple(certificate(row) for row in found["certificates"]["certificates"]),
        "latency": of("latency", Latency.of_row),
        "end_to_end": of("whole model", lambda row: EndToEnd.model_validate_json(json.dumps(row))),
    }


def _row(name: str, decision: Decision, cast: str | None) -> str:
    """A layer in a table: what it alone costs the metric, where that is known, and why it has its scheme."""
    scheme = decision.scheme
    found = None if scheme is None else decision.evidence.get(scheme) or decision.predicted.get(scheme)
    drop = "" if found is None else f"{found.drop:+.2g} \u00b1 {found.error:.1g}"
    cells = (name, scheme or cast or "base precision", drop, f"{decision.flops_share:.1%}")
    short = "".join(f'<td style="white-space:nowrap;text-align:left">{escape(cell)}</td>' for cell in cells)
    return f'<tr>{short}<td style="text-align:left">{escape(decision.reason)}</td></tr>'


def saved(result: SearchResult, run: str | Path | None) -> SearchResult:
    """The answer is in its run's directory; the map that another question was answered with stays, by its fingerprint."""
    if run is None:
        return result
    path = Path(run) / "map.json"
    if path.is_file():
        try:
            before = PrecisionMap.load(path)
        except MapError:  # edited, damaged, of an older version: it stays, too, and must not cost the answer
            path.replace(path.with_name(f"unreadable-{path.stat().st_mtime_ns}.json"))
        else:
            if before.fingerprint != result.map.fingerprint:
                before.save(path.with_name(f"map-{before.fingerprint}.json"))
            elif _asked(before) != _asked(result.map):
                margin = f"-margin-{before.certificate.margin:g}" if before.certificate is not None else ""
                before.save(path.with_name(f"map-{before.fingerprint}{margin}.json"))
    result.map.save(path)
    return result


def _asked(precision_map: PrecisionMap) -> tuple[object, ...] | None:
    """What its certificate answers; None without one."""
    found = precision_map.certificate
    if found is None:
        return None
    return (found.margin, found.alpha, found.split, *((name, guard.margin) for name, guard in found.guards.items()))
