"""The noise floor: what rounding every layer to BF16 alone does to the metric.

Not a choice but a yardstick: a drop below it is what the base precision of most servers costs already.
"""

from collections.abc import Container

from precimap.layers.inventory import Inventory
from precimap.layers.target import EMULATED
from precimap.numerics.schemes import BF16_FLOOR, Scheme
from precimap.searching.calibrate import Calibration
from precimap.searching.evidence.probe import Comparison, compare, prepare
from precimap.searching.run import Parts, Run, scored


def floor_pairs(inventory: Inventory) -> list[tuple[str, Scheme]]:
    """What is rounded: every layer that is multiplied and not dead."""
    return [(layer.name, BF16_FLOOR) for layer in inventory.layers if layer.dead is None and not layer.table]


def rounding_floor(
    run: Run, inventory: Inventory, baseline: Parts, units: int, alpha: float, failed: Container[tuple[str, str]] = ()
) -> Comparison:
    """The drop under BF16 weights and inputs of all layers, on batches of the search split with about `units` units.

    failed: the (layer, scheme name) that cannot be computed.
    """
    task = run.task
    alive = {name: scheme for name, scheme in floor_pairs(inventory) if (name, scheme.name) not in failed}
    numbers = baseline.scattered(units)
    parts = scored(
        run,
        "floor",
        "bf16",
        task.splits.search,
        lambda: EMULATED.running(task.model, prepare(task, inventory, Calibration({}), alive)),
        numbers=numbers,
    )
    return compare(task, baseline.only(numbers), parts.whole, alpha)
