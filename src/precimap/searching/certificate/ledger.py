"""The alpha ledger: how much confidence a certify split has already given away.

Invariant: the directory holds every chain of maps that was ever judged on a split, written before the split is looked at;
the sum of the alphas of all chains that judged with its units bounds the probability that any certificate from them is
false (union bound). Data that judged often enough ends up choosing; a plain counter of runs was not taken, because the
same question may be asked again for nothing: same question, same data, same answer.

A split is known by the set of its units, by what the forward reads of each and its label: another size or order of batches,
a row more or less, another key beside, other clusters are the same data. Each split has a file of its own (`account`).
Where more than NEARLY_NEW of a split's units are in accounts, all that those have given away counts as given away by this
one, too, which is never too little. Data that are new but for a smaller share are new data: what was given away with that
share is counted as that share, stands in the total that a certificate states, and is no reason to refuse. Deleting a file
makes a used split look fresh, and the certificates made from it false.
Processes that share the directory take turns through a lock on `ledger.lock` (POSIX `flock`).
"""

import fcntl
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from precimap.durable import write_text
from precimap.errors import AlphaSpent, JournalError, SaveError, TaskError
from precimap.searching.certificate.account import Account, Answer, Judged, parse
from precimap.searching.certificate.known_units import IN_LEDGER, Sketch, shared_units
from precimap.searching.splits.rows import Prints

LOCK_NAME = "ledger.lock"
NEARLY_NEW = 0.2
FRESH = (
    "a fresh split is a second try: each split passes a map that is too bad with a probability of up to its alpha, so k "
    "splits, asked until one says yes, pass it with up to k times alpha"
)
_SUFFIX = ".alpha.json"
_SLACK = 1e-9  # 0.025 + 0.025 is at most 0.05


