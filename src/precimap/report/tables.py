"""The values of a run as rich tables that fit 80 columns.

Every number stands with its error and its n, in the table or in its caption.
"""

import itertools
import math
from collections import Counter
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from precimap.precision_map import Decision, Evidence, PrecisionMap, Verdict
from precimap.report.end_to_end_table import end_to_end_page
from precimap.report.proof import certificate_text, rounding_text
from precimap.report.run_record import RunRecord
from precimap.report.terminal import Rows, lines_of, shown
from precimap.searching.evidence.means import said_of
from precimap.searching.latency.savings import Savings

SELECTED = "Proved is the margin: drop and bound are those of the map that passed, and a little too good."
NAME_WIDTH = 36
NARROW_NAME_WIDTH = 24  # beside all columns of a map
SCHEME_WIDTH = 15
_WITHOUT_EVIDENCE = (Verdict.INELIGIBLE, Verdict.PINNED, Verdict.SLOWER)
_STYLE = {
    Verdict.TOLERANT: "green",
    Verdict.SENSITIVE: "red",
    Verdict.UNDECIDED: "yellow",
    Verdict.INELIGIBLE: "dim",
    Verdict.PINNED: "cyan",
    Verdict.SLOWER: "magenta",
}


def short_name(name: str, width: int = NAME_WIDTH) -> str:
    """A layer's name without `.weight`, and without the leading parts that do not fit: the end tells layers apart."""
    name = shown(name.removesuffix(".weight"))
    parts = name.split(".")
    while len(name) > width and len(parts) > 1:
        parts = parts[1:]
        name = "…" + ".".join(parts)
    return name if len(name) <= width else "…" + name[-(width - 1) :]


