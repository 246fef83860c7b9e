"""Discovery accounts for every parameter and every weight FLOP, of models that nobody here wrote."""

import pytest
import torch
from torch import nn

from helpers import zoo
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.groups import fused_by_engines
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import quantize_layer
from precimap.layers.refusals import refusal
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import SCHEMES

# Where no layer can stand for the products of a weight, and what discovery says instead.
HIDDEN = {"weight_norm_mlp": "_weight_norm", "lstm": "lstm (LSTM): lstm / aten.mkldnn_rnn_layer"}


@pytest.fixture(params=zoo.ZOO, ids=lambda builder: builder.__name__)
def specimen(request: pytest.FixtureRequest) -> zoo.Specimen:
    made: zoo.Specimen = request.param()
    return made


def discovered(specimen: zoo.Specimen) -> Inventory:
    return discover(specimen.model, specimen.forward, specimen.batch)


def test_every_parameter_is_in_one_place(specimen: zoo.Specimen) -> None:
    inventory = discovered(specimen)
    names = [layer.name for layer in inventory.layers] + [other.name for other in inventory.others]
    assert sorted(names) == sorted(parameter_names(specimen.model))
    assert inventory.parameters == sum(p.numel() for p in specimen.model.parameters())
    assert all(other.reason for other in inventory.others)


def test_every_flop_is_counted_as_torch_counts_it(specimen: zoo.Specimen) -> None:
    inventory = discovered(specimen)
    assert inventory.flops == zoo.matmul_flops(specimen)
    assert inventory.uncounted == ()


def test_every_weight_flop_is_in_a_layer(specimen: zoo.Specimen) -> None:
    inventory = discovered(specimen)
    if specimen.name in HIDDEN:
        said = " ".join([reason for reason, _ in inventory.hidden_flops] + [other.reason for other in inventory.others])
        assert HIDDEN[specimen.name] in said
        assert inventory.layer_flops < inventory.weight_flops
        return
    assert inventory.hidden_flops == ()
    assert inventory.covered == (inventory.flops - inventory.activation_flops) / inventory.flops


def test_dead_layers_are_found_and_no_other(specimen: zoo.Specimen) -> None:
    inventory = discovered(specimen)
    found = {layer.name for layer in inventory.layers if layer.dead}
    found |= {other.name for other in inventory.others if "never read" in other.reason and len(other.shape) > 1}
    assert found == specimen.dead


def test_the_baseline_path_gives_the_model_s_own_bits(specimen: zoo.Specimen) -> None:
    torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder path rounds differently, and hides its weights
    try:
        plain = specimen()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with quantized(specimen.model, {}):
        assert torch.equal(specimen(), plain)
    discovered(specimen)
    with quantized(specimen.model, {}):
        assert torch.equal(specimen(), plain)


def test_every_layer_can_be_emulated_at_its_own_call_sites(specimen: zoo.Specimen) -> None:
    """Each alone, in every scheme it can take: the output is finite and moves, and the model's own bits come back."""
    inventory, weights = discovered(specimen), parameter_names(specimen.model)
    with quantized(specimen.model, {}):
        plain = specimen()
    for layer in inventory.layers[:12]:
        for name in ("fp8-tensor", "int8", "fp8-weight"):
            if refusal(layer, SCHEMES[name]) is not None:
                continue
            low = quantize_layer(layer.name, weights[layer.name], layer.contracted, SCHEMES[name], None)
            with quantized(specimen.model, {layer.name: low}):
                found = specimen()
            assert torch.isfinite(found).all()
            assert found.shape == plain.shape
            if not (layer.lookup and layer.shape[-1] == 1):  # there a scale for each value leaves nothing to round
                assert not torch.equal(found, plain), (layer.name, name)
            torch.testing.assert_close(found, plain, rtol=0.5, atol=0.5 * float(plain.abs().max()))
    with quantized(specimen.model, {}):
        assert torch.equal(specimen(), plain)


def test_every_refusal_is_a_sentence(specimen: zoo.Specimen) -> None:
    for layer in discovered(specimen).layers:
        for scheme in SCHEMES.values():
            reason = refusal(layer, scheme)
            assert reason is None or len(reason) > 10


def layer_of(model: nn.Module, x: torch.Tensor):
    inventory = discover(model.eval(), lambda m, b: m(b), x)
    return inventory.layers[0]


@pytest.mark.parametrize(
    ("model", "x", "scheme", "words"),
    [
        (nn.Linear(24, 32), torch.randn(2, 24), "fp8", "contracted width is 24"),
        (nn.Linear(32, 24), torch.randn(2, 32), "fp8", "output width is 24"),
        (nn.Linear(32, 1), torch.randn(2, 32), "int8", "one output column"),
        (nn.Conv1d(16, 16, 1), torch.randn(2, 16, 4), "fp8", "convolution"),
        (nn.Embedding(32, 16), torch.arange(4), "fp8", "lookup"),
    ],
)
def test_ineligible_layers_say_why(model: nn.Module, x: torch.Tensor, scheme: str, words: str) -> None:
    assert words in str(refusal(layer_of(model, x), SCHEMES[scheme]))


