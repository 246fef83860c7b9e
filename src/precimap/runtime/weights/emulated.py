"""The kernel of the target `emulated`: quantise-dequantise around the call itself, on any device.

For looking at a map where its hardware is not at hand, and as the oracle of every other kernel. It is slower than the model
it emulates and says so; nothing here claims speed.

Invariant: what is emulated is what `layers/emulation.py` emulates in a search: the same function, given the operators that
torch makes of the model's calls instead of the calls themselves. So a call that is no product of matrices itself (einsum),
and that torch makes one of, multiplies codes here and values there, with other last bits (`layers/code_products.py`).
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from precimap.layers.emulation import SharedInputs, emulate, operand
from precimap.layers.interception import WeightCall
from precimap.layers.ops import OPS, Arguments
from precimap.layers.views import View
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.products import GATHERS, CodedKernel


class EmulatedKernel(CodedKernel):
    """Any scheme, any product that the table of `layers/ops.py` describes."""

    name = "EMULATED_KERNEL"

    def linear(self, x: Tensor, weight: LowWeight, bias: Tensor | None = None) -> Tensor:
        output: Tensor = self.product(F.linear, (x, weight, bias), {})
        return output

    def rows(self, x: Tensor, weight: LowWeight, bias: Tensor | None, dtype: Any) -> Tensor:
        return self.linear(x, weight, bias).to(dtype)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = OPS.get(func)
        if op is None:
            return super().product(func, args, kwargs) if func in GATHERS else NotImplemented
        arguments = Arguments(args, kwargs)
        left, right = arguments.get(op.left), arguments.get(op.right)
        weight = right if isinstance(right, LowWeight) else left
        if not isinstance(weight, LowWeight) or (isinstance(left, LowWeight) and isinstance(right, LowWeight)):
            return NotImplemented
        layer = self.layer(weight)
        if op.lookup and layer.scheme.computes_low:
            arguments = arguments.replaced(op.left if weight is left else op.right, weight.read())
            return func(*arguments.args, **arguments.kwargs)
        # The codes are a view of the weight's already.
        view = View(weight.how.name, (None,) * weight.dim(), lambda given: given)
        call = WeightCall(
            op=op,
            func=func,
            arguments=arguments,
            contraction=op.contraction(left, right, arguments),
            view=view,
            weight_on_left=weight is left,
        )
        return emulate(call, layer, weight.prepared("emulated", lambda low: operand(low.layer())), SharedInputs())


EMULATED_KERNEL = EmulatedKernel()
