"""FP8 layers: codes to the bit, products against the emulation, one graph for compilers. On a GPU too, where there is one.

On a CPU `torch._scaled_mm` is a reference loop, so shapes are tiny; it checks neither layouts nor dtypes as CUDA does, so
those are held to the op's own meta function for CUDA tensors.
"""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.numerics.formats import E4M3
from precimap.numerics.quantize import Affine, dequantize, quantize
from precimap.numerics.schemes import SCHEMES, Granularity, Rounding, Scheme
from precimap.runtime.compiling.compiled import compiled
from precimap.runtime.nvidia import fp8 as fp8_weights
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.nvidia.fp8 import FP8_KERNEL, RESULTS, StaticScale, dynamic_codes, scaled_experts
from precimap.runtime.nvidia.target import CUDA_FP8
from precimap.runtime.weights.low_weight import low_weight
from precimap.runtime.weights.placing import placed, weight_of

needs_compiler = pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
on_devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")),
    ],
)
CHANNEL, TENSOR, TOKEN = Granularity.PER_CHANNEL, Granularity.PER_TENSOR, Granularity.PER_TOKEN
MIXED = {  # no scheme has a name for these; a user may write them down
    "channel-static": Scheme("channel-static", Rounding(E4M3, CHANNEL), Rounding(E4M3, TENSOR)),
    "tensor-token": Scheme("tensor-token", Rounding(E4M3, TENSOR), Rounding(E4M3, TOKEN, dynamic=True)),
}
SERVED = {name: SCHEMES[name] for name in ("fp8", "fp8-tensor", "fp8-static")} | MIXED
ROUNDINGS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 1e-6}


def layer_of(linear: nn.Linear, scheme: Scheme, name: str = "weight", phase: float = 1.0) -> QuantizedLayer:
    found = quantize_layer(name, linear.weight, (1,), scheme, InputRange(0.01, 0))
    return QuantizedLayer(
        name=name,
        scheme=scheme,
        codes=found.codes,
        weight_affine=found.weight_affine,
        input_range=found.input_range,
        input_phase=phase,
    )


def fp8(linear: nn.Linear, scheme: Scheme, phase: float = 1.0) -> nn.Linear:
    made = placed(linear, {"weight": layer_of(linear, scheme, phase=phase)}, fp8_weight)
    assert isinstance(made, nn.Linear)
    return made


def fp8_weight(layer: QuantizedLayer, parameter: Tensor) -> Any:
    """Without a look at the hardware."""
    return weight_of(layer, parameter, FP8_KERNEL)


def linear_of(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = True, device: str = "cpu") -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * inputs**-0.5)
        linear.weight[0] *= 50  # one scale for all rows would lose the others' small values
    return linear.to(device, dtype).eval()


