"""One parameter, and the calls that models multiply it in: each as a small module, for tests of kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import discover
from precimap.layers.quantized import InputRange, QuantizedLayer, quantize_layer
from precimap.numerics.schemes import SCHEMES

X = torch.randn(6, 4, 32, generator=torch.Generator().manual_seed(0))


class Spelled(nn.Module):
    """A parameter `w` of some shape, and a call that multiplies it."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor], columns: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(shape, generator=generator) / 6)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w)


SPELLINGS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((48, 32), F.linear),
    "matmul on the right": ((32, 48), lambda x, w: x @ w),
    "matmul of a turned batch": ((4, 48), lambda x, w: torch.matmul(x.transpose(1, 2), w)),
    "square, on the left": ((32, 32), lambda x, w: torch.matmul(w, x.transpose(1, 2))),
    "square, of a turned batch": ((4, 4), lambda x, w: torch.matmul(x.transpose(1, 2), w)),
    "its transpose": ((48, 32), lambda x, w: x @ w.t()),
    "mm": ((32, 48), lambda x, w: torch.mm(x.reshape(-1, 32), w)),
    "matmul on the left": ((48, 32), lambda x, w: torch.matmul(w, x.transpose(1, 2))),
    "mm on the left": ((48, 32), lambda x, w: torch.mm(w, x.reshape(-1, 32).t())),
    "addmm of GPT-2": ((32, 48), lambda x, w: torch.addmm(torch.ones(48), x.view(-1, 32), w)),
    "addmm, scaled": ((32, 48), lambda x, w: torch.addmm(torch.ones(24, 48), x.view(-1, 32), w, beta=0.5, alpha=2)),
    "einsum": ((32, 48), lambda x, w: torch.einsum("bsk,kn->bsn", x, w)),
    "einsum of heads": ((3, 16, 32), lambda x, w: torch.einsum("bsk,hdk->bhsd", x, w)),
    "einsum of heads, inputs first": ((32, 3, 16), lambda x, w: torch.einsum("bsk,khd->bhsd", x, w)),
    "tensordot": ((32, 48), lambda x, w: torch.tensordot(x, w, dims=1)),
    "inner": ((48, 32), torch.inner),
    "experts in a bmm": ((6, 32, 48), torch.bmm),
    "experts, transposed": ((6, 48, 32), lambda x, w: torch.bmm(x, w.transpose(1, 2))),
    "baddbmm": ((6, 32, 48), lambda x, w: torch.baddbmm(torch.ones(6, 4, 48), x, w)),
    "experts for every row of a batch": ((3, 32, 48), lambda x, w: x[:, None].expand(6, 3, 4, 32) @ w),
    "experts, broadcast both ways": ((3, 48, 32), lambda x, w: torch.matmul(x[:, None], w.transpose(1, 2))),
    "experts of one batch": ((1, 3, 32, 48), lambda x, w: torch.matmul(x[:, None], w)),
    "parts of one weight": ((96, 32), lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)[1:]], -1)),
    "rows of a weight": ((96, 32), lambda x, w: F.linear(x, w[torch.tensor([5, 3, 90, 3])])),
    "a slice": ((96, 32), lambda x, w: F.linear(x, w[10:40])),
    "a view of heads": ((48, 32), lambda x, w: torch.einsum("bsk,hdk->bshd", x, w.view(3, 16, 32))),
    "a 1x1 convolution": ((48, 32, 1), lambda x, w: F.conv1d(x.transpose(1, 2), w, torch.ones(48), stride=2)),
    "a 1x1 convolution in 2-d": ((48, 32, 1, 1), lambda x, w: F.conv2d(x.transpose(1, 2)[..., None], w)),
    "an aten call": ((32, 48), lambda x, w: torch.ops.aten.mm.default(x.reshape(-1, 32), w)),
    "linalg": ((32, 48), lambda x, w: torch.linalg.matmul(x, w)),
    "grouped": (
        (3, 32, 48),
        lambda x, w: torch._grouped_mm(
            x.reshape(-1, 32).bfloat16(), w.bfloat16(), offs=torch.tensor([5, 5, 24], dtype=torch.int32)
        ),
    ),
}


def layers_of(model: nn.Module, name: str, x: Any = X, range_of: InputRange | None = None) -> dict[str, QuantizedLayer]:
    """Every product of a model, as discovery finds it."""
    chosen, inventory = SCHEMES[name], discover(model, lambda m, b: m(b), x)
    weights, found = dict(model.named_parameters()), InputRange(0.03, 120)
    return {
        layer.name: quantize_layer(layer.name, weights[layer.name], layer.contracted, chosen, range_of or found)
        for layer in inventory.layers
        if not layer.table
    }
