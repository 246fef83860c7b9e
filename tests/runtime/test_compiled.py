"""Compiled calls: INT8 for every size, checked where code is made; and what is told of batches that nobody timed."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from helpers.small_tasks import COUNTED_INT8, planted_task
from precimap import (
    CPU_INT8,
    CPU_INT8_COMPILED,
    CUDA_FP8,
    CUDA_FP8_COMPILED,
    EndToEnd,
    compiled,
    deploy,
    discover,
    load_deployed,
    save_deployed,
    search,
)
from precimap.end_to_end import FormTimes, SizeTimes
from precimap.errors import BatchSizeWarning, DeployError
from precimap.hardware_profile import Times
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.layers.target import as_given
from precimap.numerics.schemes import scheme
from precimap.precision_map import PrecisionMap
from precimap.runtime.compiling import compiled as compiled_module
from precimap.runtime.compiling.compiled import CompiledCalls, compile_calls, no_compiler
from precimap.runtime.deploy import deployment_of
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.weights import low_weight
from precimap.runtime.x86.target import has_qlinear, int8_scheme

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Inductor and dynamo warn about parts of their own
    pytest.mark.skipif(no_compiler() is not None or not has_qlinear(), reason="no C++ compiler, or no INT8 products"),
]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))

    def encode(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    found = InputRange(0.03, 100)
    return {
        name: quantize_layer(name, parameter, (1,), scheme(int8_scheme()), found)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }


def test_every_size_is_int8_in_one_code() -> None:
    torch._dynamo.reset()
    model = Tower().eval()
    with CPU_INT8_COMPILED.running(model, layers_of(model)) as fast, torch.no_grad():
        calls = fast._compiled_call_impl
        assert isinstance(calls, CompiledCalls)
        eager = CPU_INT8.deployed(model, layers_of(model))
        fast(torch.randn(8, 64))
        assert (calls._products.found, calls._products.expected) == (2, 2)
        for rows in (8, 5, 300):
            x = torch.randn(rows, 64)
            torch.testing.assert_close(fast(x), eager(x), atol=0.03, rtol=0)
        assert calls.graphs == 1
        with torch.inference_mode():
            fast(torch.randn(8, 64))
        assert (calls.graphs, calls._products.found, calls._products.expected) == (2, 2, 2)


@pytest.mark.parametrize("name", ["fp8", "fp8-tensor", "fp8-static"])
def test_fp8_compiles_to_one_code_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU, which is let pass for a GPU: the target's own path, not its speed. A code that moves is worth a step."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch._dynamo.reset()
    model = Tower().eval().to(device, torch.bfloat16)
    layers = {
        weight: quantize_layer(weight, parameter, (1,), scheme(name), InputRange(0.02, 0))
        for weight, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
    eager = CUDA_FP8.deployed(model, layers)
    with CUDA_FP8_COMPILED.running(model, layers) as fast, torch.no_grad():
        for rows in (16, 48):
            x = torch.randn(rows, 64, device=device).bfloat16()
            found, expected = fast(x).float(), eager(x).float()
            assert float((found - expected).square().mean().sqrt()) < 0.05 * float(expected.square().mean().sqrt())
        assert fast._compiled_call_impl.graphs == 1
    assert CUDA_FP8_COMPILED.name == "cuda-fp8-compiled"
    assert "experimental" in CUDA_FP8_COMPILED.claim


def test_a_forward_that_passes_the_model_by_is_refused() -> None:
    """Its certificate would speak of compiled code, and none ran."""
    model = Tower().eval()
    with (
        pytest.raises(DeployError, match="called parts of it only"),
        CPU_INT8_COMPILED.running(model, layers_of(model)) as fast,
    ):
        fast.encode(torch.randn(8, 64))
    with as_given(CPU_INT8_COMPILED, model) as same:
        assert same is model, "the baseline is the model as given"


def test_many_forms_of_one_class_are_all_compiled() -> None:
    """Dynamo keeps 8 codes for a class and then runs eagerly without a word."""
    torch._dynamo.reset()
    x = torch.randn(8, 64)
    for _ in range(10):
        model = Tower().eval()
        fast = compiled(CPU_INT8.deployed(model, layers_of(model)), (x,))
        assert fast._calls.graphs == 1


@pytest.fixture(scope="module")
def precision_map(tmp_path_factory: pytest.TempPathFactory) -> PrecisionMap:
    folder = tmp_path_factory.mktemp("compiled")
    return search(
        planted_task(), schemes=[int8_scheme()], target=COUNTED_INT8, margin=0.2, ledger=folder
    ).map.model_copy(update={"end_to_end": None})


def timed(precision_map: PrecisionMap, *rows: int) -> PrecisionMap:
    """The same map with times at batches of so many rows."""
    one = Times(lower=1, median=1, upper=1, n=15)
    forms = tuple(
        FormTimes(precision=name, form="eager", seconds=one, p99=1, ratio=one, memory=None) for name in ("base", "map")
    )
    times = EndToEnd(
        map=precision_map.fingerprint,
        device=CPU_INT8.whole_timer.device(),
        served="eager",
        sizes=tuple(SizeTimes(units=n, rows=n, forms=forms) for n in rows),
        refused={},
        foretold=None,
        flops=1,
        peak_flops=1.0,
        peak_given=True,
    )
    return precision_map.model_copy(update={"end_to_end": times})


@pytest.mark.parametrize("target", ["cpu-int8", "cpu-int8-compiled"])
def test_batches_outside_the_timed_sizes_are_told_once(target: str, precision_map: PrecisionMap) -> None:
    task = planted_task()
    made = timed(precision_map, 16, 64).model_copy(update={"target": target})
    fast = deploy(task.model, made, task=task)  # scores 125 units itself, and says nothing of it
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", BatchSizeWarning)
        for rows in (16, 40, 64):
            fast(torch.randn(rows, 64))
    with pytest.warns(BatchSizeWarning, match="timed with batches of 16 to 64 rows and now gets 65"), torch.no_grad():
        fast(torch.randn(65, 64))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", BatchSizeWarning)
        fast(torch.randn(3, 64))


def test_times_of_another_target_tell_nothing(precision_map: PrecisionMap) -> None:
    task = planted_task()
    for fast in (
        deploy(task.model, timed(precision_map, 16), target="emulated"),
        deploy(task.model, precision_map),
    ):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", BatchSizeWarning)
            fast(torch.randn(65, 64))


@pytest.mark.filterwarnings("ignore:this map is not certified")
def test_a_compiled_model_is_saved_and_read(precision_map: PrecisionMap, tmp_path: Path) -> None:
    task, x = planted_task(), torch.randn(9, 64)
    other = {"target": "cpu-int8-compiled", "certificate": None}
    made = precision_map.model_copy(update=other)
    fast = deploy(task.model, made)
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    loaded = load_deployed(planted_task().model, tmp_path / "model.safetensors")
    assert deployment_of(loaded).target == "cpu-int8-compiled"
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))
    again = compiled(deploy(task.model, precision_map), (x,))
    assert deployment_of(again).map == precision_map


def test_code_that_failed_its_check_is_never_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo keeps it: a second call would find it, and nothing would be counted."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "SETTINGS", {"freezing": False})
    monkeypatch.setattr(low_weight, "freezing", torch.compiler.assume_constant_result(lambda: True))
    model = Tower().eval()
    fast, x = CPU_INT8.deployed(model, layers_of(model)), torch.randn(8, 64)
    calls = compile_calls(fast)
    for _ in range(2):
        with pytest.raises(DeployError, match="expected 2 INT8 products in the generated code, found 0"):
            fast(x)
    assert fast._compiled_call_impl is calls


def test_what_shapes_do_not_tell_compiles_with_the_settings_again() -> None:
    """A code for one tensor given twice does not hold for two of the same shape: INT8 there, too, and counted."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = torch.cat([self.tower(x), y], 1)
            return result

    torch._dynamo.reset()
    model = Pair().eval()
    fast, x, y = CPU_INT8.deployed(model, layers_of(model)), torch.randn(8, 64), torch.randn(8, 64)
    calls = compile_calls(fast)
    eager = CPU_INT8.deployed(model, layers_of(model))
    fast(x, x)
    first = calls.graphs
    with torch.no_grad():
        torch.testing.assert_close(fast(x, y), eager(x, y), atol=0.05, rtol=0)
    assert calls.graphs == first + 1, "one graph, without a break at each layer"
    assert calls._products.found == calls._products.expected > 0


