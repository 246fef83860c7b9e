"""One account of the alpha ledger as a file: what a certify split has judged, and how the split is known again.

File `<directory>/<split>.alpha.json`, UTF-8:

    {"version": 2, "split": "<fingerprint>", "units": [{"n": 3000, "prints": "<base64>"}],
     "judged": [{"chain": "<fingerprint>", "alpha": 0.05, "description": "nDCG@10, margin 0.002, 8 maps",
                 "first": "2026-05-04T10:20:30.125+00:00"}],
     "answers": [{"chain": "<fingerprint>", "map": "<fingerprint>", "margin": 0.002, "alpha": 0.05, "upper": 0.0015,
                  "certified": true}]}

(`units` stands last, for it is long.) One entry in `judged` per chain, oldest first; `alpha` is the largest level it was
judged at, `first` the time of its first judging (UTC). `answers` are what the split said of the maps of a
chain; a chain without any was being judged when its process ended. Version 1 had neither units nor answers, knew a split by
its batches in order, and booked a chain without its margin; its files are read, and written anew with units once their split
is met again.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from precimap.searching.certificate.known_units import Sketch

VERSION = 2


@dataclass(frozen=True, slots=True)
class Judged:
    """One chain of maps that the split has judged; a row of the file."""

    chain: str
    alpha: float
    description: str
    first: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the split said of one map of a chain. upper: None where there is no finite bound."""

    chain: str
    map: str
    margin: float
    alpha: float
    upper: float | None
    certified: bool


@dataclass(frozen=True, slots=True)
class Account:
    """What one split has judged, oldest first. units: None for one of version 1, known by its name alone."""

    split: str
    units: tuple[Sketch, ...] | None
    judged: tuple[Judged, ...] = ()
    answers: tuple[Answer, ...] = ()

    def render(self) -> str:
        """The file's text. Raises ValueError for an account without units, which only version 1 had."""
        if self.units is None:
            raise ValueError("an account is written with its units")
        units = [{"n": sketch.n, "prints": sketch.text()} for sketch in self.units]
        rows = {"judged": [asdict(row) for row in self.judged], "answers": [asdict(row) for row in self.answers]}
        return json.dumps({"version": VERSION, "split": self.split, **rows, "units": units}, indent=2) + "\n"


def parse(text: str, split: str) -> Account:
    """Raises ValueError, TypeError or KeyError for anything but an account of version 1 or 2 of this split."""
    content: Any = json.loads(text)
    if content["version"] not in (1, VERSION):
        raise ValueError(f"version {content['version']!r}, this precimap reads versions 1 and {VERSION}")
    if content["split"] != split:
        raise ValueError(f"it belongs to the split {content['split']!r}")
    judged = tuple(Judged(**row) for row in content["judged"])
    for entry in judged:
        texts = (entry.chain, entry.description, entry.first)
        if not (all(isinstance(text, str) for text in texts) and type(entry.alpha) is float and 0 < entry.alpha < 1):
            raise ValueError(f"an entry that is none: {entry}")
    if len({entry.chain for entry in judged}) != len(judged):
        raise ValueError("the same chain twice")
    if content["version"] == 1:
        return Account(split, None, judged)
    units = tuple(_sketch(**row) for row in content["units"])
    return Account(split, units, judged, _answers(content["answers"]))


def _sketch(n: Any, prints: Any) -> Sketch:
    if type(n) is not int or not isinstance(prints, str):
        raise ValueError(f"units that are none: n = {n!r}")
    return Sketch.parse(prints, n)


def _answers(rows: Any) -> tuple[Answer, ...]:
    found = tuple(Answer(**row) for row in rows)
    for row in found:
        numbers = (row.margin, row.alpha, *(() if row.upper is None else (row.upper,)))
        if not (
            all(isinstance(text, str) for text in (row.chain, row.map))
            and all(type(number) is float for number in numbers)
            and type(row.certified) is bool
        ):
            raise ValueError(f"an answer that is none: {row}")
    return found
