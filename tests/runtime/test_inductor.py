"""Compiled code leaves alone what was there before, and holds every INT8 product, whatever a model does around it."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from precimap import CPU_INT8, compiled
from precimap.errors import DeployError
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.numerics.schemes import scheme
from precimap.runtime.compiling.compiled import compile_calls, no_compiler
from precimap.runtime.compiling.inductor import sums_in_own_memory
from precimap.runtime.x86.target import has_qlinear, int8_scheme

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Inductor and dynamo warn about parts of their own
    pytest.mark.skipif(no_compiler() is not None or not has_qlinear(), reason="no C++ compiler, or no INT8 products"),
]


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.position = nn.Parameter(torch.randn(2, 16, 64))
        self.register_buffer("mean", torch.randn(2, 16, 64))
        self.register_buffer("image", torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last))
        self.conv = nn.Conv2d(16, 16, 3, padding=1)


class OfTheInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + x


class OfAViewOfTheInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + x.flatten(1).view(x.shape)


class OfAParameter(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.position.view(x.shape)


class OfABuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.mean.view(x.shape) + self.first(x))


class OfWhatIsReturnedToo(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        return self.second(hidden) + hidden, hidden


class OfWhatIsReturnedAsAView(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        heads = hidden.view(*hidden.shape[:-1], 4, 16)
        return self.second(heads.view(hidden.shape)) + hidden, heads


class OfWhatIsReturnedInPart(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x))
        part = hidden[..., :16]
        return self.second(torch.cat([part, hidden[..., 16:]], -1)) + hidden, part


class OfAConvolution(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x).view(2, 16, 8, 8)) + self.image


class Flattened(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).view(-1, 64) + x.reshape(-1, 64)


class FlattenedAndNot(Base):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return self.second(hidden).flatten(0, -2), torch.relu(hidden.flatten(0, -2)).sum(0) + hidden


class Heads(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (
            self.first(x).view(*x.shape[:-1], 4, 16).movedim(-2, 0)
            + self.second(x).view(*x.shape[:-1], 4, 16)[..., 0, :]
        )


MODELS = (
    OfTheInput,
    OfAViewOfTheInput,
    OfAParameter,
    OfABuffer,
    OfWhatIsReturnedToo,
    OfWhatIsReturnedAsAView,
    OfWhatIsReturnedInPart,
    OfAConvolution,
    Flattened,
    FlattenedAndNot,
    Heads,
)


def layers_of(model: nn.Module) -> dict[str, QuantizedLayer]:
    used = InputRange(0.05, 128)
    return {
        f"{name}.weight": quantize_layer(f"{name}.weight", layer.weight.float(), (1,), scheme(int8_scheme()), used)
        for name, layer in model.named_children()
        if isinstance(layer, nn.Linear)
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 64), (2, 16, 64), (1, 2, 16, 64)], ids=str)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_calls_change_nothing_that_was_there(kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = kind().eval().to(dtype)
    eager = CPU_INT8.deployed(model, layers_of(model))
    fast = compiled(CPU_INT8.deployed(model, layers_of(model)))
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x = given.clone()
    with torch.no_grad():
        expected = tree_leaves(eager(given))
    first = [result.clone() for result in tree_leaves(fast(x))]
    assert torch.equal(x, given)
    again = tree_leaves(fast(x))
    for one, other, result in zip(first, again, expected, strict=True):
        assert torch.equal(one, other)
        # Eight units of a code of the second layer's input, where sums round otherwise; BF16 has three digits.
        torch.testing.assert_close(one.float(), result.float(), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kind", MODELS[:3] + MODELS[4:7] + MODELS[8:], ids=lambda kind: kind.__name__)
def test_for_all_sizes_in_one_code(kind: type[nn.Module]) -> None:
    torch._dynamo.reset()
    model = kind().eval()
    eager, fast = (CPU_INT8.deployed(model, layers_of(model)) for _ in range(2))
    calls, products = compile_calls(fast), 0
    for size in (2, 3, 5) if kind is not OfAParameter else (2, 2):
        given = torch.randn(size, 16, 64, generator=torch.Generator().manual_seed(size))
        x = given.clone()
        with torch.no_grad():
            for one, other in zip(tree_leaves(fast(x)), tree_leaves(eager(given)), strict=True):
                torch.testing.assert_close(one, other, atol=0.1, rtol=0.02)
        assert torch.equal(x, given)
        products += calls._products.found
    assert calls.graphs == 1
    assert products > 0


def test_the_question_is_put_back() -> None:
    from torch._inductor.fx_passes import mkldnn_fusion

    def fail() -> None:
        with sums_in_own_memory():
            assert not mkldnn_fusion._can_be_inplace(None)
            raise ZeroDivisionError

    before = mkldnn_fusion._can_be_inplace
    with pytest.raises(ZeroDivisionError):
        fail()
    assert mkldnn_fusion._can_be_inplace is before


def test_a_torch_that_decides_it_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.fx_passes import mkldnn_fusion

    monkeypatch.delattr(mkldnn_fusion, "_qlinear_binary_can_be_inplace")
    torch._dynamo.reset()
    model = OfTheInput().eval()
    with pytest.raises(
        DeployError, match="may overwrite the inputs of a model; use the deployed model without compiling"
    ):
        compiled(CPU_INT8.deployed(model, layers_of(model)), torch.randn(4, 64))
