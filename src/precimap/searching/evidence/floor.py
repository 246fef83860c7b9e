"""The noise floor: what rounding every layer to BF16 alone does to the metric.

Not a choice but a yardstick: a drop below it is what the base precision of most servers costs already.
"""

from precimap.layers.inventory import Inventory
from precimap.layers.target import EMULATED
from precimap.numerics.schemes import BF16_FLOOR, Scheme
from precimap.searching.comparison import Comparison, compare
from precimap.searching.question import Question
from precimap.searching.run import Parts, Pass, scored
from precimap.searching.subject import Subject


def floor_pairs(inventory: Inventory) -> list[tuple[str, Scheme]]:
    """What is rounded: every layer that is multiplied and not dead."""
    return [(layer.name, BF16_FLOOR) for layer in inventory.layers if layer.dead is None and not layer.table]


def rounding_floor(subject: Subject, question: Question, baseline: Parts) -> Comparison:
    """The drop when every layer that can be is computed in BF16, on `Effort.check_units` units of the search split."""
    task, inventory = subject.task, subject.inventory
    alive = {name: scheme for name, scheme in floor_pairs(inventory) if (name, scheme.name) not in subject.failed}
    numbers = baseline.scattered(question.effort.check_units)
    asked = Pass(
        kind="floor",
        of="bf16",
        batches=task.splits.search,
        running=lambda: EMULATED.running(task.model, subject.quantized(alive)),
        numbers=numbers,
    )
    return compare(task, baseline.only(numbers), scored(subject.run, asked).whole, question.alpha)
