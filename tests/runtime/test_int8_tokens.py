"""INT8 with a scale for each input row: to the bit the codes of the quantiser and the sums of whole numbers."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from helpers.going_round import through_pickle, through_torch, wrong_in_threads
from precimap import CPU_INT8, discover
from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer, quantize_layer
from precimap.numerics.quantize import quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import SCHEMES, scheme
from precimap.runtime.compiling.compiled import compiled
from precimap.runtime.kernel_checks import check_weight
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.x86 import building, tokens
from precimap.runtime.x86.target import has_bf16
from precimap.runtime.x86.tokens import AMX, TOKENS, TOKENS_KERNEL, VNNI, instructions

INT8_TOKENS = scheme("int8")
REASON = tokens.scheme_refusal(INT8_TOKENS)
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))
FORMS = (AMX, VNNI) if instructions() == AMX else (instructions(),)  # whoever has tiles has the other, too
DTYPES = (torch.float32, torch.bfloat16)
# Around the rows, inputs and outputs of tiles, panels and blocks.
SHAPES = ((1, 1, 1), (1, 64, 32), (2, 65, 33), (15, 63, 31), (16, 128, 16), (17, 4, 48), (33, 200, 70), (300, 96, 40),
          (40, 1030, 600))  # fmt: skip


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the instruction sets that this CPU has."""
    monkeypatch.setattr(tokens, "instructions", lambda: request.param)
    return str(request.param)


X = torch.randn(6, 48, generator=torch.Generator().manual_seed(0))


def made(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias).eval().requires_grad_(False).to(dtype)


def layer_of(model: nn.Linear) -> QuantizedLayer:
    return quantize_layer("weight", model.weight, (1,), INT8_TOKENS, None)


def served(model: nn.Linear) -> nn.Module:
    return CPU_INT8.deployed(model, {"weight": layer_of(model)}, owned=True)