def test_weight_only_schemes_take_tables() -> None:
    assert refusal(layer_of(nn.Embedding(32, 16), torch.arange(4)), SCHEMES["int8-weight"]) is None


def test_a_weight_used_both_ways_has_no_channels() -> None:
    layer = next(layer for layer in discovered(zoo.tied_autoencoder()).layers if len(layer.shape) == 2)
    assert layer.contracted is None
    assert "no channel" in str(refusal(layer, SCHEMES["fp8"]))
    assert refusal(layer, SCHEMES["fp8-tensor"]) is None


def test_siblings_and_fused_groups_are_two_things() -> None:
    inventory = discovered(zoo.minilm())
    query = inventory.layer("transformer.encoder.layer.0.attention.self.query.weight")
    key = inventory.layer("transformer.encoder.layer.0.attention.self.key.weight")
    dense = inventory.layer("transformer.encoder.layer.0.attention.output.dense.weight")
    assert query.siblings == key.siblings is not None
    assert query.fused == key.fused is not None
    assert dense.siblings is None
    assert dense.fused is None
    other = inventory.layer("transformer.encoder.layer.1.attention.self.query.weight")
    assert other.fused != query.fused
    assert other.siblings != query.siblings


def test_engines_fuse_by_name() -> None:
    names = [
        "m.layers.0.self_attn.q_proj.weight", "m.layers.0.self_attn.k_proj.weight", "m.layers.0.self_attn.v_proj.weight",
        "m.layers.10.self_attn.q_proj.weight", "m.layers.0.self_attn.o_proj.weight",
        "m.layers.0.mlp.gate_proj.weight", "m.layers.0.mlp.up_proj.weight", "m.layers.0.mlp.down_proj.weight",
        "m.layers.1.mlp.experts.0.w1.weight", "m.layers.1.mlp.experts.7.w2.weight",
        "m.layers.2.mlp.experts.gate_up_proj", "m.layers.2.mlp.experts.down_proj",
    ]  # fmt: skip
    groups = fused_by_engines(names)
    assert len({groups[name] for name in names[:3]}) == 1
    assert len({groups[name] for name in names[5:7]}) == 1
    assert groups[names[8]] == groups[names[9]] == "m.layers.1.mlp.experts"
    assert groups[names[10]] == groups[names[11]]
    assert {names[3], names[4], names[7]}.isdisjoint(groups)


@pytest.mark.parametrize(
    ("together", "apart"),
    [
        ("attn.q_proj attn.k_proj attn.v_proj", "attn.g_proj other.q_proj"),
        ("linear_attn.q_proj linear_attn.k_proj linear_attn.v_proj linear_attn.g_proj", "linear_attn.o_proj"),
        ("a.q_proj a.k_proj a.v_proj a.b_proj a.forget_gate.f_a_proj a.g_proj", "a.forget_gate.f_b_proj a.o_proj"),
        ("a.q_a_proj a.kv_a_proj_with_mqa a.g_proj", "a.q_b_proj a.kv_b_proj"),
        ("a.q_a_proj a.kv_a_proj_with_mqa", "a.q_b_proj a.kv_b_proj"),
        ("attn.wq_a attn.wkv", "attn.compressor.wgate attn.wq_b"),
        ("attn.compressor.wkv attn.compressor.wgate", "attn.wo_a"),
        ("feed_forward.w1 feed_forward.w3", "feed_forward.w2"),
        ("attn.q_proj attn.k_proj", "attn.o_proj"),  # keys that are values, too
    ],
)
def test_fused_parts_of_one_module(together: str, apart: str) -> None:
    """Planted by hand from what vLLM's own models stack."""
    groups = fused_by_engines([f"m.{name}.weight" for name in (*together.split(), *apart.split())])
    assert {name.removeprefix("m.").removesuffix(".weight") for name in groups} == {*together.split()}
    assert len({*groups.values()}) == 1


def test_tied_weights_know_each_other() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(32, 16)
            self.head = nn.Linear(16, 32, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids))

    layer = layer_of(Tied(), torch.arange(4))
    assert (layer.name, layer.tied) == ("table.weight", ("head.weight",))
    assert layer.ops == ("embedding", "linear")
    assert not layer.in_linear_module


def test_what_leaves_torch_is_not_called_dead() -> None:
    """The trace loses a value that goes through numpy; disturbing the layer shows that it matters."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.from_numpy(self.a(x).detach().numpy().copy()))

    inventory = discover(Through().eval(), lambda m, b: m(b), torch.randn(2, 16))
    assert [layer.dead for layer in inventory.layers] == [None, None]
