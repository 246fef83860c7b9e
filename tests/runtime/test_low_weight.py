"""A low-precision weight in its parameter's place: every spelling of a product, and a model that stays the user's."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from helpers.going_round import through_pickle, through_torch, wrong_in_threads
from helpers.small_maps import map_of
from helpers.spellings import SPELLINGS, Spelled, X, layers_of
from precimap import CPU_INT8, Splits, Task, deploy, discover, load_deployed, save_deployed
from precimap.errors import DeployError, MapError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.storages import storages_of
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES, Scheme, scheme
from precimap.runtime import emulated
from precimap.runtime.compiling.compiled import compile_calls, no_compiler
from precimap.runtime.kernel_checks import check_weight
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.placing import low_weights, placed
from precimap.runtime.x86 import int8 as int8_weights
from precimap.runtime.x86.target import has_bf16, int8_scheme

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore"
    ),  # maps made by hand; Inductor, dynamo and exporters warn about parts of their own
]


def expected_of(model: nn.Module, layers: dict[str, QuantizedLayer], *x: Any) -> Tensor:
    with torch.no_grad(), quantized(model, layers):
        result: Tensor = model(*x)
    return result


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("inference", [False, True])
def test_every_spelling_is_multiplied_in_int8(how: str, inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spelled(*SPELLINGS[how]).eval()
    inventory = discover(model, lambda m, b: m(b), X)
    assert CPU_INT8.refusal(inventory.layer("w"), scheme(int8_scheme())) is None
    layers = layers_of(model, int8_scheme())
    fast = CPU_INT8.deployed(model, layers)
    expected = expected_of(model, layers, X)
    packed: list[Any] = []
    monkeypatch.setattr(
        int8_weights, "_packed", lambda weight, plain=int8_weights._packed: packed.append(1) or plain(weight)
    )
    with torch.inference_mode(inference), torch.no_grad():
        found = fast(X)
    step = 2.0**-6 if found.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    assert packed, "the kernel was asked: it has packed the codes"
    with torch.no_grad():
        assert not torch.allclose(found.float(), model(X).float(), atol=1e-3)


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("name", ["fp8", "int8", "fp8-weight", "int8-static"])
def test_the_emulated_target_has_the_bits_of_the_search(how: str, name: str) -> None:
    """But where torch makes a product of matrices of a call that the search multiplies as values: there to the last bits."""
    model = Spelled(*SPELLINGS[how]).eval()
    layers = layers_of(model, name)
    fast = emulated.deployed(model, layers)
    with torch.no_grad():
        found, expected = fast(X), expected_of(model, layers, X)
    if "einsum" in how or how in ("a view of heads", "tensordot", "inner"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


def test_a_stack_that_is_repeated_for_a_batch_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spelled(*SPELLINGS["experts for every row of a batch"]).eval()
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
    packed: list[Any] = []
    plain = int8_weights._packed
    monkeypatch.setattr(int8_weights, "_packed", lambda weight: packed.append(1) or plain(weight))
    with torch.no_grad():
        assert fast(X).is_contiguous()
        fast(2 * X)
    assert len(packed) == 3


@pytest.mark.parametrize("how", SPELLINGS)
def test_every_spelling_is_checked_against_its_emulation(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Spelled(*SPELLINGS[how]).eval()
    layers = layers_of(model, int8_scheme())
    check_weight(CPU_INT8.deployed(model, layers).w)
    plain = int8_weights._packed
    monkeypatch.setattr(int8_weights, "_packed", lambda weight: replace(plain(weight), scales=2 * plain(weight).scales))
    with pytest.raises(DeployError, match="differs from its emulation"):
        check_weight(CPU_INT8.deployed(model, layers).w)


@pytest.mark.skipif(no_compiler() is not None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "how",
    [
        *("matmul on the right", "its transpose", "addmm of GPT-2", "einsum", "parts of one weight", "mm on the left"),
        *("experts for every row of a batch", "matmul on the left", "matmul of a turned batch"),
        *("square, on the left", "square, of a turned batch"),
    ],
)
def test_compiled_spellings_are_int8_products(how: str) -> None:
    torch._dynamo.reset()
    model = Spelled(*SPELLINGS[how]).eval()
    layers = layers_of(model, int8_scheme())
    fast = CPU_INT8.deployed(model, layers)
    calls = compile_calls(fast)
    with torch.no_grad():
        found, eager = fast(X), CPU_INT8.deployed(model, layers)(X)
        torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    assert calls._products.found == calls._products.expected >= 1


@pytest.mark.parametrize(
    "how",
    [
        *(
            "linear",
            "matmul on the right",
            "einsum",
            "addmm of GPT-2",
            "a view of heads",
            "parts of one weight",
            "a slice",
        ),
        *("matmul on the left", "matmul of a turned batch", "square, on the left", "square, of a turned batch"),
    ],
)
def test_exported_spellings_quantise(how: str) -> None:
    model = Spelled(*SPELLINGS[how]).eval()
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
    with torch.no_grad():
        plain = torch.export.export(fast, (X,)).run_decompositions({})
        torch.testing.assert_close(plain.module()(X), fast(X), rtol=1e-4, atol=1e-4)
    assert any("quantize_per_tensor" in str(node.target) for node in plain.graph.nodes)
    assert not any(isinstance(value, LowWeight) for value in plain.state_dict.values())


class Attended(nn.Module):
    """Packed projections of nn.MultiheadAttention, of one input and of two."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.attention, self.crossed = nn.MultiheadAttention(32, 4, batch_first=True), crossed

    def forward(self, x: Tensor) -> Tensor:
        memory = x.flip(1) * 0.5 if self.crossed else x
        result: Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return result


