"""Generated click logs in Criteo's TSV layout, for those who have no logs at hand.

    python -m precimap.demos.click_logs logs.tsv --rows 60000

Nobody clicked: a click is drawn from a planted model, logit = base + dense effects + an effect of each categorical value
+ <user, item> + drift of the items over time. Invariant: the same rows and seed give the same bytes. Real click logs were
not taken because their terms forbid shipping them. After Criteo's 40 columns come two that Criteo does not publish: user
(an integer) and time (seconds since 1970).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from precimap.errors import InputError

DAYS = 14
START = 1_772_323_200  # 2026-03-01 00:00 UTC
SECONDS_A_DAY = 86_400
ROWS_A_USER = 8
DENSE, FIELDS = 13, 26
# Of the 26 fields the first 5 describe the user, the next 6 the item (the 6th is the item itself), the others the visit.
USER_FIELDS, ITEM_FIELDS, ITEM_FIELD = range(5), range(5, 11), 5
CARDINALITIES = (
    *(2, 5, 12, 40, 300),
    *(1200, 600, 150, 60, 24, 8),
    *(3, 4, 6, 10, 16, 24, 32, 48, 64, 100, 160, 240, 400, 800, 1500),
)
RANK = 4  # of the taste that users and items share
BASE_LOGIT = -1.55  # about a quarter of the rows are clicks, as in Criteo's logs
LINES_AT_ONCE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clicks:
    """Rows in order of time. dense int64 [n, 13], -1 where missing; categorical int64 [n, 26], -1 where missing;

    label bool [n]; user int64 [n]; time int64 [n]; logit float64 [n], the planted truth, which no file holds.
    """

    dense: NDArray[np.int64]
    categorical: NDArray[np.int64]
    label: NDArray[np.bool_]
    user: NDArray[np.int64]
    time: NDArray[np.int64]
    logit: NDArray[np.float64]


def generate(rows: int, seed: int = 0) -> Clicks:
    """Draw `rows` impressions over 14 days. Raises InputError for fewer than one."""
    if rows < 1:
        raise InputError(f"expected at least one row, got {rows}")
    pick = np.random.default_rng(seed)
    user, day = _visits(pick, rows)
    item = _items(pick, day)
    categorical = _fields(pick, user, item)
    activity = pick.normal(size=user.max() + 1)[user]
    means = pick.uniform(0.5, 4.0, DENSE)
    dense = np.expm1(np.abs(means + 0.8 * pick.normal(size=(rows, DENSE)) + 0.5 * activity[:, None])).astype(np.int64)
    logit = BASE_LOGIT + _main_effects(pick, dense, means, categorical) + _taste(pick, user, item, day)
    label = pick.random(rows) < 1 / (1 + np.exp(-logit))
    # What the log loses: a value that was there when the user decided.
    dense[pick.random((rows, DENSE)) < pick.uniform(0, 0.4, DENSE)] = -1
    categorical[pick.random((rows, FIELDS)) < np.where(np.arange(FIELDS) < 11, 0.0, pick.uniform(0, 0.4, FIELDS))] = -1
    return Clicks(
        dense=dense,
        categorical=categorical,
        label=label,
        user=user,
        time=START + (day * SECONDS_A_DAY).astype(np.int64),
        logit=logit,
    )


def _visits(pick: np.random.Generator, rows: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """User and day (a fraction) of each row, in order of time: few users make many rows, most stay some days only."""
    users = -(-rows // ROWS_A_USER)
    weight = pick.lognormal(0.0, 1.0, users)
    user = pick.choice(users, rows, p=weight / weight.sum())
    stay = np.minimum(pick.exponential(2.0, users), DAYS)
    first = (DAYS - stay) * pick.random(users)
    day = first[user] + stay[user] * pick.random(rows)
    order = np.argsort(day, kind="stable")
    return user[order], day[order]


def _items(pick: np.random.Generator, day: NDArray[np.float64]) -> NDArray[np.int64]:
    """The item of each row: popular ones often, and each at its most popular on a day of its own (new ones keep coming)."""
    count = CARDINALITIES[ITEM_FIELD]
    popularity, peak = 1 / (1 + np.arange(count)) ** 0.7, pick.uniform(0, DAYS, count)
    item = np.empty(len(day), dtype=np.int64)
    for number in range(DAYS):
        own = np.flatnonzero(day.astype(np.int64) == number)
        weight = popularity * np.exp(-np.abs(number + 0.5 - peak) / 4)
        item[own] = pick.choice(count, len(own), p=weight / weight.sum())
    return item


def _fields(pick: np.random.Generator, user: NDArray[np.int64], item: NDArray[np.int64]) -> NDArray[np.int64]:
    columns = []
    for field, count in enumerate(CARDINALITIES):
        weight = 1 / (1 + np.arange(count)) ** 0.8
        weight /= weight.sum()
        if field == ITEM_FIELD:
            columns.append(item)
        elif field in USER_FIELDS:
            columns.append(pick.choice(count, user.max() + 1, p=weight)[user])
        elif field in ITEM_FIELDS:
            columns.append(pick.choice(count, CARDINALITIES[ITEM_FIELD], p=weight)[item])
        else:
            columns.append(pick.choice(count, len(user), p=weight))
    return np.stack(columns, axis=1).astype(np.int64)


def _main_effects(
    pick: np.random.Generator, dense: NDArray[np.int64], means: NDArray[np.float64], categorical: NDArray[np.int64]
) -> NDArray[np.float64]:
    effects = (np.log1p(dense) - means) @ pick.normal(0, 0.15, DENSE)
    for field, count in enumerate(CARDINALITIES):
        effects += pick.normal(0, 0.45 if field in ITEM_FIELDS else 0.2, count)[categorical[:, field]]
    return np.asarray(effects - effects.mean())


def _taste(
    pick: np.random.Generator, user: NDArray[np.int64], item: NDArray[np.int64], day: NDArray[np.float64]
) -> NDArray[np.float64]:
    """<user, item> of groups of users with one taste, and the item's own trend: this is the drift."""
    group = pick.integers(0, 50, user.max() + 1)[user]
    tastes = pick.normal(size=(50, RANK))[group]
    items = pick.normal(size=(CARDINALITIES[ITEM_FIELD], RANK))[item]
    trend = pick.normal(0, 0.06, CARDINALITIES[ITEM_FIELD])[item]
    return np.asarray(0.25 * (tastes * items).sum(1) + trend * (day - DAYS / 2))


