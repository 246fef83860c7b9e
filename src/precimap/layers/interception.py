"""The one mechanism: a mode that sees every call with a tensor in it and hands out those that contract a weight.

Invariant: the model is never modified. What a subclass does to a call ends with the `with` block, also when an exception
ends it; without a subclass's doing, every call returns what it would have returned. The alternative, swapping modules,
sees `nn.Linear` only and leaves a half-swapped model behind a failure.

Three things would hide calls and are taken care of: `F.multi_head_attention_forward` (its body is run with its inner
calls visible), the fused encoder fast path (off inside the block), and `torch.compile` (runs eagerly inside the block).
"""

import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from precimap.errors import FAILURES
from precimap.layers.equations import EQUATIONS, parsed
from precimap.layers.ops import OPS, Arguments, Contraction, Op
from precimap.layers.views import View, WeightViews

# The same code with an override check that never fires: its inner `linear` calls then reach the mode.
unfolded_attention = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda _: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)
unfolded_attention.__kwdefaults__ = F.multi_head_attention_forward.__kwdefaults__


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightCall:
    """One call that contracts a known weight with another tensor (or looks rows of it up).

    `weight_on_left` tells which operand is the weight; `contraction` counts dims of the operands as the call saw them.
    """

    op: Op
    func: Callable[..., Any]
    arguments: Arguments
    contraction: Contraction
    view: View
    weight_on_left: bool

    @property
    def weight(self) -> Tensor:
        operand: Tensor = self.arguments.get(self.op.left if self.weight_on_left else self.op.right)
        return operand

    @property
    def input(self) -> Tensor:
        operand: Tensor = self.arguments.get(self.op.right if self.weight_on_left else self.op.left)
        return operand

    @property
    def weight_contracted(self) -> tuple[int, ...]:
        return self.contraction.left if self.weight_on_left else self.contraction.right

    @property
    def input_contracted(self) -> tuple[int, ...]:
        return self.contraction.right if self.weight_on_left else self.contraction.left

    def run(self) -> Any:
        """The call as the model made it."""
        return self.func(*self.arguments.args, **self.arguments.kwargs)

    def replacing(self, weight: Tensor, input: Tensor) -> "WeightCall":
        """The call with other operands."""
        left, right = (weight, input) if self.weight_on_left else (input, weight)
        return replace(self, arguments=self.arguments.replaced(self.op.left, left).replaced(self.op.right, right))

    def computed(self) -> Any:
        """The result of the call; what it writes into stays as it is, see `written`."""
        kwargs = {key: value for key, value in self.arguments.kwargs.items() if key != "out"}
        return (self.op.out_of_place or self.func)(*self.arguments.args, **kwargs)

    def run_with(self, weight: Tensor, input: Tensor) -> Any:
        """As `computed`, with other operands."""
        return self.replacing(weight, input).computed()

    def written(self, result: Any) -> Any:
        """What the model gets for the call's own result; where the call writes (in place, `out`), it is written there.

        Two steps rather than one, so that a result can be computed several times (schemes, first-order errors).
        """
        target = self.arguments.get((0, "self")) if self.op.in_place else self.arguments.kwargs.get("out")
        if not isinstance(target, Tensor) or not isinstance(result, Tensor):
            return result
        if target.shape != result.shape:
            target.resize_(result.shape)
        return target.copy_(result)


class Interception(TorchFunctionMode):
    """Watches the given weights; a subclass decides what a call on one of them returns.

    weights: name -> parameter; other parameters pass through unseen.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.views = WeightViews(weights)
        self._surroundings: list[ExitStack] = []

    def on_weight(self, call: WeightCall) -> Any:
        """What the call returns. The default changes nothing."""
        return call.run()

    def on_other(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any call that does not contract a watched weight."""
        output = func(*args, **kwargs)
        self.views.follow(func, args, kwargs, output)
        return output

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            # The mode is off while it handles a call; without it on again the inner calls would pass unseen.
            with self:
                return unfolded_attention(*args, **kwargs)
        op = OPS.get(func)
        if op is None and func not in EQUATIONS:  # most calls: they are many, and small
            return self.on_other(func, args, kwargs)
        call = self._weight_call(op, func, args, kwargs)
        return self.on_other(func, args, kwargs) if call is None else self.on_weight(call)

    def _weight_call(
        self, op: Op | None, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> WeightCall | None:
        arguments = Arguments(args, kwargs)
        if op is None:
            found = parsed(func, arguments)
            if found is None:
                return None
            op, func, arguments = found
        left, right = arguments.get(op.left), arguments.get(op.right)
        left_view, right_view = self.views.find(left), self.views.find(right)
        view = left_view or right_view
        if view is None or (left_view is not None and right_view is not None):
            return None
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        try:
            contraction = op.contraction(left, right, arguments)
        except FAILURES:
            return None  # arguments in a form that the table does not know: then it is another call
        if not op.lookup and not (contraction.left and contraction.right):
            return None  # an outer product: nothing is summed, so there is no channel and no product of a matrix unit
        return WeightCall(
            op=op, func=func, arguments=arguments, contraction=contraction, view=view, weight_on_left=view is left_view
        )

    def __enter__(self) -> Self:
        surroundings = ExitStack()
        surroundings.enter_context(_VISIBILITY.everything())
        super().__enter__()  # type: ignore[no-untyped-call]
        self._surroundings.append(surroundings)
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            super().__exit__(*exception)  # type: ignore[no-untyped-call]
        finally:
            self._surroundings.pop().close()


class _Visibility:
    """The two ways in which torch runs many ops as one, off for the whole process while anybody watches.

    Both settings are torch's global ones. They are kept when the first watcher comes and restored when the last one has
    left, in whatever order threads come and go: a watcher that restored what it found would leave them off for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watchers = 0
        self._restoring = ExitStack()
        self._eager = False

    @contextmanager
    def everything(self) -> Iterator[None]:
        """Everything is visible inside the block, in this thread and in the others."""
        with self._lock:
            # Without dynamo nothing is compiled; importing it takes seconds. First, for it may refuse.
            if not self._eager and "torch._dynamo" in sys.modules:
                self._restoring.enter_context(torch.compiler.set_stance("force_eager"))
                self._eager = True
            if not self._watchers:
                fast_path = torch.backends.mha.get_fastpath_enabled()
                self._restoring.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
                torch.backends.mha.set_fastpath_enabled(False)
            self._watchers += 1
        try:
            yield
        finally:
            with self._lock:
                self._watchers -= 1
                if not self._watchers:
                    self._eager = False
                    self._restoring.close()


_VISIBILITY = _Visibility()
