"""The alpha ledger: how much confidence a certify split has already given away.

Invariant: the file holds every chain of maps that was ever judged on the split, written before the split is looked at;
the sum of their alphas bounds the probability that any certificate from this split is false (union bound). Data that
judged often enough ends up choosing; a plain counter of runs was not taken, because the same chain may be judged again
for nothing: same question, same data, same answer.

File `<directory>/<split>.alpha.json`, UTF-8:

    {"version": 1, "split": "<fingerprint>",
     "judged": [{"chain": "<fingerprint>", "alpha": 0.05, "description": "nDCG@10, margin 0.002, 8 maps",
                 "first": "2026-05-04T10:20:30+00:00"}]}

One entry per chain, oldest first; `alpha` is the largest level it was judged at, `first` the time of its first judging
(UTC). Deleting the file makes a used split look fresh, and the certificates made from it false. Processes that share
the directory take turns through a lock on `<split>.alpha.lock` (POSIX `flock`).
"""

import fcntl
import json
import math
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from precimap.durable import write_text
from precimap.errors import AlphaSpent, JournalError, SaveError, TaskError

_VERSION = 1
_SLACK = 1e-9  # 0.025 + 0.025 is at most 0.05


@dataclass(frozen=True, slots=True)
class Judged:
    """One chain of maps that the split has judged; a row of the file."""

    chain: str
    alpha: float
    description: str
    first: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """The account of one certify split. `open` it, then `spend` before each look at the split."""

    path: Path
    split: str
    budget: float

    @classmethod
    def open(cls, directory: Path, split: str, budget: float) -> Self:
        """The ledger of `split` (a fingerprint, fit for a file name) in `directory`, which is made if need be.

        budget: the largest total alpha, in (0, 1); a property of this run and not of the file.
        Raises TaskError for a bad `split` or `budget`, SaveError when the directory cannot be made, JournalError when
        the ledger is there and cannot be read.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", split):
            raise TaskError(f"expected a fingerprint of the certify split (letters, digits, . _ -), got {split!r}")
        _check_level("a budget", budget)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot make {directory} for the alpha ledger: {error.strerror or error}") from error
        ledger = cls(directory / f"{split}.alpha.json", split, budget)
        ledger.judged()
        return ledger

    def judged(self) -> tuple[Judged, ...]:
        """What the split has judged so far, oldest first. Raises JournalError when the file cannot be read."""
        try:
            return _parse(self.path.read_text(encoding="utf-8"), self.split)
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise JournalError(
                f"expected the alpha ledger of the certify split in {self.path}, got a file that cannot be read "
                f"({error}). Restore it from a backup, or certify on fresh data. Do not delete it: the split has been "
                "looked at, and nobody knows any more how often."
            ) from error

    def spend(self, chain: str, alpha: float, description: str) -> float:
        """Book that `chain` is about to be judged at level `alpha`; the total alpha spent on the split, this included.

        chain: fingerprint of the model, metric, target and ordered maps. description: what a person recognises it by.
        A chain that was judged before costs only what `alpha` exceeds its earlier level by: a false certificate at one
        level is a false one at every larger level, so that the larger level covers both. At the same level or below it
        is free, also when the budget has become smaller than what is spent.

        When this returns, the booking is on the disk. Raises AlphaSpent when the total would exceed the budget (then
        nothing is booked), TaskError for an `alpha` outside (0, 1), SaveError when the file cannot be written, and
        JournalError when it cannot be read.
        """
        _check_level("an alpha", alpha)
        with self._alone():
            before = self.judged()
            after = _with(before, chain, alpha, description)
            total = math.fsum(entry.alpha for entry in after)
            if after == before:
                return total
            if total > self.budget + _SLACK:
                raise AlphaSpent(self._refusal(before, total, alpha, description))
            write_text(self.path, _render(self.split, after))
            return total

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock, so that of two processes only one spends the last alpha. The lock ends with the process."""
        lock = self.path.with_suffix(".lock")
        with ExitStack() as held:
            try:
                fcntl.flock(held.enter_context(lock.open("a")), fcntl.LOCK_EX)
            except OSError as error:
                raise SaveError(f"cannot lock the alpha ledger with {lock}: {error.strerror or error}") from error
            yield

    def _refusal(self, before: tuple[Judged, ...], total: float, alpha: float, description: str) -> str:
        spent = math.fsum(entry.alpha for entry in before)
        history = "".join(f"\n  {e.first}  alpha {e.alpha:g}  {e.description} (chain {e.chain})" for e in before)
        return (
            f"the certify split {self.split} has given away alpha {spent:g} of the budget {self.budget:g}; judging "
            f"'{description}' at alpha {alpha:g} would make it {total:g}. It has judged:{history or ' nothing yet'}\n"
            f"Give a fresh certify split, or a budget of at least {total:g}; the certificate then states this total. "
            f"Judging one of the chains above again costs nothing. Ledger: {self.path}"
        )


def _with(before: tuple[Judged, ...], chain: str, alpha: float, description: str) -> tuple[Judged, ...]:
    """The entries after judging `chain` at `alpha`; `before` itself when that is covered."""
    for place, entry in enumerate(before):
        if entry.chain == chain:
            if alpha <= entry.alpha + _SLACK:
                return before
            return (*before[:place], replace(entry, alpha=alpha), *before[place + 1 :])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return (*before, Judged(chain, alpha, description, now))


def _render(split: str, judged: tuple[Judged, ...]) -> str:
    rows = [asdict(entry) for entry in judged]
    return json.dumps({"version": _VERSION, "split": split, "judged": rows}, indent=2) + "\n"


def _parse(text: str, split: str) -> tuple[Judged, ...]:
    """Raises ValueError, TypeError or KeyError for anything but what `_render` writes for this split."""
    content: Any = json.loads(text)
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']!r}, this precimap reads version {_VERSION}")
    if content["split"] != split:
        raise ValueError(f"it belongs to the split {content['split']!r}")
    judged = tuple(Judged(**row) for row in content["judged"])
    for entry in judged:
        texts = (entry.chain, entry.description, entry.first)
        if not (all(isinstance(text, str) for text in texts) and type(entry.alpha) is float and 0 < entry.alpha < 1):
            raise ValueError(f"an entry that is none: {entry}")
    if len({entry.chain for entry in judged}) != len(judged):
        raise ValueError("the same chain twice")
    return judged


def _check_level(what: str, level: float) -> None:
    if not 0 < level < 1:
        raise TaskError(f"expected {what} between 0 and 1, got {level}")
