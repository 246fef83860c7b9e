"""Schemes bf16 and fp16: what a call in 16 bits gives, by torch's own and by numpy; and where it is refused."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.going_round import through_pickle, through_torch, wrong_in_threads
from helpers.small_maps import map_of
from helpers.small_tasks import planted_task
from helpers.spellings import SPELLINGS, Spelled, X, layers_of
from precimap import CPU_INT8, CPU_INT8_COMPILED, EMULATED, compiled, deploy, discover, load_deployed, save_deployed
from precimap.errors import DeployError, SchemeError
from precimap.layers.emulation import quantized
from precimap.layers.refusals import refusal
from precimap.numerics.schemes import SCHEMES, scheme, scheme_from_row, scheme_key
from precimap.runtime import emulated
from precimap.runtime.compiling.compiled import no_compiler
from precimap.runtime.kernel_checks import check_weight
from precimap.runtime.nvidia import target as cuda
from precimap.runtime.weights.half import HALF_KERNEL
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.placing import low_weights, placed, weight_of
from precimap.runtime.x86 import target as x86
from precimap.runtime.x86.target import has_bf16
from precimap.searching.preflight.batch_invariance import shares_a_scale

pytestmark = [pytest.mark.filterwarnings("ignore")]  # maps made by hand; Inductor warns about parts of its own
on_bf16 = pytest.mark.skipif(not has_bf16(), reason="this CPU has no BF16 arithmetic")
ULP = {"bf16": 2.0**-7, "fp16": 2.0**-10}  # a step of the format, relative, where a number is just above a power of two
# Not grouped_mm, which takes BF16 alone; nor what adds a float32 tensor of its own, which autocast leaves alone.
CALLS = [how for how in SPELLINGS if how != "grouped"]


def half(model: nn.Module, name: str = "bf16", x: Tensor = X) -> nn.Module:
    """With the kernel, whatever this CPU is fast at."""
    return placed(model, layers_of(model, name, x), lambda layer, parameter: weight_of(layer, parameter, HALF_KERNEL))


@pytest.mark.parametrize("how", CALLS)
def test_the_kernel_is_the_call_that_autocast_makes(how: str) -> None:
    model = Spelled(*SPELLINGS[how]).eval()
    fast = half(model)
    with torch.no_grad():
        found = fast(X)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(X)
        base = model(X)
    assert (found.dtype, expected.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found.bfloat16().float(), found)  # BF16 numbers, in the model's dtype
    torch.testing.assert_close(found, expected.float(), rtol=ULP["bf16"], atol=ULP["bf16"])
    assert not torch.allclose(found, base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("how", CALLS)
def test_the_kernel_is_the_emulation(how: str, name: str) -> None:
    """But for sums in another order, which move a result by a step where it was near a tie."""
    model = Spelled(*SPELLINGS[how]).eval()
    with torch.no_grad():
        found = half(model, name)(X)
        with quantized(model, layers_of(model, name)):
            expected = model(X)
        assert torch.equal(emulated.deployed(model, layers_of(model, name))(X), expected)
    torch.testing.assert_close(found, expected, rtol=ULP[name], atol=1e-5)
    assert float((found == expected).float().mean()) > 0.97


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_one_rounding_of_an_exact_product(name: str, dtype: str, bias: bool) -> None:
    """By numpy in float64, over operands that ml_dtypes and numpy round."""
    import ml_dtypes

    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    torch.manual_seed(0)
    linear, x = nn.Linear(96, 40, bias=bias).eval(), torch.randn(50, 96) * 3

    def round_(values: np.ndarray) -> np.ndarray:
        return values.astype(np.float32).astype(kind).astype(np.float64)

    exact = round_(x.numpy()) @ round_(linear.weight.detach().numpy()).T
    if bias:
        exact = exact + round_(linear.bias.detach().numpy())
    with torch.no_grad(), quantized(linear, {"weight": layers_of(linear, name, x)["weight"]}):
        found = linear(x).double().numpy()
    off = np.abs(found - round_(exact))
    # A float32 sum of 96 products is within 2e-5 of the exact one here: another step only where that is a tie.
    assert (off <= ULP[name] * np.abs(exact) + 2e-5).all()
    assert (off == 0).mean() > 0.98


def test_fp16_saturates_inputs_that_it_cannot_hold() -> None:
    linear, x = nn.Linear(32, 16, bias=False).eval(), X * 1e5
    with torch.no_grad(), quantized(linear, layers_of(linear, "fp16", x)):
        expected = linear(x)
    assert (x.abs() > 65504).any()
    with torch.no_grad():
        torch.testing.assert_close(half(linear, "fp16")(x), expected, rtol=ULP["fp16"], atol=1)


def test_a_tied_table_is_looked_up_as_it_was() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 32)

        def forward(self, ids: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.table(ids)), self.table.weight)

    model, ids = Tied().eval(), torch.arange(20).view(4, 5)
    layers = {name: replace(layer, keeps=True) for name, layer in layers_of(model, "bf16", ids).items()}
    fast = placed(model, layers, lambda layer, parameter: weight_of(layer, parameter, HALF_KERNEL))
    with torch.no_grad():
        assert torch.equal(fast.table(ids), model.table(ids))  # type: ignore[operator, union-attr]
        expected = F.linear(torch.tanh(model.table(ids)).bfloat16(), model.table.weight.bfloat16())
        torch.testing.assert_close(fast(ids), expected.float(), rtol=ULP["bf16"], atol=ULP["bf16"])


@pytest.mark.parametrize("how", [copy.deepcopy, through_torch, through_pickle])
def test_copies_compute_the_same(how: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).eval()
    fast = half(model)
    with torch.no_grad():
        expected = fast(X)
        again = how(fast)
        assert torch.equal(again(X), expected)
        for weight in low_weights(again).values():
            weight.codes.zero_()
        assert torch.equal(fast(X), expected)
        assert wrong_in_threads(fast, [torch.randn(9, 32) for _ in range(4)], 50) == []


def test_a_state_dict_is_read_without_trusting_code() -> None:
    fast, buffer = half(nn.Linear(32, 16)), io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer)
    assert torch.equal(state["weight"].codes, fast.weight.codes)  # type: ignore[arg-type, union-attr]


@on_bf16
@pytest.mark.parametrize("target", ["cpu-int8", "emulated"])
def test_a_file_is_read(target: str, tmp_path: Path) -> None:
    task = planted_task()
    chosen = map_of(task, {"first.weight": "bf16"})
    fast = deploy(task.model, chosen, target=target)
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    loaded = load_deployed(planted_task().model, tmp_path / "model.safetensors")
    x = torch.randn(7, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), fast(x))
    weight = low_weights(loaded)["first.weight"]
    assert (weight.codes.dtype, weight.dtype) == (torch.bfloat16, torch.float32)


@on_bf16
@pytest.mark.skipif(no_compiler() is not None, reason="no C++ compiler")
def test_compiled_it_is_the_same_to_a_step() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 16)).eval()
    fast = CPU_INT8.deployed(model, layers_of(model, "bf16"))
    served = compiled(CPU_INT8.deployed(model, layers_of(model, "bf16")), X)
    with torch.no_grad():
        torch.testing.assert_close(served(X), fast(X), rtol=2.0**-6, atol=2.0**-6)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_gpus_take_both(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that passes for a GPU, which these products do not tell from one."""
    monkeypatch.setattr(cuda, "missing_hardware", lambda *_: None)
    model = nn.Sequential(nn.Linear(33, 47), nn.GELU(), nn.Linear(47, 16)).eval()  # widths that no FP8 product takes
    x = torch.randn(9, 33, generator=torch.Generator().manual_seed(3))
    layer = discover(model, lambda m, b: m(b), x).layer("0.weight")
    assert cuda.CUDA_FP8.refusal(layer, scheme(name)) is None
    fast = cuda.CUDA_FP8.deployed(model, layers_of(model, name, x))
    assert {weight.how.kernel for weight in low_weights(fast).values()} == {HALF_KERNEL}
    with torch.no_grad(), quantized(model, layers_of(model, name, x)):
        expected = model(x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=ULP[name], atol=ULP[name])


