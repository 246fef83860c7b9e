"""What is asked: how much worse the metric may get, how sure one has to be of it, and how hard to look.

Invariant: one `Question` serves `search`, `certify`, `compare` and the command line, so that a name, a default and what is
refused are written once. Torch-free but for the rule that it holds.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from precimap.errors import InputError
from precimap.hardware_profile import Device, HardwareProfile
from precimap.metrics.metric import RELATIVE, Metric
from precimap.searching.allocation.rules import KNAPSACK, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How hard a search looks.

    probe_all: measure every layer on its own instead of screening. Of the search split, screen_units are screened where
    losses are, audit_units are probed to check the screen, check_units see the noise floor and the rounding draws.
    screen_memory, replay_memory: bytes, or a text such as "4GiB". rounding_draws: shifted grids for the final map, 0 for
    none. timing_seconds: of timing a whole map at each batch size, about; 0: none is timed end to end. minutes: after these
    no new look at the search split is begun; the best answer so far is certified.
    """

    probe_all: bool = False
    screen_units: int = 256
    audit_units: int = 32
    check_units: int = 128
    screen_memory: int | str = 4 * 2**30
    replay_memory: int | str = 4 * 2**30
    rounding_draws: int = 8
    timing_seconds: float = 10.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("screen_units", "audit_units", "check_units"):
            if getattr(self, name) < 2:
                raise InputError(f"expected {name} of at least 2, got {getattr(self, name)}")
        for name in ("screen_memory", "replay_memory"):
            object.__setattr__(self, name, bytes_of(getattr(self, name), name))
        if self.rounding_draws < 0 or self.rounding_draws == 1:
            raise InputError(f"expected 0 or at least 2 rounding draws (a spread needs two), got {self.rounding_draws}")
        if not 0 <= self.timing_seconds < float("inf"):
            raise InputError(f"expected timing_seconds of 0 or more, got {self.timing_seconds}")
        if self.minutes is not None and not self.minutes > 0:
            raise InputError(f"expected a number of minutes above zero, got {self.minutes}")


_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def bytes_of(given: int | str, name: str = "memory") -> int:
    """A size of memory in bytes: a number of bytes, or a text with its unit. Raises InputError for another."""
    if isinstance(given, int) and given >= 0:
        return given
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?b)\s*", str(given), re.IGNORECASE)
    if isinstance(given, int) or found is None:
        raise InputError(f"expected {name} as a number of bytes, or with a unit such as 512MB or 4GiB, got {given!r}")
    return int(float(found[1]) * _UNITS[found[2].lower()])


USUAL_EFFORT = Effort()


AUTO = "auto"
FORMS = (AUTO, "eager", "compiled", "graphs")


@dataclass(frozen=True, slots=True)
class Serving:
    """How the model will be served. batch_sizes: units of a batch, all of them counting alike; none: those of the
    profile, or the batch that discovery sees. profile: of the machine it is for, instead of timing here. peak_tflops:
    10^12 operations per second in base precision, what utilisation is counted against; None: a large product is timed.
    form: of `FORMS`, how a model is served on the targets cpu and cuda (graphs: on cuda alone); auto: in the form in which
    whole models are faster.

    Raises InputError for a size that is not at least 1, or stands twice, for a peak that is not above zero, and for another
    form.
    """

    batch_sizes: tuple[int, ...] = ()
    profile: HardwareProfile | None = None
    peak_tflops: float | None = None
    form: str = AUTO

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise InputError(f"expected a form out of {', '.join(FORMS)}, got {self.form!r}")
        checked_sizes(self.batch_sizes)
        if self.peak_tflops is not None and not 0 < self.peak_tflops < float("inf"):
            raise InputError(f"expected peak TFLOPs per second above zero, got {self.peak_tflops}")

    def is_of(self, here: Device) -> bool:
        """Whether what is timed here is what is planned for."""
        return self.profile is None or self.profile.device == here


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Raises InputError for a batch size that is not at least 1, or stands twice."""
    if any(size < 1 for size in sizes) or len(set(sizes)) != len(sizes):
        raise InputError(f"expected batch sizes of at least 1, each once, got {', '.join(map(str, sizes))}")
    return tuple(sizes)


HERE = Serving()


class Terms(TypedDict, total=False):
    """What `search`, `certify` and `compare` take beside the margin, by name; see `Question`."""

    confidence: float
    alpha_budget: float | None
    ledger: str | Path | None


class Asked(Terms, total=False):
    """What `search` takes beside that."""

    pinned: Sequence[str]
    allowed: Mapping[str, Sequence[str]]
    rule: Rule
    cutoff: float | None
    realign: bool
    effort: Effort
    serving: Serving


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked of a model in low precision.

    margin: the largest drop you accept, in units of the metric. confidence: of the certificate. alpha_budget: what the
    certify split may give away in all (default 1 - confidence). ledger: directory of the alpha ledgers (default
    `state_directory()`).

    Of a search only: pinned: layers to keep, by name or shell pattern. allowed: name or pattern -> the only schemes for
    these layers. A name means that layer alone, whatever it holds. rule: `Knapsack(...)` or `Threshold()`. cutoff: a layer
    is called tolerant when its own drop is surely below it (default: margin / number of candidate layers). realign: bring
    each map's scores, which must be logits, back to the baseline's by a scale and a shift that are fitted without labels on
    the calibration split and folded into the last nn.Linear; part of the map and of what is certified. effort: how hard to
    look. serving: batch sizes and hardware; by default layers are timed here if the target has kernels here.

    Raises InputError for a margin, confidence or cutoff that is none.
    """

    margin: float
    confidence: float = 0.95
    alpha_budget: float | None = None
    ledger: str | Path | None = None
    pinned: Sequence[str] = ()
    allowed: Mapping[str, Sequence[str]] = field(default_factory=dict)
    rule: Rule = KNAPSACK
    cutoff: float | None = None
    realign: bool = False
    effort: Effort = USUAL_EFFORT
    serving: Serving = HERE

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

    @property
    def ledger_directory(self) -> Path:
        return Path(self.ledger) if self.ledger else state_directory()


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
