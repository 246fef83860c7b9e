"""What is searched: a task's model, the schemes that it may take, and what is known of it before any layer is judged.

Invariant: all steps of a search ask one `Subject` for codes and for the pairs that are left, so that what one step measures
is what the next one and the map hold. What cannot be computed, or saves no time, leaves by `without` and `timed`, with its
reason; nothing comes back.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import Target
from precimap.numerics.schemes import Scheme
from precimap.searching.calibrate import InputRanges, codes, prepare
from precimap.searching.eligibility import Eligibility, open_pairs, refusing
from precimap.searching.latency.planned import Latency
from precimap.searching.pairs import Key, Pair
from precimap.searching.run import Run
from precimap.task import Task, first_batch, to_device


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A task that is searched, in a run.

    target: what the map is for. eligibility: which pairs may be tried. calibration: static input ranges. failed: what the
    trial refused, and why. latency: of the layers on the target, or None. said: how the target's form was found, if it was.
    """

    run: Run
    inventory: Inventory
    schemes: tuple[Scheme, ...]
    target: Target
    eligibility: Eligibility
    calibration: InputRanges
    failed: Mapping[Key, str] = field(default_factory=dict)
    latency: Latency | None = None
    said: str | None = None

    @property
    def task(self) -> Task:
        return self.run.task

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that may be tried."""
        return open_pairs(self.eligibility, self.schemes)

    @property
    def by_name(self) -> dict[str, Scheme]:
        return {scheme.name: scheme for scheme in self.schemes}

    def codes(self, pairs: Iterable[Pair]) -> tuple[QuantizedLayer, ...]:
        """Codes and scales of each pair, in the order given: what every later step computes with."""
        return codes(self.task, self.inventory, self.calibration, pairs)

    def quantized(self, choice: Mapping[str, Scheme]) -> dict[str, QuantizedLayer]:
        """The same by layer, of a choice of layers."""
        return prepare(self.task, self.inventory, self.calibration, choice)

    def without(self, refused: Mapping[Key, str]) -> Self:
        """Less these pairs, for the reasons given, and less what engines fuse with them."""
        left = refusing(self.eligibility, refused, self.inventory, self.schemes)
        return replace(self, eligibility=left)

    def timed(self, latency: Latency) -> Self:
        """With these times, less what could not be timed or saves none."""
        left = self.without(latency.failed).eligibility
        return replace(self, eligibility=replace(left, slower=latency.slower), latency=latency)


def inventory_of(task: Task) -> Inventory:
    """The inventory of a task's model, by the first search batch and as many calibration batches as discovery asks for.

    The same task gives the same inventory, at every start of a run. Raises ModelError and TaskError as `discover`.
    """
    further = (to_device(batch, task.device) for batch in task.splits.calibration)
    return discover(task.model, task.forward, first_batch(task, task.splits.search), further)
