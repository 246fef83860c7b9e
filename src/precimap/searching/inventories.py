"""What a task's model is made of: discovery on the first search batch, and on calibration batches where that is not enough.

Invariant: the same task gives the same inventory, at every start of a run: batches are taken in the order of their splits,
the search split's first one and as many of the calibration split as discovery asks for. The certify split is not looked at.
"""

from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory
from precimap.task import Task, first_batch, to_device


def inventory_of(task: Task) -> Inventory:
    """The inventory of the task's model. Raises ModelError and TaskError as `discover`."""
    further = (to_device(batch, task.device) for batch in task.splits.calibration)
    return discover(task.model, task.forward, first_batch(task, task.splits.search), further)
