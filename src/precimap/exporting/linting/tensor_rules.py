"""Tensors that are missing, have another shape or dtype than the config says, or stand where the config says nothing.

Invariant: every Linear is looked at from both sides, what the config says of it and what the files hold of it. Scales are
read, for they are few: one that is not positive and finite makes a row of zeros or NaN.
"""

from collections.abc import Iterator

import torch

from precimap.exporting.linting.checked import NOT_QUANTISED, Checked, ignored, is_head
from precimap.exporting.linting.findings import Finding, by_layer
from precimap.exporting.linting.kinds import FLOATS, PACKED, needs

_SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "weight_global_scale", "input_global_scale")
_CHANGED = ("F32", "BF16", "F16", "F8_E4M3")  # what a scale's values can be read from


def tensors(checked: Checked) -> Iterator[Finding]:
    """What the config says of a module, and the files do not hold."""
    missing, wrong = dict[str, str](), dict[str, str]()
    for module, group in checked.group_of.items():
        if group is None:
            continue
        if not checked.holds_codes(module):
            missing[module] = "the weight is not quantised"
            continue
        if group.kind in PACKED and f"{module}.weight_packed" not in checked.folder.tensors:
            missing[module] = "weight_packed"
            continue
        for suffix, need in needs(group.kind, group.weights, checked.shape(module)).items():
            stored = checked.folder.tensors.get(f"{module}.{suffix}")
            if stored is None:
                missing[module] = f"{suffix} is missing"
            elif stored.dtype not in need.dtypes or stored.shape not in need.shapes:
                wrong[module] = (
                    f"{suffix} is {stored.dtype} {list(stored.shape)}, expected {' or '.join(need.dtypes)} "
                    f"{list(need.shapes[0])}"
                )
    for found, rule in ((missing, "missing-tensor"), (wrong, "wrong-tensor")):
        for reason in dict.fromkeys(found.values()):
            layers = [module for module, said in found.items() if said == reason]
            does = f"the config says {checked.kind(layers[0])} and {reason}; engines run what memory held, or stop"
            yield from by_layer(rule, "misread", (does, "write the tensors that the group stands for"), layers)


def elsewhere(checked: Checked) -> Iterator[Finding]:
    """Quantised tensors of a module that the config does not quantise."""
    found = [
        module for module in checked.linears if checked.kind(module) == NOT_QUANTISED and checked.holds_codes(module)
    ]
    does = "the files hold codes, and no group has it: engines load the codes as the weight, or stop"
    yield from by_layer("codes-unlisted", "misread", (does, "add it to a group's targets, or store its weight"), found)


def unlisted(checked: Checked) -> list[str]:
    """Linears that are neither a target nor in `ignore`; of a head of tokens no engine asks for that."""
    return [
        module
        for module in checked.linears
        if checked.group_of[module] is None
        and not (ignored(checked, module) or checked.holds_codes(module) or is_head(module))
    ]


def scales(checked: Checked) -> Iterator[Finding]:
    """Scales that are not finite and positive."""
    by_file: dict[str, list[str]] = {}
    for name, stored in checked.folder.tensors.items():
        if name.rpartition(".")[2] in _SCALES and stored.dtype in _CHANGED:
            by_file.setdefault(stored.file, []).append(name)
    bad = []
    for file, names in by_file.items():
        with checked.folder.opened(file) as read:
            for name in names:
                values = read.get_tensor(name).float()
                signed = checked.folder.tensors[name].dtype in FLOATS
                if not torch.isfinite(values).all() or (signed and bool((values <= 0).any())):
                    bad.append(name.rpartition(".")[0])
    does = "a scale is zero, negative or not finite; engines multiply by it"
    yield from by_layer("scale", "misread", (does, "quantise the layer again"), bad)
