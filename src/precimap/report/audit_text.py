"""How the screen was checked, in words: what a random audit by direct probes found, and where the screen was not believed.

Where the answers unit by unit and in the mean differ, both are said.
"""

import itertools

from rich.console import RenderableType

from precimap.report.terminal import lines_of
from precimap.searching.evidence.audit import Audit
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.evidence.means import GATE, MeanAgreement, said_of


def audit_text(evidence: EvidenceTable) -> RenderableType:
    """How the screen was checked, and where it was not believed."""
    lines, audit = [], evidence.audit
    if not evidence.known:
        lines.append("No layer was a candidate, so nothing was predicted or probed.")
    elif audit is None:
        lines.append("Every layer was probed on its own; nothing was predicted.")
    elif audit.rows:
        lines.append(
            f"The screen predicted the drop of every layer in one pass over {evidence.screened_units:,} units. "
            f"{_agreement(audit)}"
        )
        lines += [_means_said(found) for found in audit.means if found.kind is None or not found.agrees]
        lines += [
            f"The screen is not believed for {said_of(kind)}: those layers were probed." for kind in audit.distrusted
        ]
    lines += [f"The screen could not see {name} ({why}), so it was probed." for name, why in evidence.unseen.items()]
    lines += _schemes_compared(evidence)
    return lines_of(lines)


def _agreement(audit: Audit) -> str:
    """How many agree; unit by unit is not in the mean, and where the two answers differ both are said."""
    agreeing, n = sum(row.agrees for row in audit.rows), len(audit.rows)
    said = f"To check it, {n} pairs of layer and scheme were drawn and measured one by one: {agreeing} of {n} agree"
    if not all(found.agrees for found in audit.means):
        return f"{said} unit by unit, but not in the mean."
    return f"{said} (with 95 % confidence at least {audit.share[1]:.0%} of all do)."


def _means_said(found: MeanAgreement) -> str:
    """The sum that was predicted beside the one that was measured, and how much of the margin the error can hide."""
    kind = found.scheme if found.kind is None else said_of(found.kind)
    what = "the metric" if found.what == GATE else f"the guard {found.what}"
    verdict = "agree" if found.agrees else "DISAGREE"
    hidden = 2 * found.error * found.of / found.layers / found.margin
    return (
        f"Together these {found.layers} ({kind}) are predicted to change {what} by {found.predicted:+.2g}, and "
        f"measured to change it by {found.probed:+.2g}: they {verdict} (n = {found.n}; over all layers, this check "
        f"could miss an error of {hidden:.1%} of the margin)."
    )


def _schemes_compared(evidence: EvidenceTable) -> list[str]:
    """Where fewer or other bits do better, it is said and not clamped: which scheme has the smaller output error."""
    errors: dict[str, dict[str, float]] = {}
    for found in evidence.known:
        if found.output_error is not None:
            errors.setdefault(found.scheme, {})[found.layer] = found.output_error[0]
    lines = []
    for first, second in itertools.combinations(errors, 2):
        both = errors[first].keys() & errors[second].keys()
        if not both:  # schemes of products and of tables meet in no layer
            continue
        better = sum(errors[second][layer] < errors[first][layer] for layer in both)
        lines.append(f"In {better} of {len(both)} layers {second} is predicted to change the scores less than {first}.")
    return lines
