"""A model cast as a whole: what torch's own `bfloat16()` computes; the user's model, ties, hooks and dtypes as they were."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from precimap.decisions import Cast
from precimap.errors import MapError
from precimap.fingerprints import of_weights
from precimap.layers.casting import CASTS, cast


class Mixed(nn.Module):
    """Ties, buffers of several kinds, and results in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("order", torch.arange(16))
        self.register_buffer("scale", torch.rand(16))

    def forward(self, ids: Tensor, weights: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.table(ids) * weights[:, None])[:, self.order] * self.scale
        return {"logits": self.head(F.gelu(x)), "ids": ids}


IDS, WEIGHTS = torch.arange(12) % 20, torch.rand(12, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> Mixed:
    torch.manual_seed(1)
    return Mixed().eval()


@pytest.mark.parametrize("name", CASTS)
def test_it_is_torch_s_own_cast_of_everything(model: Mixed, name: Cast) -> None:
    dtype, short = CASTS[name], copy.deepcopy(model).to(CASTS[name])
    with torch.no_grad():
        found, expected = cast(model, name)(IDS, WEIGHTS), short(IDS, WEIGHTS.to(dtype))
    assert torch.equal(found["logits"], expected["logits"].float())
    assert found["logits"].dtype == torch.float32
    assert torch.equal(found["ids"], IDS)


def test_the_model_stays_and_what_is_tied_stays_tied(model: Mixed) -> None:
    before = of_weights(model)
    made = cast(model, "bfloat16")
    assert made.head.weight is made.table.weight  # type: ignore[union-attr]
    assert made.order.dtype == torch.int64  # type: ignore[union-attr]
    with torch.no_grad():
        for tensor in [*made.parameters(), *made.buffers()]:
            if tensor.is_floating_point():
                tensor.zero_()
    assert of_weights(model) == before
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert {one.dtype for one in model.parameters()} == {torch.float32}


def test_hooks_of_the_user_see_the_dtypes_that_they_saw(model: Mixed) -> None:
    seen: list[torch.dtype] = []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[1].dtype))
    model.register_forward_hook(lambda _, given, result: seen.append(result["logits"].dtype))
    with torch.no_grad():
        cast(model, "bfloat16")(IDS, WEIGHTS)
    assert seen == [torch.float32, torch.float32]


def test_inputs_by_name_and_results_of_a_library() -> None:
    config = BertConfig(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=1, vocab_size=40)
    bert = BertModel(config).eval()
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        found: Any = cast(bert, "bfloat16")(input_ids=ids, attention_mask=torch.ones(2, 8))
        expected = copy.deepcopy(bert).bfloat16()(input_ids=ids, attention_mask=torch.ones(2, 8).bfloat16())
    assert found.last_hidden_state.dtype == torch.float32
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state.float())


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_it_can_be_copied(model: Mixed, again: Any) -> None:
    made = cast(model, "bfloat16")
    with torch.no_grad():
        assert torch.equal(again(made)(IDS, WEIGHTS)["logits"], made(IDS, WEIGHTS)["logits"])


def test_without_a_cast_it_is_the_model(model: Mixed) -> None:
    assert cast(model, None) is model
    with pytest.raises(MapError, match="no floating-point parameter"):
        cast(nn.Identity(), "bfloat16")
