"""Layers, products of activations and what is hidden are all that torch itself counts, whoever makes the calls.

The oracle is torch's `FlopCounterMode`, with nothing of precimap in it: run on the same call with oneDNN off, since its
fused recurrent ops have no formula there, and with a formula for what else it has none for (`zoo_flops`).
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import sdpa_flop_count

from helpers import zoo_flops
from precimap.layers.counting import FORMULAS
from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory

Call = Callable[[Any, Any], Tensor]


class Given(nn.Module):
    """Two weights, a head, and a function from outside that uses them."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(32, 64)), nn.Parameter(torch.randn(4, 64, 64))
        self.head = nn.Linear(64, 16)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self, x))


def _products(x: Tensor, w: Tensor) -> Tensor:
    return torch.relu(torch.mm(x, w)) + torch.mm(x * 2, w)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says that nobody should script any more; models do
    _scripted = torch.jit.script(_products)


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) ** 2


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(50, 16, mode="mean")
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: Tensor) -> Tensor:
        return self.mlp(self.bag(ids))


class Experts(nn.Module):
    """Rows by `grouped_mm`, and all experts by `bmm`."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 32, 64)), nn.Parameter(torch.randn(2, 64, 16))
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch._grouped_mm(x, self.up, offs=torch.tensor([3, len(x)], dtype=torch.int32))
        return torch.bmm(h.expand(2, -1, -1), self.down).sum(0)


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = cell(16, 32, batch_first=True, **options)
        self.head = nn.Linear(self.cell(torch.zeros(1, 1, 16))[0].shape[-1], 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(16, 32), nn.GRUCell(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.lstm(x[:, 0])
        return self.gru(h)


class Two(nn.Module):
    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.first = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.first, x)


X, SEQUENCE, IMAGE = torch.randn(8, 32), torch.randn(6, 5, 16), torch.randn(2, 3, 12, 12)
Build = Callable[[], nn.Module]
COUNTED: dict[str, tuple[Build, Tensor, str]] = {  # name -> (model, batch, what is hidden)
    "mlp": (lambda: nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 1)), X, ""),
    "attention": (
        lambda: Two(nn.MultiheadAttention(16, 4, batch_first=True), lambda m, x: m(x, x, x)[0]),
        SEQUENCE,
        "",
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), SEQUENCE, ""),
    "transformer": (lambda: Two(nn.Transformer(16, 2, 1, 1, 32, batch_first=True), lambda m, x: m(x, x)), SEQUENCE, ""),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4)),
        IMAGE,
        "",
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
        "",
    ),
    "gru": (lambda: Recurrent(nn.GRU), SEQUENCE, "cell (GRU): gru / aten.addmm"),
    "gru, two ways": (
        lambda: Recurrent(nn.GRU, bidirectional=True, num_layers=2),
        SEQUENCE,
        "cell (GRU): gru / aten.addmm",
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), SEQUENCE, "cell (LSTM): lstm / aten.mkldnn_rnn_layer"),
    "lstm, two ways": (
        lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2),
        SEQUENCE,
        "cell (LSTM): lstm / aten.mkldnn_rnn_layer",
    ),
    "lstm, projected": (lambda: Recurrent(nn.LSTM, proj_size=8), SEQUENCE, "cell (LSTM): lstm / aten.addmm"),
    "rnn": (lambda: Recurrent(nn.RNN), SEQUENCE, "cell (RNN): rnn_tanh / aten.addmm"),
    "cells": (Cells, SEQUENCE, "lstm (LSTMCell): lstm_cell / aten.addmm"),
    "bags": (Bags, torch.randint(50, (8, 4)), ""),
    "einsum": (lambda: Given(lambda s, x: torch.einsum("bk,kn->bn", x, s.w)), X, ""),
    "einsum over one position": (
        lambda: Given(lambda s, x: torch.einsum("bkc,bnc->bkn", x[..., None], x[..., None]).sum(1) @ s.w),
        X,
        "",
    ),
    "einsum, one side broadcast": (
        lambda: Given(lambda s, x: torch.einsum("bk,kn->bn", x[:, :1], s.w)),
        X,
        "",
    ),
    "einsum of three": (
        lambda: Given(lambda s, x: torch.einsum("bk,kn,nm->bm", x, s.w, s.v[0])),
        X,
        "the model (Given): einsum / aten.bmm",
    ),
    "multi_dot of three": (
        lambda: Given(lambda s, x: torch.linalg.multi_dot([x, s.w, s.v[0]])),
        X,
        "the model (Given): linalg_multi_dot / aten.mm",
    ),
    "aten": (lambda: Given(lambda s, x: torch.ops.aten.mm(torch.ops.aten.relu(x), s.w)), X, ""),
    "experts": (Experts, torch.randn(8, 32).bfloat16(), ""),
    "scripted function": (lambda: Given(lambda s, x: _scripted(x, s.w)), X, "the model (Given): aten.mm"),
    "autograd function": (lambda: Given(lambda s, x: _Squared.apply(x, s.w)), X, ""),
    "inference mode": (lambda: Given(torch.inference_mode()(lambda s, x: F.linear(x, s.w.t()))), X, ""),
    "vmap": (lambda: Given(lambda s, x: torch.vmap(lambda row: row @ s.w)(x)), X, ""),
    "vmap of weights": (
        lambda: Given(lambda s, x: torch.vmap(lambda w: (x @ s.w) @ w)(s.v).sum(0)),
        X,
        "the model (Given): matmul / aten.bmm",
    ),
    "two weights first": (
        lambda: Given(lambda s, x: x @ (s.w @ s.v[0])),
        X,
        "the model (Given): matmul of two weights; the model (Given): computed by matmul before matmul",
    ),
}


def counted(name: str) -> tuple[nn.Module, Tensor, str, Inventory]:
    build, batch, hidden = COUNTED[name]
    model = build().eval()
    return model, batch, hidden, discover(model, lambda m, b: m(b), batch)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", COUNTED)
def test_all_that_torch_counts_is_accounted_for(name: str) -> None:
    model, batch, hidden, inventory = counted(name)
    with torch.no_grad():
        oracle = zoo_flops.count(lambda: model(batch))
    assert inventory.flops == sum(oracle.values()) > 0
    assert inventory.flops == inventory.layer_flops + inventory.activation_flops + sum(
        f for _, f in inventory.hidden_flops
    )
    said = [where for where, _ in inventory.hidden_flops]
    assert all(one in said for one in hidden.split("; ") if one)
    assert bool(said) == bool(hidden)
    assert (inventory.covered == 1.0) == (not hidden and not inventory.activation_flops)
    assert inventory.uncounted == ()


@pytest.mark.parametrize("name", COUNTED)
def test_every_parameter_is_in_one_place(name: str) -> None:
    model, _, _, inventory = counted(name)
    names = [layer.name for layer in inventory.layers] + [other.name for other in inventory.others]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert inventory.bytes == sum(p.nbytes for p in model.parameters())
    assert not [other for other in inventory.others if "never read" in other.reason and other.name != "v"]


GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("cell", GATES)
def test_a_recurrent_call_counts_its_products_by_hand(cell: type[nn.RNNBase], onednn: bool) -> None:
    model = Recurrent(cell, bidirectional=True).eval()
    before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, onednn
    try:
        inventory = discover(model, lambda m, b: m(b), SEQUENCE)
    finally:
        torch.backends.mkldnn.enabled = before
    gates, tokens = GATES[cell], SEQUENCE.shape[0] * SEQUENCE.shape[1]
    ((where, _),) = {(where.partition(" /")[0], 0) for where, _ in inventory.hidden_flops}
    assert where.startswith(f"cell ({cell.__name__}): ")
    assert sum(f for _, f in inventory.hidden_flops) == 2 * 2 * tokens * gates * (16 * 32 + 32 * 32)
    assert inventory.covered < 0.03
    weights = [other for other in inventory.others if "weight" in other.name]
    assert len(weights) == 4
    assert all("fused recurrent call" in other.reason for other in weights)


def test_a_packed_sequence_counts_the_steps_that_it_has() -> None:
    class Packed(Recurrent):
        def forward(self, x: Tensor) -> Tensor:
            lengths = torch.tensor([5, 4, 4, 2, 1, 1])
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return self.head(self.cell(packed)[1][-1])

    inventory = discover(Packed(nn.GRU).eval(), lambda m, b: m(b), SEQUENCE)
    assert sum(f for _, f in inventory.hidden_flops) == 2 * 17 * 3 * (16 * 32 + 32 * 32)


@pytest.mark.parametrize(("inputs", "width"), [((4, 5), 3), ((8, 8), 1)])
def test_a_bilinear_form_is_hidden_by_name_with_its_flops(inputs: tuple[int, int], width: int) -> None:
    model = Two(nn.Bilinear(*inputs, width), lambda m, x: m(x[:, : inputs[0]], x[:, -inputs[1] :]))
    inventory = discover(model.eval(), lambda m, b: m(b), X)
    assert inventory.hidden_flops == (
        ("first (Bilinear): bilinear / aten._trilinear", 3 * 8 * width * math.prod(inputs)),
    )
    assert inventory.covered == 0.0


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x) * 2, (x,))


class Flexible(nn.Module):
    """Attention that compiles itself, and loads the compiler to do so."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        heads = self.qkv(x).unflatten(-1, (2, 8)).transpose(1, 2)
        return flex_attention(heads, heads, heads).flatten(1)