@pytest.mark.parametrize("crossed", [False, True])
def test_packed_projections_are_served(crossed: bool) -> None:
    torch.manual_seed(0)
    model = Attended(crossed).eval()
    layers = layers_of(model, int8_scheme())
    assert set(layers) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    fast = CPU_INT8.deployed(model, layers)
    with torch.no_grad():
        torch.testing.assert_close(fast(X), expected_of(model, layers, X), rtol=1e-4, atol=1e-4)
        assert torch.equal(emulated.deployed(model, layers)(X), expected_of(model, layers, X))


@pytest.mark.parametrize("low", [("layers.0", "layers.1"), ("layers.1",)])
def test_padded_encoders_run_as_before(low: tuple[str, ...]) -> None:
    """Left-aligned masks make nested tensors on torch's fast path, which reads the first layer's weights itself."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    mask = torch.arange(4) >= torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
    layers = {name: layer for name, layer in layers_of(model, int8_scheme()).items() if name.startswith(low)}
    fast = CPU_INT8.deployed(model, layers)
    with torch.no_grad():
        found = fast(X, src_key_padding_mask=mask)
        with quantized(model, layers):
            expected = model(X, src_key_padding_mask=mask)
    torch.testing.assert_close(found[~mask], expected[~mask], rtol=1e-4, atol=1e-4)


class Library(nn.Module):
    """What foreign code does with its modules: attributes, methods, hooks, ties, lists, a second name, a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.out = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.out.weight = self.table.weight
        self.alias = self.first
        self.read = nn.Linear(32, 32)
        self.also = [self.read]
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)
        self.calls: list[str] = []
        self.first.register_forward_hook(lambda *_: self.calls.append("hook"))

    def encode(self, ids: Tensor) -> Tensor:
        like = next(self.parameters())
        x = self.table(ids).to(like.device, self.first.weight.dtype) + self.positions[:, None]
        x = torch.relu(self.alias(x)).view(*ids.shape, self.first.out_features)
        read: Tensor = self.also[0](x) / self.read.weight.norm(dim=1)
        return read

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.out(self.encode(ids).mean(1))
        return result


IDS = torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(2))


def library() -> Library:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Library().eval()


def library_layers(model: nn.Module, name: str | None = None) -> dict[str, QuantizedLayer]:
    layers = layers_of(model, name or int8_scheme(), IDS)
    kept = ("table.weight", "read.weight")
    return {name: replace(layer, keeps=name in kept) for name, layer in layers.items()}


