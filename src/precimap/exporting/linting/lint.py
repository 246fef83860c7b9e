"""lint(): what an engine would do with a compressed-tensors checkpoint, told from its files alone.

Invariant: nothing of the model runs, and no value but scales is read, so that any size of checkpoint takes seconds. Every
export is linted before it gets its name. An empty answer says that no rule here found anything, and not that an engine
runs the checkpoint well: that is seen on the engine.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from precimap.errors import InputError
from precimap.exporting.hf_folder import open_folder
from precimap.exporting.linting import config_rules, engine_rules, fused_rules, tensor_rules
from precimap.exporting.linting.checked import Checked, checked_of
from precimap.exporting.linting.engine_rules import ENGINES
from precimap.exporting.linting.findings import Finding, Linted

_FIRST = {"misread": 0, "refused": 1, "note": 2}


def lint(checkpoint: str | Path, *, engine: str) -> Linted:
    """Look at a folder with a compressed-tensors checkpoint as `vllm`, `vllm-cpu`, `sglang` or `transformers` reads it.

    Raises InputError for another engine, ModelError for a folder that cannot be read or is in another format.
    """
    if engine not in ENGINES:
        raise InputError(f"expected an engine out of {', '.join(ENGINES)}, got {engine!r}")
    checked = checked_of(open_folder(checkpoint))
    found = sorted(_findings(checked, engine), key=lambda one: _FIRST[one.effect])
    kinds = Counter(checked.kind(name) for name in checked.linears)
    return Linted(engine=engine, layers=dict(kinds.most_common()), findings=tuple(found))


def _findings(checked: Checked, engine: str) -> Iterator[Finding]:
    yield from config_rules.fields(checked, engine)
    for rule in (config_rules.formats, config_rules.targets):
        yield from rule(checked)
    for rule in (tensor_rules.tensors, tensor_rules.elsewhere, tensor_rules.scales):
        yield from rule(checked)
    if engine != "transformers":  # which fuses nothing
        for rule in (fused_rules.schemes, fused_rules.global_scales, fused_rules.blocks):
            yield from rule(checked)
    if engine in ("vllm", "vllm-cpu"):
        yield from config_rules.encoders(checked)
    for by_engine in (engine_rules.kernels, engine_rules.places, engine_rules.lists, engine_rules.dtype):
        yield from by_engine(checked, engine)