@dataclass(frozen=True, slots=True, eq=False)
class AskedSplit:
    """A certify split as the ledger knows it.

    name: its fingerprint, fit for a file name. views: prints of its units, of what the forward reads of each and of single
    columns that tell them apart. older: gives the name that older releases knew it by; called only where the directory holds
    files of theirs.
    """

    name: str
    views: tuple[Prints, ...]
    older: Callable[[], str]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The account of one certify split. `open` it, then `spend` before each look at the split."""

    path: Path
    split: AskedSplit
    budget: float

    @classmethod
    def open(cls, directory: Path, split: AskedSplit, budget: float) -> Self:
        """The ledger of `split` in `directory`, which is made if need be.

        budget: the largest total alpha, in (0, 1); a property of this run and not of the file.
        Raises TaskError for a bad name or `budget`, SaveError when the directory cannot be made, JournalError when an
        account in it cannot be read.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}", split.name):
            raise TaskError(f"expected a fingerprint of the certify split (letters, digits, . _ -), got {split.name!r}")
        _check_level("a budget", budget)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot make {directory} for the alpha ledger: {error.strerror or error}") from error
        ledger = cls(directory / f"{split.name}{_SUFFIX}", split, budget)
        ledger.judged()
        return ledger

    def judged(self) -> tuple[Judged, ...]:
        """What these units have judged so far, under any name. Raises JournalError when a file cannot be read."""
        return tuple(entry for account, _ in self._known(self._shared()) for entry in account.judged)

    def spent(self) -> float:
        """The alpha that these units have given away so far. Raises JournalError as `judged`."""
        return math.fsum(entry.alpha for entry in self.judged())

    def notes(self) -> tuple[str, ...]:
        """What is to be said of units that were asked before under another name. Raises JournalError as `judged`."""
        return tuple(
            f"{100 * share:.3g} % of the certify split's units have judged before, as the split {account.split}: "
            + _counted(account)
            for account, share in self._shared()
            if account.split != self.split.name
        )

    def spend(self, chain: str, alpha: float, description: str) -> float:
        """Book that `chain` is about to be judged at level `alpha`; the total alpha spent on the split, this included.

        chain: fingerprint of the whole question: maps in order, margin, metric, guards, data. description: what a person
        recognises it by. A chain that was judged before costs only what `alpha` exceeds its earlier level by: a false
        certificate at one level is a false one at every larger level, so that the larger level covers both. At the same
        level or below it is free, also when the budget has become smaller than what is spent.

        When this returns, the booking is on the disk. Raises AlphaSpent when the total would exceed the budget (then
        nothing is booked), TaskError for an `alpha` outside (0, 1), SaveError when the file cannot be written, and
        JournalError when it cannot be read.
        """
        _check_level("an alpha", alpha)
        with self._alone():
            shared = self._shared()
            known = self._known(shared)
            accounts = [account for account, _ in known]
            booked = next((account for account in accounts if _has(account, chain)), self._own(accounts))
            after = _with(booked.judged, chain, alpha, description)
            spent = math.fsum(entry.alpha for account in accounts if account is not booked for entry in account.judged)
            total = math.fsum((spent, *(entry.alpha for entry in after)))
            shares = _by_share(shared, accounts)
            if after == booked.judged:
                return total + shares
            if total > self.budget + _SLACK:
                raise AlphaSpent(self._refusal(known, total, alpha, description))
            for account in (*(one for one in accounts if one.units is None and one is not booked), booked):
                # One of an older release is known by its units from now on.
                judged = after if account is booked else account.judged
                self._write(replace(account, units=account.units or self._sketch(), judged=judged))
            return total + shares

    def check_left(self, may_be: Callable[[Judged, Sequence[str]], bool], alpha: float, description: str) -> None:
        """Raise AlphaSpent where `spend` would refuse whatever is asked at level `alpha`, before it is known what that is.

        may_be: whether a booked question, and the maps that are known to have been judged in it, may be what will be asked;
        that one costs only what `alpha` exceeds its level by. description: of what will be asked. Nothing is booked.
        """
        known = self._known(self._shared())
        judged = [(account, entry) for account, _ in known for entry in account.judged]
        total = math.fsum((*(entry.alpha for _, entry in judged), alpha))
        paid = [
            entry.alpha
            for account, entry in judged
            if may_be(entry, [row.map for row in account.answers if row.chain == entry.chain])
        ]
        best = max(paid, default=0.0)
        if best < alpha - _SLACK and total - best > self.budget + _SLACK:
            raise AlphaSpent(self._refusal(known, total - best, alpha, description))

    def answer(self, answers: Sequence[Answer]) -> None:
        """Write down what the split said of the maps of a chain that was booked. Raises SaveError, JournalError."""
        with self._alone():
            accounts = self._accounts()
            own = next((account for account in accounts if _has(account, answers[0].chain)), self._own(accounts))
            kept = [row for row in own.answers if (row.chain, row.map) not in {(a.chain, a.map) for a in answers}]
            after = (*kept, *answers)
            if after != own.answers:
                self._write(replace(own, units=own.units or self._sketch(), answers=after))

    def answers_before(self, chain: str) -> tuple[tuple[str, Answer], ...]:
        """What any split in the directory was asked and said before this split was asked `chain`: (split, answer).

        Raises JournalError as `judged`.
        """
        accounts = self._accounts()
        asked = {(a.split, entry.chain): datetime.fromisoformat(entry.first) for a in accounts for entry in a.judged}
        now = min(
            (first for (_, one), first in asked.items() if one == chain), default=datetime.max.replace(tzinfo=UTC)
        )
        rows = [(asked.get((a.split, row.chain), now), a.split, row) for a in accounts for row in a.answers]
        before = sorted((first, split, number) for number, (first, split, _) in enumerate(rows) if first < now)
        return tuple((split, rows[number][2]) for _, split, number in before)

    def _known(self, shared: list[tuple[Account, float]]) -> list[tuple[Account, float]]:
        """Those of `shared` that count as this split's own."""
        if math.fsum(share for account, share in shared if account.split != self.split.name) > NEARLY_NEW:
            return shared
        return [(account, share) for account, share in shared if account.split == self.split.name]

    def _shared(self) -> list[tuple[Account, float]]:
        """Every account that holds some of this split's units, with the share of them that it holds."""
        accounts = self._accounts()
        older = self.split.older() if any(account.units is None for account in accounts) else ""
        found = []
        for account in accounts:
            if account.units is None or account.split == self.split.name:
                share = float(account.split in (self.split.name, older))
            else:
                share = shared_units(account.units, self.split.views)
            if share:
                found.append((account, share))
        return found

    def _accounts(self) -> list[Account]:
        found = []
        for path in sorted(self.path.parent.glob(f"*{_SUFFIX}")):
            try:
                found.append(parse(path.read_text(encoding="utf-8"), path.name.removesuffix(_SUFFIX)))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                raise JournalError(
                    f"expected the alpha ledger of a certify split in {path}, got a file that cannot be read ({error}). "
                    "Restore it from a backup, or certify on fresh data with another --ledger. Do not delete it: the split "
                    "has been looked at, and nobody knows any more how often."
                ) from error
        return found

    def _own(self, accounts: Sequence[Account]) -> Account:
        """This split's account, a new one if it has none."""
        blank = Account(self.split.name, self._sketch())
        return next((account for account in accounts if account.split == self.split.name), blank)

    def _sketch(self) -> tuple[Sketch, ...]:
        return tuple(Sketch.of(view, IN_LEDGER) for view in self.split.views)

    def _write(self, account: Account) -> None:
        write_text(self.path.with_name(f"{account.split}{_SUFFIX}"), account.render())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock, so that of two processes only one spends the last alpha. The lock ends with the process."""
        lock = self.path.with_name(LOCK_NAME)
        with ExitStack() as held:
            try:
                fcntl.flock(held.enter_context(lock.open("a")), fcntl.LOCK_EX)
            except OSError as error:
                raise SaveError(f"cannot lock the alpha ledger with {lock}: {error.strerror or error}") from error
            yield

    def _refusal(self, known: Sequence[tuple[Account, float]], total: float, alpha: float, description: str) -> str:
        spent = math.fsum(entry.alpha for account, _ in known for entry in account.judged)
        lines = []
        for account, share in known:
            if account.split != self.split.name:
                lines.append(f"\n  as the split {account.split}, which holds {100 * share:.3g} % of its units:")
            lines += [f"\n  {e.first}  alpha {e.alpha:g}  {e.description} (chain {e.chain})" for e in account.judged]
        return (
            f"the certify split {self.split.name} has used alpha {spent:g} of the budget {self.budget:g}; judging "
            f"'{description}' at alpha {alpha:g} would make it {total:g}. It has judged:{''.join(lines) or ' nothing yet'}\n"
            f"Give a fresh certify split, or a budget of at least {total:g}; the certificate then states this total. Asking "
            f"one of the questions above again costs nothing. Mind that {FRESH}. Ledger: {self.path}"
        )


def _has(account: Account, chain: str) -> bool:
    return any(entry.chain == chain for entry in account.judged)


def _by_share(shared: Sequence[tuple[Account, float]], whole: Sequence[Account]) -> float:
    """The alpha that was given away with the few units which a split shares with other accounts than `whole`."""
    names = {account.split for account in whole}
    return math.fsum(
        share * entry.alpha for account, share in shared if account.split not in names for entry in account.judged
    )


def _counted(account: Account) -> str:
    return f"alpha {math.fsum(entry.alpha for entry in account.judged):g} in {len(account.judged)} questions"


def _with(before: tuple[Judged, ...], chain: str, alpha: float, description: str) -> tuple[Judged, ...]:
    """The entries after judging `chain` at `alpha`; `before` itself when that is covered."""
    for place, entry in enumerate(before):
        if entry.chain == chain:
            if alpha <= entry.alpha + _SLACK:
                return before
            return (*before[:place], replace(entry, alpha=alpha), *before[place + 1 :])
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return (*before, Judged(chain, alpha, description, now))


def _check_level(what: str, level: float) -> None:
    if not 0 < level < 1:
        raise TaskError(f"expected {what} between 0 and 1, got {level}")