def served(owned: bool = True) -> tuple[Library, Library, dict[str, QuantizedLayer]]:
    model = library()
    layers = library_layers(model)
    fast = CPU_INT8.deployed(model, layers, owned=owned)
    assert isinstance(fast, Library)
    return model, fast, layers


def test_foreign_code_goes_on_as_before() -> None:
    model, fast, layers = served()
    assert set(layers) == {"table.weight", "first.weight", "read.weight"}
    assert fast.out.weight is fast.table.weight
    assert fast.alias is fast.first
    assert fast.also[0] is fast.read
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), expected_of(model, layers, IDS), rtol=1e-4, atol=1e-4)
        assert torch.equal(fast.table(IDS), model.table(IDS)), "the lookup of a tied table stays"
        assert torch.equal(fast.read.weight.norm(dim=1), model.read.weight.norm(dim=1)), (
            "a second reader keeps its values"
        )
        with quantized(model, layers):
            encoded = model.encode(IDS)
        torch.testing.assert_close(fast.encode(IDS), encoded, rtol=1e-4, atol=1e-4)
    assert fast.first.weight.shape == (32, 32)
    assert fast.first.weight.device.type == "cpu"
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_hooks_of_a_layer_are_called() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
    seen.clear()
    fast(X)
    assert seen == ["before", "after"]


def changes(fast: Library) -> None:
    """What a user does to a deployed model."""
    fast.requires_grad_(True)
    fast.load_state_dict({name: value.clone() for name, value in fast.state_dict().items()})
    with torch.no_grad():
        for parameter in fast.parameters():
            if not isinstance(parameter, LowWeight):
                parameter.mul_(3)
    fast.seen.add_(1)
    fast.positions.add_(1)
    fast.bfloat16().half().to(torch.float64)


def test_nothing_done_to_the_deployed_model_reaches_the_user_s() -> None:
    model, fast, _ = served()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    changes(fast)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model.positions, torch.arange(4.0))


