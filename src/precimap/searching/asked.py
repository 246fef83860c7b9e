"""What every step of one search needs: what the user asked, and the run that measures it."""

from collections.abc import Callable
from dataclasses import dataclass

from precimap.layers.target import Target
from precimap.numerics.schemes import Scheme
from precimap.precision_map import Premise
from precimap.searching.allocation.rules import Rule
from precimap.searching.latency.serving import Serving
from precimap.searching.limits import Effort, Limits
from precimap.searching.preflight import Preflight
from precimap.searching.run import Run


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
