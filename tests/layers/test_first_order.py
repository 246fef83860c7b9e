"""First-order changes against slow oracles: the plain pass, and finite differences of one layer's error."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from helpers.zoo import ROWS, ZOO, Builder, Specimen
from precimap.layers.discover import discover
from precimap.layers.emulation import SharedInputs, emulate
from precimap.layers.first_order import (
    FirstOrder,
    Layout,
    find_layout,
    routed_changes,
    routed_rows,
    row_changes,
    row_weights,
)
from precimap.layers.interception import Interception, WeightCall
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import SCHEMES

FP8 = SCHEMES["fp8-tensor"]  # one scale for a tensor: also where the calls of a layer contract different dims
TABLE = SCHEMES["fp8-weight"]  # a lookup has no input
MIXED = {"position_embeddings", "pos_emb"}  # one lookup of positions for all units
ROUTED = {"qwen3_moe", "mixtral", "stacked_experts"}  # experts gather the tokens of several units

PARTLY_FLOAT32 = {"qwen3_moe", "mixtral", "torchrec_dlrm", "torchrec_dlrm_dcn", "torchrec_embedding_bags"}


def codes(specimen: Specimen) -> dict[str, QuantizedLayer]:
    """Every layer of the model, also those that a search would refuse."""
    inventory = discover(specimen.model, specimen.forward, specimen.batch)
    weights = parameter_names(specimen.model)
    names = [layer.name for layer in inventory.layers if weights[layer.name].is_floating_point()]
    found = {name: inventory.layer(name) for name in names}
    return {
        name: quantize_layer(name, weights[name], layer.contracted, TABLE if layer.lookup else FP8, None)
        for name, layer in found.items()
    }


def watching(specimen: Specimen, layers: Mapping[str, QuantizedLayer], joint: tuple[str, ...] = ()) -> FirstOrder:
    decoded = {(name, "s"): layer.weight() for name, layer in layers.items()}
    each = {name: {"s": layer} for name, layer in layers.items()}
    model = specimen.model
    return FirstOrder(parameter_names(model), each, decoded, dict.fromkeys(joint, "s"), model.buffers())


def unit_values(scores: Tensor) -> Tensor:
    """Some smooth number of each unit: a fixed random combination of its scores. [units]."""
    flat = scores.reshape(len(scores), -1).double()
    generator = torch.Generator().manual_seed(3)
    direction: Tensor = torch.randn(flat.shape[1], generator=generator, dtype=torch.float64)
    return (flat * direction).sum(1)


def changes(specimen: Specimen, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor | None]:
    """Layer -> first-order change of each unit's value; None where the rows of a call cannot be told apart."""
    mode = watching(specimen, layers)
    with torch.enable_grad():
        with mode:
            scores = specimen.forward(specimen.model, specimen.batch)
        rows = unit_values(scores)
        weights = row_weights(len(rows))
        mode.backward((rows * weights).sum())
        weighed = [tapped.gradient for tapped in mode.taps]
        mode.backward(rows.sum())
    found: dict[str, Tensor | None] = {}
    for tapped, gradient in zip(mode.taps, weighed, strict=True):
        layout = None
        if tapped.gradient is not None and gradient is not None:
            layout = find_layout(tapped.gradient.float(), gradient.float(), weights)
        before = found.get(tapped.layer, torch.zeros(len(rows), dtype=torch.float64))
        lines = None
        if layout is None and tapped.gradient is not None and gradient is not None:
            lines = routed_rows(tapped.gradient, gradient, weights)
        if before is None or (layout is None and lines is None):
            found[tapped.layer] = before if not tapped.errors["s"].numel() else None
        elif layout is not None:
            found[tapped.layer] = before + row_changes(tapped, layout, len(rows))["s"]
        else:
            assert lines is not None
            found[tapped.layer] = before + routed_changes(tapped, lines, len(rows))["s"]
    return found


