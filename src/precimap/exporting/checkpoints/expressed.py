"""Which layers of a map a compressed-tensors checkpoint holds, and the engine runs as the map says.

Invariant: all that is not known to be read and computed as certified is refused before anything is written, every layer
with its reason, and the nearest target that can. Where an engine builds a module without its quantisation, codes would be
loaded as weights; so for vLLM and SGLang the places of a model that are taken are a list, and what is not on it is
refused. Not taken: a list of the places that they cannot, which a new model file would make wrong.
"""

import re
from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from precimap.errors import DeployError
from precimap.exporting.checkpoints.same_model import Piece, SameModel
from precimap.exporting.checkpoints.stated import STATED
from precimap.exporting.shipped import Shipped
from precimap.layers.groups import fused_by_engines
from precimap.layers.views import plain_name, tied_names
from precimap.numerics.schemes import SCHEMES, Scheme

# Modules that the model files of vLLM and SGLang build with the checkpoint's quantisation.
_PLACES = re.compile(
    r"(^|\.)("
    r"(self_attn|attn|attention|linear_attn)\.(q|k|v|o|qkv|out|g)_proj|"
    r"self_attn\.(q_a_proj|kv_a_proj_with_mqa|q_b_proj|dense)|linear_attn\.in_proj_(qkv|z)|"
    r"attention\.self\.(query|key|value)|attention\.output\.dense|intermediate\.dense|layer\.\d+\.output\.dense|"
    r"lm_head|(mlp|feed_forward|shared_experts?)\.(gate_proj|up_proj|gate_up_proj|down_proj|w1|w2|w3|fc1|fc2)"
    r")$"
)
_BASES = {"vllm": ("bfloat16",), "sglang": ("bfloat16",), "transformers": ("bfloat16", "float32")}
_BY_SCHEME = {
    "int8-static": "engines take a static INT8 input without its zero, vLLM on a CPU without its scale; --to aoti runs it",
    "int8-static-u7": "the format has no 7-bit input; --to aoti runs it",
    "int8-row": "rows of a table have no place in the format; --to aoti runs them",
    "int8-row-half": "rows of a table have no place in the format; --to aoti runs them",
    "int4-row": "rows of a table have no place in the format; --to aoti runs them",
    "fp8-tensor": "vLLM's CPU has no kernel for it, and on a GPU it quantises fused projections again; search with fp8",
    "fp8-static": "vLLM's CPU has no kernel for it, and on a GPU it quantises fused projections again; search with fp8",
    "fp16": "the checkpoint is in BF16 where it is not quantised; search with bf16",
}


def expressed(shipped: Shipped, same: SameModel, engine: str) -> dict[str, Scheme]:
    """Stored module -> scheme, of the layers in low precision. Raises DeployError for all that cannot be expressed."""
    base = shipped.base
    if shipped.map.realignment is not None:
        raise DeployError(
            f"the map realigns its last logit at {shipped.map.realignment.layer}, which a checkpoint of {engine} does "
            "not say; search without realignment, or --to aoti"
        )
    if base not in _BASES[engine]:
        raise DeployError(
            f"the map is certified with {base} around its low layers, and {engine} runs them in "
            f"{' or '.join(_BASES[engine])}, which nobody certified; search the model in bfloat16 (load it so, or let the "
            "search cast it, scheme bf16)"
            + (
                ""
                if engine == "transformers" or base != "float32"
                else "; --to transformers and --to aoti keep float32"
            )
        )
    low, refused = dict[str, Scheme](), dict[str, str]()
    linears = {plain_name(name): module for name, module in shipped.task.model.named_modules()}
    tied = tied_names(shipped.task.model)
    for name, layer in shipped.layers.items():
        if layer.scheme == SCHEMES["bf16"] and base == "bfloat16":
            continue  # what is not quantised is in BF16
        module = name.removesuffix(".weight")
        stored = same.stored_name(name)
        reason = _why_not_stated(shipped, name) or _why_not_linear(linears.get(module), tied.get(name, ()), layer.keeps)
        if reason is None and (stored is None or same.pieces.get(stored) != Piece(name)):
            reason = "the folder does not hold it under a name of its own"
        if reason is None and stored is not None:
            place = stored.removesuffix(".weight")
            if engine != "transformers" and not _PLACES.search(place):
                reason = f"{engine} is not known to build it with a quantisation; pin it, or --to transformers"
            low[place] = layer.scheme
        if reason is not None:
            refused[name] = reason
    if engine != "transformers":
        refused |= _unlike_their_parts(low, same, [name for name, one in linears.items() if isinstance(one, nn.Linear)])
    _refuse(engine, refused)
    if not low:
        raise DeployError(
            f"no layer of the map is in a scheme that {engine} reads from a checkpoint; there is nothing to export but "
            "a cast, which the engine's own dtype option does"
        )
    return low


def _unlike_their_parts(low: Mapping[str, Scheme], same: SameModel, linears: list[str]) -> dict[str, str]:
    """Layers that an engine runs as one product with layers of another scheme."""
    stored = [name for one in linears if (name := same.stored_name(one)) is not None]
    together: dict[str, list[str]] = defaultdict(list)
    for name, group in fused_by_engines(stored).items():
        together[group].append(name)
    refused = dict[str, str]()
    for parts in together.values():
        if len({low.get(name) for name in parts}) > 1:
            said = ", ".join(f"{name.rpartition('.')[2]} {low[name].name if name in low else 'base'}" for name in parts)
            reason = f"engines run these as one product, which has one scheme ({said}); a search keeps them together"
            refused |= dict.fromkeys(parts, reason)
    return refused


def _why_not_stated(shipped: Shipped, name: str) -> str | None:
    scheme, decision = shipped.layers[name].scheme, shipped.map.layers[name]
    if scheme not in STATED:
        return f"{scheme.name}: {_BY_SCHEME.get(scheme.name, 'the format has no form of it; search with int8 or fp8')}"
    if decision.ops != ("linear",) or decision.contracted != (1,):
        return f"read by {', '.join(decision.ops)} over dims {decision.contracted}; engines quantise the weight of a Linear"
    return None


def _why_not_linear(module: nn.Module | None, tied: tuple[str, ...], keeps: bool) -> str | None:
    if type(module) is not nn.Linear:
        return f"the weight of {type(module).__name__ if module else 'no module'}; engines quantise those of torch.nn.Linear"
    if tied or keeps:
        return (
            f"also read as {', '.join(tied) or 'a parameter'}, for which the engine would lack its own values; pin it"
        )
    return None


def _refuse(engine: str, refused: Mapping[str, str]) -> None:
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    if by_reason:
        said = "; ".join(
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}: {reason}"
            for reason, names in by_reason.items()
        )
        raise DeployError(f"a checkpoint for {engine} cannot express this map: {said}")
