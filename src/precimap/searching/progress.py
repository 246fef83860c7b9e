"""How long work tells how far it is: a function of (stage, done, total), nothing else.

The search never prints; the command line turns these calls into a bar with an honest ETA.
"""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who does not want any."""
