"""Families of language models, tiny and random: every place that an export takes is one that vLLM multiplies so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import precimap as pm
from helpers.engines import asked, needs_engines
from helpers.small_maps import map_of
from helpers.tiny_llama import SIZES, llama_task
from precimap.errors import DeployError

pytestmark = [needs_engines, pytest.mark.filterwarnings("ignore")]  # transformers warns about parts of its own
NEAR = 0.003
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
SMALL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "head_dim": 64, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gemma3_text": {"query_pre_attn_scalar": 64},
    "phi3": {},
    "olmo2": {},
    "qwen2_moe": MOE,
}
REFUSED = "shared_expert_gate.weight"  # what vLLM builds without a quantisation


def saved(family: str, folder: Path) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **SMALL, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_that_is_taken_is_multiplied_so(family: str, tmp_path: Path) -> None:
    task = llama_task(saved(family, tmp_path / "base"), batches=3)
    linears = {f"{name}.weight" for name, one in task.model.named_modules() if isinstance(one, torch.nn.Linear)}
    layers = map_of(task, {}, "emulated").layers
    taken = {name: "int8" for name in layers if name in linears and "embed_tokens" not in name}
    refused = [name for name in taken if name.endswith(REFUSED)]
    if refused:
        with pytest.raises(DeployError, match=f"{refused[0]}.*not known to build it with a quantisation"):
            pm.export(task, map_of(task, taken, "emulated"), to="vllm", output=tmp_path / "out", uncertified=True)
        taken = {name: scheme for name, scheme in taken.items() if name not in refused}
    pm.export(task, map_of(task, taken, "emulated"), to="vllm", output=tmp_path / "out", uncertified=True)
    generator = torch.Generator().manual_seed(1)
    inputs = {str(width): torch.randn(32, width, generator=generator).bfloat16() for width in (64, 128, 256, 512)}
    found = asked("vllm_layers.py", tmp_path / "out", inputs, tmp_path / "asked")
    assert not found.error
    stored = load_file(tmp_path / "out" / "model.safetensors")
    seen = set()
    for module, kernel in found.kernels.items():
        prefix, dot, last = module.rpartition(".")
        parts = (
            [module] if f"{module}.weight" in stored else [f"{prefix}{dot}{one}" for one in PARTS.get(last, (last,))]
        )
        low = [part for part in parts if f"{part}.weight" in taken]
        assert ("Int8" in kernel) == bool(low), (module, kernel)
        if low:
            assert low == parts
            x = inputs[str(stored[f"{parts[0]}.weight"].shape[1])].double()
            scale = x.abs().amax(1, keepdim=True) / 127
            rounded = (x / scale).round() * scale
            each = [stored[f"{part}.weight"].double() * stored[f"{part}.weight_scale"].double() for part in parts]
            assert off(found.outputs[module], rounded @ torch.cat(each).T) < NEAR, module
            seen |= {*parts}
    assert seen == {name.removesuffix(".weight") for name in taken}
