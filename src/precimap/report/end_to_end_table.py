"""A map timed end to end as a table that fits 80 columns: every form it was served in, its rivals, and what pays."""

from rich.console import Group, RenderableType
from rich.text import Text

from precimap.end_to_end import BASE, MAP, EndToEnd, FormTimes, SizeTimes
from precimap.report.terminal import Rows, lines_of

FEW = 200  # turns below which a 99th percentile is little else than the longest, and is not printed


def end_to_end_page(found: EndToEnd) -> RenderableType:
    """A table for each batch size, and what it comes to."""
    tables = [part for size in found.sizes for part in (_table(found, size), Text())]
    gain = found.gain
    n = min(form.seconds.n for size in found.sizes for form in size.forms)
    lines = [
        str(found.device),
        f"n = {n} interleaved turns{f'; p99 takes {FEW}' if n < FEW else ''}; memory: peak of a call, beside the weights; "
        "times as long as the map in the form that is served, within a turn, median [quartiles]",
        f"utilisation of {found.peak_flops / 1e12:.3g} TFLOP/s in base precision "
        f"({'given' if found.peak_given else 'measured'}), {found.flops / 1e6:,.3g} MFLOP a unit",
        f"the map, {found.served}, is {gain} times as fast as the base model{_foretold(found)}",
    ]
    if not found.pays:
        lines.append("no gain in time that can be told from the spread of the turns")
    lines += [
        f"faster than the map: {name}, {1 / speed.median:.2f} times as fast; its {_quality(name)}"
        for name, speed in found.faster()
    ]
    lines += [f"not timed: {name}: {why}" for name, why in found.refused.items()]
    return Group(*tables, lines_of(lines))


def _foretold(found: EndToEnd) -> str:
    off = found.foretold_off
    if found.foretold is None or off is None:
        return ""
    how = "too slow" if off > 0 else "too fast"
    return f"; the sum of single layers predicted {found.foretold}, {how} by {abs(off):.2f} of the base model's time"


def _quality(name: str) -> str:
    precision = name.split(",")[0]
    if precision == BASE:
        return "answers are the baseline's"
    return (
        "codes are the map's, its sums round otherwise: not certified"
        if precision == MAP
        else "quality is not certified"
    )


def _table(found: EndToEnd, size: SizeTimes) -> Rows:
    table = Rows(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=f"batch of {size.units:,}", title_justify="left")
    table.add_column("form", no_wrap=True)
    for heading in ("ms", "p99", "units/s", "times as long", "MB", "use"):
        table.add_column(heading, justify="right", no_wrap=True)
    for form in size.forms:
        own = (form.precision, form.form) == (MAP, found.served)
        table.add_row(*_cells(found, size, form), style="bold" if own else "")
    return table


def _cells(found: EndToEnd, size: SizeTimes, form: FormTimes) -> tuple[str, ...]:
    each = size.units / form.seconds.median
    used = each * found.flops / found.peak_flops
    return (
        form.name,
        f"{1e3 * form.seconds.median:.4g}",
        "" if form.seconds.n < FEW else f"{1e3 * form.p99:.4g}",
        f"{each:,.0f}",
        str(form.ratio),
        "" if form.memory is None else f"{form.memory / 1e6:.1f}",
        "" if used > 1 else f"{used:.0%}",  # a peak that is passed is none
    )