class Nudged(Interception):
    """The oracle: one layer's result moved by `step` times its own error; nothing else is touched."""

    def __init__(self, model: nn.Module, layer: QuantizedLayer, step: float) -> None:
        super().__init__({layer.name: parameter_names(model)[layer.name]})
        self.layer, self.step, self.weight = layer, step, layer.weight()

    def on_weight(self, call: WeightCall) -> Any:
        output = call.run()
        with torch.no_grad():
            return output + self.step * (emulate(call, self.layer, self.weight, SharedInputs()) - output)


def measured(specimen: Specimen, layer: QuantizedLayer, step: float = 1e-6) -> Tensor:
    """d(value of a unit) / d(step), by central differences; small, for errors jump with the input. [units]"""
    values = []
    for nudge in (step, -step):
        with torch.no_grad(), Nudged(specimen.model, layer, nudge):
            values.append(unit_values(specimen.forward(specimen.model, specimen.batch)))
    return (values[0] - values[1]) / (2 * step)


def in_double(specimen: Specimen) -> Specimen:
    """The same model and batch in float64, so that a difference of 1e-6 of an error is not lost in rounding."""
    batch = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, specimen.batch)
    choose_experts: Any = getattr(specimen.model, "set_experts_implementation", lambda _: None)
    choose_experts("eager")  # torch has no grouped product in float64
    return Specimen(specimen.name, specimen.model.double(), specimen.forward, batch, specimen.dead)


@pytest.mark.parametrize("build", ZOO, ids=lambda build: build.__name__)
def test_the_pass_gives_the_bits_of_a_plain_one_and_leaves_the_model_alone(build: Builder) -> None:
    specimen = build()
    layers = codes(specimen)
    with torch.no_grad(), Interception({}):  # the path on which baselines are scored
        plain = specimen.forward(specimen.model, specimen.batch)
    before = {name: value.clone() for name, value in specimen.model.state_dict().items()}
    asked = {name: parameter.requires_grad for name, parameter in specimen.model.named_parameters()}
    if not layers:
        assert specimen.name == "weight_norm_mlp"  # its weights are results, not parameters
        return
    mode = watching(specimen, layers)
    with mode:
        scores = specimen.forward(specimen.model, specimen.batch)
    assert torch.equal(scores.detach(), plain)
    mode.backward(unit_values(scores).sum())
    assert any(tapped.gradient is not None for tapped in mode.taps)
    with pytest.raises(ZeroDivisionError), watching(specimen, layers):
        1 / len(specimen.forward(specimen.model, specimen.batch)[:0])
    for name, value in specimen.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {name: p.requires_grad for name, p in specimen.model.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in specimen.model.parameters())
    assert all(buffer.grad_fn is None for buffer in specimen.model.buffers())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("build", ZOO, ids=lambda build: build.__name__)
def test_changes_are_those_that_finite_differences_find(build: Builder) -> None:
    specimen = in_double(build())
    # Some compute in float32 here and there, whatever the model's dtype.
    step, tolerance, noise = (1e-3, 1e-2, 5e-4) if specimen.name in PARTLY_FLOAT32 else (1e-6, 2e-4, 1e-6)
    layers = codes(specimen)
    if not layers:
        pytest.skip("no weight of it is a parameter that feeds an op")
    found = changes(specimen, layers)
    compared = 0
    for name, change in list(found.items())[:: 1 if len(found) < 20 else 4]:
        expected = measured(specimen, layers[name], step)
        if change is None:
            assert any(part in name for part in MIXED) or name in specimen.dead or not expected.any(), name
            continue
        compared += bool(expected.any())
        torch.testing.assert_close(
            change, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + noise
        )
    assert compared
    if specimen.name in ROUTED:
        assert all(found[name] is not None for name in found if "experts" in name or "proj" in name), found.keys()


class Interleaved(nn.Module):
    """Time first: unit b is every B-th row of the flattened result."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)
        self.after = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[units, time, 16] -> [units, 8]."""
        x = x.transpose(0, 1)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        flat = self.after(mixed.reshape(-1, 16))  # [time * units, 8], units interleaved
        mean: Tensor = flat.reshape(x.shape[0], x.shape[1], 8).tanh().mean(0)
        return mean


