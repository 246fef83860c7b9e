"""Which layers an engine runs as one, and so must share a scheme.

Serving engines fuse some projections into one matrix by their names (vLLM and SGLang `packed_modules_mapping` and what
their loaders stack, the grouping rules of NVIDIA Model-Optimizer); a map that gives the parts different schemes is refused
by them or, worse, loaded wrongly. That is a rule about names and is kept apart from *siblings* (layers that read one input:
sharing its quantised form only saves time), which discovery sees in the running model.

The rules are those that the model files of vLLM 0.32 write down for products (Kimi's and DeepSeek-V4's under the names of
transformers, too). Invariant: one too many costs a search some
freedom, one too few costs a wrong model; so rules that meet in one layer are taken together.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator

# Parts of one module: those of a rule that are there are fused, though not all may be there (keys that are values, too).
_FUSED_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("query_net", "key_net", "value_net"),
    ("key_proj", "value_proj"),
    ("wq_du", "wk_dv", "wv_dv", "wr_du"),
    ("gate_proj", "up_proj"),
    ("gate_proj", "dense_h_to_4h"),
    ("w1", "w3"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_a", "in_proj_b"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq_a", "wkv_a_with_mqa"),
    ("q_a_proj", "kv_proj"),
    ("kv_proj", "gate_proj"),
    ("wq_a", "wkv"),
    ("wkv", "wgate"),
    ("wk", "weights_proj"),
    ("input_mix_weight_down", "block_inject_weight"),
)
_QKV = ("q_proj", "k_proj", "v_proj")
# Those that need all of the first to be there, and then take the second along.
_FUSED_WITH = (
    (_QKV, ("b_proj",)),
    (_QKV, ("index_q_proj", "index_k_proj", "index_qk_proj")),
    ((*_QKV, "f_a_proj"), ("f_a_proj", "g_a_proj", "g_proj")),
    (("q_a_proj", "kv_a_proj_with_mqa"), ("g_proj",)),
)
_GATED_STATES = (
    (*_QKV, "g_proj"),
    "linear_attn",
)  # parts, and the module that they are fused in; elsewhere they are not
# All routed experts of one layer, with everything inside them: engines look at the first expert only.
_ROUTED_EXPERT = re.compile(r"^(?P<experts>.*\.experts)\.(\d+\.)?(gate_proj|up_proj|gate_up_proj|down_proj|w[123])$")
_NESTED = ".forget_gate"  # of `f_a_proj`, which engines fuse with projections of the module around it


def fused_by_engines(names: Iterable[str]) -> dict[str, str]:
    """Layer name -> name of the group that engines fuse it into; a layer alone in its group is left out."""
    group_of, parts = dict[str, str](), defaultdict[str, dict[str, list[str]]](lambda: defaultdict(list))
    for name in names:
        module = name.removesuffix(".weight")
        expert = _ROUTED_EXPERT.match(module)
        if expert:
            group_of[name] = expert["experts"]
            continue
        prefix, _, last = module.rpartition(".")
        parts[prefix.removesuffix(_NESTED)][last].append(name)
    for prefix, there in parts.items():
        for group in _groups(prefix, there):
            for last in group:
                group_of |= dict.fromkeys(there[last], f"{prefix}.{'|'.join(group)}".lstrip("."))
    sizes = Counter(group_of.values())
    return {name: group for name, group in group_of.items() if sizes[group] > 1}


def _groups(prefix: str, there: Collection[str]) -> list[tuple[str, ...]]:
    """The parts of one module that are fused, groups that meet in a part taken together."""
    groups: list[tuple[str, ...]] = []
    for found in _rules(prefix, there):
        meet = [group for group in groups if not {*group}.isdisjoint(found)]
        groups = [group for group in groups if group not in meet]
        groups.append(tuple(dict.fromkeys(part for group in (*meet, found) for part in group)))
    return groups


def _rules(prefix: str, there: Collection[str]) -> Iterator[tuple[str, ...]]:
    for rule in _FUSED_PROJECTIONS:
        yield tuple(part for part in rule if part in there)
    for needed, along in _FUSED_WITH:
        if {*needed} <= {*there}:
            yield (*needed, *(part for part in along if part in there and part not in needed))
    gated, module = _GATED_STATES
    if prefix.rpartition(".")[2] == module and {*gated} <= {*there}:
        yield gated
