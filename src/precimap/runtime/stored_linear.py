"""A linear layer whose weight is stored low and computed in base precision: what weight-only schemes are on a CPU.

Invariant: the codes are decoded once, when the layer is made; a saved file holds them instead of the weight. So the file
is smaller and nothing else is: in memory the codes are kept for saving beside the decoded weight, one byte a value more
than the model had. Decoding in each call was not taken: at 32 rows and 1024 x 1024 in BF16 a call then takes 14 times as
long in FP8 and 1.8 times in INT8 (docs/log.md), and INT8 that is multiplied as INT8 needs as little memory.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from precimap.layers.quantized import QuantizedLayer


class StoredLinear(nn.Module):
    """A linear layer [.., K] -> [.., N] that computes what its codes stand for, in the weight's base precision.

    In float32 that is the emulation. In BF16 the decoded weight is rounded once more, by 2^-9 of each value at most.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantizedLayer, linear: nn.Linear) -> None:
        super().__init__()
        bias: Tensor | None = linear.bias
        # Not in the state dict: what travels are the codes.
        self.register_buffer("weight", layer.weight().to(linear.weight.dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.layer_name, self.stored = layer.name, layer.scheme.name

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        n, k = self.weight.shape
        return f"in_features={k}, out_features={n}, stored={self.stored}"
