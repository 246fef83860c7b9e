"""A deployed model through torch.compile, with its INT8 products in the generated code.

Invariant: every INT8 layer that an example reaches is multiplied by oneDNN's INT8 product in the code for it, counted and
not assumed: Inductor finds the product only with its weights frozen, and computes in base precision without a word
where it does not. Frozen weights cannot be changed afterwards; a deployed model's never are. Setting
`torch._inductor.config.freezing` for the process was not taken: it would freeze the user's other models too.
"""

from typing import Any

import torch
from torch import nn

from precimap.errors import DeployError
from precimap.runtime.attention import attention_pass
from precimap.runtime.int8_linear import Int8Linear

# Inductor computes what two products read in each of them again, if it reads only four tensors or fewer; where one of these
# is a gather, as after an embedding, that is done element by element and takes longer than the product.
_SETTINGS = {"freezing": True, "realize_reads_threshold": 1}
_LOWERED = "qlinear_weight_prepack_matcher_count"


class CompiledModel(nn.Module):
    """Calls of this module run the compiled code, without gradients. Other methods of the model are not reached."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._run = torch.compile(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self._run(*args, **kwargs)


def compiled(deployed: nn.Module, *examples: tuple[Any, ...]) -> nn.Module:
    """`deployed` compiled by Inductor for the shapes of the examples, each the positional arguments of one call.

    Compiles now, with a C++ compiler of this machine. A call with other shapes later is right but compiles again and
    runs the INT8 layers one by one, as the deployed model itself does; so do calls in inference mode. An activation
    that follows a layer and the codes of the next are computed inside the product, whose sums may round to another code
    now and then; attention in BF16 is products where those are faster (`attention`), its scores in BF16. Raises DeployError
    when a layer is not in INT8 in the generated code.
    """
    import torch._inductor.config
    from torch._dynamo.utils import counters

    model = CompiledModel(deployed)
    for example in examples:
        expected = _int8_calls(deployed, example)
        before = counters["inductor"][_LOWERED]
        with torch._inductor.config.patch({**_SETTINGS, "pre_grad_custom_pass": attention_pass()}):
            model(*example)
        found = counters["inductor"][_LOWERED] - before
        if found < expected:
            raise DeployError(
                f"expected {expected} INT8 products in the generated code, found {found}: this torch build does not "
                "lower them; use the deployed model as it is"
            )
    return model


def _int8_calls(deployed: nn.Module, example: tuple[Any, ...]) -> int:
    """How many times a call reaches an INT8 layer."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [m.register_forward_hook(count) for m in deployed.modules() if isinstance(m, Int8Linear)]
    try:
        with torch.no_grad():
            deployed(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