@torch.library.custom_op("precimap_tests::product", mutates_args=())
def product_of_a_library(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@product_of_a_library.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class OtherwiseCompiled(nn.Module):
    """As transformers runs experts: by an operator of its own, in compiled code alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 48, bias=False), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.second(product_of_a_library(x, self.first.weight))
        return self.second(self.first(x))


def test_a_layer_that_only_compiled_code_reads_otherwise_is_refused() -> None:
    """Its decoded values would be multiplied in base precision, and every product that was traced would be there."""
    torch._dynamo.reset()
    model, x = OtherwiseCompiled().eval(), torch.randn(8, 64)
    fast = CPU_INT8.deployed(model, layers_of(model))
    compile_calls(fast)
    for _ in range(2):
        with pytest.raises(
            DeployError, match=r"first\.weight is read by precimap_tests\.product\.default in compiled code"
        ):
            fast(x)


def test_a_compiled_model_is_in_evaluation_mode(precision_map: PrecisionMap) -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 32)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.second(nn.functional.dropout(self.first(x), 0.5, self.training))
            return result

    model = Dropped().train()
    fast, x = CPU_INT8_COMPILED.deployed(model, layers_of(model)), torch.randn(8, 64)
    assert torch.equal(fast(x), fast(x))
    assert model.training


def test_a_loaded_model_warns_too(precision_map: PrecisionMap, tmp_path: Path) -> None:
    task = planted_task()
    save_deployed(deploy(task.model, timed(precision_map, 16)), task.model, tmp_path / "model.safetensors")
    loaded = load_deployed(planted_task().model, tmp_path / "model.safetensors")
    with pytest.warns(BatchSizeWarning, match="batches of 16 rows and now gets 17"), torch.no_grad():
        loaded(torch.randn(17, 64))


def test_codes_do_not_outlive_a_call() -> None:
    """A write that no version counts, as of `x.data` or of another library, is seen by the next call."""
    model = Tower().eval()
    fast = CPU_INT8.deployed(model, layers_of(model))
    x = torch.randn(8, 64)
    with torch.no_grad():
        fast(x)
        x.data.copy_(torch.randn(8, 64))
        assert torch.equal(fast(x), fast(x.clone()))


def test_a_layer_that_is_called_on_several_inputs_is_refused() -> None:
    """By the search, from what discovery saw; and where it was compiled all the same, by its count."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = Tower()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.cat([self.tower(x), self.tower(y)])

    torch._dynamo.reset()
    model, x, y = Twice().eval(), torch.randn(8, 64), torch.randn(8, 64)
    found = discover(model, lambda m, b: m(*b), (x, y)).layer("tower.first.weight")
    assert CPU_INT8.refusal(found, scheme(int8_scheme())) is None
    assert "called 2 times" in str(CPU_INT8_COMPILED.refusal(found, scheme(int8_scheme())))
    fast = CPU_INT8_COMPILED.deployed(model, layers_of(model))
    with pytest.raises(DeployError, match="no layer that one graph calls on several inputs"):
        fast(x, y)


def test_code_that_was_thrown_away_is_made_again() -> None:
    """`torch.compiler.reset` of somebody else: never in base precision, and never without being counted."""
    torch._dynamo.reset()
    model = Tower().eval()
    fast, x = CPU_INT8.deployed(model, layers_of(model)), torch.randn(8, 64)
    calls = compile_calls(fast)
    eager = CPU_INT8.deployed(model, layers_of(model))
    fast(x)
    before = calls.graphs
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(fast(x), eager(x), atol=0.03, rtol=0)
    assert calls.graphs > before
    assert calls._products.found == calls._products.expected > 0


@pytest.mark.parametrize("shape", [(8, 64), (2, 8, 64), (2, 2, 8, 64)])
def test_activations_and_residuals_are_part_of_the_products(shape: tuple[int, ...]) -> None:
    """As Inductor counts them: its patterns meet the layer's own input, and not rows that were cut out of it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(64, 96), nn.Linear(96, 64), nn.LayerNorm(64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.second(nn.functional.gelu(self.first(x))) + x)

    torch._dynamo.reset()
    model, x = Block().eval(), torch.randn(shape)
    layers = {name: layer for name, layer in layers_of(model).items() if "norm" not in name}
    counters["inductor"].clear()
    fast = compiled(CPU_INT8.deployed(model, layers), x)
    assert counters["inductor"]["qlinear_unary_matcher_count"] == 1  # gelu, whose results are codes at once
    assert counters["inductor"]["qlinear_binary_matcher_count"] == 1  # the sum with the input
    torch.testing.assert_close(fast(x), CPU_INT8.deployed(model, layers)(x), atol=0.1, rtol=0)


@pytest.mark.parametrize("form", ["tuple", "mapping", "tensor"])
def test_an_example_is_given_as_the_model_is_called(form: str) -> None:
    base, x = Tower().eval(), torch.randn(8, 64)
    fast = CPU_INT8.deployed(base, layers_of(base))
    example = {"tuple": (x,), "mapping": {"x": x}, "tensor": x}[form]
    model = compiled_module.compiled(fast, example)
    calls = model._calls
    made = calls.graphs
    assert made == 1
    found = model(**example) if isinstance(example, dict) else model(x)
    assert calls.graphs == made, "nothing was compiled anew"
    with torch.no_grad():
        assert torch.allclose(found, fast(x), atol=0.05)
