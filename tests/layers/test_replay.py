"""Replay against the plain probe on every specimen; what is replayed, what is held, and what may never be stale."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import zoo
from precimap.errors import ModelError
from precimap.layers.discover import discover
from precimap.layers.emulation import Emulation, operands, quantized
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.layers.replay import Recording, Replay
from precimap.layers.views import parameter_names
from precimap.numerics.schemes import scheme

UNLIMITED = float("inf")
MOST_LAYERS = 6


def _probes(model: nn.Module, inventory: Inventory) -> list[dict[str, QuantizedLayer]]:
    """One layer each: all of a small model, an even sample of a large one."""
    weights = parameter_names(model)
    step = max(1, len(inventory.layers) // MOST_LAYERS)
    return [
        {
            layer.name: quantize_layer(
                layer.name,
                weights[layer.name],
                layer.contracted,
                scheme("fp8-weight" if layer.lookup else "fp8"),
                None,
            )
        }
        for layer in inventory.layers[::step]
    ]


def _replayed(specimen: zoo.Specimen, layers: dict[str, QuantizedLayer], recording: Recording) -> Tensor:
    with torch.no_grad(), Replay(parameter_names(specimen.model), layers, operands(layers), recording):
        return specimen.forward(specimen.model, specimen.batch)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers, at import
@pytest.mark.parametrize("build", zoo.ZOO, ids=lambda build: build.__name__)
def test_every_model_has_the_bits_of_its_plain_probes(build: zoo.Builder) -> None:
    specimen = build()
    inventory = discover(specimen.model, specimen.forward, specimen.batch)
    probes = [{}, *_probes(specimen.model, inventory), {}]
    plain = []
    for layers in probes:
        with torch.no_grad(), quantized(specimen.model, layers):
            plain.append(specimen.forward(specimen.model, specimen.batch))
    whole = Recording(UNLIMITED)
    for limit in (UNLIMITED, None, 0):
        recording = whole if limit == UNLIMITED else Recording(whole.bytes // 3 if limit is None else limit)
        for layers, expected in zip(probes, plain, strict=True):
            assert torch.equal(_replayed(specimen, layers, recording), expected), (limit, *layers)
            assert recording.bytes <= recording.limit_bytes
        assert (recording.evicted > 0) == (limit != UNLIMITED)
        assert (recording.replayed > 0) or limit == 0
    assert whole.replayed > recording.replayed


def _pairs(widths: int = 16) -> tuple[nn.Sequential, Tensor]:
    model = nn.Sequential(
        *(nn.Sequential(nn.Linear(widths, widths), nn.ReLU(inplace=True)) for _ in range(4)), nn.Linear(widths, 1)
    ).eval()
    return model, torch.randn(8, widths)


def _layer(model: nn.Module, name: str) -> dict[str, QuantizedLayer]:
    return {name: quantize_layer(name, parameter_names(model)[name], (1,), scheme("fp8"), None)}


def test_in_place_chains_still_replay_their_products() -> None:
    model, x = _pairs()
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    layers = _layer(model, "3.0.weight")
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            model(x)
        with quantized(model, layers):
            plain = model(x)
        for _ in range(3):
            before = recording.replayed
            with Replay(weights, layers, operands(layers), recording):
                assert torch.equal(model(x), plain)
            assert recording.replayed - before == 3  # the products before the layer; each ReLU writes in place
    assert recording.bytes == 4 * (4 * 8 * 16 + 8)


class _Towers(nn.Module):
    """Independent towers, and a gate that routes the rows of a batch to them."""

    def __init__(self, towers: int) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Linear(16, 16) for _ in range(towers))
        self.gate = nn.Linear(16, towers)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(1)
        rows = [torch.where(chosen == k)[0] for k in range(len(self.towers))]
        result = torch.zeros_like(x)
        for k, tower in enumerate(self.towers):
            if len(rows[k]):
                result[rows[k]] = F.gelu(tower(x[rows[k]]))
        return result


def test_a_probe_of_one_tower_computes_that_tower() -> None:
    torch.manual_seed(1)
    model, x = _Towers(8).eval(), torch.randn(64, 16)
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            model(x)
        layers = _layer(model, "towers.3.weight")
        with Replay(weights, layers, operands(layers), recording):
            found = model(x)
        with quantized(model, layers):
            assert torch.equal(model(x), found)
    # Left: zeros_like and the writes of 8 rows in place, the tower's product and its gelu.
    assert recording.computed <= 8 + 3
    assert recording.replayed >= 8 * 2 + 7 * 3


def test_a_changed_route_is_noticed_and_computed() -> None:
    torch.manual_seed(1)
    model, x = _Towers(4).eval(), torch.randn(512, 16)
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    layers = _layer(model, "gate.weight")
    with torch.no_grad():
        with quantized(model, layers):
            plain = model(x)
        with Replay(weights, {}, {}, recording):
            base = model(x)
        assert (base == 0).any() or not torch.equal(base, plain)  # the route did change
        with Replay(weights, layers, operands(layers), recording):
            assert torch.equal(model(x), plain)


def test_what_a_user_does_to_outputs_never_comes_back() -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh()).eval(), torch.randn(4, 16)
    model.register_parameter("dead", nn.Parameter(torch.randn(16, 16)))
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    layers = _layer(model, "dead")
    with torch.no_grad():
        plain, outputs = model(x), []
        with Replay(weights, {}, {}, recording):
            outputs.append(model(x))
        for _ in range(3):
            outputs[-1].data.mul_(7.0)  # unseen: no version tells of it
            with Replay(weights, layers, operands(layers), recording):
                outputs.append(model(x))
            assert torch.equal(outputs[-1], plain)
    assert recording.replayed == 2 * 3
    assert len({output.data_ptr() for output in outputs}) == 4


def test_another_batch_and_changed_weights_are_computed() -> None:
    model, x = _pairs()
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            model(x)
        other = torch.randn(8, 16)
        with Emulation(weights, {}, {}):
            plain = model(other)
        with Replay(weights, {}, {}, recording):
            assert torch.equal(model(other), plain)
        assert recording.replayed == 0
        weights["0.0.weight"].mul_(1.5)
        with Emulation(weights, {}, {}):
            plain = model(x)
        with Replay(weights, {}, {}, recording):
            assert torch.equal(model(x), plain)
        assert recording.replayed == 0


def test_a_storage_at_a_used_address_is_another_storage() -> None:
    weight, recording = torch.randn(16, 16), Recording(UNLIMITED)
    with torch.no_grad():
        x = torch.full((4, 16), -1.0)
        with Replay({}, {}, {}, recording):
            F.linear(x, weight)
        for value in range(20):
            del x
            x = torch.full((4, 16), float(value))  # freed and allocated again and again
            plain = F.linear(x, weight)
            with Replay({}, {}, {}, recording):
                assert torch.equal(F.linear(x, weight), plain)
    assert recording.replayed == 0


def test_other_surroundings_are_another_call() -> None:
    model, x = _pairs()
    recording = Recording(UNLIMITED)
    with torch.no_grad():
        with Replay({}, {}, {}, recording):
            model(x)
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(x)
            with Replay({}, {}, {}, recording):
                assert torch.equal(model(x), plain)
    assert plain.dtype == torch.bfloat16


def test_structures_and_layouts_come_back_as_they_were() -> None:
    x = torch.randn(4, 6, dtype=torch.float64)

    def results() -> list[Any]:
        state = torch.zeros(1, 2, 6, dtype=torch.float64)
        lstm = torch.lstm(x[None], (state[:, :1], state[:, :1]), parameters, True, 1, 0.0, False, False, True)
        return [
            x.max(0),
            torch.sort(x, 1),
            torch.topk(x, 2),
            torch.frexp(x),
            torch.cat([x, x], 1),
            torch.einsum("ij,kj->ki", x, x),
            torch.empty_strided((4, 6), (1, 4)).copy_(x) + 1,
            x.t().contiguous(),
            x[:0] * 2,
            torch.broadcast_to(x[:1], (4, 6)) * 1,
            F.embedding_bag(torch.tensor([0, 1, 2]), x, torch.tensor([0, 2]), mode="sum"),
            torch.unique(torch.tensor([3, 1, 3]), return_counts=True, return_inverse=True),
            *lstm,
        ]

    generator = torch.Generator().manual_seed(3)
    shapes = [(24, 6), (24, 6), (24,), (24,)]
    parameters = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    recording = Recording(UNLIMITED)
    with torch.no_grad():
        with Replay({}, {}, {}, recording):
            first = results()
        with Replay({}, {}, {}, recording):
            second = results()
    assert recording.replayed > 10
    for one, other in zip(first, second, strict=True):
        assert type(one) is type(other)
        pairs = [(one, other)] if isinstance(one, Tensor) else list(zip(one, other, strict=True))
        for a, b in pairs:
            assert torch.equal(a, b)
            assert (a.stride(), a.dtype, a.storage_offset()) == (b.stride(), b.dtype, b.storage_offset())
            assert a.numel() == 0 or a.data_ptr() != b.data_ptr()


def test_a_failed_baseline_pass_leaves_no_recording() -> None:
    model, x = _pairs()
    recording = Recording(UNLIMITED)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="mat1 and mat2"), Replay({}, {}, {}, recording):
            model(torch.cat([model(x)] * 15, 1))
        assert (recording.bytes, recording.complete) == (0, False)
        with Replay({}, {}, {}, recording):
            model(x)
    assert recording.complete


@pytest.mark.parametrize("surroundings", [torch.enable_grad, torch.inference_mode])
def test_gradients_are_refused(surroundings: type[torch.enable_grad]) -> None:
    with surroundings(), pytest.raises(ModelError, match="no_grad"), Replay({}, {}, {}, Recording(0)):
        pass


def test_a_model_in_its_own_inference_mode_is_computed() -> None:
    model, x = _pairs()
    recording = Recording(UNLIMITED)
    with torch.no_grad():
        plain = model(x)
        for _ in range(2):
            with Replay({}, {}, {}, recording), torch.inference_mode():
                assert torch.equal(model(x), plain)
    assert (recording.replayed, recording.bytes) == (0, 0)


def test_a_probe_leaves_no_recorded_result_in_use() -> None:
    """What the layer read is a recorded result; were it held on to, the recording would move it at the end of each probe."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    weights, recording = parameter_names(model), Recording(UNLIMITED)
    layers = _layer(model, "2.weight")
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            model(x)
        storages = set(recording._owners)
        for _ in range(2):
            probe = Replay(weights, layers, operands(layers), recording)
            with probe:
                model(x)
            assert set(recording._owners) == storages
        assert recording.replayed == 2 * 2
