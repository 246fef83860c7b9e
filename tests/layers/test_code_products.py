"""Products of codes against float64, and where they must not be taken."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_sharer
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap.layers import code_products
from precimap.layers.code_products import CodedWeight
from precimap.layers.emulation import operand, quantized
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.numerics.fast import code_values, fake_quantize
from precimap.numerics.formats import (
    BF16,
    E2M1,
    E4M3,
    E4M3_FNUZ,
    E5M2,
    E5M2_FNUZ,
    INT8,
    UINT4,
    UINT8,
    Format,
    IntegerFormat,
)
from precimap.numerics.quantize import Affine, dequantize, quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import BF16_FLOOR, SCHEMES, Granularity, Rounding, Scheme

FORMATS = (BF16, E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ, E2M1, INT8, UINT8, UINT4)
CODED = [scheme for scheme in (*SCHEMES.values(), BF16_FLOOR) if scheme.input is not None and scheme.result is None]


class Product(nn.Module):
    """One op on a parameter; `weight` has the contracted dim that the op wants."""

    def __init__(self, weight: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.weight)


BIAS = torch.linspace(-2, 2, 24)
# name -> shape of the weight from (n, k), its contracted dims, the op, whether x is [k, m]
OPS: dict[
    str, tuple[Callable[[int, int], tuple[int, ...]], tuple[int, ...], Callable[[Tensor, Tensor], Tensor], bool]
] = {
    "linear": (lambda n, k: (n, k), (1,), lambda x, w: F.linear(x, w, BIAS[: len(w)]), False),
    "no bias": (lambda n, k: (n, k), (1,), F.linear, False),
    "right": (lambda n, k: (k, n), (0,), torch.matmul, False),
    "transposed": (lambda n, k: (n, k), (1,), lambda x, w: x @ w.t(), False),
    "left": (lambda n, k: (n, k), (1,), lambda x, w: w @ x, True),
    "addmm": (lambda n, k: (k, n), (0,), lambda x, w: torch.addmm(BIAS[: w.shape[1]], x, w), False),
    "chunk": (lambda n, k: (2 * n, k), (1,), lambda x, w: F.linear(x, w.chunk(2)[1]), False),
    "heads": (lambda n, k: (n, k), (1,), lambda x, w: F.linear(x, w.view(2, len(w) // 2, -1)[1]), False),
    "stacked": (lambda n, k: (3, k, n), (1,), lambda x, w: torch.bmm(x.expand(3, *x.shape), w), False),
}


def layer_of(weight: Tensor, contracted: tuple[int, ...], scheme: Scheme) -> QuantizedLayer:
    return quantize_layer(
        "weight", weight, contracted, scheme, InputRange(0.03, 3) if scheme.needs_calibration else None
    )


def rounded(x: Tensor, layer: QuantizedLayer, contracted: tuple[int, ...]) -> Tensor:
    """The input as the scheme rounds it, in float64, by encoding and decoding."""
    rounding = layer.scheme.input
    assert rounding is not None
    affine = fit(x, rounding, contracted)
    if layer.input_range is not None:
        zero = None if rounding.symmetric else torch.tensor(float(layer.input_range.zero))
        affine = Affine(torch.tensor(layer.input_range.scale), zero)
    codes = quantize(x, rounding.format, affine).to(torch.float32).double()
    zero = 0.0 if affine.zero is None else affine.zero.double()
    return (codes - zero) * affine.scale.double()


@contextmanager
def another_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@pytest.fixture
def threads_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that other tests have left in this process (a compiler's, say) are not seen."""
    before = set(threading.enumerate()) - {threading.current_thread()}
    seen = SimpleNamespace(
        enumerate=lambda: [thread for thread in threading.enumerate() if thread not in before],
        active_count=lambda: len(set(threading.enumerate()) - before),
        current_thread=threading.current_thread,
        Thread=threading.Thread,
    )
    monkeypatch.setattr(code_products, "threading", seen)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    st.floats(2.0**-40, 2.0**40, width=32),
    st.integers(0, 15),
)
def test_code_values_are_the_codes(format: Format, values: list[float], scale: float, zero: int) -> None:
    whole = isinstance(format, IntegerFormat) and format.minimum == 0
    affine = Affine(torch.tensor(scale), torch.tensor(float(zero)) if whole else None)
    x = torch.tensor(values)
    ones = Affine(torch.tensor(1.0), affine.zero)
    assert torch.equal(code_values(x, format, affine), dequantize(quantize(x, format, affine), format, ones))


