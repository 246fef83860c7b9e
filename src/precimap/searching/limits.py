"""What the user accepts, and where what was given away is remembered."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from precimap.errors import InputError
from precimap.metrics.metric import RELATIVE, Metric


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user accepts: margin (in the metric's units), confidence, cutoff per layer, alpha budget of the split."""

    margin: float
    confidence: float
    cutoff: float | None
    alpha_budget: float | None

    def __post_init__(self) -> None:
        if not self.margin > 0 or self.margin == float("inf"):
            raise InputError(f"expected a margin above zero (the largest drop you accept), got {self.margin}")
        if not 0.5 <= self.confidence < 1:
            raise InputError(f"expected a confidence from 0.5 to below 1, such as 0.95, got {self.confidence}")
        if self.cutoff is not None and not 0 < self.cutoff < float("inf"):
            raise InputError(f"expected a cutoff above zero, got {self.cutoff}")

    @property
    def alpha(self) -> float:
        return round(1 - self.confidence, 12)

    @property
    def budget(self) -> float:
        """What the certify split may give away in all."""
        return self.alpha if self.alpha_budget is None else self.alpha_budget


def margin_of(given: float | str, metric: Metric) -> float:
    """A margin in the metric's units: a number, as a number or as text, or a percentage such as "0.1%" of a relative drop.

    Raises InputError for another text, and for a percentage of a metric whose drop is not relative: of what, nobody knows.
    """
    if not isinstance(given, str):
        return given
    text = given.strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        raise InputError(f'expected a margin such as 0.002 or "0.1%", got {given!r}') from None
    if not text.endswith("%"):
        return number
    if metric.unit != RELATIVE:
        raise InputError(
            f"expected a margin in {metric.unit or f'units of {metric.name}'}, got {text}; per cent are for metrics whose "
            "drop is relative, such as NE"
        )
    return number / 100


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a search looks.

    probe_all: measure every layer on its own instead of screening. Of the search split, screen_units are screened where
    losses are, audit_units are probed to check the screen, check_units see the noise floor and the rounding draws.
    screen_memory, replay_memory: bytes. rounding_draws: shifted grids for the final map, 0 for none.
    timing_seconds: of timing a whole map at each batch size, about; 0: none is timed end to end.
    minutes: after these no new look at the search split is begun; the best answer so far is certified.
    """

    probe_all: bool = False
    screen_units: int = 256
    audit_units: int = 32
    check_units: int = 128
    screen_memory: int = 4 * 2**30
    replay_memory: int = 4 * 2**30
    rounding_draws: int = 8
    timing_seconds: float = 10.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("screen_units", "audit_units", "check_units"):
            if getattr(self, name) < 2:
                raise InputError(f"expected {name} of at least 2, got {getattr(self, name)}")
        for name in ("screen_memory", "replay_memory"):
            if getattr(self, name) < 0:
                raise InputError(f"expected {name} in bytes, 0 or more, got {getattr(self, name)}")
        if self.rounding_draws < 0 or self.rounding_draws == 1:
            raise InputError(f"expected 0 or at least 2 rounding draws (a spread needs two), got {self.rounding_draws}")
        if not 0 <= self.timing_seconds < float("inf"):
            raise InputError(f"expected timing_seconds of 0 or more, got {self.timing_seconds}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"expected a number of minutes above zero, got {self.minutes}")


USUAL_EFFORT = Effort()


def state_directory() -> Path:
    """Where the alpha ledgers are kept: $PRECIMAP_STATE, or precimap's folder under the user's state directory."""
    given = os.environ.get("PRECIMAP_STATE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "precimap"


def chain_fingerprint(maps: Sequence[str], margin: float, terms: Mapping[str, str]) -> str:
    """What the ledger calls a question: the maps in order, the margin of the gate, and all that makes another one of it.

    maps: their fingerprints. terms: the metric with its parameters, guards with their margins, the data, what the task says
    of them (`precimap.searching.same_task.question_terms`).

    The margin belongs to it because a chain stops at another map under another margin: with maps of true drops d1 < d2 < d3,
    asked at margins just below each of them, each question has a first bad map of its own, and a chance of up to alpha to
    pass it. (For a chain of one map these events are nested and alpha would hold for all margins together; but its bound is
    on the certificate, so that a wider margin needs no question.)
    """
    text = json.dumps([margin, sorted(terms.items()), list(maps)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
