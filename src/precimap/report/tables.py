"""The values of a run as rich tables that fit 80 columns.

Every number stands with its error and its n, in the table or in its caption.
"""

import math
from collections import Counter

from rich.console import Group, RenderableType
from rich.text import Text

from precimap.precision_map import Decision, Evidence, PrecisionMap, Verdict
from precimap.report.audit_text import audit_text
from precimap.report.end_to_end_table import end_to_end_page
from precimap.report.proof import certificate_text, rounding_text
from precimap.report.run_record import RunRecord
from precimap.report.terminal import Rows, lines_of, shown
from precimap.searching.preflight.checks import Preflight
from precimap.searching.preflight.sample_size import Outlook
from precimap.searching.result import SearchResult

SELECTED = (
    "What is proved is the margin. The map was picked because it passed, so drop and bound are a little too good."
)
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
    table.add_column("runs in", no_wrap=True)
    for name, decision in precision_map.layers.items():
        cells = (_own_drop(decision, decision.predicted, unit), _own_drop(decision, decision.evidence, unit))
        verdict = Text(decision.verdict.value, style=_STYLE[decision.verdict])
        runs = (decision.scheme or precision_map.cast or "as it is")[:SCHEME_WIDTH]
        table.add_row(short_name(name, NARROW_NAME_WIDTH), f"{precision_map.share_of(name):.1%}", *cells, verdict, runs)
    reasons = Counter(d.reason for d in precision_map.layers.values() if d.verdict in _WITHOUT_EVIDENCE)
    notes = lines_of((f"{count} layer{'s' * (count > 1)}: {reason}" for reason, count in reasons.items()), "dim")
    said = (
        f"Drops of single layers in {precision_map.premise.metric}, in {unit:.0e}, {_sizes(precision_map)}; above zero is "
        "worse."
    )
    if precision_map.realignment:
        said += " They are predicted with the last logit realigned, and probed without."
    if len(precision_map.schemes) > 1:
        said += " They are those of the scheme in the last column, or of the first that was tried."
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