class Einsum(nn.Module):
    """One weight in two calls of different form, a transposed result, an in-place ReLU, and a bag and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.randn(16, 16) / 4)
        self.mix = nn.Linear(16, 16)
        self.table = nn.Embedding(32, 16)
        self.bag = nn.EmbeddingBag(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """[units, time, 16] -> [units, 16]."""
        first = torch.einsum("btk,kn->nbt", x, self.shared)  # units in the middle
        first = F.relu(self.mix(first.permute(1, 2, 0)), inplace=True)
        ids = (x[..., 0].abs() * 8).long().clamp(max=31)
        pooled = self.bag(ids.reshape(-1), torch.arange(0, ids.numel(), ids.shape[1])) + self.table(ids[:, 0])
        again = self.shared @ (first.mean(1) + pooled).T  # on the left, units last
        scores: Tensor = again.T.sigmoid()
        return scores


@pytest.mark.parametrize("model", [Interleaved, Einsum])
def test_rows_that_do_not_lie_in_front_are_found(model: Callable[[], nn.Module]) -> None:
    specimen = in_double(Specimen("rows", model().eval(), lambda m, x: m(x), torch.randn(ROWS, 5, 16)))
    layers = codes(specimen)
    assert len(layers) >= 3
    for name, change in changes(specimen, layers).items():
        expected = measured(specimen, layers[name])
        assert change is not None, name
        assert expected.abs().max() > 0
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


class Scorer(nn.Module):
    """Called under whatever the owner chose; `surroundings` makes that context."""

    def __init__(self, surroundings: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2, generator=generator)
        self.surroundings = surroundings

    def forward(self, x: Tensor) -> Tensor:
        with self.surroundings():
            scores: Tensor = torch.tanh(self.last(torch.relu_(self.first(x))))
            return scores


class Decorated(Scorer):
    forward = torch.no_grad()(Scorer.forward)


class DecoratedInference(Scorer):
    forward = torch.inference_mode()(Scorer.forward)


def scored_changes(model: nn.Module) -> dict[str, Tensor]:
    specimen = Specimen("scorer", model, lambda m, x: m(x), torch.randn(ROWS, 16, generator=torch.Generator()))
    weights = parameter_names(model)
    layers = {name: quantize_layer(name, w, (1,), FP8, None) for name, w in weights.items() if w.dim() == 2}
    found = changes(specimen, layers)
    assert all(change is not None for change in found.values())
    return {name: change for name, change in found.items() if change is not None}


@pytest.mark.parametrize(
    "model",
    [
        Scorer(torch.no_grad),
        Scorer(torch.inference_mode),
        Scorer(lambda: torch.set_grad_enabled(False)),
        Decorated(torch.enable_grad),
        DecoratedInference(torch.enable_grad),
    ],
    ids=["no_grad", "inference_mode", "set_grad_enabled", "no_grad decorator", "inference_mode decorator"],
)
def test_what_the_owner_says_about_gradients_changes_nothing(model: nn.Module) -> None:
    expected = scored_changes(Scorer(torch.enable_grad))
    found = scored_changes(model)
    assert list(found) == ["first.weight", "last.weight"]
    assert all(torch.equal(found[name], expected[name]) and expected[name].any() for name in expected)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_surrounding_grad_mode_is_in_force_again_also_after_an_exception() -> None:
    specimen = ZOO[-1 - [b.__name__ for b in reversed(ZOO)].index("without_gradient")]()
    layers = codes(specimen)
    with torch.no_grad():
        with watching(specimen, layers):
            specimen.forward(specimen.model, specimen.batch)
        assert not torch.is_grad_enabled()
        with pytest.raises(RuntimeError), watching(specimen, layers):
            specimen.forward(specimen.model, torch.zeros(3, 5))  # fails inside the model's own no_grad
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_at_the_joint_point_the_scores_are_those_of_the_emulated_map() -> None:
    specimen = Specimen("scorer", Scorer(torch.no_grad), lambda m, x: m(x), torch.randn(ROWS, 16))
    layers = codes(specimen)

    class Emulated(Interception):
        def on_weight(self, call: WeightCall) -> Any:
            name = call.view.name
            return emulate(call, layers[name], layers[name].weight(), SharedInputs())

    with torch.no_grad(), Emulated(parameter_names(specimen.model)):
        expected = specimen.forward(specimen.model, specimen.batch)
    with watching(specimen, layers, joint=tuple(layers)):
        found = specimen.forward(specimen.model, specimen.batch)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-6, atol=1e-6)
    assert (expected - specimen()).abs().max() > 1e-3


class Writes(nn.Module):
    """Keeps its state in a buffer, as caches do."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.register_buffer("state", torch.zeros(ROWS, 16))

    def forward(self, x: Tensor) -> Tensor:
        self.state.copy_(self.first(x))
        if not torch.isfinite(x).all():
            raise FloatingPointError
        return self.state * 2