@pytest.mark.parametrize("format", FORMATS[1:])
def test_all_codes_less_a_zero_are_exact_in_bf16(format: Format) -> None:
    if isinstance(format, IntegerFormat):
        values = torch.arange(format.minimum, format.maximum + 1).float()
        values = torch.cat([values, values - format.maximum])
    else:
        values = dequantize(quantize(torch.linspace(-format.maximum, format.maximum, 9999), format, ONE), format, ONE)
    assert torch.equal(values.bfloat16().float(), values)


ONE = Affine(torch.tensor(1.0), None)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(CODED),
    st.sampled_from(sorted(OPS)),
    st.integers(1, 40),
    st.sampled_from([1, 3, 16, 100, 1500]),
    st.sampled_from([2, 6, 24]),
    st.floats(-20, 20),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_a_product_of_codes_is_as_near_as_its_bound(
    scheme: Scheme, name: str, m: int, k: int, n: int, power: float, seed: int, alone: bool
) -> None:
    shape, contracted, op, columns = OPS[name]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2.0**power
    x = x.t().contiguous() if columns else x
    model = Product(torch.randn(shape(n, k), generator=generator), op).eval()
    layer = layer_of(model.weight, contracted, scheme)
    weight = operand(layer)
    assert isinstance(weight, CodedWeight)
    assert torch.equal(weight.dequantized(), layer.weight())
    with torch.no_grad(), quantized(model, {"weight": layer}):
        if alone:
            found = model(x)
        else:
            with another_thread():
                found = model(x)
    x64 = rounded(x, layer, (0,) if columns else (1,))
    w64 = weight.values.double() * weight.scale.double()
    bias, absolute = (BIAS.double(), BIAS.double().abs()) if name in ("linear", "addmm") else (BIAS.double() * 0,) * 2
    exact, size = (op64(name, x64, w64, bias), op64(name, x64.abs(), w64.abs(), absolute))
    assert ((found.double() - exact).abs() <= (k + 3) * 2.0**-24 * size).all()


@pytest.mark.parametrize("name", OPS)
def test_these_calls_are_products_of_codes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, contracted, op, _ = OPS[name]
    taken: list[Tensor] = []
    multiply = code_products.multiply
    monkeypatch.setattr(
        "precimap.layers.emulation.multiply", lambda *given: taken.append(multiply(*given)) or taken[-1]
    )
    model = Product(torch.randn(shape(6, 16)), op).eval()
    found = emulated(model, layer_of(model.weight, contracted, SCHEMES["fp8"]), torch.randn(16, 16))
    assert len(taken) == 1
    assert found is taken[0]


def op64(name: str, x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    if name in ("linear", "addmm"):
        w = w if name == "addmm" else w.t()
        return x @ w + bias[: w.shape[1]]
    return OPS[name][2](x, w)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 518), st.integers(1, 30), st.integers(1, 24), st.integers(0, 2**32), st.integers(0, 255))
