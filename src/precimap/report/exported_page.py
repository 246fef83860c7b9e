"""What a command says of an export: what runs where, how near it is to what was certified, and what to know before it
serves.
"""

from collections import Counter
from pathlib import Path

from rich.console import RenderableType

from precimap.exporting.exported import Difference, Exported, Served
from precimap.report.terminal import lines_of

_WIDE = ("float64", "float32", "bfloat16", "float16")


def exported_page(found: Exported, output: Path) -> RenderableType:
    """found: the record; output: where it was written."""
    runs = Counter(found.layers.values())
    low_first = sorted(runs, key=lambda what: (what in _WIDE, -runs[what]))
    lines = [f"exported for {found.to} to {output}: {', '.join(found.files)}"]
    lines += [f"{runs[what]} of {len(found.layers)} layers: {what}" for what in low_first]
    lines += [f"input {said}" for said in found.inputs]
    if found.difference is not None and not found.served:
        lines.append(f"scores {_said(found.difference)}")
    lines += [line for engine in found.served for line in _of_engine(engine)]
    lines += found.notes
    if found.not_certified is not None:
        lines.append(f"NOT CERTIFIED: {found.not_certified}")
    return lines_of(lines)


def _of_engine(engine: Served) -> list[str]:
    """What one engine runs, and how near it is; what it must not serve stands among the notes."""
    if engine.refused is not None or engine.difference is None:
        return []
    runs = Counter(engine.layers.values())
    low = ", ".join(f"{count} in {what}" for what, count in runs.most_common())
    what = f"products of layers: {low}" if low else "no product in low precision"
    return [f"{engine.engine} {engine.version}: {what}; scores {_said(engine.difference)}"]


def _said(off: Difference) -> str:
    return (
        f"beside the certified form ({off.against}): rms difference {off.rms:.2g}, largest {off.largest:.2g}, of scores "
        f"up to {off.largest_output:.3g} (n = {off.units}); the map itself changes them by {off.quantising:.2g}"
    )