def lines(clicks: Clicks) -> Iterator[str]:
    """The rows as text, some thousands at once, each with its line break."""
    # A 32-bit hash of field and value, as Criteo's; an odd multiplier makes it one to one within a field.
    names = [
        ["", *(f"{((value + 1) * 2_654_435_761 + field * 40_503_000_007) % 2**32:08x}" for value in range(count))]
        for field, count in enumerate(CARDINALITIES)
    ]
    for start in range(0, len(clicks.label), LINES_AT_ONCE):
        some = slice(start, start + LINES_AT_ONCE)
        columns: list[Any] = [clicks.label[some].astype(int).tolist()]
        columns += [["" if x < 0 else x for x in column] for column in clicks.dense[some].T.tolist()]
        columns += [
            [own[x + 1] for x in column] for own, column in zip(names, clicks.categorical[some].T.tolist(), strict=True)
        ]
        columns += [clicks.user[some].tolist(), clicks.time[some].tolist()]
        yield "".join("\t".join(map(str, row)) + "\n" for row in zip(*columns, strict=True))


def main(
    out: Annotated[Path, typer.Argument(help="The file to write: 42 columns, tab-separated, no header.")],
    rows: Annotated[int, typer.Option(min=1, help="Impressions, over 14 days.")] = 60_000,
    seed: Annotated[int, typer.Option(help="Another one gives other users, items and clicks.")] = 0,
) -> None:
    """Write generated click logs in Criteo's TSV layout, with user and time as two columns more."""
    clicks = generate(rows, seed)
    with out.open("w", encoding="ascii") as file:
        file.writelines(lines(clicks))
    users = len(np.unique(clicks.user))
    typer.echo(
        f"{out}: {rows:,} generated impressions of {users:,} users, {clicks.label.mean():.1%} clicks, {DAYS} days"
    )


if __name__ == "__main__":
    typer.run(main)