def map_table(precision_map: PrecisionMap) -> RenderableType:
    """Layer by layer: the drop of that layer alone, as predicted and as probed, and what was decided."""
    unit = _unit(precision_map)
    table = Rows(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for heading in ("FLOPs", "predicted ±", "probed ±"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("in", no_wrap=True)
    for name, decision in precision_map.layers.items():
        cells = (_own_drop(decision, decision.predicted, unit), _own_drop(decision, decision.evidence, unit))
        verdict = Text(decision.verdict.value, style=_STYLE[decision.verdict])
        runs = (decision.scheme or "base")[:SCHEME_WIDTH]
        table.add_row(short_name(name, NARROW_NAME_WIDTH), f"{precision_map.share_of(name):.1%}", *cells, verdict, runs)
    reasons = Counter(d.reason for d in precision_map.layers.values() if d.verdict in _WITHOUT_EVIDENCE)
    notes = lines_of((f"{count} x {reason}" for reason, count in reasons.items()), "dim")
    said = f"drops of single layers in {precision_map.premise.metric} x {unit:.0e}, {_sizes(precision_map)}"
    whose = "; predicted with the last logit realigned, probed without" if precision_map.realignment else ""
    whose += "; of the scheme in the last column, else of the first tried" if len(precision_map.schemes) > 1 else ""
    said = f"{said}; positive is worse{whose}"
    return Group(table, *([notes] if reasons else []), lines_of([said], "dim"))


def _unit(precision_map: PrecisionMap) -> float:
    """The power of ten in which the median error of a single layer's drop has one digit before the point."""
    errors = [e.error for d in precision_map.layers.values() for e in (*d.predicted.values(), *d.evidence.values())]
    return _power_of_ten(errors)


def _power_of_ten(errors: list[float]) -> float:
    """In which the median error has one digit before the point; 1 without an error."""
    found = sorted(error for error in errors if error > 0)
    return 10.0 ** math.floor(math.log10(found[len(found) // 2])) if found else 1.0


def _own_drop(decision: Decision, evidence: dict[str, Evidence], unit: float) -> str:
    found = evidence.get(decision.scheme) if decision.scheme else next(iter(evidence.values()), None)
    return "" if found is None else f"{found.drop / unit:+.1f} ±{found.error / unit:4.1f}"


def chain_table(run: RunRecord) -> RenderableType:
    """The maps of the chain as wholes: predicted, measured on the search split, tested on the certify split."""
    errors = [row["measured"]["error"] for row in run.chain if row["measured"] is not None and row["measured"]["error"]]
    singles = [abs(row["singles"]) for row in run.chain if row["singles"]]
    unit = _power_of_ten([error / 10 for error in errors or singles])
    table = Rows(
        title=f"drops of whole maps x {unit:.0e}, safest first (upper: one-sided bound)",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("low", "singles", "predicted", "search", "± s.e.", "upper", "certify", "± s.e.", "upper"):
        table.add_column(heading, justify="right")
    table.add_column("passed")

    def cell(value: float | None) -> str:
        return "none" if value is None else f"{value / unit:+.1f}"

    for row in run.chain:
        tested = next((c for c in run.certificates if c.map == row["map"]), None)
        found = row["measured"]
        cells = [
            "" if row["singles"] is None else cell(row["singles"]),
            "" if row["predicted"] is None else cell(row["predicted"]["drop"]),
        ]
        cells += ["", "", ""] if found is None else [cell(found[name]) for name in ("drop", "error", "upper")]
        cells += ["", "", ""] if tested is None else [cell(tested.drop), cell(tested.error), cell(tested.upper)]
        said = "" if tested is None else "yes" if tested.certified else "no"
        table.add_row(str(len(row["low"])), *cells, said)
    return Group(table, _gains(run), *_broken_guards(run), *_drift(run))


def _gains(run: RunRecord) -> Text:
    gains = ", ".join(f"{row['gain']:.1%}" for row in run.chain)
    how = "half of the FLOPs that 8 bits take over, counted" if run.latency is None else "of the layers' time, timed"
    return Text(f"gains, in that order: {gains} ({how}; what bytes are worth included)", style="dim")


def _broken_guards(run: RunRecord) -> list[Text]:
    """Which maps a guard kept from the certify split: the gate's columns do not show it."""
    lines = []
    for row in run.chain:
        how, found = ("reaches", row["measured"]) if row["measured"] else ("is predicted to reach", row["predicted"])
        lines += [
            lines_of([f"{len(row['low'])} low: guard {name} {how} {filled:.1f} times its margin on the search split"])
            for name, filled in (found["guards"].items() if found else ())
            if filled > 1
        ]
    return lines


def _drift(run: RunRecord) -> list[Text]:
    """Calibration breaks before order: how far the scores of the final map are predicted to move on average."""
    final = None if run.map is None else next((row for row in run.chain if row["map"] == run.map.fingerprint), None)
    if final is None or final["drift"] is None:
        return []
    return [Text(f"predicted mean drift of the final map: {final['drift']:+.1e} (scores, or losses if not scalar)")]


def audit_text(evidence: dict[str, Any]) -> RenderableType:
    """How the screen was checked, and where it was not believed."""
    lines, audit = [], evidence["audit"]
    if not evidence["layers"]:
        lines.append("no layer was a candidate: nothing was predicted or probed")
    elif audit is None:
        lines.append("every layer was probed on its own; nothing was predicted")
    elif audit["rows"]:
        lines.append(
            f"screen: {evidence['screened_units']:,} units in one pass; audit by direct probes: {_agreement(audit)}"
        )
        lines += [_means_said(row) for row in audit.get("means", ()) if row["kind"] is None or not row["agrees"]]
        lines += [f"screen not believed for {kind}: probed instead" for kind in audit["distrusted"]]
    lines += [f"not screened, probed: {name}: {why}" for name, why in evidence["unseen"].items()]
    lines += _schemes_compared(evidence["layers"])
    return lines_of(lines)


def _agreement(audit: dict[str, Any]) -> str:
    """How many agree; unit by unit is not in the mean, and where the two answers differ both are said."""
    agreeing, n = sum(row["agrees"] for row in audit["rows"]), len(audit["rows"])
    said = f"{agreeing} of {n} agree"
    if not all(row["agrees"] for row in audit.get("means", ())):  # an older run has none
        return f"{said} unit by unit, but not in the mean"
    return f"{said} (at least {audit['share_at_least']:.0%}, 95 %)"


def _means_said(row: dict[str, Any]) -> str:
    """The sum that was predicted beside the one that was measured, and how much of the margin the error can hide."""
    kind = row["scheme"] if row["kind"] is None else said_of(tuple(row["kind"]))
    verdict = "agree" if row["agrees"] else "DISAGREE"
    hidden = 2 * row["error"] * row["of"] / row["layers"] / row["margin"]
    return (
        f"mean drop of {row['layers']} audited ({kind}, {row['what']}): predicted {row['predicted']:+.2g}, "
        f"measured {row['probed']:+.2g} ({verdict}; n = {row['n']}, off by up to {hidden:.2g} margins would not show)"
    )


def _schemes_compared(layers: list[dict[str, Any]]) -> list[str]:
    """Where fewer or other bits do better, it is said and not clamped: which scheme has the smaller output error."""
    errors: dict[str, dict[str, float]] = {}
    for row in layers:
        if row["output_error"] is not None:
            errors.setdefault(row["scheme"], {})[row["layer"]] = row["output_error"][0]
    lines = []
    for first, second in itertools.combinations(errors, 2):
        both = errors[first].keys() & errors[second].keys()
        if not both:  # schemes of products and of tables meet in no layer
            continue
        better = sum(errors[second][layer] < errors[first][layer] for layer in both)
        lines.append(f"predicted output error: {second} below {first} in {better} of {len(both)} layers")
    return lines


def run_page(run: RunRecord) -> RenderableType:
    """Everything about a run."""
    parts: list[RenderableType] = []
    if run.answer is not None:
        parts += [lines_of([f"answer: {run.answer}"], "bold"), Text()]
    if run.preflight is not None:
        parts += [preflight_text(run.preflight), Text()]
    if run.map is not None:
        parts += [map_table(run.map), Text(), _savings(run.map, run.floor, run.latency), Text()]
    else:
        done = ", ".join(f"{kind} {count}" for kind, count in run.batches.items()) or "none"
        parts += [Text(f"unfinished, the same command takes it up again; batches scored: {done}", style="yellow")]
    if run.evidence is not None:
        parts += [audit_text(run.evidence), Text()]
    if run.chain:
        parts += [chain_table(run), Text()]
    if run.end_to_end is not None:
        parts += [end_to_end_page(run.end_to_end), Text()]
    if run.map is not None and run.map.certificate is not None:
        parts += [certificate_text(run.map.certificate), lines_of([f"  {SELECTED}"])]
    elif run.certificates:
        parts += [certificate_text(run.certificates[0])]
    if run.map is not None and run.map.rounding is not None:
        parts += [rounding_text(run.map.rounding)]
    return Group(*parts)


def preflight_text(preflight: dict[str, Any]) -> RenderableType:
    """What the splits can tell, and what is worth knowing."""
    lines = [
        f"The search uses {preflight['search_units']:,} units, and the final test (the certify split) about "
        f"{preflight['certify_units']:,}."
    ]
    lines += [_outlook_line(found) for found in preflight["outlook"]]
    return lines_of([*lines, *(f"note: {note}" for note in preflight["notes"])])


def _outlook_line(found: dict[str, Any]) -> str:
    """What the splits can tell of one metric, beside the margin that was asked for."""
    if found["impossible"] is not None:
        return f"no map can be certified: {found['impossible']}"
    if found["unmeasured"] is not None and not math.isfinite(found["detectable"]):
        return f"{found['label']}: how noisy a map is could not be measured beforehand ({found['unmeasured']})"
    assumed = "for a map that loses nothing and is as noisy as the model with all layers in low precision"
    if not math.isfinite(found["detectable"]):
        line = f"{found['label']}: with these data no margin can be certified, {assumed}"
    else:
        line = (
            f"{found['label']}: with these data margins from {found['detectable']:.2g} on can be certified, {assumed}"
        )
    if found["detectable"] <= found["margin"]:
        return f"{line}. Yours is {found['margin']:g}."
    needed = "" if found["about"] is None else f" It takes about {found['about']:,} units in each split."
    return f"{line}. Yours is {found['margin']:g}: expect a map that changes less, or none.{needed}"


def _savings(
    precision_map: PrecisionMap, floor: dict[str, Any] | None, latency: dict[str, Any] | None
) -> RenderableType:
    rest = precision_map.other_bytes
    lines = [
        f"in low precision: {len(precision_map.low)} of {len(precision_map.layers)} layers, {precision_map.flops_said}",
        f"bytes of all {'layers' if precision_map.of_model is None else 'parameters'}: "
        f"{megabytes(precision_map.bytes_before + rest)} -> {megabytes(precision_map.bytes_after + rest)}, "
        f"{precision_map.bytes_share:.1%} of them in low precision",
        _time_saved(precision_map, latency),
    ]
    if precision_map.realignment is not None:
        repair = precision_map.realignment
        lines.append(
            f"last logit realigned in {repair.layer}: {repair} (without labels, n = {repair.n:,} logits of each output)"
        )
    if floor is not None:
        drop = floor["drop"]
        lines.append(f"noise floor (rounding every layer to BF16): {drop['estimate']:+.1e} ± {drop['error']:.1e}")
    return lines_of(lines)


def _time_saved(precision_map: PrecisionMap, latency: dict[str, Any] | None) -> str:
    """As the sum of the layers that are low, timed one by one; or that nothing was timed."""
    if latency is None:
        return f"time saved is counted in FLOPs: no layer was timed for the target {precision_map.target}"
    chosen = ((name, precision_map.layers[name].scheme or "") for name in precision_map.low)
    share, low, high = Savings.of_row(latency).total(chosen)
    sizes = ", ".join(map(str, latency["batch_sizes"]))
    took = ", ".join(f"{1e3 * seconds:.3g} ms" for seconds in latency["seconds"])
    return (
        f"time of the layers: {share:.1%} [{low:.1%}, {high:.1%}] saved, the sum of layers timed one by one (quartiles of "
        f"n = {latency['n']} turns; batch {sizes}: {took} in base precision; {latency['device']})"
    )


def _sizes(precision_map: PrecisionMap) -> str:
    found = []
    for how, name in (("predicted", "predicted"), ("probed", "evidence")):
        units = sorted({e.n for d in precision_map.layers.values() for e in getattr(d, name).values()})
        found += [f"{how} on n = {' or '.join(map(str, units))}"] if units else []
    return ", ".join(found) or "none known"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
