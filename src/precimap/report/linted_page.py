"""What a command says of a checkpoint that it looked at: its layers by kind, and each finding in a sentence."""

from pathlib import Path

from rich.console import RenderableType

from precimap.exporting.linting.findings import Linted
from precimap.report.terminal import lines_of


def linted_page(found: Linted, checkpoint: Path) -> RenderableType:
    """checkpoint: the folder that was looked at."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.layers.items())
    lines = [f"{checkpoint} for {found.engine}: {sum(found.layers.values())} layers, {kinds or 'none'}"]
    lines += [f"{'' if one.effect == 'note' else f'{one.effect.upper()} '}{one.said}" for one in found.findings]
    bad = len(found.misread)
    lines.append(
        f"{bad} {'finding' if bad == 1 else 'findings'}: {found.engine} must not serve this checkpoint as it is"
        if bad
        else f"no rule says that {found.engine} would misread or refuse it"
    )
    return lines_of(lines)
