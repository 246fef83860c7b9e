"""The alpha ledger: what a look at the certify split costs, and that no look goes unrecorded."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import AlphaSpent, JournalError, SaveError, TaskError
from precimap.searching.certificate import ledger as ledger_module
from precimap.searching.certificate.account import Answer
from precimap.searching.certificate.known_units import Sketch
from precimap.searching.certificate.ledger import AskedSplit, Ledger
from precimap.searching.certificate.older_prints import older_print
from precimap.searching.splits.rows import finished


def split(name: str, units: range = range(100), *, old: str = "") -> AskedSplit:
    """A split whose units are numbers; `old` is what older releases call it."""
    return AskedSplit(name, (finished(np.array(units, np.uint64)),), lambda: old)


def opened(directory: Path, name: str, budget: float, units: range | None = None) -> Ledger:
    """The ledger of a split that shares no unit with splits of another first letter."""
    start = 10**6 * ord(name[0])
    return Ledger.open(directory, split(name, range(start, start + 100) if units is None else units), budget)


def content(ledger: Ledger) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(ledger.path.read_text(encoding="utf-8"))
    return read


def test_the_first_look_is_booked(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "made" / "here", "5f3a", 0.05)
    assert ledger.judged() == ()
    assert ledger.spend("chain-a", 0.05, "nDCG@10, margin 0.002, 8 maps") == 0.05
    (entry,) = opened(tmp_path / "made" / "here", "5f3a", 0.05).judged()
    assert (entry.chain, entry.alpha, entry.description) == ("chain-a", 0.05, "nDCG@10, margin 0.002, 8 maps")
    age = datetime.now(UTC) - datetime.fromisoformat(entry.first)
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "5f3a", 0.1)
    ledger.spend("a", 0.05, "first")
    ledger.spend("b", 0.025, "second, größer")
    assert ledger.path == tmp_path / "5f3a.alpha.json"
    read = content(ledger)
    assert set(read) == {"version", "split", "units", "judged", "answers"}
    assert (read["version"], read["split"], read["answers"], len(read["units"])) == (2, "5f3a", [], 1)
    assert read["units"][0]["n"] == 100
    assert [set(row) for row in read["judged"]] == [{"chain", "alpha", "description", "first"}] * 2
    assert [(row["chain"], row["alpha"], row["description"]) for row in read["judged"]] == [
        ("a", 0.05, "first"),
        ("b", 0.025, "second, größer"),
    ]


def test_the_same_chain_again_is_free(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "s", 0.05)
    ledger.spend("a", 0.05, "once")
    before = ledger.path.read_bytes()
    assert ledger.spend("a", 0.05, "twice") == 0.05
    assert ledger.spend("a", 0.01, "at a smaller level") == 0.05
    assert ledger.path.read_bytes() == before
    # Also when this run allows less than was spent.
    assert opened(tmp_path, "s", 0.01).spend("a", 0.05, "again") == 0.05


def test_a_larger_level_of_the_same_chain_costs_the_difference(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "s", 0.1)
    ledger.spend("a", 0.02, "a")
    ledger.spend("b", 0.03, "b")
    first = ledger.judged()[0].first
    assert ledger.spend("a", 0.07, "a at more") == pytest.approx(0.1)
    entry = ledger.judged()[0]
    assert (entry.chain, entry.alpha, entry.description, entry.first) == ("a", 0.07, "a", first)
    with pytest.raises(AlphaSpent):
        ledger.spend("a", 0.08, "a at too much")
    assert [(e.chain, e.alpha) for e in ledger.judged()] == [("a", 0.07), ("b", 0.03)]


@pytest.mark.parametrize("parts", [2, 3, 6, 7, 10])
def test_equal_parts_of_the_budget_may_all_be_spent(tmp_path: Path, parts: int) -> None:
    """Rounded sums like 0.1 + 0.2 must not cost the last part."""
    ledger = opened(tmp_path, "s", 0.05)
    for part in range(parts):
        total = ledger.spend(f"chain-{part}", 0.05 / parts, "a part")
    assert total == pytest.approx(0.05)
    with pytest.raises(AlphaSpent):
        ledger.spend("one more", 1e-6, "beyond")


def test_a_refusal_says_what_was_judged_and_what_to_do(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "5f3a", 0.05)
    ledger.spend("c0ffee", 0.05, "nDCG@10, margin 0.002")
    when = ledger.judged()[0].first
    before = ledger.path.read_bytes()
    with pytest.raises(AlphaSpent) as refusal:
        ledger.spend("decaf", 0.025, "nDCG@10, margin 0.004")
    message = str(refusal.value)
    for part in (
        "split 5f3a has used alpha 0.05 of the budget 0.05",
        "'nDCG@10, margin 0.004' at alpha 0.025 would make it 0.075",
        f"{when}  alpha 0.05  nDCG@10, margin 0.002 (chain c0ffee)",
        "a fresh certify split, or a budget of at least 0.075",
        str(ledger.path),
    ):
        assert part in message
    assert ledger.path.read_bytes() == before
    assert opened(tmp_path, "5f3a", 0.075).spend("decaf", 0.025, "now allowed") == pytest.approx(0.075)


def test_a_level_above_the_budget_is_refused_on_a_fresh_split(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "s", 0.01)
    with pytest.raises(AlphaSpent, match="It has judged: nothing yet"):
        ledger.spend("a", 0.05, "too much")
    assert not ledger.path.exists()


def test_splits_have_accounts_of_their_own(tmp_path: Path) -> None:
    for split in ("one", "two"):
        assert opened(tmp_path, split, 0.05).spend("a", 0.05, "a") == 0.05


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.01, 0.02, 0.05])), max_size=12))
def test_the_total_is_the_sum_of_the_largest_levels_and_within_budget(
    tmp_path_factory: pytest.TempPathFactory, looks: list[tuple[str, float]]
) -> None:
    ledger = opened(tmp_path_factory.mktemp("ledger"), "s", 0.1)
    model: dict[str, float] = {}
    for chain, alpha in looks:
        wanted = {**model, chain: max(alpha, model.get(chain, 0.0))}
        if sum(wanted.values()) > 0.1 + 1e-9:
            with pytest.raises(AlphaSpent):
                ledger.spend(chain, alpha, "x")
        else:
            model = wanted
            assert ledger.spend(chain, alpha, "x") == pytest.approx(sum(model.values()))
        assert {e.chain: e.alpha for e in ledger.judged()} == model


# Files


ROW: dict[str, Any] = {"chain": "a", "alpha": 0.05, "description": "d", "first": "2026-05-04T10:20:30+00:00"}
SAID = {"chain": "a", "map": "m", "margin": 0.1, "alpha": 0.05, "upper": None, "certified": False}
UNITS = {"n": 2, "prints": Sketch.of(np.array([3, 5], np.uint64), 8).text()}
GOOD: dict[str, Any] = {"version": 2, "split": "s", "units": [UNITS], "judged": [ROW], "answers": [SAID]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps(GOOD)[:-9],
        json.dumps({**GOOD, "version": 3}),
        json.dumps({k: v for k, v in GOOD.items() if k != "units"}),
        json.dumps({**GOOD, "units": [{"n": 2, "prints": "?"}]}),
        json.dumps({**GOOD, "units": [{**UNITS, "n": 1}]}),
        json.dumps({**GOOD, "units": [{**UNITS, "n": "2"}]}),
        json.dumps({**GOOD, "units": [{"n": 2, "prints": "AAAAAAAAAAAAAAAAAAAAAA=="}]}),
        json.dumps({**GOOD, "answers": [{**SAID, "certified": 1}]}),
        json.dumps({**GOOD, "answers": [{**SAID, "upper": "0.1"}]}),
        json.dumps({**GOOD, "split": "another"}),
        json.dumps({**GOOD, "judged": None}),
        json.dumps({**GOOD, "judged": [{**ROW, "more": 1}]}),
        json.dumps({**GOOD, "judged": [{"chain": "a"}]}),
        json.dumps({**GOOD, "judged": [{**ROW, "alpha": "0.05"}]}),
        json.dumps({**GOOD, "judged": [{**ROW, "alpha": -0.05}]}),
        json.dumps({**GOOD, "judged": [{**ROW, "alpha": float("nan")}]}),
        json.dumps({**GOOD, "judged": [{**ROW, "chain": 7}]}),
        json.dumps({**GOOD, "judged": [ROW, ROW]}),
    ],
)
def test_a_ledger_that_cannot_be_read_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.alpha.json"
    path.write_text(json.dumps(GOOD))
    ledger = opened(tmp_path, "s", 0.5)
    path.write_text(text)
    for look in (ledger.judged, lambda: opened(tmp_path, "s", 0.5), lambda: ledger.spend("a", 0.05, "d")):
        with pytest.raises(JournalError, match=r"s\.alpha\.json.*Restore it from a backup, or certify on fresh data"):
            look()
    assert path.read_text() == text


def test_a_ledger_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.alpha.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JournalError, match="Do not delete it"):
        opened(tmp_path, "s", 0.05)
    (tmp_path / "s.alpha.json").unlink()
    (tmp_path / "t.alpha.json").mkdir()
    with pytest.raises(JournalError, match="Is a directory"):
        opened(tmp_path, "t", 0.05)


def test_a_disk_that_is_full_books_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No booking, no look: the caller never gets past `spend`."""
    ledger = opened(tmp_path, "s", 0.1)
    ledger.spend("a", 0.05, "a")
    before = ledger.path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        SaveError, match=re.escape(str(ledger.path)) + ".*No space left on device; the old file is still"
    ):
        ledger.spend("b", 0.05, "b")
    monkeypatch.undo()
    assert ledger.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ledger.lock", "s.alpha.json"]
    assert ledger.spend("b", 0.05, "b") == pytest.approx(0.1)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot make .*file/ledger"):
        opened(tmp_path / "file" / "ledger", "s", 0.05)