@pytest.mark.filterwarnings("ignore")
def test_the_branch_of_a_cond_that_is_taken_is_counted() -> None:
    model = Branches().eval()
    inventory = discover(model, lambda m, b: m(b), torch.ones(8, 32))
    assert inventory.hidden_flops == (("the model (Branches): cond / aten.addmm", 2 * 8 * 32 * 16),)
    assert (inventory.covered, inventory.uncounted) == (0.0, ())
    reasons = {other.name: other.reason for other in inventory.others}
    assert "in a call that does not show the parameter" in reasons["a.weight"]
    assert "never read" in reasons["b.weight"]


@pytest.mark.filterwarnings("ignore")
def test_attention_that_compiles_itself_is_counted() -> None:
    inventory = discover(Flexible().eval(), lambda m, b: m(b), torch.randn(2, 6, 16))
    attention = 2 * (2 * 2 * 2 * 6 * 6 * 8)
    assert inventory.hidden_flops == (("the model (Flexible): flex_attention", attention),)
    assert inventory.layer("qkv.weight").flops == 2 * 12 * 16 * 16


def test_heads_that_share_keys_are_counted_as_if_each_had_its_own() -> None:
    """Also by the ops of other devices, against torch's formula for heads of their own."""
    query, key, value = (torch.empty(3, heads, *sizes) for heads, *sizes in ((8, 5, 16), (2, 7, 16), (2, 7, 24)))
    expected = sdpa_flop_count((3, 8, 5, 16), (3, 8, 7, 16), (3, 8, 7, 24))  # type: ignore[no-untyped-call]
    kinds = ("flash_attention_for_cpu", "efficient_attention", "flash_attention", "cudnn_attention")
    ops = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}") for kind in kinds]
    for op in (*ops, torch.ops.higher_order.flex_attention):
        assert FORMULAS[op](query, key, value, out_val=None) == expected


