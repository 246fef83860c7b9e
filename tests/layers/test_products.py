"""What no map reaches, by name: products of activations, with shapes, calls and FLOPs worked out by hand."""

import math

import pytest
import torch
from torch import nn

from helpers import zoo
from precimap.layers.discover import discover
from precimap.layers.inventory import ActivationProduct, Inventory

N, SDPA = zoo.ROWS, "scaled_dot_product_attention"


def product(op: str, left: tuple[int, ...], right: tuple[int, ...], calls: int = 1) -> ActivationProduct:
    """[..., m, k] x [..., k, n], as many as the left operand has matrices."""
    return ActivationProduct(op=op, left=left, right=right, calls=calls, flops=calls * 2 * math.prod(left) * right[-1])


def attention(batch: int, heads: int, tokens: int, width: int, calls: int) -> tuple[ActivationProduct, ...]:
    each = (batch, heads, tokens, width)
    flops = calls * 2 * batch * heads * tokens * tokens * width
    return (
        ActivationProduct(op=SDPA, left=each, right=each, calls=calls, flops=flops),
        ActivationProduct(op=SDPA, left=(batch, heads, tokens, tokens), right=each, calls=calls, flops=flops),
    )


def scores_by_einsum(batch: int, tokens: int, heads: int, width: int, calls: int) -> tuple[ActivationProduct, ...]:
    each, weights = (batch, tokens, heads, width), (batch, heads, tokens, tokens)
    flops = calls * 2 * batch * heads * tokens * tokens * width
    return (
        ActivationProduct(op="einsum", left=each, right=each, calls=calls, flops=flops),
        ActivationProduct(op="einsum", left=weights, right=each, calls=calls, flops=flops),
    )


PRODUCTS: dict[zoo.Builder, tuple[ActivationProduct, ...]] = {
    zoo.torchrec_dlrm: (product("bmm", (N, 3, 16), (N, 16, 3)),),
    zoo.torchrec_dlrm_dcn: (),
    zoo.torchrec_embedding_bags: (),
    zoo.dcnv2: (),
    zoo.deepfm: (),  # the sum-square trick is elementwise
    zoo.mmoe: (),  # its weighed sum is elementwise too; PLE's is not
    zoo.ple: (product("bmm", (N, 1, 4), (N, 4, 32), calls=4), product("bmm", (N, 1, 6), (N, 6, 32))),
    zoo.stacked_experts: (
        ActivationProduct(op="einsum", left=(N, 4), right=(4, N, 16), calls=1, flops=2 * N * 4 * 16),
    ),
    zoo.two_tower: (product("bmm", (N, 5, 16), (N, 16, 1)),),
    zoo.wukong: (product("bmm", (N, 32, 16), (N, 16, 16)), product("bmm", (N, 6, 16), (N, 16, 16))),
    zoo.hstu: scores_by_einsum(N, 6, 2, 16, calls=2),
    zoo.autoint: scores_by_einsum(N, 6, 2, 8, calls=1),
    zoo.sasrec: (*attention(N, 2, 7, 16, calls=2), product("matmul", (N, 5, 32), (N, 32, 1))),
    zoo.transformer_encoder: attention(N, 4, 6, 8, calls=2),
    zoo.bert_cross_encoder: attention(N, 2, 12, 16, calls=2),
    zoo.bert_bi_encoder: (
        *attention(3 * N, 2, 9, 16, calls=2),
        *attention(N, 2, 5, 16, calls=2),
        product("matmul", (N, 3, 32), (N, 32, 1)),
    ),
}


def inventory_of(build: zoo.Builder) -> Inventory:
    specimen = build()
    return discover(specimen.model, specimen.forward, specimen.batch)


@pytest.mark.parametrize("build", PRODUCTS, ids=lambda build: build.__name__)
def test_products_of_activations_are_named(build: zoo.Builder) -> None:
    found = inventory_of(build).products

    assert sorted(found, key=str) == sorted(PRODUCTS[build], key=str)
    assert [p.flops for p in found] == sorted((p.flops for p in found), reverse=True)