def expected_of(x: Tensor, layer: QuantizedLayer, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """By whole numbers: codes of the quantiser, sums in float64, where they are exact, and each later step in float32."""
    affine = fit(x, TOKENS, (1,))
    sums = quantize(x, TOKENS.format, affine).double() @ layer.codes.double().t()
    output = sums.float() * affine.scale * layer.weight_affine.scale.reshape(1, -1)
    return (output if bias is None else output + bias.float()).to(dtype)


def rows_of(count: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Of very different size."""
    x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(count))
    return (x * 4.0 ** torch.linspace(-6, 6, count)[:, None]).to(dtype)


@needs_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_are_those_of_whole_numbers(
    shape: tuple[int, int, int], dtype: torch.dtype, bias: bool, form: str
) -> None:
    count, inputs, outputs = shape
    model, x = made(inputs, outputs, dtype, bias), rows_of(count, inputs, dtype)
    assert torch.equal(served(model)(x), expected_of(x, layer_of(model), model.bias, dtype))


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_those_of_the_quantiser(dtype: torch.dtype, form: str) -> None:
    """A weight that gives each code back times its scale; rows of all exponents, ties, zeros, subnormals, the largest."""
    size = 96
    weight = LowWeight(
        {"codes": torch.eye(size, dtype=torch.int8), "scale": torch.ones(size, 1)},
        served(made(size, size)).weight.how,
        torch.float32,
    )
    patterns = torch.randint(-(2**31), 2**31, (400, size), generator=torch.Generator().manual_seed(0))
    floats = patterns.to(torch.int32).view(torch.float32).nan_to_num(1.0)
    narrow = torch.randn(200, size, generator=torch.Generator().manual_seed(1)) * 2.0 ** torch.arange(-110, 90)[:, None]
    ties = (torch.arange(size) - 40.5).repeat(3, 1) * torch.tensor([[1.0], [2.0**-20], [2.0**30]])
    ties[:, 0] = 127 * torch.tensor([1.0, 2.0**-20, 2.0**30])
    largest = torch.full((2, size), torch.finfo(torch.float32).max)
    tiny = torch.full((2, size), 1e-45) * torch.tensor([[1.0], [300.0]])
    x = torch.cat([floats, narrow, ties, largest, tiny, torch.zeros(1, size), -torch.zeros(1, size)]).to(dtype)
    affine = fit(x, TOKENS, (1,))
    expected = quantize(x, TOKENS.format, affine).float() * affine.scale
    assert torch.equal(TOKENS_KERNEL.rows(x, weight, None, torch.float32), expected)
    assert int(quantize(x, TOKENS.format, affine).unique().numel()) == 255


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_taken_as_the_quantiser_takes_them(dtype: torch.dtype, form: str) -> None:
    """NaN in a row makes all of it NaN, infinity saturates; the rows beside it stay what they were."""
    model, x = made(70, 40, dtype), rows_of(20, 70, dtype)
    fast = served(model)
    before = fast(x)
    for row, column, value in ((1, 3, torch.nan), (2, 69, -torch.nan), (17, 0, torch.inf), (18, 64, -torch.inf)):
        x[row, column] = value
    found, expected = fast(x), expected_of(x, layer_of(model), model.bias, dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found[1:3].isnan().all())
    assert torch.equal(found.nan_to_num(0.0), expected.nan_to_num(0.0))
    others = [row for row in range(20) if row not in (1, 2, 17, 18)]
    assert torch.equal(found[others], before[others])
    x = x.float()
    x[3, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # rounded up, its bits are those of -0
    assert bool(TOKENS_KERNEL.rows(x, fast.weight, None, dtype)[3].isnan().all())


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_emulation_has_the_same_bits(dtype: torch.dtype) -> None:
    """Where its sums are exact: for so few inputs."""
    model, x = made(500, 64, dtype), rows_of(50, 500, dtype)
    with quantized(model, {"weight": layer_of(model)}):
        expected = model(x)
    assert torch.equal(served(model)(x), expected)


@needs_kernel
@pytest.mark.parametrize("count", [1, 2, 32, 33, 64, 700])
def test_a_row_does_not_know_its_batch_nor_its_threads(count: int, form: str) -> None:
    model, x = made(130, 90), rows_of(700, 130, torch.float32)
    fast = served(model)
    whole = fast(x)
    torch.set_num_threads(2)
    assert torch.equal(fast(x), whole)
    parts = [fast(part) for part in x.split(count)]
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.cat([fast(part) for part in x.split(count)]), whole)


@needs_kernel
def test_inputs_of_any_shape_and_strides() -> None:
    model = made(48, 20)
    fast, x = served(model), rows_of(24, 48, torch.float32)
    whole = fast(x)
    assert torch.equal(fast(x.t().contiguous().t()), whole)
    assert torch.equal(fast(torch.cat([x, x], 1)[:, :48]), whole)
    assert torch.equal(fast(x.view(2, 3, 4, 48)), whole.view(2, 3, 4, 20))
    assert torch.equal(fast(x.view(4, 6, 48).transpose(0, 1)), whole.view(4, 6, 20).transpose(0, 1))
    assert torch.equal(fast(x[:1].expand(5, 48)), whole[:1].expand(5, 20))
    assert torch.equal(fast(x[0]), whole[0])
    for shape in ((0, 48), (2, 0, 48)):
        assert fast(torch.empty(shape)).shape == (*shape[:-1], 20)


@needs_kernel
def test_dtypes_of_inputs_and_results() -> None:
    model, x = made(48, 20), rows_of(8, 48, torch.float32)
    weight, layer = served(model).weight, layer_of(model)
    for given in (torch.float32, torch.bfloat16, torch.float16):
        for wanted in (torch.float32, torch.bfloat16, torch.float16):
            part = (x / 4096).to(given)
            found = TOKENS_KERNEL.rows(part, weight, model.bias.to(wanted), wanted)
            expected = expected_of(part, layer, model.bias.to(wanted), torch.float32).to(wanted)
            assert found.dtype == wanted
            assert torch.equal(found, expected)
    if has_bf16():
        with torch.autocast("cpu", torch.bfloat16):
            assert served(model)(x).dtype == torch.bfloat16


@needs_kernel
def test_rounding_draws_multiply_the_scales(form: str) -> None:
    model, x = made(96, 40), rows_of(9, 96, torch.float32)
    layer = layer_of(model)
    for phase in (0.8, 1.17):
        drawn = replace(layer, input_phase=phase)
        with quantized(model, {"weight": drawn}):
            expected = model(x)
        assert torch.equal(CPU_INT8.deployed(model, {"weight": drawn})(x), expected)


@needs_kernel
@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, through_torch])
def test_copies_compute_the_same_without_the_packed_codes(how: object) -> None:
    model, x = made(48, 20), rows_of(8, 48, torch.float32)
    fast = served(model)
    expected = fast(x)
    assert fast.weight.cache
    again = how(fast)  # type: ignore[operator]
    assert again.weight.how.kernel is TOKENS_KERNEL
    assert not again.weight.cache
    assert torch.equal(again(x), expected)


@needs_kernel
def test_the_state_of_another_model_is_packed_anew() -> None:
    first, second, x = made(48, 20), made(48, 20), rows_of(8, 48, torch.float32)
    fast, other = served(first), served(second)
    fast(x)
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(x), other(x))
    assert set(other.weight.canonical()) == {"codes", "scale"}


@needs_kernel
def test_threads_share_a_model() -> None:
    inputs = [rows_of(40, 300, torch.float32) * number for number in range(1, 5)]
    assert not wrong_in_threads(served(made(300, 64)), inputs, 50)


@needs_kernel
def test_products_of_other_kernels_go_on_between(form: str) -> None:
    """oneDNN keeps what it has set of the tiles: its BF16 products before and after have the same bits."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).bfloat16() for _ in range(2))
    before, fast, x = left @ right, served(made(300, 64)), rows_of(40, 300, torch.float32)
    expected = fast(x)
    for _ in range(5):
        assert torch.equal(fast(x), expected)
        assert torch.equal(left @ right, before)


class Between(nn.Module):
    """Layers after one another, one that is called twice, and parts of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(64, 96), nn.Linear(96, 96)
        self.packed, self.last = nn.Linear(96, 120, bias=False), nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(torch.relu(self.first(x))))
        a, b, _ = self.packed.weight.chunk(3)
        result: Tensor = self.last(F.linear(x, a) * F.linear(x, b))
        return result


def several(model: nn.Module) -> nn.Module:
    model.eval()
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}
    layers = {name: quantize_layer(name, weight, (1,), INT8_TOKENS, None) for name, weight in weights.items()}
    return CPU_INT8.deployed(model, layers)


@needs_kernel
@pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
def test_compiled_it_has_the_eager_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph with its weights packed when it is compiled, and without freezing in eager layers between graphs."""
    torch._dynamo.reset()
    fast, x = several(Between()), torch.randn(8, 64)
    with torch.no_grad():
        expected = fast(x)
        model = compiled(fast, (x,))
        monkeypatch.setattr(tokens, "_pack_codes", None)
        assert torch.equal(model(x), expected)
        assert torch.equal(torch.compile(fast, backend="eager")(x), expected)


class Readers(nn.Module):
    """Eight layers that read what a ReLU gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.others = nn.Linear(64, 96), nn.ModuleList(nn.Linear(96, 16) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.cat([other(x) for other in self.others], 1)


@needs_kernel
@pytest.mark.filterwarnings("ignore")
def test_compiled_an_input_is_written_once_for_all_its_readers() -> None:
    """Of an operator that holds its inputs to the strides of the trace, Inductor writes the ReLU once for each reader."""
    torch._dynamo.reset()
    fast, x = several(Readers()), torch.randn(8, 64)
    with torch.no_grad():
        expected = fast(x)
        (result, (code,)) = run_and_get_code(compiled(fast), x)
    assert torch.equal(result, expected)
    assert code.count(" = torch.ops.precimap.int8_tokens.default(") == 9
    assert code.count(" = empty_strided_cpu(") <= 2, "the result of the ReLU, and that of the whole"


@needs_kernel
@pytest.mark.filterwarnings("ignore")
def test_exported_it_has_the_eager_bits(tmp_path: Path) -> None:
    fast, x = several(nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8, bias=False))), torch.randn(8, 64)
    rows = torch.export.Dim("rows", min=2, max=100)
    with torch.no_grad():
        program = torch.export.export(fast, (x,), dynamic_shapes=({0: rows},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2")
        plain = loaded.run_decompositions({})
        for given in (x, torch.randn(31, 64)):
            assert torch.equal(loaded.module()(given), fast(given))
            assert torch.equal(plain.module()(given), fast(given))
    assert sum("int8_tokens" in str(node.target) for node in plain.graph.nodes) == 2
    assert not any(isinstance(value, LowWeight) for value in plain.state_dict.values())


@needs_kernel
def test_the_operators_are_what_they_say() -> None:
    codes = torch.randint(-127, 128, (40, 70), dtype=torch.int8)
    packed = torch.ops.precimap.pack_codes(codes)
    torch.library.opcheck(torch.ops.precimap.pack_codes.default, (codes,))
    for dtype in DTYPES:
        given = (torch.randn(3, 5, 70, dtype=dtype), packed, torch.ones(40), torch.zeros(40, dtype=dtype), 1.0, dtype)
        torch.library.opcheck(torch.ops.precimap.int8_tokens.default, given)
    with pytest.raises(DeployError, match="expected codes packed for 71 inputs and 40 outputs"):
        torch.ops.precimap.int8_tokens(
            torch.randn(3, 71).repeat(1, 2)[:, :71], packed[:1], torch.ones(40), None, 1.0, dtype
        )


@needs_kernel
def test_a_wrong_kernel_is_found_before_a_model_is_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = served(made(96, 40)).weight
    check_weight(weight)
    plain = tokens._pack_codes(weight.codes)
    plain[0, 5] += 3
    weight.cache["int8 tokens"] = tokens._Packed(plain, weight.affine.scale.reshape(-1))
    with pytest.raises(DeployError, match="differs from its emulation"):
        check_weight(weight)


@needs_kernel
def test_sums_beyond_32_bits_are_refused() -> None:
    wide = nn.Linear(tokens._LONGEST + 1, 2, bias=False).requires_grad_(False)
    with pytest.raises(DeployError, match="do not fit into 32 bits"):
        served(wide)(torch.zeros(1, tokens._LONGEST + 1))
    most = nn.Linear(tokens._LONGEST, 2, bias=False).requires_grad_(False)
    nn.init.ones_(most.weight)
    x = torch.ones(1, tokens._LONGEST)
    assert torch.equal(served(most)(x), expected_of(x, layer_of(most), None, torch.float32))


def linear_layer() -> object:
    return discover(nn.Linear(64, 32).eval(), lambda m, b: m(b), torch.randn(2, 64)).layer("weight")


def test_the_target_takes_it_where_it_pays_and_says_why_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear_layer()
    assert CPU_INT8.refusal(layer, INT8_TOKENS) == REASON
    monkeypatch.setattr(tokens, "instructions", lambda: None)
    assert "neither AMX nor AVX-512 VNNI" in str(CPU_INT8.refusal(layer, INT8_TOKENS))
    assert "symmetric" in str(tokens.scheme_refusal(SCHEMES["fp8"]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory of the test's own, and nothing built yet."""
    asked = (tokens._not_built, tokens._kernel, building.library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for each in asked:
        each.cache_clear()
    yield tmp_path / "cache"
    for each in asked:
        each.cache_clear()


@needs_kernel
@pytest.mark.parametrize("how", ["no compiler", "failing", "no folder", "foreign folder", "works"])
def test_what_keeps_the_kernel_from_being_built_is_the_reason(
    how: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "None"
    if how == "no compiler":
        monkeypatch.setenv("CXX", "no-such-compiler -m64")
        expected = "no C++ compiler: expected no-such-compiler in PATH"
    elif how == "failing":
        failing = tmp_path / "failing"
        failing.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x: error: no AMX here" >&2\nexit 3\n')
        failing.chmod(0o755)
        monkeypatch.setenv("CXX", str(failing))
        expected = "ended with 3 and said: x: error: no AMX here"
    elif how == "no folder":
        cache.write_text("a file")
        expected = "no folder to keep compiled code in"
    elif how == "foreign folder":
        (cache / "precimap").mkdir(parents=True)
        (cache / "precimap").chmod(0o777)
        expected = "others can write to"
    assert expected in str(CPU_INT8.refusal(linear_layer(), INT8_TOKENS))
    left = [path.suffix for path in cache.rglob("*") if path.is_file()] if cache.is_dir() else []
    assert sorted(left) == {"works": [".lock", ".so"], "failing": [".lock"]}.get(how, [])
    model = made(48, 20)
    if how == "works":
        assert torch.equal(served(model)(X), expected_of(X, layer_of(model), model.bias, torch.float32))
    else:
        with pytest.raises(DeployError, match="is not built here"):
            served(model)
