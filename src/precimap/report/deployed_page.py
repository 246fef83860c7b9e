"""What a command says of a deployed model: where it runs, how near it is to the emulation, and what it is not for."""

from typing import Any

from rich.console import RenderableType

from precimap.layers.target import EMULATED
from precimap.report.terminal import lines_of
from precimap.runtime.emulated import SLOW
from precimap.runtime.nvidia.target import marked


def deployed_page(row: dict[str, Any], seconds: float) -> RenderableType:
    """row: as the command gives it to machines. seconds: that deploying took."""
    lines = [
        f"{row['layers']} layers deployed for {marked(row['target'])} in {seconds:.1f} s",
        f"difference to the emulation: rms {row['rms_difference']:.2g}, largest {row['largest_difference']:.2g}, "
        f"of scores up to {row['largest_output']:.3g} (n = {row['units']})",
        f"saved {row['file']}",
    ]
    if row["target"] == EMULATED.name:
        lines.append(SLOW)
    if row["not_certified"] is not None:
        lines.append(f"NOT CERTIFIED: {row['not_certified']}")
    return lines_of(lines)
