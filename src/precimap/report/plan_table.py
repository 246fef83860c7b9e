"""How many units a margin takes, as a page: the answer first, then a row for each margin."""

from rich.console import Group, RenderableType

from precimap.report.terminal import Rows, lines_of
from precimap.searching.planning import Plan
from precimap.searching.preflight.sample_size import Outlook


def plan_page(plan: Plan) -> RenderableType:
    """Units that each of the two splits needs, beside those that they have."""
    table = Rows(box=None, pad_edge=False)
    table.add_column("metric")
    for heading in ("margin", "at least", "about", "search", "certify"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("can pass", no_wrap=True)
    asked = plan.asked
    for row in plan.rows:
        cells = (f"{row.margin:g}", _units(row.enough), _units(row.about), _units(row.search_units))
        style = "bold" if row in asked else ""
        table.add_row(row.label, *cells, _units(row.certify_units), _can(row), style=style)
    said = (
        f"Units that each split needs at {100 * plan.confidence:g} % confidence, beside those that they have; the smaller "
        "split decides. At least: fewer can certify no map, not even one that changes nothing. About: so many certify, in 4 "
        "of 5 cases, a map that costs nothing and is as noisy as one with every layer in low precision; quieter maps need "
        "fewer, a map that costs a part of the margin needs more."
    )
    notes = lines_of(f"note: {note}" for note in plan.notes)
    return Group(
        lines_of([_answer(plan), ""], "bold"), table, lines_of(["", said], "dim"), *([notes] if plan.notes else ())
    )


def _answer(plan: Plan) -> str:
    refused = [row.impossible for row in plan.asked if row.impossible is not None]
    if refused:
        return f"No map can be certified with these splits. {refused[0]}."
    short = [row for row in plan.asked if _noisy_fails(row)]
    if short:
        row = short[0]
        return (
            f"These splits are small for a margin of {row.margin:g}: a map as noisy as one with every layer in low "
            f"precision passes at {row.detectable:.2g}, so only quieter ones can pass at yours; for all it takes about "
            f"{_units(row.about)} units in each split ({row.label})."
        )
    return f"These splits are large enough for a margin of {plan.margin:g}."


def _noisy_fails(row: Outlook) -> bool:
    return row.about is None or row.about > min(row.search_units, row.certify_units)


def _can(row: Outlook) -> str:
    if row.impossible is not None:
        return "no"
    return "a quiet one" if _noisy_fails(row) else "yes"


def _units(units: int | None) -> str:
    return "no number" if units is None else f"{units:,}"
