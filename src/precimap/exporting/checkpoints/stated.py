"""The `quantization_config` of a map: which module has which scheme, as engines read it.

Invariant: only fields that compressed-tensors 0.17 knows, which vLLM 0.32 and 0.33 pin (its arguments forbid others, and
SGLang pins 0.18); each group says its own format, every Linear that is not quantised stands in `ignore`, and no target is
the bare name of a class, which engines also look for inside other names. Module names are those of the checkpoint. Encoders
like BERT have other names in vLLM (it puts the projections of `attention.self` under `attention.output`, and the whole
under `model.`): there each name is a regular expression, anchored at both ends, that takes both.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from precimap.exporting.linting.config_rules import ENCODER
from precimap.numerics.schemes import SCHEMES, Scheme

# Our scheme -> format, and the arguments of weight and input.
_CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True, "dynamic": False}
_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_GROUPS: Mapping[Scheme, tuple[str, str]] = {
    SCHEMES["int8"]: ("int-quantized", "int"),
    SCHEMES["fp8"]: ("float-quantized", "float"),
}
STATED = frozenset(_GROUPS)  # the schemes that have a group


def quantization_config(low: Mapping[str, Scheme], ignored: Iterable[str]) -> dict[str, Any]:
    """low: module -> one of `STATED`; ignored: every other Linear, by module."""
    ignored = tuple(ignored)
    patterns = any(ENCODER.search(name) for name in (*low, *ignored))
    groups = {}
    for scheme, (layout, kind) in _GROUPS.items():
        modules = sorted(name for name, its in low.items() if its == scheme)
        if modules:
            groups[scheme.name] = {
                "targets": [_pattern(name) if patterns else name for name in modules],
                "format": layout,
                "weights": {"type": kind, **_CHANNEL},
                "input_activations": {"type": kind, **_TOKEN},
            }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [_pattern(name) if patterns else name for name in sorted(ignored)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _pattern(name: str) -> str:
    """A module under any prefix, and under the name that vLLM gives to the projections of an encoder's attention."""
    escaped = re.escape(name).replace(r"attention\.self\.", r"attention\.(self|output)\.")
    return rf"re:^(.*\.)?{escaped}$"