def test_a_buffer_that_the_forward_writes_to_keeps_no_graph() -> None:
    model = Writes()
    specimen = Specimen("writes", model, lambda m, x: m(x), torch.randn(ROWS, 16))
    layers = {"first.weight": quantize_layer("first.weight", model.first.weight, (1,), FP8, None)}
    expected = 2 * F.linear(specimen.batch, model.first.weight, model.first.bias).detach()
    mode = watching(specimen, layers)
    with mode:
        scores = specimen.forward(model, specimen.batch)
    mode.backward(scores.sum())
    assert torch.equal(scores.detach(), expected)
    assert mode.taps[0].gradient is not None
    assert torch.equal(mode.taps[0].gradient, torch.full((ROWS, 16), 2.0))
    assert not model.state.requires_grad
    with pytest.raises(FloatingPointError), watching(specimen, layers):
        specimen.forward(model, specimen.batch / 0)
    assert not model.state.requires_grad


@pytest.mark.parametrize("cut", [lambda h: h.detach(), lambda h: h.data, lambda h: h.clone().detach_()])
def test_layers_before_a_detach_are_known_although_a_gradient_reaches_them(cut: Callable[[Tensor], Tensor]) -> None:
    first, last = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(_: Any, x: Tensor) -> Tensor:
        hidden = first(x)
        scores: Tensor = last(hidden) + cut(hidden)
        return scores

    model = nn.ModuleDict({"first": first, "last": last})
    specimen = Specimen("cut", model, forward, torch.randn(ROWS, 16))
    mode = watching(specimen, codes(specimen))
    with mode:
        scores = forward(model, specimen.batch)
    assert mode.before_cuts() == {"first.weight"}
    mode.backward(scores.sum())
    assert all(tapped.gradient is not None for tapped in mode.taps)
    mode.clear()
    assert mode.before_cuts() == frozenset()


def test_a_layout_is_seen_and_not_guessed() -> None:
    weights = torch.tensor([0.5, 1.0, 2.0])
    rows = torch.randn(3, 2, 4)
    weighed = rows * weights[:, None, None]
    for dim in range(3):
        found = find_layout(rows.movedim(0, dim), weighed.movedim(0, dim), weights)
        assert found == Layout(dim, True)
    flat, flat_weighed = (x.transpose(0, 1).reshape(6, 4) for x in (rows, weighed))
    layout = find_layout(flat, flat_weighed, weights)
    assert layout == Layout(0, False)
    torch.testing.assert_close(layout.rows(flat, 3), rows.reshape(3, 8))
    assert find_layout(rows.flip(0), weighed, weights) is None
    assert find_layout(torch.zeros(3, 3), torch.zeros(3, 3), weights) is None  # fits every layout: none is known
    mixed = rows.mean(0, keepdim=True).expand(3, 2, 4)
    assert find_layout(mixed, mixed * 1.5, weights) is None
