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

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precimap.errors import AlphaSpent, JournalError, SaveError, TaskError
from precimap.search.certificate import ledger as ledger_module
from precimap.search.certificate.ledger import Ledger


def content(ledger: Ledger) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(ledger.path.read_text(encoding="utf-8"))
    return read


def test_the_first_look_is_booked(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "made" / "here", "5f3a", 0.05)
    assert ledger.judged() == ()
    assert ledger.spend("chain-a", 0.05, "nDCG@10, margin 0.002, 8 maps") == 0.05
    (entry,) = Ledger.open(tmp_path / "made" / "here", "5f3a", 0.05).judged()
    assert (entry.chain, entry.alpha, entry.description) == ("chain-a", 0.05, "nDCG@10, margin 0.002, 8 maps")
    age = datetime.now(UTC) - datetime.fromisoformat(entry.first)
    assert timedelta(seconds=-1) < age < timedelta(minutes=1)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "5f3a", 0.1)
    ledger.spend("a", 0.05, "first")
    ledger.spend("b", 0.025, "second, größer")
    assert ledger.path == tmp_path / "5f3a.alpha.json"
    read = content(ledger)
    assert (set(read), read["version"], read["split"]) == ({"version", "split", "judged"}, 1, "5f3a")
    assert [set(row) for row in read["judged"]] == [{"chain", "alpha", "description", "first"}] * 2
    assert [(row["chain"], row["alpha"], row["description"]) for row in read["judged"]] == [
        ("a", 0.05, "first"),
        ("b", 0.025, "second, größer"),
    ]


def test_the_same_chain_again_is_free(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "s", 0.05)
    ledger.spend("a", 0.05, "once")
    before = ledger.path.read_bytes()
    assert ledger.spend("a", 0.05, "twice") == 0.05
    assert ledger.spend("a", 0.01, "at a smaller level") == 0.05
    assert ledger.path.read_bytes() == before
    # Also when this run allows less than was spent.
    assert Ledger.open(tmp_path, "s", 0.01).spend("a", 0.05, "again") == 0.05


def test_a_larger_level_of_the_same_chain_costs_the_difference(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "s", 0.1)
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
    ledger = Ledger.open(tmp_path, "s", 0.05)
    for part in range(parts):
        total = ledger.spend(f"chain-{part}", 0.05 / parts, "a part")
    assert total == pytest.approx(0.05)
    with pytest.raises(AlphaSpent):
        ledger.spend("one more", 1e-6, "beyond")


def test_a_refusal_says_what_was_judged_and_what_to_do(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "5f3a", 0.05)
    ledger.spend("c0ffee", 0.05, "nDCG@10, margin 0.002")
    when = ledger.judged()[0].first
    before = ledger.path.read_bytes()
    with pytest.raises(AlphaSpent) as refusal:
        ledger.spend("decaf", 0.025, "nDCG@10, margin 0.004")
    message = str(refusal.value)
    for part in (
        "split 5f3a has given away alpha 0.05 of the budget 0.05",
        "'nDCG@10, margin 0.004' at alpha 0.025 would make it 0.075",
        f"{when}  alpha 0.05  nDCG@10, margin 0.002 (chain c0ffee)",
        "a fresh certify split, or a budget of at least 0.075",
        str(ledger.path),
    ):
        assert part in message
    assert ledger.path.read_bytes() == before
    assert Ledger.open(tmp_path, "5f3a", 0.075).spend("decaf", 0.025, "now allowed") == pytest.approx(0.075)


def test_a_level_above_the_budget_is_refused_on_a_fresh_split(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "s", 0.01)
    with pytest.raises(AlphaSpent, match="It has judged: nothing yet"):
        ledger.spend("a", 0.05, "too much")
    assert not ledger.path.exists()


def test_splits_have_accounts_of_their_own(tmp_path: Path) -> None:
    for split in ("one", "two"):
        assert Ledger.open(tmp_path, split, 0.05).spend("a", 0.05, "a") == 0.05


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.01, 0.02, 0.05])), max_size=12))
def test_the_total_is_the_sum_of_the_largest_levels_and_within_budget(
    tmp_path_factory: pytest.TempPathFactory, looks: list[tuple[str, float]]
) -> None:
    ledger = Ledger.open(tmp_path_factory.mktemp("ledger"), "s", 0.1)
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


GOOD = {"version": 1, "split": "s", "judged": [{"chain": "a", "alpha": 0.05, "description": "d", "first": "t"}]}
ROW = GOOD["judged"][0]  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        json.dumps(GOOD)[:-9],
        json.dumps({**GOOD, "version": 2}),
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
    ledger = Ledger.open(tmp_path, "s", 0.5)
    path.write_text(text)
    for look in (ledger.judged, lambda: Ledger.open(tmp_path, "s", 0.5), lambda: ledger.spend("a", 0.05, "d")):
        with pytest.raises(JournalError, match=r"s\.alpha\.json.*Restore it from a backup, or certify on fresh data"):
            look()
    assert path.read_text() == text


def test_a_ledger_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.alpha.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(JournalError, match="Do not delete it"):
        Ledger.open(tmp_path, "s", 0.05)
    (tmp_path / "t.alpha.json").mkdir()
    with pytest.raises(JournalError, match="Is a directory"):
        Ledger.open(tmp_path, "t", 0.05)


def test_a_disk_that_is_full_books_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No booking, no look: the caller never gets past `spend`."""
    ledger = Ledger.open(tmp_path, "s", 0.1)
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.alpha.json", "s.alpha.lock"]
    assert ledger.spend("b", 0.05, "b") == pytest.approx(0.1)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"cannot make .*file/ledger"):
        Ledger.open(tmp_path / "file" / "ledger", "s", 0.05)


def test_a_lock_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, "s", 0.05)
    (tmp_path / "s.alpha.lock").mkdir()
    with pytest.raises(SaveError, match=r"cannot lock the alpha ledger with .*s\.alpha\.lock"):
        ledger.spend("a", 0.05, "a")


@pytest.mark.parametrize("split", ["", "a/b", "..", ".hidden", "a b", "x" * 201, "a\n"])
def test_a_split_that_is_no_file_name_is_refused(tmp_path: Path, split: str) -> None:
    with pytest.raises(TaskError, match="a fingerprint of the certify split"):
        Ledger.open(tmp_path, split, 0.05)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, float("nan")])
def test_levels_out_of_range_are_refused(tmp_path: Path, level: float) -> None:
    with pytest.raises(TaskError, match="a budget between 0 and 1"):
        Ledger.open(tmp_path, "s", level)
    with pytest.raises(TaskError, match="an alpha between 0 and 1"):
        Ledger.open(tmp_path, "s", 0.05).spend("a", level, "a")


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
            Ledger.open(tmp_path, "s", 0.05).spend(f"chain-{number}", 0.01, "race")
        except AlphaSpent:
            return False
        return True

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(spend, range(16))) == 5
    assert len(Ledger.open(tmp_path, "s", 0.05).judged()) == 5


def test_another_process_waits_for_the_lock(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from precimap.search.certificate.ledger import Ledger\n"
        "ledger = Ledger.open(pathlib.Path(sys.argv[1]), 's', 0.05)\n"
        "print('ready', flush=True)\n"
        "print(ledger.spend('a', 0.05, 'child'), flush=True)\n"
    )
    with (tmp_path / "s.alpha.lock").open("a") as lock:
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
        Ledger.open(tmp_path, "s", 0.05).spend("b", 0.05, "parent")