def emulated(linear: nn.Linear, layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The emulation in float32, and the sum of the magnitudes of all products."""
    wide = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device=x.device)
    with torch.no_grad():
        wide.load_state_dict({name: value.float() for name, value in linear.state_dict().items()})
        with quantized(wide, {"weight": layer}):
            expected: Tensor = wide(x.float())
        magnitudes = x.float().abs() @ layer.weight().abs().T
    return expected, magnitudes


def assert_emulates(module: nn.Linear, linear: nn.Linear, x: Tensor) -> None:
    with torch.no_grad():
        found = module(x)
    expected, magnitudes = emulated(linear, module.weight.layer(), x)
    assert found.dtype == linear.weight.dtype
    assert found.shape == expected.shape
    summed = 1e-6 if x.device.type == "cpu" else FP8_KERNEL.accumulation_error
    allowed = ROUNDINGS[found.dtype] * expected.abs() + summed * (magnitudes + 1)
    assert bool(((found.float() - expected).abs() <= allowed).all())


def numbers() -> Tensor:
    """All exponents, both signs, NaN, infinities, zeros, subnormals, and values on the ties of E4M3."""
    patterns = torch.randint(-(2**31), 2**31, (1 << 14,), generator=torch.Generator().manual_seed(0))
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (codes[1:] + codes[:-1]) / 2
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 2.0**-149, -(2.0**-140)])
    return torch.cat([patterns.to(torch.int32).view(torch.float32), ties, -ties, special])


@on_devices
@pytest.mark.parametrize("dtype", RESULTS)
def test_static_codes_are_those_of_the_quantiser_to_the_bit(dtype: torch.dtype, device: str) -> None:
    for scale in (2.0**-126, 1e-20, 0.0137, 1.0, 1e20):
        affine = Affine(torch.tensor(scale), None)
        x = torch.cat([numbers(), numbers()[-300:] * affine.scale]).to(dtype)
        found, expected = StaticScale(float(affine.scale)).codes(x.to(device)).cpu(), quantize(x, E4M3, affine)
        known = ~expected.float().isnan()  # a NaN has two codes
        assert torch.equal(found.float().isnan(), ~known)
        assert torch.equal(found.view(torch.uint8)[known], expected.view(torch.uint8)[known])


@on_devices
@pytest.mark.parametrize("dtype", RESULTS)
def test_dynamic_codes_are_amax_over_448(dtype: torch.dtype, device: str) -> None:
    """Row by row against numpy and ml_dtypes; rows of zeros, of subnormals, with an infinity and with a NaN."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 32, generator=generator) * 10.0 ** torch.randint(-6, 5, (12, 1), generator=generator)
    x[0], x[1], x[2, 3], x[3, 4], x[4] = 0, 1e-42, torch.inf, torch.nan, 0.0
    x[4, 5] = -448.0
    x = x.to(dtype)
    codes, scales = dynamic_codes(x.to(device), Rounding(E4M3, TOKEN, dynamic=True), 1.0)
    rows = x.float().numpy()
    largest = np.minimum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).max * np.float32(1 - 2.0**-23))
    expected = np.where(largest == 0, 1, np.maximum(largest / np.float32(448), np.float32(2.0**-126)))
    np.testing.assert_array_equal(scales.cpu().numpy(), expected.astype(np.float32))
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.clip(rows * (np.float32(1) / expected.astype(np.float32)), -448, 448)
    wanted = scaled.astype(ml_dtypes.float8_e4m3fn)
    isnan = np.isnan(wanted.astype(np.float32))
    assert isnan[3].all()
    assert isnan.sum() == 32
    np.testing.assert_array_equal(codes.cpu().view(torch.uint8).numpy()[~isnan], wanted.view(np.uint8)[~isnan])
    assert torch.equal(codes.cpu().float().isnan(), torch.from_numpy(isnan))


@on_devices
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_are_those_of_the_emulation(name: str, dtype: torch.dtype, bias: bool, device: str) -> None:
    linear = linear_of(32, 48, dtype, bias, device)
    generator = torch.Generator().manual_seed(2)
    for shape in ((5, 32), (2, 3, 32), (1, 32), (32,), (0, 32)):
        x = torch.randn(shape, generator=generator).to(device, dtype)
        assert_emulates(fp8(linear, SERVED[name]), linear, x)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.sampled_from(sorted(SERVED)), st.sampled_from(RESULTS),
    st.floats(1e-3, 1e3), st.floats(0.8, 1.25), st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_scale_and_phase(
    m: int, k: int, n: int, name: str, dtype: torch.dtype, size: float, phase: float, seed: int
) -> None:
    linear = linear_of(16 * k, 16 * n, dtype)
    x = (torch.randn(m, 16 * k, generator=torch.Generator().manual_seed(seed)) * min(size, 4.0)).to(dtype)
    module = fp8(linear, SERVED[name], phase if SERVED[name].input.dynamic else 1.0)  # type: ignore[union-attr]
    assert_emulates(module, linear, x)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=4, max_size=4), st.sampled_from(["fp8", "tensor-token"]))