def test_sums_of_whole_numbers_have_the_same_bits_everywhere(k: int, m: int, n: int, seed: int, zero: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scheme = SCHEMES["int8-static"]
    model = Product(torch.randn(n, k, generator=generator), F.linear).eval()
    x = 3 * torch.randn(m, k, generator=generator)
    layer = quantize_layer("weight", model.weight, (1,), scheme, InputRange(0.0123, zero))
    with torch.no_grad(), quantized(model, {"weight": layer}):
        found = model(x)
    assert scheme.input is not None
    codes = quantize(x, scheme.input.format, Affine(torch.tensor(0.0123), torch.tensor(float(zero)))).long() - zero
    sums = codes @ layer.codes.long().t()
    assert torch.equal(found, sums.float() * torch.tensor(0.0123) * layer.weight_affine.scale.t())


def emulated(model: nn.Module, layer: QuantizedLayer, x: Tensor) -> Tensor:
    with torch.no_grad(), quantized(model, {"weight": layer}):
        found: Tensor = model(x)
    return found


def by_values(x: Tensor, layer: QuantizedLayer) -> Tensor:
    rounding = layer.scheme.input
    assert rounding is not None
    return fake_quantize(x, rounding.format, fit(x, rounding, (1,)))


def refused() -> dict[str, tuple[Tensor, tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]]:
    """Calls that are no product of the layer's codes: the weight's shape, its contracted dims as stored, the op."""
    square = torch.randn(16, 16)
    return {
        "scales along the contraction": (square, (1,), lambda x, w: x @ w),
        "einsum": (square, (1,), lambda x, w: torch.einsum("mk,nk->nm", x, w).t()),
        "factors": (square, (0,), lambda x, w: torch.addmm(x, x, w, alpha=2)),
        "a vector": (torch.randn(16), (0,), torch.matmul),
    }


@pytest.mark.parametrize("name", refused())
def test_other_calls_multiply_values(name: str) -> None:
    weight, contracted, op = refused()[name]
    model, x = Product(weight, op).eval(), torch.randn(8, 16)
    layer = layer_of(model.weight, contracted, SCHEMES["fp8"])
    values = by_values(x, layer)
    expected = torch.addmm(x, values, layer.weight(), alpha=2) if name == "factors" else op(values, layer.weight())
    assert torch.equal(emulated(model, layer, x), expected)


@pytest.mark.parametrize("power", [-80, 100])
def test_scales_far_from_one_stay_with_the_values(power: int) -> None:
    model, x = Product(torch.randn(8, 16), F.linear).eval(), torch.randn(4, 16) * 2.0**power
    layer = layer_of(model.weight, (1,), SCHEMES["fp8"])
    assert torch.equal(emulated(model, layer, x), F.linear(by_values(x, layer), layer.weight()))


def test_what_is_not_a_number_is_seen() -> None:
    model, x = Product(torch.randn(8, 16), F.linear).eval(), torch.randn(4, 16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    for scheme in CODED[:-1]:
        found = emulated(model, layer_of(model.weight, (1,), scheme), x)
        rows = found.isnan().all(1).tolist()
        if scheme.input is not None and scheme.input.granularity is Granularity.PER_TENSOR and scheme.input.dynamic:
            assert all(rows)
        else:
            assert rows == [False, True, False, False]
            assert not found[2].isnan().any()


def test_the_setting_of_the_process_is_what_it_was() -> None:
    if not code_products.has_tiles():
        pytest.skip("needs BF16 tiles")
    settings_ = torch.backends.mkldnn
    before = settings_.matmul.fp32_precision

    def fail_inside() -> None:
        with code_products._in_tiles():
            assert settings_.matmul.fp32_precision == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert settings_.matmul.fp32_precision == before
    try:
        settings_.matmul.fp32_precision = "ieee"
        with code_products._in_tiles():
            pass
        assert settings_.matmul.fp32_precision == "ieee"
    finally:
        settings_.matmul.fp32_precision = "none"


@pytest.mark.usefixtures("threads_from_here")
def test_while_another_thread_could_multiply_the_setting_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("the setting of the process was changed")

    assert code_products._alone()
    monkeypatch.setattr(code_products, "_in_tiles", refuse)
    model, x = Product(torch.randn(32, 64), F.linear).eval(), torch.randn(40, 64)
    with another_thread():
        assert not code_products._alone()
        emulated(model, layer_of(model.weight, (1,), SCHEMES["fp8"]), x)


@pytest.mark.usefixtures("threads_from_here")
def test_threads_that_pass_messages_do_not_count_and_workers_do() -> None:
    before = threading.active_count()
    queue: multiprocessing.Queue[int] = multiprocessing.Queue()
    queue.put(1)  # starts the feeder
    handed = resource_sharer.DupFd(os.open(os.devnull, os.O_RDONLY))  # as torch hands over a tensor's file
    assert threading.active_count() > before
    assert code_products._alone()
    with ThreadPool(1):
        assert not code_products._alone()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.ones, 1).result()
        assert not code_products._alone()
    os.close(handed.detach())
    queue.close()
    queue.join_thread()


def test_a_bf16_result_is_the_float32_one_rounded_once() -> None:
    model, x = Product(torch.randn(24, 64).bfloat16(), F.linear).eval(), torch.randn(40, 64).bfloat16()
    layer = layer_of(model.weight, (1,), SCHEMES["fp8"])
    wide = emulated(Product(model.weight.detach().float(), F.linear).eval(), layer, x.float())
    assert torch.equal(emulated(model, layer, x), wide.bfloat16())


def test_weights_alone_are_multiplied_as_values() -> None:
    only = Scheme("stored", Rounding(E4M3, Granularity.PER_CHANNEL), None)
    layer = layer_of(torch.randn(8, 16), (1,), only)
    assert isinstance(operand(layer), Tensor)
