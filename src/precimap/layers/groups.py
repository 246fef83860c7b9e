"""Which layers an engine runs as one, and so must share a scheme.

Serving engines fuse some projections into one matrix by their names (vLLM and SGLang `packed_modules_mapping`, the
grouping rules of NVIDIA Model-Optimizer); a map that gives the parts different schemes is refused by them or, worse,
loaded wrongly. That is a rule about names and is kept apart from *siblings* (layers that read one input: sharing its
quantised form only saves time), which discovery sees in the running model.
"""

import re
from collections import Counter
from collections.abc import Iterable

_FUSED_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_a", "in_proj_b"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# All routed experts of one layer, with everything inside them: engines look at the first expert only.
_ROUTED_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(\d+\.)?(gate_proj|up_proj|gate_up_proj|down_proj|w[123])$")


def fused_by_engines(names: Iterable[str]) -> dict[str, str]:
    """Layer name -> name of the group that engines fuse it into; a layer alone in its group is left out."""
    group_of = {name: group for name in names if (group := _group(name)) is not None}
    sizes = Counter(group_of.values())
    return {name: group for name, group in group_of.items() if sizes[group] > 1}


def _group(name: str) -> str | None:
    module = name.removesuffix(".weight")
    expert = _ROUTED_EXPERT.match(module)
    if expert:
        return expert["experts"]
    prefix, _, last = module.rpartition(".")
    for members in _FUSED_PROJECTIONS:
        if last in members:
            return f"{prefix}.{'|'.join(members)}".lstrip(".")
    return None