def test_rows_have_scales_of_their_own(powers: list[int], name: str) -> None:
    """A row times a power of two gives its result times that power, to the bit; no row sees another."""
    linear = linear_of(32, 16, torch.float32, bias=False)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    factors = torch.tensor([2.0**power for power in powers])[:, None]
    with torch.no_grad():
        module = fp8(linear, SERVED[name])
        assert torch.equal(module(x * factors), module(x) * factors)
        assert torch.equal(module(x[2:3]), module(x)[2:3])


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("bias", [True, False])
def test_row_scales_that_a_cpu_lacks_are_written_out(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in torch 2.11."""
    taken: list[bool] = []
    plain = torch._scaled_mm

    def tensorwise(*args: Any, scale_a: Tensor, scale_b: Tensor, **rest: Any) -> Tensor:
        taken.append(scale_a.numel() == scale_b.numel() == 1)
        return plain(*args, scale_a=scale_a, scale_b=scale_b, **rest)

    monkeypatch.setattr(fp8_weights, "ROW_SCALES_ON_CPU", False)
    monkeypatch.setattr(torch, "_scaled_mm", tensorwise)
    linear, x = linear_of(32, 48, torch.bfloat16, bias), torch.randn(5, 32).bfloat16()
    assert_emulates(fp8(linear, SERVED[name]), linear, x)
    assert taken == [True]


def test_a_planted_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight scales one channel off: what a wrong layout would do."""
    plain = fp8_weights.scaled_mm

    def shifted(codes: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, *rest: Any) -> Tensor:
        return plain(codes, weight, scales, weight_scales.roll(1, 1).contiguous(), *rest)

    linear = linear_of(32, 48, torch.bfloat16)
    module, x = fp8(linear, SCHEMES["fp8"]), torch.randn(5, 32).bfloat16()
    assert_emulates(module, linear, x)
    monkeypatch.setattr(fp8_weights, "scaled_mm", shifted)
    with pytest.raises(AssertionError):
        assert_emulates(module, linear, x)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 16])
def test_cuda_would_take_the_operands(
    name: str, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts by torch's own rules for CUDA, on fake CUDA tensors; dtypes by those of its ScaledBlas.cpp."""
    calls: list[tuple[Any, ...]] = []
    plain = fp8_weights.scaled_mm
    monkeypatch.setattr(fp8_weights, "scaled_mm", lambda *args: (calls.append(args), plain(*args))[1])
    with torch.no_grad():
        fp8(linear_of(32, 48, dtype), SERVED[name])(torch.randn(rows, 32).to(dtype))
    ((codes, weight, scales, weight_scales, bias, result),) = calls
    with FakeTensorMode(), torch.device("cuda"):
        operands = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in (codes, weight, scales, weight_scales)
        ]
        assert plain(*operands, None, result).shape == (rows, 48)
    # ScaledBlas.cpp: no bias of a float32 result, otherwise one of the result's dtype; row-wise scales with BF16.
    assert bias is None if result == torch.float32 else bias is not None and bias.dtype == result
    assert scales.numel() == weight_scales.numel() == 1 or result == torch.bfloat16


class OnDevice(TorchDispatchMode):
    """Counts ops; fails for one that reads or makes a tensor on the host, which no graph could capture."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            assert not isinstance(value, Tensor) or value.device.type == "cuda", func
        assert func is not torch.ops.aten._local_scalar_dense.default
        self.calls += 1
        return result


@pytest.mark.parametrize(
    "name", sorted(set(SERVED) - {"channel-static"})
)  # torch copies that scale on CUDA builds only
@pytest.mark.parametrize("dtype", RESULTS)
def test_nothing_waits_for_the_host(name: str, dtype: torch.dtype) -> None:
    """On fake CUDA tensors; experts too."""
    module = fp8(linear_of(32, 48, dtype), SERVED[name])
    with FakeTensorMode(), torch.no_grad():
        weight = module.weight
        fake = {
            name: torch.empty(part.shape, dtype=part.dtype, device="cuda") for name, part in weight.canonical().items()
        }
        module.weight = low_weight(fake, weight.how, weight.dtype)
        module.bias = nn.Parameter(torch.empty(48, dtype=dtype, device="cuda"), False)
        x, mode = torch.empty(5, 32, device="cuda", dtype=dtype), OnDevice()
        codes, scales = (
            torch.empty(2, 48, 32, dtype=torch.float8_e4m3fn, device="cuda").transpose(1, 2),
            torch.empty(2, 48, device="cuda"),
        )
        ends = torch.empty(2, device="cuda", dtype=torch.int32)
        with mode:
            assert FP8_KERNEL.rows(x, module.weight, module.bias, dtype).dtype == dtype
            assert scaled_experts(x, codes, scales, ends).shape == (5, 48)
    assert mode.calls > 10


def test_what_cannot_be_multiplied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)

    def deploy(linear: nn.Linear, scheme: Scheme) -> None:
        CUDA_FP8.deployed(linear, {"weight": layer_of(linear, scheme)})

    for name in ("fp8-weight", "fp8-e5m2", "int8", "int8-weight"):
        with pytest.raises(DeployError, match="weight"):
            deploy(linear_of(32, 48, torch.bfloat16), SCHEMES[name])
    for widths in ((32, 24), (40, 48)):
        with pytest.raises(DeployError, match="multiples of 16"):
            deploy(linear_of(*widths, torch.bfloat16), SCHEMES["fp8"])
    with pytest.raises(DeployError, match="float64"):
        deploy(linear_of(32, 48, torch.float64), SCHEMES["fp8"])


class Attention(nn.Module):
    """Three layers that read one LayerNorm, and one that reads an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key, self.value = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(32, 48, bias=False)
        self.out = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        result: Tensor = self.out(nn.functional.gelu(self.query(x) * self.key(x) + self.value(x)))
        return result


