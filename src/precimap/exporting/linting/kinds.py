"""What a group's arguments stand for, and the tensors that a module of it has.

Invariant: a kind is told by the arguments alone, as engines tell it, and never by the group's name. What no kind stands
for is `unknown`, and is reported, not guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOATS = ("F32", "BF16", "F16")
Args = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Need:
    """One tensor of a quantised module: dtypes, and the shapes that it may have, of N outputs and K inputs."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]


def kind_of(weights: Args | None, inputs: Args | None) -> str:
    """`int8`, `int8-static`, `int8-weight`, `fp8`, `fp8-tensor`, `fp8-static`, `fp8-weight`, `fp8-block`, `mxfp8`, `mxfp4`,
    `nvfp4`, `int4` (any packed weight), with `-zero` where a weight has zero points; or `unknown`."""
    if not isinstance(weights, Mapping):
        return "unknown"
    bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int")).lower()
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if kind == "float":
        return _float_kind((bits, strategy, size, weights.get("scale_dtype")), inputs)
    if kind != "int":
        return "unknown"
    zero = "" if weights.get("symmetric", True) else "-zero"
    if bits != 8 or strategy not in ("channel", "tensor"):
        return f"int{bits}{zero}" if bits in (2, 3, 4, 8) and inputs is None else "unknown"
    return f"int8{_input_kind(inputs)}{zero}" if _input_kind(inputs) is not None else "unknown"


def _float_kind(weight: tuple[Any, Any, Any, Any], inputs: Args | None) -> str:
    bits, strategy, size, scales = weight
    if bits == 4:
        return {("tensor_group", 16): "nvfp4", ("group", 32): "mxfp4"}.get((strategy, size), "unknown")
    if bits != 8:
        return "unknown"
    if strategy == "group":
        return "mxfp8" if size == 32 and str(scales).endswith("uint8") else "unknown"
    if strategy == "block":
        return "fp8-block"
    given = _input_kind(inputs)
    if given is None or strategy not in ("channel", "tensor"):
        return "unknown"
    if given == "" and strategy == "tensor":
        return "fp8-tensor"
    return f"fp8{given}"


def _input_kind(inputs: Args | None) -> str | None:
    """Nothing for a dynamic token; None for what is none of these."""
    if inputs is None:
        return "-weight"
    strategy, dynamic = inputs.get("strategy"), inputs.get("dynamic", False)
    if strategy == "token" and dynamic is True:
        return ""
    if strategy == "tensor":
        return "-tensor" if dynamic is True else "-static"
    return None


FORMATS = {  # of a kind; one with zero points has that of the kind without
    "int8": ("int-quantized", "naive-quantized"),
    "int8-static": ("int-quantized", "naive-quantized"),
    "int8-tensor": ("int-quantized", "naive-quantized"),
    "fp8": ("float-quantized", "naive-quantized"),
    "fp8-tensor": ("float-quantized", "naive-quantized"),
    "fp8-static": ("float-quantized", "naive-quantized"),
    "fp8-block": ("float-quantized", "naive-quantized"),
    "fp8-weight": ("float-quantized", "naive-quantized"),
    "mxfp8": ("mxfp8-quantized",),
    "mxfp4": ("mxfp4-pack-quantized",),
    "nvfp4": ("nvfp4-pack-quantized",),
}
PACKED = ("nvfp4", "mxfp4")


def needs(kind: str, weights: Args, shape: tuple[int, ...]) -> dict[str, Need]:
    """Suffix -> tensor, of a module whose weight is [N, K] = `shape`; empty for kinds whose layout is not looked at."""
    (rows, columns), one = shape, ((1,), ())
    channel = ((rows, 1), (rows,)) if weights.get("strategy") == "channel" else one
    if kind.removesuffix("-zero").startswith("int8"):
        found = {"weight": Need(("I8",), (shape,)), "weight_scale": Need(FLOATS, channel)}
        if kind.endswith("-zero"):
            found["weight_zero_point"] = Need(("I8",), channel)
    elif kind == "fp8-block":
        high, wide = weights.get("block_structure") or (128, 128)
        blocks = ((-(-rows // high), -(-columns // wide)),)
        found = {"weight": Need(("F8_E4M3",), (shape,)), "weight_scale": Need(FLOATS, blocks)}
    elif kind.startswith("fp8"):
        found = {"weight": Need(("F8_E4M3",), (shape,)), "weight_scale": Need(FLOATS, channel)}
    elif kind == "mxfp8":
        found = {
            "weight": Need(("F8_E4M3",), (shape,)),
            "weight_scale": Need(("U8", "F8_E8M0"), ((rows, columns // 32),)),
        }
    elif kind == "mxfp4":
        found = {
            "weight_packed": Need(("U8",), ((rows, columns // 2),)),
            "weight_scale": Need(("U8", "F8_E8M0"), ((rows, columns // 32),)),
        }
    elif kind == "nvfp4":
        found = {
            "weight_packed": Need(("U8",), ((rows, columns // 2),)),
            "weight_scale": Need(("F8_E4M3",), ((rows, columns // 16),)),
            "weight_global_scale": Need(("F32",), one),
        }
    else:
        return {}
    if "-static" in kind:
        found["input_scale"] = Need(FLOATS, one)
    return found