def test_a_kernel_that_multiplies_wrongly_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(32, 48).eval()
    weight = half(model).weight
    assert isinstance(weight, LowWeight)
    check_weight(weight)
    plain = F.linear
    monkeypatch.setattr(
        "precimap.runtime.weights.half.F.linear",
        lambda x, w, b=None: plain(x, w, b) * (1 + 2.0**-5 * (w.dtype == torch.bfloat16)),
    )
    with pytest.raises(DeployError, match="the kernel of bf16 differs from its emulation"):
        check_weight(weight)


def test_who_is_refused_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(model: nn.Module, x: Tensor) -> object:
        return discover(model, lambda m, b: m(b), x).layer("weight")

    short = found(nn.Linear(32, 48).bfloat16(), X.bfloat16())
    assert "is in bfloat16 already" in str(refusal(short, scheme("bf16")))
    assert "is in bfloat16 already" in str(refusal(short, scheme("fp16")))
    layer = found(nn.Linear(32, 48), X)
    assert refusal(layer, scheme("bf16")) is None
    assert EMULATED.refusal(layer, scheme("fp16")) is None
    assert "multiplies fp16 no faster" in str(CPU_INT8.refusal(layer, scheme("fp16")))
    wide = found(nn.Conv1d(32, 48, 3), torch.randn(2, 32, 9))
    monkeypatch.setattr(x86, "has_bf16", lambda: True)
    assert CPU_INT8.refusal(layer, scheme("bf16")) is None
    assert CPU_INT8_COMPILED.refusal(layer, scheme("bf16")) is None
    assert CPU_INT8.refusal(wide, scheme("bf16")) is None  # torch has BF16 convolutions
    monkeypatch.setattr(x86, "has_bf16", lambda: False)
    assert "multiplies bf16 no faster" in str(CPU_INT8.refusal(layer, scheme("bf16")))


def test_convolutions_are_served() -> None:
    conv, x = nn.Conv1d(32, 48, 3, padding=1).eval(), X.transpose(1, 2)
    with torch.no_grad():
        found = half(conv, x=x)(x)
        expected = conv.bfloat16()(x.bfloat16())
    torch.testing.assert_close(found, expected.float(), rtol=ULP["bf16"], atol=ULP["bf16"])


def test_the_rows_of_a_map_hold_the_result() -> None:
    for name in ("bf16", "fp16"):
        chosen = SCHEMES[name]
        assert scheme_from_row(name, chosen.row()) == chosen
        assert scheme_key(chosen) == name
        assert not shares_a_scale(chosen)
        assert chosen.stored_bytes((48, 32), (1,)) == 48 * 32 * 2
    with pytest.raises(SchemeError, match="expected a result of bf16 or fp16, got 'e4m3'"):
        scheme_from_row("odd", {**SCHEMES["bf16"].row(), "result": "e4m3"})
