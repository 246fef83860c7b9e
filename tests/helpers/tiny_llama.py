"""A tiny random Llama as a Hugging Face folder, and a task of it: which of two tokens comes next."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import precimap as pm

WIDTH, VOCABULARY = 256, 500  # engines widen the latter to a multiple of 64
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 256,
}


def save_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, shard: str = "1MB", **changes: Any) -> Path:
    """In several files, unless `shard` is large; with a file that is no weight, and one that is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "README.md").write_text("mine\n")
    (folder / "pytorch_model.bin").write_bytes(b"the original")
    return folder


def load_llama(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"]).logits[:, -1]
    return logits[:, 3] - logits[:, 5]


def llama_task(model: nn.Module, batches: int = 6, size: int = 16) -> pm.Task:
    generator = torch.Generator().manual_seed(5)
    loader = [
        {
            "input_ids": torch.randint(VOCABULARY, (size, 12), generator=generator),
            "labels": torch.randint(2, (size,), generator=generator).float(),
        }
        for _ in range(batches)
    ]
    return pm.Task.from_loader(model, loader, metric="log-loss", forward=forward, name="next of two")


def mixed_choice() -> dict[str, str]:
    """INT8, FP8 and BF16 side by side: each kind on fused and on plain products."""
    first, second = "model.layers.0", "model.layers.1"
    qkv = ("q_proj", "k_proj", "v_proj")
    choice = {f"{first}.self_attn.{one}.weight": "int8" for one in qkv}
    choice |= {f"{first}.mlp.{one}.weight": "fp8" for one in ("gate_proj", "up_proj")}
    choice |= {f"{first}.mlp.down_proj.weight": "int8", f"{first}.self_attn.o_proj.weight": "fp8"}
    choice |= {f"{second}.self_attn.{one}.weight": "fp8" for one in qkv}
    choice |= {"lm_head.weight": "int8"}
    choice |= {f"{second}.mlp.{one}.weight": "int8" for one in ("gate_proj", "up_proj")}
    return choice
