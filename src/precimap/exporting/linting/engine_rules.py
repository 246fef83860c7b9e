"""What one engine has no kernel for, ignores, or builds without the checkpoint's quantisation.

Invariant: a table by engine and kind, each row seen on the engine or read in its source (vLLM 0.32 on a CPU was run; vLLM
0.33 and SGLang 0.5.23 on a GPU were read). What depends on the hardware is a note for `vllm`, and a finding for `vllm-cpu`.
"""

import re
from collections.abc import Iterator

from precimap.exporting.linting.checked import Checked, in_order
from precimap.exporting.linting.findings import Effect, Finding, by_layer
from precimap.exporting.linting.tensor_rules import unlisted

ENGINES = ("vllm", "vllm-cpu", "sglang", "transformers")
Row = tuple[Effect, str, str]
_ZERO: Row = ("refused", "no scheme of vLLM has 8-bit weights with zero points", "quantise the weight symmetrically")
_ON_A_CPU: dict[str, Row] = {
    "int8-static": (
        "misread",
        "the CPU kernel ignores input_scale and quantises each token by itself",
        "use dynamic token",
    ),
    "fp8-tensor": ("refused", "there is no CPU kernel for FP8 per tensor", "use FP8 by channel and token, or a GPU"),
    "fp8-static": ("refused", "there is no CPU kernel for FP8 per tensor", "use FP8 by channel and token, or a GPU"),
    "fp8-weight": ("refused", "there is no CPU kernel for FP8 weights alone", "use FP8 by channel and token, or a GPU"),
    "fp8-block": ("misread", "the CPU kernel leaves the input in BF16", "use FP8 by channel and token, or a GPU"),
    "mxfp8": ("refused", "there is no CPU kernel for MXFP8", "serve it on a GPU"),
    "mxfp4": ("refused", "there is no CPU kernel for MXFP4", "serve it on a GPU"),
    "nvfp4": ("refused", "there is no CPU kernel for NVFP4", "serve it on a GPU"),
}
_EVERYWHERE: dict[str, Row] = {
    "unknown": ("refused", "no scheme of vLLM has these arguments", "use one of int8, fp8, fp8-block, mxfp8, nvfp4"),
    "int8-zero": _ZERO,
    "int8-static-zero": _ZERO,
    "int8-tensor": ("refused", "no scheme of vLLM has an INT8 input of one dynamic scale", "use dynamic token"),
}
_SGLANG: dict[str, Row] = {
    **{kind: (effect, said.replace("vLLM", "SGLang"), to_do) for kind, (effect, said, to_do) in _EVERYWHERE.items()},
    "mxfp8": ("refused", "SGLang 0.5.23 has no MXFP8 for a Linear (NotImplementedError)", "use fp8, or vLLM"),
    "mxfp4": ("refused", "SGLang 0.5.23 has no MXFP4 for a Linear (NotImplementedError)", "use nvfp4, or vLLM"),
}
_ON_A_GPU: dict[str, Row] = {
    "fp8": ("note", "a GPU older than compute capability 8.9 runs FP8 as weights alone", "serve it on a newer one"),
}
_TRANSFORMERS: dict[str, Row] = {
    "int8": (
        "note",
        "compressed-tensors scales INT8 inputs by amax / 127.5 where kernels have amax / 127, and takes one scale for all "
        "tokens of an input with two dims",
        "judge it by what the serving engine computes",
    ),
    "fp8": (
        "note",
        "compressed-tensors takes one scale for all tokens of an input with two dims",
        "see that its inputs have three",
    ),
}
_REQUANTISED = ("fp8-tensor", "fp8-static")
# Modules that vLLM and SGLang build without the checkpoint's quantisation.
_WITHOUT = re.compile(
    r"(^|\.)(mlp\.gate|block_sparse_moe\.gate|router|pooler\.dense|score|classifier(\.\w+)?|visual\.\w+)$"
)


def kernels(checked: Checked, engine: str) -> Iterator[Finding]:
    """Kinds that the engine does not run as the checkpoint says."""
    for kind in dict.fromkeys(checked.kind(name) for name in checked.linears):
        layers = in_order([name for name in checked.linears if checked.kind(name) == kind], checked)
        for effect, does, to_do in _rows(kind, engine):
            yield from by_layer("kernel", effect, (does, to_do), layers)


def _rows(kind: str, engine: str) -> Iterator[Row]:
    if engine == "transformers":
        if kind in _TRANSFORMERS:
            yield _TRANSFORMERS[kind]
        return
    if engine == "sglang":
        yield from (table[kind] for table in (_SGLANG, _ON_A_GPU) if kind in table)
        return
    if kind in _EVERYWHERE:
        yield _EVERYWHERE[kind]
    elif engine == "vllm-cpu" and kind in _ON_A_CPU:
        yield _ON_A_CPU[kind]
    elif engine == "vllm":
        if kind in _ON_A_CPU:
            _, does, to_do = _ON_A_CPU[kind]
            yield "note", f"on a CPU, {does}", to_do
        if kind in _ON_A_GPU:
            yield _ON_A_GPU[kind]
        if kind in _REQUANTISED:
            does = "fused parts with scales of their own are quantised once more, by the largest of these"
            yield "note", does, "measure them so, or quantise them by channel"


def places(checked: Checked, engine: str) -> Iterator[Finding]:
    """Modules that have a group and that the engine builds without a quantisation."""
    if engine == "transformers":
        return
    found = [name for name in checked.linears if checked.group_of[name] is not None and _WITHOUT.search(name)]
    does = "the engine builds it without the checkpoint's quantisation, and loads the codes as its weight or stops"
    yield from by_layer("place", "misread", (does, "keep it unquantised, and name it in ignore"), found)


def lists(checked: Checked, engine: str) -> Iterator[Finding]:
    """Linears that are neither a target nor in `ignore`."""
    does, to_do = "it is neither a target nor in ignore", "name it in ignore"
    if engine == "sglang":
        yield from by_layer(
            "unlisted", "refused", (f"{does}, for which SGLang raises an error", to_do), unlisted(checked)
        )
    elif engine != "transformers":
        said = f"{does}: vLLM runs it unquantised, and refuses nothing where a part of a fused product is left out so"
        yield from by_layer("unlisted", "note", (said, to_do), unlisted(checked))
    bare = [group.name for group in checked.groups if any(_class(one, checked) for one in group.targets)]
    if engine == "sglang" and len(checked.groups) > 1 and bare:
        yield Finding(
            rule="class-target",
            effect="misread",
            layers=(),
            engine_does=f"group {bare[0]} targets a class, which SGLang looks for before the names of fused parts",
            to_do="name the modules in the targets",
        )


def _class(target: str, checked: Checked) -> bool:
    """Whether it is the name of a class: neither a pattern nor a module."""
    return not (target.startswith("re:") or "." in target or target in checked.linears)


def dtype(checked: Checked, engine: str) -> Iterator[Finding]:
    """What is not quantised, in a dtype that the engine changes."""
    config = checked.folder.config
    text = config.get("text_config")
    given = config.get("dtype", config.get("torch_dtype"))
    if given is None and isinstance(text, dict):
        given = text.get("dtype", text.get("torch_dtype"))
    if engine == "transformers" or given not in ("float32", None):
        return
    yield Finding(
        rule="dtype",
        effect="note" if given is None else "misread",
        layers=(),
        engine_does=f"the config's dtype is {given}, and the engine runs the rest in 16 bits of its own choice",
        to_do="certify the model in bfloat16 and write that dtype, or give it on the engine's command line",
    )
