"""What was proved of a map, and what was not: the certificate, its guards, and the two uncertainties.

Every number stands with its error and its n.
"""

import math

from rich.console import Group, RenderableType

from precimap.certificate import Certificate, GuardAnswer, Rounding, units_said, worth
from precimap.metrics.metric import RELATIVE
from precimap.report.terminal import lines_of


def certificate_text(certificate: Certificate) -> RenderableType:
    """A certificate, a fact a line."""
    lines = [
        *_gate_lines(certificate),
        f"n = {certificate.n:,} units"
        + worth(certificate.n, certificate.clusters, certificate.effective)
        + ("" if certificate.drop is None else f", {certificate.changed:,} changed")
        + f"; alpha spent on this split: {certificate.spent_alpha:g}",
    ]
    for name, guard in certificate.guards.items():
        lines += _guard_lines(name, guard, certificate.alpha)
    if certificate.unrepaired is not None:
        plain = certificate.unrepaired
        drop, error, upper = _told(plain.error, plain.drop, plain.error, plain.upper)
        lines.append(f"without the realigned last logit: {drop} ± {error.lstrip('+')}, upper bound {upper}")
        lines += [f"  guard {name}: {d:+.5f} ± {e:.5f}" for name, (d, e) in plain.guards.items()]
    lines += [
        f"reported beside it, deciding nothing: {name} {d:+.5f} ± {e:.5f}"
        for name, (d, e) in certificate.reported.items()
    ]
    lines += [*certificate.blind_spots, *([certificate.history] if certificate.earlier else []), certificate.claim]
    head = lines_of(
        [f"{certificate.verdict[:1].upper()}{certificate.verdict[1:]}."],
        "bold green" if certificate.certified else "bold yellow",
    )
    return Group(head, lines_of(f"  {line}" for line in lines))


def _gate_lines(certificate: Certificate) -> list[str]:
    if certificate.drop is None or certificate.error is None:
        return [
            f"the map was not scored on this split, whose baseline of {certificate.metric} is {certificate.baseline:.5f}; "
            f"margin {certificate.margin:g}"
        ]
    drop, error, upper = _told(certificate.error, certificate.drop, certificate.error, certificate.upper)
    return [
        f"drop of {certificate.metric}{_of(certificate.unit, certificate.baseline)}: {drop} ± {error.lstrip('+')} (standard "
        "error)",
        f"{100 * (1 - certificate.alpha):g} % upper bound {upper}, margin {certificate.margin:g}",
        f"bound: {certificate.bound}",
    ]


def _guard_lines(name: str, guard: GuardAnswer, alpha: float) -> list[str]:
    drop, error, upper = _told(guard.error, guard.drop, guard.error, guard.upper)
    size = f"n = {guard.n:,}{worth(guard.n, guard.clusters, guard.effective)}"
    needed = "" if guard.needed is None else f"; needs {units_said(guard.needed)}"
    return [
        f"guard {name} {guard.verdict}: {drop} ± {error.lstrip('+')}{_of(guard.unit, guard.baseline)},",
        f"  {100 * (1 - alpha):g} % bound {upper.lstrip('+')}, margin {guard.margin:g}; {size}{needed}",
    ]


def _of(unit: str, baseline: float) -> str:
    """What a drop is a share of, or is in, and the baseline's value."""
    if unit == RELATIVE:
        return f" as a share of the baseline's {baseline:.5f}"
    return f" from {baseline:.5f}{' ' + unit if unit else ''}"


def rounding_text(rounding: Rounding) -> RenderableType:
    """The two uncertainties of the final map, side by side."""
    here = _told(rounding.error_over_units, rounding.shipped, rounding.error_over_units)
    there = _told(rounding.sd, rounding.mean, rounding.sd, rounding.common)
    lines = [
        f"How sure is its drop? On n = {rounding.n:,} units of the search split:",
        f"  These very weights, for other units: {here[0]} ± {here[1].lstrip('+')}.",
        f"  Weights of a next training, rounded elsewhere: {there[0]} ± {there[1].lstrip('+')} (over {len(rounding.drops)} "
        "shifted rounding grids).",
    ]
    if rounding.common:
        lines.append(f"  More units do not make the second smaller than {there[2].lstrip('+')}.")
    return lines_of(lines)


def _told(error: float, *values: float | None) -> tuple[str, ...]:
    """Numbers with two digits of their error, at least five behind the point."""
    digits = 5 if not error or not math.isfinite(error) else max(5, 1 - math.floor(math.log10(error)))
    return tuple("none" if value is None else f"{value:+.{digits}f}" for value in values)