def chain_table(result: SearchResult) -> RenderableType:
    """The maps of the chain as wholes: predicted, measured on the search split, tested on the certify split."""
    measured = [one.measured.drop.error for one in result.chain if one.measured is not None and one.measured.drop.error]
    singles = [abs(one.singles) for one in result.chain if one.singles]
    unit = _power_of_ten([error / 10 for error in measured or singles])
    table = Rows(
        title=f"The drops of whole maps, in {unit:.0e}, the safest map first (upper: the bound):",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("layers", "sum", "predicted", "search", "± s.e.", "upper", "certify", "± s.e.", "upper"):
        table.add_column(heading, justify="right")
    table.add_column("passed")

    def cell(value: float | None) -> str:
        return "" if value is None else "none" if not math.isfinite(value) else f"{value / unit:+.1f}"

    for one in result.chain:
        tested = next((c for c in result.certificates if c.map == one.fingerprint), None)
        found, predicted = one.measured, one.predicted
        cells = [cell(one.singles), "" if predicted is None else cell(predicted.drop.estimate)]
        cells += ["", "", ""] if found is None else map(cell, (found.drop.estimate, found.drop.error, found.upper))
        cells += (
            ["", "", ""]
            if tested is None
            else ["none" if value is None else cell(value) for value in (tested.drop, tested.error, tested.upper)]
        )
        said = "" if tested is None else "yes" if tested.certified else "no"
        table.add_row(str(len(one.step.choice)), *cells, said)
    legend = (
        "layers: in low precision. sum: of what these layers lose one by one. predicted: by the screen. search, certify: "
        "measured on these splits; empty where it was not."
    )
    return Group(table, lines_of([legend, _gains(result), *_broken_guards(result), *_drift(result)], "dim"))


def _gains(result: SearchResult) -> str:
    gains = ", ".join(f"{one.step.gain:.1%}" for one in result.chain)
    how = (
        "of the FLOPs, where a layer takes time as its bits"
        if result.latency is None
        else "of the time of all timed layers"
    )
    return f"These maps save, in the same order, {gains} ({how}; what saved bytes are worth is added)."


def _casts(result: SearchResult) -> list[str]:
    """What the search split says of the whole model in 16 bits, or why it was not looked at."""
    lines = []
    for one in result.casts.candidates:
        assert one.measured is not None
        found, low = one.measured, len(one.step.choice)
        also = f", with {low} layers in 8 bits" if low else ""
        lines.append(
            f"The whole model in 16 bits{also}: its drop on the search split is {found.drop.estimate:+.2g} ± "
            f"{found.drop.error:.1g}, at most {found.upper:.2g} (n = {found.drop.n:,})."
        )
    if result.casts.refused is not None:
        lines.append(f"The whole model in 16 bits was not looked at: {result.casts.refused}.")
    return lines


def _broken_guards(result: SearchResult) -> list[str]:
    """Which maps a guard kept from the certify split: the gate's columns do not show it."""
    lines = []
    for one in result.chain:
        how, found = ("has", one.measured) if one.measured is not None else ("is predicted to have", one.predicted)
        lines += [
            f"The map with {len(one.step.choice)} layers low {how} a bound of {guard.filled:.1f} times the margin for the "
            f"guard {name} on the search split."
            for name, guard in (found.guards.items() if found is not None else ())
            if guard.filled > 1
        ]
    return lines


def _drift(result: SearchResult) -> list[str]:
    """Calibration breaks before order: how far the scores of the final map are predicted to move on average."""
    final = next((one for one in result.chain if one.fingerprint == result.map.fingerprint), None)
    if final is None or final.drift is None:
        return []
    return [
        f"The screen predicts that under the final map scores (or losses, where a unit has several scores) move by "
        f"{final.drift:+.1e} on average."
    ]


def run_page(run: RunRecord) -> RenderableType:
    """Everything about a run."""
    if run.result is None:
        done = ", ".join(f"{kind} {count}" for kind, count in run.batches.items()) or "none"
        return Text(
            f"This run is not finished; the same command goes on. Batches scored so far: {done}.", style="yellow"
        )
    result = run.result
    parts = [lines_of([f"answer: {result.answer}"], "bold"), Text(), preflight_text(result.preflight), Text()]
    parts += [map_table(result.map), Text(), _savings(result), Text()]
    if result.evidence is not None:
        parts += [audit_text(result.evidence), Text()]
    if result.chain:
        parts += [chain_table(result), Text()]
    parts += [lines_of(_casts(result), "dim"), Text()] if result.latency or result.end_to_end else []
    if result.end_to_end is not None:
        parts += [end_to_end_page(result.end_to_end), Text()]
    if result.map.certificate is not None:
        parts += [certificate_text(result.map.certificate), lines_of([f"  {SELECTED}"])]
    elif result.certificates:
        parts += [certificate_text(result.certificates[0])]
    if result.map.rounding is not None:
        parts += [rounding_text(result.map.rounding)]
    return Group(*parts)


def preflight_text(preflight: Preflight) -> RenderableType:
    """What the splits can tell, and what is worth knowing."""
    lines = [
        f"The search uses {preflight.search_units:,} units, and the final test (the certify split) about "
        f"{preflight.certify_units:,}."
    ]
    lines += [_outlook_line(found) for found in preflight.outlook]
    return lines_of([*lines, *(f"note: {note}" for note in preflight.notes)])


def _outlook_line(found: Outlook) -> str:
    """What the splits can tell of one metric, beside the margin that was asked for."""
    if found.impossible is not None:
        return f"no map can be certified: {found.impossible}"
    if found.unmeasured is not None and not math.isfinite(found.detectable):
        return f"{found.label}: how noisy a map is could not be measured beforehand ({found.unmeasured})"
    assumed = "for a map that loses nothing and is as noisy as the model with all layers in low precision"
    if not math.isfinite(found.detectable):
        line = f"{found.label}: these data can certify no margin, {assumed}"
    else:
        line = f"{found.label}: these data can certify margins from about {found.detectable:.2g} on, {assumed}"
    if found.detectable <= found.margin:
        return f"{line}. Yours is {found.margin:g}."
    needed = "" if found.about is None else f" It takes about {found.about:,} units in each split."
    return f"{line}. Yours is {found.margin:g}: expect a map that changes less, or none.{needed}"


def _savings(result: SearchResult) -> RenderableType:
    found = result.map
    before, after = map(megabytes, found.shrinks)
    whose = "layers" if found.of_model is None else "parameters"
    lines = [
        f"{len(found.low)} of {len(found.layers)} layers are in low precision: {found.flops_said}.",
        f"The {whose} shrink from {before} to {after}; {found.bytes_share:.1%} of their bytes are in low precision.",
        _time_saved(result),
    ]
    if found.realignment is not None:
        repair = found.realignment
        lines.append(
            f"The last logit is realigned in {repair.layer}: {repair} (fitted without labels on n = {repair.n:,} logits of "
            "each output)."
        )
    if result.floor is not None:
        drop = result.floor.drop
        lines.append(
            f"For comparison, rounding every layer to BF16 alone has a drop of {drop.estimate:+.1e} ± {drop.error:.1e} "
            f"(n = {drop.n:,})."
        )
    return lines_of(lines)


def _time_saved(result: SearchResult) -> str:
    """As the sum of the layers that are low, timed one by one; or that nothing was timed."""
    found, latency = result.map, result.latency
    if latency is None:
        return f"No layer was timed for the target {found.target}: what is saved is counted in FLOPs."
    chosen = ((name, found.layers[name].scheme or "") for name in found.low)
    share, low, high = latency.savings.total(chosen)
    sizes = ", ".join(map(str, latency.batch_sizes))
    took = ", ".join(f"{1e3 * seconds:.3g} ms" for seconds in latency.seconds)
    return (
        f"Of the time of the layers, {share:.1%} [{low:.1%}, {high:.1%}] is saved: the sum of layers timed one by one "
        f"(quartiles of n = {latency.n} turns; at batch size {sizes} all of them take {took} in base precision; "
        f"{latency.device})."
    )


def _sizes(precision_map: PrecisionMap) -> str:
    found = []
    for how, name in (("predicted", "predicted"), ("probed", "evidence")):
        units = sorted({e.n for d in precision_map.layers.values() for e in getattr(d, name).values()})
        found += [f"{how} on n = {' or '.join(map(str, units))}"] if units else []
    return ", ".join(found) or "none known"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
