"""Calls that write their result, tables by ATen's names, transposed convolutions: emulated as a float oracle says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from precimap.layers.discover import discover
from precimap.layers.emulation import operands, quantized
from precimap.layers.first_order import FirstOrder
from precimap.layers.interception import Interception
from precimap.layers.quantized import quantize_layer
from precimap.layers.recording import Recording
from precimap.layers.refusals import refusal
from precimap.layers.replay import Replay
from precimap.numerics.fast import fake_quantize
from precimap.numerics.ranges import fit
from precimap.numerics.schemes import scheme

ATEN = torch.ops.aten


class Writes(nn.Module):
    """h, changed in place by the call that is given, is read; what the call returns is not."""

    def __init__(self, call: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.w = nn.Parameter(torch.randn(32, 48, generator=generator))
        self.head = nn.Linear(48, 16)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        h = torch.ones(len(x), 48, dtype=x.dtype)
        self.call(h, x, self.w)
        return self.head(torch.relu(h))


WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "addmm_": lambda h, x, w: h.addmm_(x, w, beta=0.5),
    "aten.addmm_": lambda h, x, w: ATEN.addmm_(h, x, w, beta=0.5),
    "baddbmm_": lambda h, x, w: h[None].baddbmm_(x[None], w[None], beta=0.5),
    "addmv_ of rows": lambda h, x, w: [h[i].addmv_(w.t(), x[i], beta=0.5) for i in range(len(x))],
    "addmm, out": lambda h, x, w: torch.addmm(h.clone(), x, w, beta=0.5, out=h),
    "aten.addmm.out": lambda h, x, w: ATEN.addmm.out(h.clone(), x, w, beta=0.5, out=h),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_that_writes_is_emulated_where_it_writes(name: str, dtype: torch.dtype) -> None:
    model = Writes(WRITES[name]).eval().to(dtype)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4)).to(dtype)
    inventory = discover(model, lambda m, b: m(b), x)
    assert inventory.layer("w").contracted == (0,)
    assert inventory.layer("w").flops == 2 * 5 * 32 * 48

    low = quantize_layer("w", model.w, (0,), scheme("int8"), None)
    with torch.no_grad(), quantized(model, {"w": low}):
        found = model(x)
    rounding = scheme("int8").input
    assert rounding is not None
    rounded = fake_quantize(x, rounding.format, fit(x.float(), rounding, (1,)))
    h = (0.5 + rounded.float() @ low.weight()).to(dtype)
    expected = model.head(torch.relu(h)).detach()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)
    with torch.no_grad(), quantized(model, {}):
        plain = model(x)
    assert not torch.equal(plain, found)


INTO_VIEWS = ("baddbmm_", "addmv_ of rows")  # autograd refuses these writes: such layers are probed


@pytest.mark.parametrize("name", WRITES)
def test_first_order_and_replay_see_what_a_call_writes(name: str) -> None:
    model = Writes(WRITES[name]).eval()
    x = torch.randn(5, 32)
    low = quantize_layer("w", model.w, (0,), scheme("int8"), None)
    with torch.no_grad():
        with Interception({}):
            plain = model(x)
        with quantized(model, {"w": low}):
            emulated = model(x)
    weights, codes = {"w": model.w}, {"w": low}
    if name not in INTO_VIEWS:
        mode = FirstOrder(weights, {"w": {"int8": low}}, {("w", "int8"): low.weight()}, {})
        with mode:
            found = model(x)
        torch.testing.assert_close(found.detach(), plain, rtol=1e-5, atol=1e-6)
        mode.backward(found.sum())
        assert mode.taps
        assert all(tapped.gradient is not None and tapped.gradient.any() for tapped in mode.taps)

    recording = Recording(2**20)
    with torch.no_grad():
        with Replay(weights, {}, {}, recording):
            assert torch.equal(model(x), plain)
        with Replay(weights, codes, operands(codes), recording):
            assert torch.equal(model(x), emulated)
        with Replay(weights, {}, {}, recording):
            assert torch.equal(model(x), plain)


class Table(nn.Module):
    def __init__(self, look: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(20, 16, generator=torch.Generator().manual_seed(5)))
        self.look = look

    def forward(self, _: Tensor) -> Tensor:
        return self.look(self.w)


IDS, OFFSETS = torch.tensor([1, 4, 4, 19, 0, 7]), torch.tensor([0, 2, 5])


@pytest.mark.parametrize(
    "look",
    [
        lambda w: ATEN.embedding(w, IDS),
        lambda w: ATEN.embedding.default(w, IDS),
        lambda w: torch.embedding(w, IDS),
        lambda w: ATEN.embedding_bag(w, IDS, OFFSETS)[0],
        lambda w: ATEN.embedding_bag.padding_idx(w, IDS, OFFSETS, False, 1, False, None, False, 7)[0],
        lambda w: ATEN._embedding_bag_forward_only.default(w, IDS, OFFSETS)[0],
        lambda w: torch.embedding_bag(w, IDS, OFFSETS, False, 1)[0],
    ],
)
@pytest.mark.parametrize("name", ["int8-row", "int4-row", "fp8-weight"])
def test_tables_by_atens_names(look: Callable[[Tensor], Tensor], name: str) -> None:
    model = Table(look)
    inventory = discover(model, lambda m, b: m(b), IDS)
    layer = inventory.layer("w")
    assert (layer.lookup, layer.contracted, layer.flops) == (True, (1,), 0)
    assert layer.reads[0].rows == len(look(model.w.detach()))
    low = quantize_layer("w", model.w, (1,), scheme(name), None)
    with torch.no_grad(), quantized(model, {"w": low}):
        assert torch.equal(model(IDS), look(low.weight()))


TRANSPOSED = {
    "1d, stride 2": (nn.ConvTranspose1d(16, 8, 3, stride=2), (4, 16, 5)),
    "1d, one example": (nn.ConvTranspose1d(16, 8, 3, stride=2), (16, 5)),
    "2d, groups": (nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, groups=4), (2, 16, 4, 5)),
    "3d, dilation": (nn.ConvTranspose3d(4, 8, 2, dilation=2, bias=False), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_a_transposed_convolution_is_a_layer(name: str) -> None:
    module, shape = TRANSPOSED[name]
    module = module.eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    layer = discover(module, lambda m, b: m(b), x).layer("weight")
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        plain = module(x)
    assert layer.flops == counted.get_total_flops() > 0
    assert layer.contracted == (0, *range(2, module.weight.dim()))
    assert "convolution" in str(refusal(layer, scheme("fp8")))

    for chosen in (scheme("int8"), scheme("int8-weight")):
        low = quantize_layer("weight", module.weight, layer.contracted, chosen, None)
        per_output = module.weight.abs().amax(layer.contracted, keepdim=True) / 127
        torch.testing.assert_close(low.weight_affine.scale, per_output.detach(), rtol=1e-5, atol=0)
        with torch.no_grad(), quantized(module, {"weight": low}):
            found = module(x)
        rounded = x
        if chosen.input is not None:  # one scale for each example
            dims = tuple(range(x.dim() - module.weight.dim() + 1, x.dim()))
            rounded = fake_quantize(x, chosen.input.format, fit(x, chosen.input, dims))
        expected = type(module).forward(_with(module, low.weight()), rounded)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found, plain, rtol=0.1, atol=0.05 * float(plain.abs().max()))


def _with(module: nn.Module, weight: Tensor) -> nn.Module:
    import copy

    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight.copy_(weight)
    return other


@pytest.mark.filterwarnings("ignore")
def test_an_exported_program_is_a_model_like_any_other() -> None:
    inner = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    x = torch.randn(4, 32)
    model = torch.export.export(inner, (x,)).module()
    inventory = discover(model, lambda m, b: m(b), x)
    assert {layer.name for layer in inventory.layers} == {"0.weight", "2.weight"}
    low = quantize_layer("0.weight", inner[0].weight, (1,), scheme("fp8-weight"), None)
    with torch.no_grad():
        with quantized(model, {"0.weight": low}):
            found = model(x)
        expected = inner[2](torch.relu(F.linear(x, low.weight(), inner[0].bias)))
    torch.testing.assert_close(found, expected)
