"""What a search returns: the answer, and the values of all steps that it rests on."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

from precimap.certificate import Certificate
from precimap.decisions import Decision
from precimap.end_to_end import EndToEnd
from precimap.errors import MapError
from precimap.layers.inventory import Inventory
from precimap.precision_map import PrecisionMap
from precimap.searching.evidence.gather import Evidence
from precimap.searching.evidence.probe import Comparison
from precimap.searching.latency.planned import Latency
from precimap.searching.preflight import Preflight
from precimap.searching.whole.whole_maps import Joint


@dataclass(frozen=True, slots=True, repr=False)
class SearchResult:
    """The answer, and everything it rests on.

    map: the certified one, or all base precision when none passed. certificate: of that map, or of the first map that
    failed; None when no map got as far as the certify split. end_to_end: the times of the last map that was timed as a
    whole, or None. floor, evidence: None for a search that ended early, because no map could pass with these splits.
    `answer` says it in a sentence.
    """

    map: PrecisionMap
    certificate: Certificate | None
    answer: str
    preflight: Preflight
    inventory: Inventory
    floor: Comparison | None
    evidence: Evidence | None
    chain: tuple[Joint, ...]
    certificates: tuple[Certificate, ...]
    latency: Latency | None
    end_to_end: EndToEnd | None

    @property
    def certified(self) -> bool:
        return self.certificate is not None and self.certificate.certified

    def __repr__(self) -> str:
        return f"SearchResult({self.answer!r})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the answer, what the certificate says, and each layer with its reason."""
        proof = "" if self.certificate is None else f"<p>{escape(str(self.certificate))}</p>"
        head = "".join(f"<th>{name}</th>" for name in ("layer", "scheme", "drop alone", "share of the FLOPs", "why"))
        rows = "".join(_row(name, decision) for name, decision in self.map.layers.items())
        return f"<p><b>{escape(self.answer)}</b></p>{proof}<table><tr>{head}</tr>{rows}</table>"


def _row(name: str, decision: Decision) -> str:
    """A layer in a table: what it alone costs the metric, where that is known, and why it has its scheme."""
    scheme = decision.scheme
    found = None if scheme is None else decision.evidence.get(scheme) or decision.predicted.get(scheme)
    drop = "" if found is None else f"{found.drop:+.2g} \u00b1 {found.error:.1g}"
    cells = (name, scheme or "base precision", drop, f"{decision.flops_share:.1%}", decision.reason)
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


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