# Tokens x multiply-adds of one token, by hand: what all weights take, and what nn.Linear modules take of it.
TWO_LAYERS = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # of a BERT or an encoder: attention's four projections, the MLP's two
WEIGHTS: dict[zoo.Builder, tuple[int, int]] = {
    zoo.hstu: (N * 6 * 2 * (32 * 128 + 32 * 32), 0),
    zoo.sasrec: (N * 7 * 2 * 6 * 32 * 32, 0),  # packed projections and convolutions; out_proj is never called
    zoo.transformer_encoder: (N * 6 * TWO_LAYERS, N * 6 * 2 * 2 * 32 * 64),
    zoo.wukong: (
        # by layer: MLP in and out; compressions to rank, to the result, and (first) of the residual, 16 values wide
        N * (6 * 16 * 32 + 32 * 256 + 16 * 6 * (16 + 16 + 32))
        + N * (32 * 16 * 32 + 32 * 256 + 16 * 32 * (16 + 16))
        + N * (32 * 16 * 32 + 32),
        N * (6 * 16 * 32 + 32 * 256 + 32 * 16 * 32 + 32 * 256 + 32 * 16 * 32 + 32),
    ),
    zoo.torchrec_dlrm_dcn: (N * (16 * 32 + 32 * 16 + 4 * 48 * 16 + 48 * 32 + 32), N * (2 * 16 * 32 + 48 * 32 + 32)),
    zoo.dcnv2: (N * (2 * 96 * 96 + 96 * 32 + 32 * 16 + 112),) * 2,
    zoo.ple: (N * (6 * 16 * 32 + 2 * 16 * 4 + 16 * 6 + 6 * 32 * 32 + 2 * 32 * 4 + 2 * (32 * 16 + 16)),) * 2,
    zoo.mmoe: (N * (4 * 16 * 32 + 2 * 16 * 4 + 2 * (32 * 16 + 16)),) * 2,
    zoo.deepfm: (N * (96 * 32 + 32 * 16 + 16),) * 2,
    zoo.two_tower: (N * 6 * (16 * 32 + 32 * 16),) * 2,
    zoo.bert_cross_encoder: (N * (12 * TWO_LAYERS + 32 * 32 + 32),) * 2,
}


@pytest.mark.parametrize("build", WEIGHTS, ids=lambda build: build.__name__)
def test_every_weight_is_seen_and_nn_linear_shows_this_much(build: zoo.Builder) -> None:
    inventory = inventory_of(build)

    every, in_modules = WEIGHTS[build]
    assert inventory.layer_flops == inventory.weight_flops == 2 * every
    assert sum(layer.flops for layer in inventory.layers if layer.in_linear_module) == 2 * in_modules


def test_the_total_is_that_of_the_products_and_grouped_queries_share_keys() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(8, width) for width in (32, 16, 24))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            query = self.query(x).unflatten(-1, (4, 8)).transpose(1, 2)
            key, value = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.key, self.value))
            return nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    inventory = discover(Grouped(), lambda model, x: model(x), torch.randn(3, 5, 8))
    scores, weighed = 2 * 3 * 4 * 5 * 5 * 8, 2 * 3 * 4 * 5 * 5 * 12
    assert inventory.products == (
        ActivationProduct(op=SDPA, left=(3, 4, 5, 5), right=(3, 2, 5, 12), calls=1, flops=weighed),
        ActivationProduct(op=SDPA, left=(3, 4, 5, 8), right=(3, 2, 5, 8), calls=1, flops=scores),
    )
    assert inventory.activation_flops == scores + weighed


class Unsupported(nn.Module):
    """Products in forms that no entry of the table describes."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.up = nn.Bilinear(8, 8, 4), nn.ConvTranspose1d(4, 4, 1)
        self.row, self.inner = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(5, 4))
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.pairs(x, x).unsqueeze(2)).squeeze(2)
        return torch.inner(hidden, self.inner) * self.scale + torch.linalg.vecdot(hidden, self.row).unsqueeze(1)


def test_a_weight_in_a_product_of_an_unknown_form_is_not_said_to_be_in_none() -> None:
    inventory = discover(Unsupported(), lambda model, x: model(x), torch.randn(3, 8))

    assert [(layer.name, layer.ops, layer.flops) for layer in inventory.layers] == [
        ("inner", ("inner",), 2 * 3 * 5 * 4),
        ("up.weight", ("conv_transpose1d",), 2 * 3 * 4 * 4),
    ]
    reasons = {other.name: other.reason for other in inventory.others}
    assert "product of more than two bilinear, which is not supported" in reasons["pairs.weight"]
    assert "product of vectors linalg_vecdot, which is not supported" in reasons["row"]
    assert "contract nothing" in reasons["scale"]