def test_a_kept_parameter_is_the_copy_s_own() -> None:
    """Another model's state is loaded into the copy, and the user's model is trained on: neither sees the other."""
    model, fast, _ = served()
    assert not set(storages_of(fast.state_dict().values())) & set(storages_of(model.state_dict().values()))
    retrained = library()
    with torch.no_grad():
        for parameter in retrained.parameters():
            parameter.mul_(-0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast.load_state_dict(CPU_INT8.deployed(retrained, library_layers(retrained), owned=True).state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    looked_up = fast.table(IDS)
    assert torch.equal(looked_up, retrained.table(IDS))
    with torch.no_grad():
        model.table.weight.zero_()
        retrained.table.weight.zero_()
    assert torch.equal(fast.table(IDS), looked_up)


@pytest.mark.parametrize("how", [copy.deepcopy, through_torch, through_pickle])
@pytest.mark.parametrize("name", ["cpu", "emulated", "stored"])
def test_copies_compute_the_same_and_are_copies(how: Callable[[nn.Module], nn.Module], name: str) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    chosen = {"cpu": int8_scheme(), "emulated": "fp8", "stored": "fp8-weight"}[name]
    layers = layers_of(model, chosen)
    fast = emulated.deployed(model, layers) if name == "emulated" else CPU_INT8.deployed(model, layers)
    with torch.no_grad():
        expected = fast(X)  # and packed weights are there
        again = how(fast)
        assert torch.equal(again(X), expected)
        for weight in low_weights(again).values():
            weight.codes.zero_()
            weight.cache.clear()
        assert torch.equal(fast(X), expected)


@pytest.mark.parametrize("name", [int8_scheme(), "fp8-weight", "int8-row"])
def test_a_state_dict_is_read_without_trusting_code(name: str) -> None:
    """By `torch.load` as it is, which takes texts, numbers and tensors alone."""
    model: nn.Module = nn.Embedding(20, 16) if "row" in name else nn.Linear(32, 16)
    given = torch.arange(5) if "row" in name else X
    layer = quantize_layer("weight", model.weight, (1,), SCHEMES[name], InputRange(0.03, 120))
    fast = CPU_INT8.deployed(model, {"weight": layer})
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert state["weight"].how == fast.weight.how
    other = CPU_INT8.deployed(model, {"weight": layer}, owned=True)
    with torch.no_grad():
        for part in other.weight.parts.values():
            part.zero_()
        other.load_state_dict(state)
        assert torch.equal(other(given), fast(given))


def test_casts_leave_codes_alone() -> None:
    _, fast, layers = served()
    codes = {name: layer.codes.clone() for name, layer in layers.items()}
    for dtype in (torch.bfloat16, torch.float16) if has_bf16() else (torch.float16,):
        other = copy.deepcopy(fast).to(dtype)
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        with torch.no_grad():
            assert other(IDS).dtype == dtype
            assert bool(torch.isfinite(other(IDS)).all())
        assert all(torch.equal(weight.codes, codes[name]) for name, weight in low_weights(other).items())
        assert all(weight.codes.dtype == torch.int8 for weight in low_weights(other).values())


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no BF16 arithmetic")
@pytest.mark.parametrize("how", ["linear", "matmul on the right", "einsum", "a 1x1 convolution"])
def test_autocast_gives_its_dtype(how: str) -> None:
    model = Spelled(*SPELLINGS[how]).eval()
    layers = layers_of(model, int8_scheme())
    for fast in (CPU_INT8.deployed(model, layers), emulated.deployed(model, layers)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = fast(X)
            with quantized(model, layers):
                expected = model(X)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.skipif(not has_bf16(), reason="this CPU has no BF16 arithmetic")
def test_deployed_inside_autocast_nothing_is_blamed_on_the_machine() -> None:
    model = library()
    with torch.autocast("cpu", torch.bfloat16):
        fast = deploy(model, map_of(library_task(model), {"first.weight": int8_scheme()}))
    assert set(low_weights(fast)) == {"first.weight"}


def test_the_state_of_a_retrained_model_is_taken_over() -> None:
    """Codes, scales and input range, with what was packed from the old ones thrown away."""
    first = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(-0.7)
    old = CPU_INT8.deployed(first, layers_of(first, int8_scheme()), owned=True)
    new = CPU_INT8.deployed(second, layers_of(second, int8_scheme(), range_of=InputRange(0.05, 99)), owned=True)
    with torch.no_grad():
        old(X)
        expected = new(X)
        assert str(old.load_state_dict(new.state_dict())) == "<All keys matched successfully>"
        assert torch.equal(old(X), expected)
        old[0].weight.codes.zero_()
        assert torch.equal(new(X), expected)
        again = CPU_INT8.deployed(first, layers_of(first, int8_scheme()))
        again.load_state_dict(new.state_dict(), assign=True)
        assert torch.equal(again(X), expected)


@pytest.mark.parametrize("wrong", ["float", "scheme", "shape"])
def test_the_state_of_another_kind_is_refused(wrong: str) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
    with torch.no_grad():
        expected = fast(X)
    if wrong == "float":
        state = model.state_dict()
    elif wrong == "scheme":
        state = CPU_INT8.deployed(model, layers_of(model, "int8-weight")).state_dict()
    else:
        other = nn.Sequential(nn.Linear(32, 16))
        state = CPU_INT8.deployed(other, layers_of(other, int8_scheme())).state_dict()
    with pytest.raises(
        RuntimeError, match="size mismatch" if wrong == "shape" else "0.weight: expected a weight in int8"
    ):
        fast.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(fast[0](X) if wrong == "float" else fast(X), expected)


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.zero_(), lambda w: w.t().add_(1), nn.init.zeros_])
def test_codes_are_not_written(write: Callable[[Tensor], Any]) -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
    before = fast[0].weight.codes.clone()
    with pytest.raises(DeployError, match=r"0\.weight: its codes cannot be written"), torch.no_grad():
        write(fast[0].weight)
    assert torch.equal(fast[0].weight.codes, before)


def test_unexpected_readers_get_the_values_of_the_codes() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    layers = layers_of(model, int8_scheme())
    weight, values = CPU_INT8.deployed(model, layers)[0].weight, layers["0.weight"].weight()
    with torch.no_grad():
        for read in (
            torch.sum,
            lambda w: w + 1,
            lambda w: w[3:5].abs(),
            lambda w: w.reshape(-1)[:7],
            lambda w: torch.cdist(w, w),
            lambda w: w.data.exp(),
            lambda w: torch.stack([w, w]),
            lambda w: w.t().contiguous() * 2,
            lambda w: torch.linalg.vector_norm(w),
        ):
            assert torch.equal(read(weight), read(values))
    assert weight.sum().dtype == torch.float32


@pytest.mark.parametrize("name", ["cpu", "emulated", "stored"])
def test_a_model_is_shared_with_other_processes(name: str) -> None:
    """By the memory of its parts: a server makes its workers so."""
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    layers = layers_of(model, {"cpu": int8_scheme(), "emulated": "fp8", "stored": "fp8-weight"}[name])
    target = emulated.deployed if name == "emulated" else CPU_INT8.deployed
    fast = target(model, layers, owned=True)
    with torch.no_grad():
        expected = fast(X)
        assert not fast[0].weight.is_shared()
        assert fast.share_memory() is fast
        assert all(parameter.is_shared() for parameter in fast.parameters())
        worker = pickle.loads(ForkingPickler.dumps(fast))
        assert torch.equal(fast(X), expected)
        assert torch.equal(worker(X), expected)
        fast[0].weight.codes.zero_()
    assert not worker[0].weight.dequantize().any(), "one memory for both"
    assert not any(parameter.is_shared() for parameter in model.parameters())


def test_other_libraries_read_the_values_of_the_codes() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    layers = layers_of(model, int8_scheme())
    weight, values = CPU_INT8.deployed(model, layers)[0].weight, layers["0.weight"].weight()
    reads = (
        lambda w: w.numpy(),
        lambda w: w.tolist(),
        np.asarray,
        lambda w: w.detach().t().numpy().copy(),
        np.from_dlpack,
    )
    for read in (*reads, torch.from_dlpack):
        assert np.array_equal(read(weight), read(values))


def test_what_takes_memory_or_a_trace_is_told_what_to_do_instead(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    model = BertModel(config).eval()
    name = "encoder.layer.0.intermediate.dense.weight"
    weight = model.get_parameter(name)
    layer = quantize_layer(name, weight, (1,), SCHEMES[int8_scheme()], InputRange(0.03, 120))
    fast, ids = CPU_INT8.deployed(model, {name: layer}), torch.ones(2, 8, dtype=torch.long)
    for writes in (
        lambda: fast.save_pretrained(tmp_path),
        lambda: save_file(fast.state_dict(), tmp_path / "weights.safetensors"),
    ):
        with pytest.raises(DeployError, match=rf"^{name}: a weight in .* take precimap\.save_deployed or torch\.save"):
            writes()
    with pytest.raises(DeployError, match=r"^a model with low-precision weights is not traced .* take torch\.export"):
        torch.jit.trace(fast, (ids,), strict=False)
    with torch.no_grad():
        assert torch.isfinite(fast(ids).last_hidden_state).all()


def test_other_data_is_a_write() -> None:
    model = nn.Sequential(nn.Linear(32, 48))
    fast = CPU_INT8.deployed(model, layers_of(model, int8_scheme()), owned=True)
    with torch.no_grad():
        model[0].weight.mul_(-0.7)
        other = CPU_INT8.deployed(model, layers_of(model, int8_scheme()))
        assert not torch.equal(fast(X), other(X))
        with pytest.raises(DeployError, match=r"0\.weight: expected a weight in int8"):
            fast[0].weight.data = torch.zeros(48, 32)
        fast[0].weight.data = other[0].weight.data
        fast[0].bias.data = other[0].bias.data
        assert torch.equal(fast(X), other(X))


def library_task(model: nn.Module) -> Task:
    def batch(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(50, (30, 4), generator=torch.Generator().manual_seed(seed))
        return {"ids": ids, "labels": torch.ones(30)}

    return Task(
        model,
        splits=Splits(*([batch(seed)] for seed in range(3))),
        forward=lambda m, b: m(b["ids"]).mean(1),
        loss=lambda s, b: (s - b["labels"]).square(),
        metric=Loss(),
    )


def skeleton() -> Library:
    """Parameters on the meta device, tied as they are; buffers as they are: what accelerate's init_empty_weights makes."""
    made = library()
    tied = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        for parameter in made.parameters()
    }
    for module in made.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = tied[id(parameter)]
    return made


def test_a_file_of_a_tied_model_is_read(tmp_path: Path) -> None:
    """With a second reader, and buffers that no state dict holds; into other values, and into none."""
    model, path = library(), tmp_path / "model.safetensors"
    names = ("table.weight", "first.weight", "read.weight")
    fast = deploy(model, map_of(library_task(model), dict.fromkeys(names, int8_scheme())))
    save_deployed(fast, model, path)
    zeroed = library()
    with torch.no_grad():
        for parameter in zeroed.parameters():
            parameter.zero_()
        zeroed.seen.fill_(7)
    for given in (zeroed, skeleton()):
        loaded = load_deployed(given, path)
        assert set(low_weights(loaded)) == set(names)
        assert loaded.out.weight is loaded.table.weight
        assert torch.equal(loaded.seen, model.seen)
        with torch.no_grad():
            assert torch.equal(loaded(IDS), fast(IDS))
            assert torch.equal(loaded.read.weight.norm(dim=1), model.read.weight.norm(dim=1))
    assert all(not parameter.any() for parameter in zeroed.parameters())


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model, path = library(), tmp_path / "model.safetensors"
    fast = deploy(model, map_of(library_task(model), {"table.weight": int8_scheme()}))
    save_deployed(fast, model, path)
    smaller = library()
    smaller.table = nn.Embedding(40, 32)
    smaller.out.weight = smaller.table.weight
    with pytest.raises(MapError, match=r"table\.weight: the model has .*40, 32.*50, 32"):
        load_deployed(smaller, path)
    with torch.device("meta"):
        without = Library().eval()
    without.out.weight = without.table.weight
    with pytest.raises(MapError, match="positions is a buffer that is not saved"):
        load_deployed(without, path)
    with pytest.raises(DeployError, match="another architecture"):
        save_deployed(fast, smaller, path)


def test_threads_get_the_answers_of_one() -> None:
    _, fast, _ = served()
    inputs = [torch.randint(50, (6, 4), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    assert not wrong_in_threads(fast.encode, inputs, 250)


def test_a_copy_for_a_moment_holds_no_second_model() -> None:
    model, fast, _ = served(owned=False)
    assert fast.read.bias.data_ptr() == model.read.bias.data_ptr()
    assert fast.read.bias is not model.read.bias
    _, own, _ = served()
    assert own.read.bias.data_ptr() != model.read.bias.data_ptr()


def test_a_weight_goes_when_its_model_goes() -> None:
    _, fast, _ = served()
    with torch.no_grad():
        fast(IDS)
    held = weakref.ref(fast.first.weight)
    del fast
    import gc

    gc.collect()
    assert held() is None


def test_another_place_than_the_kernel_s_is_refused() -> None:
    linear = nn.Linear(32, 48, device="meta")
    layer = next(iter(layers_of(nn.Linear(32, 48), int8_scheme()).values()))
    with pytest.raises(DeployError, match="expected a model on the CPU"):
        CPU_INT8.deployed(linear, {"weight": layer})
    with pytest.raises(DeployError, match="the model has no such parameter"):
        placed(nn.Linear(32, 48), {"nowhere": layer}, lambda *_: None)  # type: ignore[arg-type,return-value]


def test_a_scheme_that_a_search_did_not_try_is_refused() -> None:
    chosen: Scheme = SCHEMES["fp8"]
    model = nn.Linear(32, 48)
    with pytest.raises(DeployError, match="no arithmetic for it"):
        CPU_INT8.deployed(model, {"weight": quantize_layer("weight", model.weight, (1,), chosen, None)})
