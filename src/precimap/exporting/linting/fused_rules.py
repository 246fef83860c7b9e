"""Parts that an engine runs as one product: q, k and v; gate and up; the experts of a layer.

Invariant: the groups are those that a search obeys (`layers/groups.py`). vLLM 0.32 compares the parts only where some are
in `ignore`; where all are targets of different groups it takes the first part's scheme for all of them, and reads the
others' codes by it without a word.
"""

from collections import defaultdict
from collections.abc import Iterator

from precimap.exporting.linting.checked import NOT_QUANTISED, Checked
from precimap.exporting.linting.findings import Finding, by_layer
from precimap.exporting.linting.kinds import PACKED
from precimap.layers.groups import fused_by_engines


def groups(checked: Checked) -> list[list[str]]:
    """The Linears that engines fuse, by product."""
    together: dict[str, list[str]] = defaultdict(list)
    for name, group in fused_by_engines(checked.linears).items():
        together[group].append(name)
    return list(together.values())


def schemes(checked: Checked) -> Iterator[Finding]:
    """Parts in different schemes."""
    for parts in groups(checked):
        kinds = {name: _scheme(checked, name) for name in parts}
        if len({*kinds.values()}) == 1:
            continue
        said = ", ".join(f"{name.rpartition('.')[2]} {kinds[name][0]}" for name in parts[:6])
        low = {kind for kind in kinds.values() if kind[0] != NOT_QUANTISED}
        if len(low) > 1:
            does = f"engines run these as one product with one scheme ({said}) and read the codes of one by that of another"
            yield from by_layer("fused-schemes", "misread", (does, "give all of them one scheme"), parts)
        else:
            does = (
                f"engines run these as one product ({said}) and refuse a part that is not quantised beside one that is"
            )
            yield from by_layer("fused-schemes", "refused", (does, "quantise all of them or none"), parts)


def _scheme(checked: Checked, module: str) -> tuple[str, str]:
    """Its kind, and all its arguments: two groups with the same are one scheme."""
    group = checked.group_of[module]
    if group is None:
        return NOT_QUANTISED, ""
    rows = (
        {k: v for k, v in (row or {}).items() if not k.startswith("observer")} for row in (group.weights, group.inputs)
    )
    return group.kind, str([sorted(row.items(), key=str) for row in rows])


def global_scales(checked: Checked) -> Iterator[Finding]:
    """NVFP4 parts with global scales of their own."""
    for parts in groups(checked):
        for suffix in ("weight_global_scale", "input_global_scale"):
            names = [f"{name}.{suffix}" for name in parts if checked.kind(name) in PACKED]
            values = {
                float(checked.folder.read(name).float().max()) for name in names if name in checked.folder.tensors
            }
            if len(values) > 1:
                does = f"they have {len(values)} different {suffix}, and engines take the largest for all of them"
                yield from by_layer("global-scale", "misread", (does, "quantise them with one global scale"), parts)


def blocks(checked: Checked) -> Iterator[Finding]:
    """FP8 in blocks, where a part ends inside of a block of the product."""
    for parts in groups(checked):
        if ".experts" in parts[0]:
            continue
        cut = [
            name
            for name in parts[:-1]
            if (group := checked.group_of[name]) is not None
            and group.kind == "fp8-block"
            and checked.shape(name)[0] % (group.weights.get("block_structure") or [128])[0]
        ]
        does = "its outputs are no multiple of the block, and the part after it begins inside of one: engines stop"
        yield from by_layer(
            "block-shape", "refused", (does, "keep these parts unquantised, or use fp8 by channel"), cut
        )
