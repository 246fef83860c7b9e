"""What a command says of an export: what runs where, how near it is to what was certified, and what to know before it
serves.
"""

from collections import Counter
from pathlib import Path

from rich.console import RenderableType

from precimap.exporting.exported import Exported
from precimap.report.terminal import lines_of

_WIDE = ("float64", "float32", "bfloat16", "float16")


def exported_page(found: Exported, output: Path) -> RenderableType:
    """found: the record; output: where it was written."""
    runs = Counter(found.layers.values())
    low_first = sorted(runs, key=lambda what: (what in _WIDE, -runs[what]))
    lines = [f"exported for {found.to} to {output}: {', '.join(found.files)}"]
    lines += [f"{runs[what]} of {len(found.layers)} layers: {what}" for what in low_first]
    lines += [f"input {said}" for said in found.inputs]
    if found.difference is not None:
        off = found.difference
        lines.append(
            f"scores beside the certified form ({off.against}): rms difference {off.rms:.2g}, largest "
            f"{off.largest:.2g}, of scores up to {off.largest_output:.3g} (n = {off.units}); the map itself changes "
            f"them by {off.quantising:.2g}"
        )
    lines += found.notes
    if found.not_certified is not None:
        lines.append(f"NOT CERTIFIED: {found.not_certified}")
    return lines_of(lines)