def deployed(model: nn.Module, scheme: Scheme) -> nn.Module:
    layers = {
        f"{path}.weight": layer_of(module, scheme, f"{path}.weight")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }

    return placed(model, layers, fp8_weight)


@needs_compiler
@on_devices
@pytest.mark.parametrize("name", SERVED)
def test_a_compiler_sees_one_graph_and_quantises_a_shared_input_once(name: str, device: str) -> None:
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    model = deployed(Attention().eval().bfloat16().to(device), SERVED[name])
    x = torch.randn(2, 5, 32).bfloat16().to(device)
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))(x)
        assert torch.equal(found, model(x))
    (graph,) = graphs
    assert _count(graph.graph, torch.ops.aten._scaled_mm.default) == 4
    casts = [node for node in graph.graph.nodes if _is_cast(node)]
    assert len(casts) == 4
    # torch 2.13 saturates in the cast; older ones, and other devices, make NaN of what is beyond 448.
    assert {node.args[0].target for node in casts} == {torch.ops.aten.clamp.default}
    assert _quantised(fx_graph_cse(graph.graph)) == 2


def _count(graph: torch.fx.Graph, op: Any) -> int:
    return sum(node.target is op for node in graph.nodes)


def _quantised(graph: torch.fx.Graph) -> int:
    return sum(_is_cast(node) for node in graph.nodes)


def _is_cast(node: torch.fx.Node) -> bool:
    return node.target is torch.ops.aten._to_copy.default and node.kwargs.get("dtype") == torch.float8_e4m3fn


@needs_compiler
@on_devices
@pytest.mark.parametrize("name", ["fp8", "fp8-static"])
def test_compiled_code_quantises_a_shared_input_once(name: str, device: str) -> None:
    """Two FP8 tensors are made for four products, without a graph break. A code that moves is worth a step."""
    torch._dynamo.reset()
    model = deployed(Attention().eval().bfloat16().to(device), SERVED[name])
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    found, sources = run_and_get_code(lambda: compiled(model, (x,))(x))
    code = "\n".join(sources)
    made = [line for line in code.splitlines() if "empty_strided" in line and "float8_e4m3fn" in line]
    assert len(made) == 2
    assert len(sources) == 1
    assert code.count("torch.float8_e4m3fn (32, 48) (1, 32)") == 3, "frozen weights are column-major still"
    assert code.count("extern_kernels._scaled_mm(") + code.count("aten._scaled_mm.default(") == 4
    with torch.no_grad():
        expected = model(x).float()
    error = (found.float() - expected).square().mean().sqrt()
    assert float(error) < 0.03 * float(expected.square().mean().sqrt())


@needs_compiler
def test_an_exported_model_carries_the_codes() -> None:
    model, x = deployed(Attention().eval(), SCHEMES["fp8"]), torch.randn(4, 32)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert torch.equal(program.module()(x), model(x))
    held = program.state_dict["query.weight"].codes
    assert torch.equal(held.view(torch.uint8), model.query.weight.codes.view(torch.uint8))


def test_the_state_dict_holds_codes_and_scales() -> None:
    linear = linear_of(32, 48, torch.bfloat16)
    state = fp8(linear, SCHEMES["fp8"]).state_dict()
    assert set(state) == {"weight", "bias"}
    assert set(state["weight"].parts) == {"codes", "scale"}
    largest = linear.weight.float().abs().amax(1, keepdim=True)
    values = dequantize(state["weight"].codes, E4M3, state["weight"].affine)
    assert bool(((values - linear.weight.float()).abs() <= largest / 16).all())