def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    ledger = opened(tmp_path, "s", 0.05)
    (tmp_path / "ledger.lock").mkdir()
    with pytest.raises(SaveError, match=r"cannot lock the alpha ledger with .*ledger\.lock"):
        ledger.spend("a", 0.05, "a")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "x" * 201, "a\n"])
def test_a_split_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TaskError, match="a fingerprint of the certify split"):
        Ledger.open(tmp_path, split(name), 0.05)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
def test_levels_out_of_range_are_refused(tmp_path: Path, level: float) -> None:
    with pytest.raises(TaskError, match="a budget between 0 and 1"):
        opened(tmp_path, "s", level)
    with pytest.raises(TaskError, match="an alpha between 0 and 1"):
        opened(tmp_path, "s", 0.05).spend("a", level, "a")


# Two at a time


def test_many_at_once_spend_no_more_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flock is held per open file, so threads compete as processes do."""
    unhurried = ledger_module.write_text

    def slow(path: Path, text: str) -> None:
        time.sleep(0.02)  # the others have read the old file by now, if nothing holds them back
        unhurried(path, text)

    monkeypatch.setattr(ledger_module, "write_text", slow)

    def spend(number: int) -> bool:
        try:
            opened(tmp_path, "s", 0.05).spend(f"chain-{number}", 0.01, "race")
        except AlphaSpent:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(spend, range(16))) == 5
    assert len(opened(tmp_path, "s", 0.05).judged()) == 5


def test_another_process_waits_for_the_lock(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from precimap.searching.certificate.ledger import AskedSplit, Ledger\n"
        "import numpy as np\n"
        "split = AskedSplit('s', (np.arange(100, dtype=np.uint64),), lambda: '')\n"
        "ledger = Ledger.open(pathlib.Path(sys.argv[1]), split, 0.05)\n"
        "print('ready', flush=True)\n"
        "print(ledger.spend('a', 0.05, 'child'), flush=True)\n"
    )
    with (tmp_path / "ledger.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        assert not (tmp_path / "s.alpha.json").exists()
    rest, _ = child.communicate(timeout=30)
    assert rest == "0.05\n"
    assert child.returncode == 0
    with pytest.raises(AlphaSpent, match="child"):
        opened(tmp_path, "s", 0.05).spend("b", 0.05, "parent")


# The same data under another name


def test_a_split_is_known_by_its_units(tmp_path: Path) -> None:
    """Order, batches and a row more or less are no new data; what was given away is given away."""
    opened(tmp_path, "first", 0.05, range(1000)).spend("a", 0.05, "the first question")
    for name, units in {
        "backwards": range(999, -1, -1),
        "less": range(1, 1000),
        "more": range(1200),
        "some": range(500, 1500),
        "few": range(780, 1780),
    }.items():
        ledger = opened(tmp_path, name, 0.05, units)
        share = sum(unit < 1000 for unit in units) / len(units)
        assert ledger.spent() == 0.05
        assert f"{100 * share:.3g} % of the certify split's units have judged before" in ledger.notes()[0]
        with pytest.raises(AlphaSpent, match=rf"as the split first, which holds {100 * share:.3g} % of its units"):
            ledger.spend("b", 0.05, "another question")
        assert not ledger.path.exists()
    assert opened(tmp_path, "some", 0.1, range(500, 1500)).spend("b", 0.05, "paid for") == pytest.approx(0.1)
    assert opened(tmp_path, "first", 0.1, range(1000)).spent() == pytest.approx(0.1), "the other way round, too"


def test_a_fifth_or_less_counts_as_that_share(tmp_path: Path) -> None:
    """New but for a few rows is new: nothing is refused, and the total says what those have given away."""
    opened(tmp_path, "first", 0.05, range(1000)).spend("a", 0.05, "a")
    ledger = opened(tmp_path, "fresh", 0.05, range(950, 1950))
    assert "5 % of the certify split's units have judged before, as the split first: alpha 0.05" in ledger.notes()[0]
    assert ledger.spend("b", 0.05, "b") == pytest.approx(0.05 + 0.05 * 0.05)
    assert ledger.spend("b", 0.05, "b") == pytest.approx(0.0525), "asking again is free"


def test_many_small_shares_add_up(tmp_path: Path) -> None:
    for number in range(3):
        opened(tmp_path, f"part{number}", 0.05, range(1000 * number, 1000 * number + 1000)).spend("a", 0.05, "a")
    units = [*range(110), *range(1000, 1110), *range(50_000, 50_780)]
    asked = AskedSplit("mixed", (finished(np.array(units, np.uint64)),), lambda: "")
    with pytest.raises(AlphaSpent, match=r"used alpha 0\.1 "):
        Ledger.open(tmp_path, asked, 0.05).spend("b", 0.05, "b")


def test_any_view_of_the_units_tells_them(tmp_path: Path) -> None:
    """Another column beside makes the whole of a unit another one; the column that is the same tells."""
    column = finished(np.arange(1000, dtype=np.uint64))
    first = AskedSplit("first", (finished(column + np.uint64(1)), column), lambda: "")
    again = AskedSplit("again", (finished(column + np.uint64(2)), column), lambda: "")
    Ledger.open(tmp_path, first, 0.05).spend("a", 0.05, "a")
    with pytest.raises(AlphaSpent):
        Ledger.open(tmp_path, again, 0.05).spend("b", 0.05, "b")


@given(st.integers(1, 3000), st.integers(0, 3000), st.integers(1, 3000), st.sampled_from([64, 512, 10**6]))
def test_a_sketch_tells_the_share_within_its_error(n: int, start: int, m: int, kept: int) -> None:
    """Against the sets themselves; six standard errors of a sample of what the sketch holds."""
    known, asked = (finished(np.arange(a, b, dtype=np.uint64)) for a, b in ((0, n), (start, start + m)))
    sketch = Sketch.of(known, kept)
    share, found = max(0, n - start) and min(m, max(0, n - start)) / m, sketch.share_of(asked)
    if kept >= n:
        assert found == pytest.approx(share)
    else:
        compared = max(1.0, m * kept / n)
        assert abs(found - share) <= 6 * (max(share * (1 - share), 1 / compared) / compared) ** 0.5
    same = Sketch.parse(sketch.text(), sketch.n)
    assert (same.n, same.prints.tolist()) == (sketch.n, sketch.prints.tolist())


def test_a_million_units_are_known_by_a_file_of_less_than_a_megabyte(tmp_path: Path) -> None:
    """Shares of 2 % and of a half are found in a split of a tenth of the size."""
    known = finished(np.arange(10**6, dtype=np.uint64))
    Ledger.open(tmp_path, AskedSplit("large", (known,), lambda: ""), 0.05).spend("a", 0.05, "a")
    assert (tmp_path / "large.alpha.json").stat().st_size < 800_000
    for count, expected in ((0, 0.0), (2_000, 0.02), (50_000, 0.5)):
        units = finished(np.arange(10**6 - count, 10**6 - count + 100_000, dtype=np.uint64))
        ledger = Ledger.open(tmp_path, AskedSplit("asked", (units,), lambda: ""), 0.05)
        shares = [float(note.split(" %")[0]) / 100 for note in ledger.notes()]
        assert sum(shares) == pytest.approx(expected, abs=0.01)
        assert ledger.spent() == (0.05 if count > 10_000 else 0)


# Files of older releases


def old_file(directory: Path, name: str) -> Path:
    path = directory / f"{name}.alpha.json"
    path.write_text(json.dumps({"version": 1, "split": name, "judged": [ROW]}))
    return path


def test_what_an_older_release_booked_is_counted_and_known_by_its_units_from_then_on(tmp_path: Path) -> None:
    path = old_file(tmp_path, "0123456789abcdef")
    before = path.read_text()
    again = split("anew", old="0123456789abcdef")
    with pytest.raises(AlphaSpent, match="as the split 0123456789abcdef, which holds 100 % of its units"):
        Ledger.open(tmp_path, again, 0.05).spend("b", 0.05, "b")
    assert path.read_text() == before, "a refusal writes nothing"
    assert Ledger.open(tmp_path, again, 0.1).spend("b", 0.05, "b") == pytest.approx(0.1)
    assert json.loads(path.read_text())["version"] == 2
    assert json.loads(path.read_text())["judged"] == [ROW]
    # Known by units now, where nobody can name it as older releases did.
    with pytest.raises(AlphaSpent):
        Ledger.open(tmp_path, split("third", range(50, 150)), 0.1).spend("c", 0.05, "c")


def test_an_older_file_of_other_data_stays_as_it_is(tmp_path: Path) -> None:
    path = old_file(tmp_path, "0123456789abcdef")
    before = path.read_text()
    assert Ledger.open(tmp_path, split("anew", old="fedcba9876543210"), 0.05).spend("b", 0.05, "b") == 0.05
    assert path.read_text() == before


def test_older_names_are_those_that_older_releases_gave() -> None:
    """As the code of release 0.1 named these, with batches of each kind that it told apart."""
    import torch

    batches = [{"x": torch.arange(6.0).reshape(2, 3), "y": [1, "a"], "z": np.arange(3)}, (torch.zeros(0, 2), None)]
    assert older_print(batches) == OLDER
    assert older_print(batches[::-1]) != OLDER


OLDER = "4ada801e3684ae01"


# What was said


def test_answers_before_a_question_are_told_and_its_own_are_not(tmp_path: Path) -> None:
    def row(chain: str, certified: bool) -> Answer:
        return Answer(chain=chain, map="map", margin=0.1, alpha=0.05, upper=0.2, certified=certified)

    one, two = opened(tmp_path, "one", 0.2), opened(tmp_path, "two", 0.2)
    one.spend("a", 0.05, "a")
    one.answer([row("a", False)])
    time.sleep(0.005)
    two.spend("b", 0.05, "b")
    assert two.answers_before("b") == (("one", row("a", False)),)
    two.answer([row("b", True)])
    two.answer([row("b", True)])
    assert two.answers_before("b") == (("one", row("a", False)),)
    assert one.answers_before("a") == (), "asked again, it says what it said"
    time.sleep(0.005)
    one.spend("c", 0.05, "c")
    assert [split for split, _ in one.answers_before("c")] == ["one", "two"]
