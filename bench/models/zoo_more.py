"""Models of libraries that the tests do not install: timm, PEFT, x-transformers, vit-pytorch, tabular and graph models.

Sizes are those of the library where it has no small ones. What is not installed raises ImportError when it is built.
"""

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from helpers import zoo_transformers
from helpers.specimen import ROWS, Builder, Specimen, call, call_all, seeded

# fmt: off
_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": _SMALL, "deit_tiny_distilled_patch16_224": _SMALL, "beit_base_patch16_224": _SMALL,
    "cait_xxs24_224": _SMALL, "vit_relpos_small_patch16_224": _SMALL,
    "eva02_tiny_patch14_224": {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4,
    },
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "mixer_s32_224": {"img_size": 64}, "resmlp_12_224": {"img_size": 64}, "gmlp_s16_224": {"img_size": 64},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)}, "resnet10t": {}, "mobilenetv3_small_050": {},
    "efficientnet_b0": {}, "regnetx_002": {}, "poolformer_s12": {}, "mobilevit_xxs": {}, "edgenext_xx_small": {},
    "mambaout_femto": {}, "naflexvit_base_patch16_gap": {}, "coatnet_nano_rw_224": {"img_size": 64},
    "maxvit_pico_rw_256": {"img_size": 64}, "nest_tiny": {"img_size": 32}, "pit_ti_224": {"img_size": 64},
    "volo_d1_224": {"img_size": 64}, "focalnet_tiny_srf": {},
    "levit_128s": {"img_size": 64, "embed_dim": (32, 32, 32), "key_dim": 16, "num_heads": (2, 2, 2), "depth": (1, 1, 1)},
}
_PLAIN = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64}
VIT_PYTORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", _PLAIN), "simple_vit": ("SimpleViT", _PLAIN), "deepvit": ("DeepViT", _PLAIN),
    "parallel_vit": ("ViT", _PLAIN), "cait": ("CaiT", _PLAIN | {"cls_depth": 1}),
}
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(
        r=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False,
    ),
    "dora": lambda peft: peft.LoraConfig(r=16, use_dora=True, target_modules=["q_proj"], init_lora_weights=False),
    "tables": lambda peft: peft.LoraConfig(
        r=16, target_modules=["embed_tokens", "o_proj"], init_lora_weights=False, modules_to_save=["lm_head"],
    ),
    "ia3": lambda peft: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False,
    ),
    "prompt": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "vera": lambda peft: peft.VeraConfig(r=16, target_modules=["q_proj", "o_proj"], init_weights=False),
    "oft": lambda peft: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], init_weights=False),
}
GRAPHS = ("GCN", "GAT", "GraphSAGE", "GIN")
# fmt: on


def images(size: int) -> Tensor:
    return torch.randn(ROWS, 3, size, size)


def named(name: str, build: Callable[[], Specimen]) -> Builder:
    build.__name__ = name
    return seeded(build)


def without_operators() -> None:
    """Import torchvision, if it is there, also one that was built for another torch: its own operators are then missing, and
    read by no model here. Before transformers, which looks for it."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    while "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            return
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library.define(f"{missing[1]}(Tensor a) -> Tensor")
            for name in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[name]
    _KEPT.append(library)


_KEPT: list[Any] = []  # an operator goes when its library does


def _timm(name: str, settings: dict[str, Any]) -> Builder:
    def build() -> Specimen:
        timm = importlib.import_module("timm")
        model = timm.create_model(name, num_classes=7, **settings)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():  # some heads begin as zeros
                nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
        return Specimen(name, model, call, images(settings.get("img_size", 32)))

    return named(f"timm {name}", build)


def _vit_pytorch(module: str, kind: str, settings: dict[str, Any]) -> Builder:
    def build() -> Specimen:
        model = getattr(importlib.import_module(f"vit_pytorch.{module}"), kind)(**settings)
        return Specimen(module, model, call, images(32))

    return named(f"vit-pytorch {module}", build)


def _peft(name: str, config: Callable[[Any], Any]) -> Builder:
    def build() -> Specimen:
        peft = importlib.import_module("peft")
        base = zoo_transformers.built("llama", "padded", "LlamaConfig", "LlamaForCausalLM", {})
        return Specimen(name, peft.get_peft_model(base.model, config(peft)), base.forward, base.batch)

    return named(f"peft {name}", build)


def _graph(name: str) -> Builder:
    def build() -> Specimen:
        graphs = importlib.import_module("torch_geometric.nn")
        nodes = torch.arange(ROWS)
        edges = torch.stack([nodes, (nodes * 3 + 1) % ROWS])
        return Specimen(name, getattr(graphs, name)(16, 32, 2, 4), call_all, (torch.randn(ROWS, 16), edges))

    return named(f"torch-geometric {name}", build)


def _x_transformer() -> Specimen:
    library = importlib.import_module("x_transformers")
    layers = library.Decoder(dim=32, depth=2, heads=2, attn_dim_head=16, rotary_pos_emb=True, ff_glu=True)
    model = library.TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers)
    return Specimen("x-transformers decoder", model, call, torch.randint(64, (ROWS, 6)))


def _relative() -> Specimen:
    library = importlib.import_module("x_transformers")
    layers = library.Encoder(dim=32, depth=2, heads=2, attn_dim_head=16, rel_pos_bias=True, use_rmsnorm=True)
    model = library.TransformerWrapper(num_tokens=64, max_seq_len=16, attn_layers=layers)
    return Specimen("x-transformers encoder", model, call, torch.randint(64, (ROWS, 6)))


def _mamba() -> Specimen:
    library = importlib.import_module("mambapy.mamba")
    model = library.Mamba(library.MambaConfig(d_model=32, n_layers=2, d_state=8))
    return Specimen("mambapy", model, call, torch.randn(ROWS, 6, 32))


def _tabnet() -> Specimen:
    library = importlib.import_module("pytorch_tabnet.tab_network")
    model = library.TabNet(16, 4, group_attention_matrix=torch.eye(16))
    return Specimen("tabnet", model, lambda model, batch: model(batch)[0], torch.randn(ROWS, 16))


def _reformer() -> Specimen:
    library = importlib.import_module("reformer_pytorch")
    model = library.ReformerLM(num_tokens=64, dim=32, depth=1, max_seq_len=8, heads=2, bucket_size=2, n_hashes=1,
                               use_full_attn=True)  # fmt: skip
    return Specimen("reformer-pytorch", model, call, torch.randint(64, (ROWS, 8)))


def _feature_tokens() -> Specimen:
    library = importlib.import_module("rtdl_revisiting_models")
    model = library.FTTransformer(
        n_cont_features=4, cat_cardinalities=[5, 6, 7], d_out=2, n_blocks=2, d_block=32, attention_n_heads=2,
        attention_dropout=0.0, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    return Specimen("rtdl", model, call_all, (torch.randn(ROWS, 4), torch.randint(5, (ROWS, 3))))


SINGLE = (_x_transformer, _relative, _mamba, _tabnet, _reformer, _feature_tokens)
BUILDERS: tuple[Builder, ...] = (
    *(_timm(name, settings) for name, settings in TIMM.items()),
    *(_vit_pytorch(module, *what) for module, what in VIT_PYTORCH.items()),
    *(_peft(name, config) for name, config in ADAPTERS.items()),
    *(_graph(name) for name in GRAPHS),
    *(named(build.__name__.strip("_"), build) for build in SINGLE),
)
