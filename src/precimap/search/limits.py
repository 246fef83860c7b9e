"""What the user accepts, and where what was given away is remembered."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from precimap.errors import InputError
from precimap.precision_map import PrecisionMap


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


def state_directory() -> Path:
    """Where the alpha ledgers are kept: $PRECIMAP_STATE, or precimap's folder under the user's state directory."""
    given = os.environ.get("PRECIMAP_STATE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "precimap"


def chain_fingerprint(chain: Sequence[PrecisionMap]) -> str:
    """What the ledger calls a chain: its maps in order and the metric that judges them."""
    text = json.dumps([chain[0].premise.metric, *(precision_map.fingerprint for precision_map in chain)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