def test_a_gradient_within_the_model_is_counted() -> None:
    model = nn.Linear(32, 1).eval()
    inventory = discover(model, lambda m, b: torch.func.vmap(torch.func.grad(lambda row: m(row).tanh().sum()))(b), X)
    assert inventory.layer("weight").flops == 2 * 8 * 32
    assert sum(flops for _, flops in inventory.hidden_flops) == 2 * 8 * 32


def test_products_with_a_vector_are_counted_although_torch_does_not() -> None:
    inventory = discover(
        Given(lambda s, x: torch.stack([torch.mv(s.w.t(), r) for r in x]) * torch.dot(x[0], x[1])).eval(),
        lambda m, b: m(b),
        X,
    )
    assert inventory.layer("w").flops == 8 * 2 * 32 * 64
    assert inventory.hidden_flops == (("the model (Given): aten.dot", 2 * 32),)


def test_what_has_no_formula_is_named() -> None:
    @torch.library.custom_op("precimap_tests::doubled", mutates_args=())
    def doubled(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) * 2

    model = Given(lambda s, x: torch.ops.precimap_tests.doubled(x, s.w) + torch.cdist(x, x).sum()).eval()
    inventory = discover(model, lambda m, b: m(b), X)
    assert set(inventory.uncounted) == {
        "the model (Given): precimap_tests.doubled",
        "the model (Given): cdist / aten._cdist_forward",
    }
    (other,) = [other for other in inventory.others if other.name == "w"]
    assert "precimap_tests.doubled" in other.reason


def test_dynamically_quantised_modules_are_counted_and_are_no_layers() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 16))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model[2] = torch.ao.quantization.quantize_dynamic(model[2], {nn.Linear})
        inventory = discover(model, lambda m, b: m(b), X)
    assert [layer.name for layer in inventory.layers] == ["0.weight"]
    assert inventory.hidden_flops == (("2.0 (Linear): quantized.linear_dynamic", 2 * 8 * 64 * 16),)


def test_watching_changes_no_bit_and_leaves_no_hook() -> None:
    for name in COUNTED:
        build, batch, _ = COUNTED[name]
        model = build().eval()
        with torch.no_grad():
            before = model(batch)
        discover(model, lambda m, b: m(b), batch)
        with torch.no_grad():
            assert torch.equal(model(batch), before), name
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
