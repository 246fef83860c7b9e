"""A compressed-tensors checkpoint as rules look at it: its groups, and its modules with their tensors.

Invariant: targets are matched as engines match them, in their order: a module that is in `ignore` is not quantised; else
the first target that is its name, or a regular expression that its name begins with, in the order of the groups; else the
first that is the name of a class. Names are the checkpoint's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from precimap.errors import ModelError
from precimap.exporting.hf_folder import HfFolder
from precimap.exporting.linting.kinds import PACKED, Args, kind_of

NOT_QUANTISED = "not quantised"
_TABLE = re.compile(r"(^|\.)(embed\w*|\w*embeddings?|wte|wpe|shared)$|(^|\.)embeddings\.")
_QUANTISED_DTYPES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
_PARTS = ("weight", "weight_packed", "weight_scale", "weight_scale_inv", "weight_shape", "weight_zero_point")


@dataclass(frozen=True, slots=True)
class Group:
    """One of `config_groups`."""

    name: str
    targets: tuple[str, ...]
    row: Mapping[str, Any]

    @property
    def weights(self) -> Args:
        given = self.row.get("weights")
        return given if isinstance(given, dict) else {}

    @property
    def inputs(self) -> Args | None:
        given = self.row.get("input_activations")
        return given if isinstance(given, dict) else None

    @property
    def kind(self) -> str:
        return kind_of(self.weights, self.inputs)


@dataclass(frozen=True)
class Checked:
    """folder: the checkpoint; config: its `quantization_config`; groups, ignore: of it."""

    folder: HfFolder
    config: Mapping[str, Any]
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Modules with a matrix that is no table of embeddings."""
        found = dict[str, None]()
        for name, stored in self.folder.tensors.items():
            module, _, last = name.rpartition(".")
            if last in ("weight", "weight_packed") and len(stored.shape) == 2 and not _TABLE.search(module):
                found[module] = None
        return tuple(found)

    @cached_property
    def group_of(self) -> dict[str, Group | None]:
        """Linear -> the group that an engine takes for it; None: not quantised."""
        return {module: self._group(module) for module in self.linears}

    def _group(self, module: str) -> Group | None:
        if ignored(self, module):
            return None
        named = self.named(module)
        if named:
            return named[0]
        if is_head(module) and not self.holds_codes(module):
            return None  # which engines look for by name alone
        return next((group for group in self.groups if "Linear" in group.targets), None)

    def named(self, module: str) -> list[Group]:
        """The groups whose targets are its name, or match it."""
        return [group for group in self.groups if any(matches(module, target) for target in group.targets)]

    def kind(self, module: str) -> str:
        group = self.group_of[module]
        return NOT_QUANTISED if group is None else group.kind

    def holds_codes(self, module: str) -> bool:
        """Whether its tensors are those of a quantised weight, whatever the config says."""
        tensors = self.folder.tensors
        weight = tensors.get(f"{module}.weight")
        return any(f"{module}.{part}" in tensors for part in _PARTS[1:]) or (
            weight is not None and weight.dtype in _QUANTISED_DTYPES
        )

    def shape(self, module: str) -> tuple[int, ...]:
        """Of its weight, unpacked."""
        weight = self.folder.tensors.get(f"{module}.weight")
        if weight is not None:
            return weight.shape
        rows, columns = self.folder.tensors[f"{module}.weight_packed"].shape
        return (rows, 2 * columns) if self.kind(module) in PACKED else (rows, columns)


def is_head(module: str) -> bool:
    return module.rpartition(".")[2] == "lm_head"


def ignored(checked: Checked, module: str) -> bool:
    return any(matches(module, one) for one in checked.ignore)


def matches(name: str, target: str) -> bool:
    """As engines match: `re:` at the beginning of the name, anything else as the whole name."""
    if not target.startswith("re:"):
        return name == target
    try:
        return re.match(target[3:], name) is not None
    except re.error:
        return False


def checked_of(folder: HfFolder) -> Checked:
    """Raises ModelError for a folder that holds no compressed-tensors checkpoint."""
    config = folder.config.get("quantization_config", folder.config.get("compression_config"))
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(config, dict) or method != "compressed-tensors":
        raise ModelError(
            f"{folder.path}: expected a compressed-tensors checkpoint, got quant_method {method!r}; precimap lint knows no "
            "other format"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(row, dict) for row in groups.values()):
        raise ModelError(f"{folder.path}: expected config_groups, a JSON object of objects, got {str(groups)[:80]}")
    ignore = config.get("ignore") or []
    found = tuple(Group(name, _texts(row.get("targets"), folder), row) for name, row in groups.items())
    return Checked(folder=folder, config=config, groups=found, ignore=_texts(ignore, folder))


def _texts(given: Any, folder: HfFolder) -> tuple[str, ...]:
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ModelError(f"{folder.path}: expected targets and ignore to be lists of names, got {str(given)[:80]}")
    return tuple(given)


def in_order(modules: Iterable[str], checked: Checked) -> list[str]:
    """Those of `modules`, in the checkpoint's order."""
    wanted = {*modules}
    return [module for module in checked.linears if module in wanted]
