"""INT8 layers: inputs quantised to the bit, shared only while they are the same, and what compilers make of them."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from helpers.going_round import wrong_in_threads
from precimap import CPU_INT8
from precimap.errors import DeployError, SchemeError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.numerics import fast
from precimap.numerics.fast import unsigned_codes
from precimap.numerics.formats import INT8, UINT7, UINT8, IntegerFormat
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.schemes import scheme
from precimap.runtime import shared_codes
from precimap.runtime.compiling import compiled as compiled_module
from precimap.runtime.compiling.compiled import compiled
from precimap.runtime.shared_codes import MOST_KEPT, SharedCodes
from precimap.runtime.weights import low_weight
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86.target import int8_scheme

needs_compiler = pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own


class Projections(nn.Module):
    """Two layers that read one input, with or without a change in place between them, and a third after a ReLU."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = in_place
        self.query, self.key, self.out = nn.Linear(64, 48), nn.Linear(64, 48), nn.Linear(48, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        query = self.query(x)
        if self.in_place:
            x.mul_(-0.5)
        result: Tensor = self.out(torch.relu(query + self.key(x)))
        return result


def deployed(model: nn.Module) -> nn.Module:
    weights = dict(model.named_parameters())
    layers = {
        name: quantize_layer(name, weight, (1,), scheme(int8_scheme()), InputRange(0.03, 100))
        for name, weight in weights.items()
        if weight.dim() == 2
    }
    return CPU_INT8.deployed(model, layers)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every input that is quantised, in order."""
    seen: list[Tensor] = []

    def counted(x: Tensor, format: IntegerFormat, scale: float, zero: int) -> tuple[Tensor, bool]:
        seen.append(x)
        return unsigned_codes(x, format, scale, zero)

    monkeypatch.setattr(shared_codes, "unsigned_codes", counted)
    return seen


@pytest.mark.parametrize("format", [UINT8, UINT7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_the_quantiser_to_the_bit(format: IntegerFormat, dtype: torch.dtype) -> None:
    """All exponents, both signs, NaN with any payload, infinities, and every tie, at scales from tiny to huge."""
    patterns = torch.randint(-(2**31), 2**31, (1 << 15,), generator=torch.Generator().manual_seed(0))
    floats = patterns.to(torch.int32).view(torch.float32)
    for scale in (2.0**-126, 1e-20, 0.0137, 1.0, 1e20):
        for zero in (0, 1, 64, format.maximum):
            affine = Affine(torch.tensor(scale), torch.tensor(float(zero)))
            ties = (torch.arange(-300, 300) + 0.5) * affine.scale
            special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
            x = torch.cat([floats, ties, special]).to(dtype)
            codes, spoiled = unsigned_codes(x, format, float(affine.scale), zero)
            assert torch.equal(codes, quantize(x, format, affine))
            assert spoiled
            large = x[(x.float() * affine.reciprocal).isfinite()]
            assert not unsigned_codes(large, format, float(affine.scale), zero)[1], "a sum may overflow"
            assert unsigned_codes(torch.cat([large, -special[:1].to(dtype)]), format, float(affine.scale), zero)[1]


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (7,), (3, 0), (5, 7), (2, 3, 4)])
def test_codes_of_any_shape_in_parts(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_CODED_PART", 3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    strided = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(1))[..., 0]
    affine = Affine(torch.tensor(0.02), torch.tensor(131.0))
    for values in (x, strided, x.requires_grad_()):
        found, spoiled = unsigned_codes(values, UINT8, float(affine.scale), 131)
        assert not spoiled
        assert found.shape == shape
        assert torch.equal(found, quantize(values, UINT8, affine))


def test_signed_codes_are_refused() -> None:
    with pytest.raises(SchemeError, match="unsigned"):
        unsigned_codes(torch.ones(2), INT8, 1.0, 0)


def test_siblings_quantise_their_input_once(calls: list[Tensor]) -> None:
    """From the second call on: the first one finds out whose input is read again."""
    model = Projections().eval()
    fast_model, x = deployed(model), torch.randn(5, 64)
    with torch.no_grad():
        fast_model(x)
        calls.clear()
        fast_model(x)
    assert [tuple(seen.shape) for seen in calls] == [(5, 64), (5, 48)]


@pytest.mark.parametrize("inference", [False, True])
def test_a_change_in_place_between_siblings_is_seen(inference: bool) -> None:
    """Against the emulation of the same codes, several times."""
    model, x = Projections(in_place=True).eval(), torch.randn(5, 64)
    fast_model = deployed(model)
    with torch.inference_mode(inference), torch.no_grad():
        for _ in range(3):
            found = fast_model(x)
            with quantized(model, {name: weight.layer() for name, weight in low_weights(fast_model).items()}):
                torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def codes_of(shared: SharedCodes, x: Tensor, scale: float = 0.02, zero: int = 100) -> Tensor:
    return shared.codes(x, UINT8, scale, zero, 1)[0]


def anew(x: Tensor) -> Tensor:
    return unsigned_codes(x, UINT8, 0.02, 100)[0]


def test_other_scales_do_not_share() -> None:
    shared, x = SharedCodes(), torch.randn(4, 8)
    for _ in range(3):
        for scale, zero, format in ((0.02, 100, UINT8), (0.03, 100, UINT8), (0.03, 50, UINT8), (0.03, 50, UINT7)):
            affine = Affine(torch.tensor(scale), torch.tensor(float(zero)))
            assert torch.equal(shared.codes(x, format, scale, zero, 1)[0], quantize(x, format, affine))


def test_codes_go_with_their_input() -> None:
    shared, x = SharedCodes(), torch.randn(4, 8)
    for _ in range(2):
        codes_of(shared, x)
    assert shared.kept
    del x
    gc.collect()
    assert not shared.kept


def test_the_same_values_are_shared_through_any_view_and_after_other_inputs(calls: list[Tensor]) -> None:
    """As discovery sees siblings; against codes made anew."""
    shared, x = SharedCodes(), torch.randn(4, 3, 8)
    for _ in range(2):
        codes_of(shared, x)
    assert len(calls) == 2
    others = [torch.randn(4, 8) for _ in range(MOST_KEPT - 1)]
    for values in (*others, x, x.view(12, 8), x.reshape(-1)):
        found = codes_of(shared, values)
        assert found.shape == values.shape
        assert torch.equal(found, anew(values))
    assert len(calls) == 2 + len(others)
    # Other parts and other orders of the same memory are other inputs.
    for values in (x[:2], x[2:], x.transpose(0, 1), torch.randn(4, 8)):
        assert torch.equal(codes_of(shared, values), anew(values))
    assert len(calls) == 2 + len(others) + 4


def test_a_layer_that_nobody_follows_keeps_no_copies() -> None:
    shared = SharedCodes()
    for _ in range(5):
        codes_of(shared, torch.randn(4, 8))
    assert not shared.kept


@pytest.mark.parametrize("how", ["data", "version", "numpy", "shared memory", "lent to numpy", "dlpack"])
def test_what_is_written_past_a_tensor_is_seen(how: str) -> None:
    """A buffer that is filled again for each request, by whatever way: codes are those of what it holds now."""
    shared, array = SharedCodes(), np.zeros((4, 8), np.float32)
    x = {
        "numpy": lambda: torch.from_numpy(array),
        "shared memory": lambda: torch.zeros(4, 8).share_memory_(),
    }.get(how, lambda: torch.zeros(4, 8))()
    alias = {"numpy": lambda: array, "lent to numpy": lambda: x.numpy(), "dlpack": lambda: np.from_dlpack(x)}
    written = alias.get(how, lambda: x.numpy())()
    for number in range(6):
        value = torch.randn(4, 8, generator=torch.Generator().manual_seed(number))
        if how == "data":
            x.data.copy_(value)
        elif how == "version":
            x.copy_(value)
        else:
            written[:] = value.numpy()
        for _ in range(3):
            assert torch.equal(codes_of(shared, x), anew(value))


def test_a_buffer_that_each_layer_finds_rewritten() -> None:
    """Inside one forward, past versions, and through methods that no hook of the model sees."""

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
            self.register_buffer("state", torch.zeros(4, 64), persistent=False)

        def encode(self, x: Tensor) -> Tensor:
            total = torch.zeros(4, 64)
            for number, layer in enumerate(self.layers):
                self.state.data.copy_(x * (number + 1))
                total = total + layer(self.state)
            return total

        def forward(self, x: Tensor) -> Tensor:
            return self.encode(x)

    model = Steps().eval()
    fast_model = deployed(model)
    layers = {name: weight.layer() for name, weight in low_weights(fast_model).items()}
    with torch.no_grad():
        for seed in range(4):
            x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
            with quantized(model, layers):
                expected = model(x)
            torch.testing.assert_close(fast_model.encode(x), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(fast_model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_makes_no_score(value: float, dtype: torch.dtype) -> None:
    """In the row that has it, and in no other; also where a sibling shares the codes."""
    if dtype == torch.bfloat16 and CPU_INT8.refusal(_layer(dtype), scheme(int8_scheme())) is not None:
        pytest.skip("this CPU has no BF16 arithmetic")
    model, x = Projections().eval().to(dtype), torch.randn(5, 64).to(dtype)
    fast_model = deployed(model)
    with torch.no_grad():
        whole = fast_model(x)
        x[2, 7] = value
        for _ in range(3):
            found = fast_model(x)
            assert bool(found[2].isnan().all())
            assert torch.equal(found[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


def test_threads_share_a_model() -> None:
    fast_model = deployed(Projections().eval())
    inputs = [torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    assert not wrong_in_threads(fast_model, inputs, 50)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generated_code_multiplies_in_int8(dtype: torch.dtype) -> None:
    """With the ReLU and the codes of the layer after it inside the product. A code that moves is worth `step`."""
    if dtype == torch.bfloat16 and CPU_INT8.refusal(_layer(dtype), scheme(int8_scheme())) is not None:
        pytest.skip("this CPU has no BF16 arithmetic")
    torch._dynamo.reset()
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval().to(dtype)
    fast_model, x = deployed(model), torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, sources = run_and_get_code(lambda: compiled(fast_model, (x,))(x))
    code = "\n".join(sources)
    products = [
        line for line in code.splitlines() if "torch.ops.onednn.qlinear_pointwise" in line and "= torch" in line
    ]
    assert len(products) == 2
    assert "'relu'" in products[0]
    assert "torch.uint8" in products[0]
    with torch.no_grad():
        expected = fast_model(x)
    step = 0.03 * float(fast_model[3].weight.affine.scale.max()) * 127
    largest = float((found - expected).abs().max())
    assert found.dtype == dtype
    assert largest <= (step if dtype == torch.float32 else 4 * step)
    assert float((found - expected).float().square().mean().sqrt()) < 0.02 * float(
        expected.float().square().mean().sqrt()
    )


@needs_compiler
def test_other_shapes_and_plain_compile_run_the_eager_layers() -> None:
    """To the bit, as there are no products in base precision behind the user's back."""
    torch._dynamo.reset()
    fast_model = deployed(Projections().eval())
    model = compiled(fast_model, (torch.randn(8, 64),))
    plain = torch.compile(fast_model, backend="eager")
    for x in (torch.randn(5, 64), torch.randn(2, 3, 64)):
        with torch.no_grad():
            assert torch.equal(model(x), fast_model(x))
            assert torch.equal(plain(x), fast_model(x))


@needs_compiler
def test_code_without_int8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted compile without freezing that traces the quantised form anyway: Inductor says nothing, `compiled` does."""
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "SETTINGS", {"freezing": False})
    monkeypatch.setattr(low_weight, "freezing", torch.compiler.assume_constant_result(lambda: True))
    with pytest.raises(DeployError, match="expected 3 INT8 products in the generated code, found 0"):
        compiled(deployed(Projections().eval()), (torch.randn(8, 64),))


@needs_compiler
def test_an_exported_model_carries_the_codes(tmp_path: Path) -> None:
    fast_model, x = deployed(Projections().eval()), torch.randn(8, 64)
    with torch.no_grad():
        program = torch.export.export(fast_model, (x,))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        found, expected = loaded.module()(x), fast_model(x)
    assert sum("quantize_per_tensor.default" in str(node.target) for node in loaded.graph.nodes) == 6
    assert torch.equal(loaded.state_dict["query.weight"].codes, fast_model.query.weight.codes)
    plain = loaded.run_decompositions({})  # without a tensor of ours
    assert not any(isinstance(value, low_weight.LowWeight) for value in plain.state_dict.values())
    torch.testing.assert_close(plain.module()(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _layer(dtype: torch.dtype) -> object:
    from precimap import discover

    model = nn.Linear(64, 32).eval().to(dtype)
    return discover(model, lambda m, b: m(b), torch.randn(2, 64).to(dtype)).layer("weight")
