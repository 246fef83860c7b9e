"""What every step of one search needs: what the user asked, and the run that measures it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from precimap.errors import InputError
from precimap.layers.target import Target
from precimap.numerics.schemes import Scheme
from precimap.numerics.schemes import scheme as scheme_by_name
from precimap.precision_map import Premise
from precimap.searching.allocation.rules import Rule
from precimap.searching.latency.serving import Serving
from precimap.searching.limits import Effort, Limits
from precimap.searching.preflight import Preflight
from precimap.searching.run import Run


def schemes_of(given: Sequence[str | Scheme], target: Target) -> tuple[Scheme, ...]:
    """The schemes by name. Raises InputError for what is easily given in another form."""
    if isinstance(given, str) or not given:
        raise InputError(f"expected a list of at least one scheme, such as ['fp8'], got {given!r}")
    if isinstance(target, str):
        raise InputError(f"expected a target such as pm.CPU_INT8 or pm.EMULATED, got the text {target!r}")
    return tuple(scheme_by_name(scheme) if isinstance(scheme, str) else scheme for scheme in given)


@dataclass(frozen=True, slots=True)
class Asked:
    """realigned_at: the layer that makes the scores, if maps are to be realigned there."""

    run: Run
    schemes: tuple[Scheme, ...]
    limits: Limits
    rule: Rule
    target: Target
    effort: Effort
    premise: Premise
    on_preflight: Callable[[Preflight], None] | None
    serving: Serving
    realigned_at: str | None = None
