"""The INT8 products of compiled code, counted against the layers that it was made of.

Invariant: a layer that Inductor multiplies in base precision is never taken for one in INT8. Three things are compared:
what was traced as a product, what Inductor says it lowered to oneDNN's, and what read a layer's decoded values instead
(an operator that a library calls in compiled code alone). To look for the operator in the code's text was not taken: it
has another name in each kind of code; tests do it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from precimap.runtime.weights.tracing import TRACED

_LOWERED = "qlinear_weight_prepack_matcher_count"


@dataclass(slots=True)
class Products:
    """expected: layers that were traced as products, by their codes: of two calls of a layer on one input a single
    product is left. found: oneDNN's in the code. otherwise: layer -> the operator that reads its decoded values.
    """

    expected: int = 0
    found: int = 0
    otherwise: dict[str, str] = field(default_factory=dict)

    @property
    def lost(self) -> str | None:
        """What is not in INT8, a sentence; or None."""
        if self.otherwise:
            named = [f"{name} is read by {by}" for name, by in self.otherwise.items()]
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            return f"{', '.join(named[:3])}{more} in compiled code, and would be multiplied in base precision there"
        if self.found < self.expected:
            return (
                f"expected {self.expected} INT8 products in the generated code, found {self.found}: Inductor lowers "
                "no layer that one graph calls on several inputs, or this torch build none"
            )
        return None


@contextmanager
def counted(products: Products) -> Iterator[None]:
    """What is traced and compiled inside of the block is added to `products`."""
    from torch._dynamo.utils import counters

    before = counters["inductor"][_LOWERED]
    TRACED.names, TRACED.otherwise = set(), {}
    try:
        yield
    finally:
        products.expected += len(TRACED.names)
        products.otherwise |= TRACED.otherwise
        products.found += counters["inductor"][_LOWERED] - before
        TRACED.names, TRACED.otherwise = None, {}
