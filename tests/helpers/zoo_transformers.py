"""Models of transformers, tiny and with random weights: one line a model, and how its owner calls it.

A size that a configuration does not know is left out of it, so that one set of sizes serves most of them.
"""

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.specimen import ROWS, Builder, Specimen, seeded

VOCABULARY, TOKENS = 64, 6
# fmt: off
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64,
    "n_positions": 64, "initializer_range": 0.2, "init_std": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
SEQUENCES: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGES: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}
# fmt: on


def family(name: str, kind: str, config: str, model: str, *shared: dict[str, Any], **settings: Any) -> Builder:
    """kind: of its batch. config, model: names in transformers. shared, settings: beside `SIZES`, the later ones first."""

    def build() -> Specimen:
        return built(name, kind, config, model, functools.reduce(operator.or_, (*shared, settings)))

    build.__name__ = name
    return seeded(build)


def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (ROWS, TOKENS))


def text() -> dict[str, Any]:
    return {"input_ids": ids()}


def padded() -> dict[str, Any]:
    mask = torch.arange(TOKENS) < torch.tensor([6, 4, 5, 6, 3, 6, 2, 6])[:, None]
    return {"input_ids": ids(), "attention_mask": mask.long()}


def pairs() -> dict[str, Any]:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(ROWS, 3, 16, 16)}


def both() -> dict[str, Any]:
    return {**text(), **images()}


def sound() -> dict[str, Any]:
    return {"input_values": torch.randn(ROWS, 400)}


def spectra() -> dict[str, Any]:
    return {"input_features": torch.randn(ROWS, 16, 32), "decoder_input_ids": ids()}


def past() -> dict[str, Any]:
    return {"past_values": torch.randn(ROWS, 16, 2)}


def perceived() -> dict[str, Any]:
    return {"inputs": torch.randn(ROWS, TOKENS, 16)}


def decided() -> dict[str, Any]:
    steps = torch.arange(4).expand(ROWS, -1)
    return {
        "states": torch.randn(ROWS, 4, 8),
        "actions": torch.randn(ROWS, 4, 3),
        "returns_to_go": torch.randn(ROWS, 4, 1),
        "timesteps": steps,
        "attention_mask": torch.ones(ROWS, 4),
    }


def foretold() -> dict[str, Any]:
    """The past of a series with a feature of time, and of its future."""
    return {
        "past_values": torch.randn(ROWS, 12),
        "past_time_features": torch.randn(ROWS, 12, 1),
        "past_observed_mask": torch.ones(ROWS, 12),
        "future_values": torch.randn(ROWS, 4),
        "future_time_features": torch.randn(ROWS, 4, 1),
    }


_RESULTS = (
    *("logits", "logits_per_image", "prediction_logits", "last_hidden_state", "prediction_outputs", "params"),
    *("reconstruction", "regression_outputs", "action_preds"),
)


def scores(model: Any, batch: dict[str, Any]) -> Tensor:
    """The first tensor of what the model returns, the units first."""
    output = model(**batch)
    for name in _RESULTS:
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
        if isinstance(found, tuple):
            return torch.cat([each.reshape(len(each), -1) for each in found], 1)
    raise AssertionError(f"none of {_RESULTS} in {list(output.keys())}")


def without_cache(model: Any, batch: dict[str, Any]) -> Tensor:
    return scores(model, {**batch, "use_cache": False})


@functools.cache
def _library() -> Any:
    return pytest.importorskip("transformers", reason="needs the demo extra")


def _known(config: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Of the usual sizes those that the configuration has, by whichever name, and the settings do not say."""
    also: dict[str, str] = getattr(config, "attribute_map", {})
    fields = {*inspect.signature(config.__init__).parameters, *getattr(config, "__dataclass_fields__", {}), *also}
    sizes = {name: value for name, value in SIZES.items() if name in fields and also.get(name) not in settings}
    return sizes | settings


def built(name: str, kind: str, config: str, model: str, settings: dict[str, Any]) -> Specimen:
    transformers = _library()
    kept = getattr(transformers, config)
    made = getattr(transformers, model)(kept(**_known(kept, settings)))
    forward = without_cache if "use_cache" in inspect.signature(made.forward).parameters else scores
    return Specimen(name, made, forward, BATCHES[kind]())


_KINDS = (text, padded, pairs, images, both, sound, spectra, past, foretold, perceived, decided)
BATCHES: dict[str, Callable[[], dict[str, Any]]] = {made.__name__: made for made in _KINDS}
