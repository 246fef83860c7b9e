"""A hardware profile as a table that fits 80 columns: what each module takes in base precision, and how many times as long
under each scheme."""

from pathlib import Path

from rich.console import Group, RenderableType

from precimap.hardware_profile import HardwareProfile
from precimap.report.terminal import Rows, lines_of
from precimap.runtime.nvidia.target import marked


def profile_page(profile: HardwareProfile, path: Path) -> RenderableType:
    """One line for each module, number of rows and scheme; the quartiles stand beside every ratio."""
    table = Rows(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("module", max_width=34)
    for heading in ("rows", "base us"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("scheme", no_wrap=True)
    table.add_column("times as long", justify="right", no_wrap=True)
    for row in profile.rows:
        cells = (row.module, f"{row.rows:,}", f"{1e6 * row.base.median:.1f}")
        for at, (scheme, low) in enumerate(row.low.items()):
            table.add_row(*(cells if at == 0 else ("", "", "")), scheme, str(low.ratio))
            if low.shared is not None:
                table.add_row("", "", "", "  input shared", str(low.shared))
        if not row.low:
            table.add_row(*cells, "", "")
    n = sorted({row.base.n for row in profile.rows})
    sizes = ", ".join(map(str, profile.batch_sizes))
    lines = [
        f"{marked(profile.target)} on {profile.device}",
        f"medians [quartiles] of n = {' or '.join(map(str, n))} turns, batch {sizes}; saved {path}",
    ]
    return Group(table, lines_of(lines))
