"""A search that is killed, refused, interrupted or out of time: the same command ends with the same answer."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from helpers import search_attempts
from helpers.search_attempts import (
    EFFORT,
    SLOW,
    STAGES,
    Attempt,
    assert_same_answer,
    charged,
    concluded,
    measured,
    searched,
    task_of,
)
from precimap import PrecisionMap, Task
from precimap.errors import JournalError, TaskError
from precimap.journal import open_journal
from precimap.metrics import NDCG
from precimap.numerics.schemes import SCHEMES, Percentile

KILLS = 24  # about so many, spread evenly over the measurements

Start = Callable[..., Attempt]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Starts a search of the same command in a folder."""
    path = os.pathsep.join(
        [str(Path(search_attempts.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with subprocess.Popen(
        [sys.executable, search_attempts.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        to, answers = process.stdin, process.stdout
        assert to is not None
        assert answers is not None

        def started(folder: Path, dies_at: str = "") -> Attempt:
            folder.mkdir(exist_ok=True)
            to.write(f"{folder}\t{dies_at}\n")
            to.flush()
            return Attempt(int(next(answers)), folder, answers)

        yield started
        to.close()


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """A search that nothing disturbed."""
    one = start(tmp_path_factory.mktemp("undisturbed"))
    assert one.ended() == 0
    return one


# --- kill -9 ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """The forwards up to one commit, or up to the end of the attempt (`key` is None then)."""

    key: tuple[str, ...] | None
    forwards: tuple[int, ...]


def segments(lines: list[list[str]]) -> list[Segment]:
    """One attempt's log, cut at its commits."""
    found, forwards = [], list[int]()
    for word, *rest in lines:
        if word == "forward":
            forwards.append(int(rest[0]))
        elif word == "committed":
            found.append(Segment(tuple(rest), tuple(forwards)))
            forwards = []
    return [*found, Segment(None, tuple(forwards))]


def place_of(key: tuple[str, ...]) -> int | None:
    """The batch that a measurement belongs to; calibration is one measurement of a whole split."""
    kind, subject, _ = key
    return None if kind == "calibration" else (300 if kind == "certify" else 200) + int(subject.rsplit("@", 1)[1])


def stage_of(lines: list[list[str]]) -> str:
    """What an attempt was at when it ended."""
    return next((line[1] for line in reversed(lines) if line[0] in ("missing", "commits")), "start")


def killed_again_and_again(start: Start, folder: Path, measurements: int) -> list[Attempt]:
    """All but the last attempt were killed: some during their start, the rest in mid-work, all over the run."""
    chance, attempts, done = random.Random(20_260_331), list[Attempt](), 0
    while True:
        one = start(folder)
        share = max(1, (measurements - done) // max(1, KILLS - len(attempts)))
        count = chance.randint(1, share + 1) if len(attempts) % 6 else 0
        attempts.append(one)
        if not one.has_committed(count):
            assert one.ended() == 0
            return attempts
        time.sleep(chance.uniform(0, 3 * SLOW if count else 0.1))
        os.kill(one.pid, signal.SIGKILL)
        assert one.ended() == -signal.SIGKILL
        done += sum(line[0] == "committed" for line in one.lines())


def assert_nothing_is_repeated(attempts: list[Attempt], plain: Attempt, always: Counter[int]) -> None:
    """Each kill costs at most the batch that it interrupted, and a recording of that batch if it was being probed.

    always: the batches that every start looks at, and how often, also when all is measured.
    """
    kinds = Counter[str]()
    for segment in segments(plain.lines()):
        if segment.key is not None:
            looks = sum(place not in always for place in segment.forwards)
            kinds[segment.key[0]] = max(kinds[segment.key[0]], looks)
    assert kinds["probe"] == 2, "a recording and a replay"
    for one in attempts:
        known = set[tuple[str, ...]]()
        for segment in segments(one.lines()):
            own = [place for place in segment.forwards if place not in always]
            if segment.key is None or segment.key[0] == "calibration":
                assert len({place if place >= 200 else 100 for place in own}) <= 1
                assert len(own) <= max(kinds.values())
            else:
                known.add(segment.key)
                assert all(place == place_of(segment.key) for place in own), segment
                assert len(own) <= max(kinds[segment.key[0]], 1), segment
        looked = Counter(place for segment in segments(one.lines()) for place in segment.forwards)
        for place, count in always.items():
            committed = sum(kinds[key[0]] for key in known if place_of(key) == place)
            assert looked[place] <= count + committed + 2
    committed_by = Counter(tuple(line[1:]) for one in attempts for line in one.lines() if line[0] == "committed")
    assert set(committed_by.values()) == {1}


def executed(attempts: list[Attempt], always: Counter[int]) -> int:
    """Forwards on the search and certify splits, beyond those of every start."""
    places = [int(line[1]) for one in attempts for line in one.lines() if line[0] == "forward"]
    return sum(place >= 200 and place not in always for place in places)


def test_kill_9_changes_no_decision_and_repeats_no_measurement(
    start: Start, undisturbed: Attempt, tmp_path: Path
) -> None:
    expected, killed = undisturbed.folder, tmp_path / "killed"
    everything = measured(expected)
    attempts = killed_again_and_again(start, killed, len(everything))
    kills = len(attempts) - 1
    assert kills >= 20
    assert len({stage_of(one.lines()) for one in attempts[:-1]} & set(STAGES)) >= 5, "the kills did not spread"
    assert_same_answer(killed, expected)
    assert measured(killed) == everything
    assert charged(killed) == charged(expected)
    assert len(charged(killed)) == 1

    again = start(killed)
    assert again.ended() == 0
    assert not any(line[0] in ("commits", "missing") for line in again.lines())
    assert_same_answer(killed, expected)
    always = Counter(int(line[1]) for line in again.lines() if line[0] == "forward")
    assert set(always) == {200, 300}, "a start looks at the first batch of the search and of the certify split alone"
    assert_nothing_is_repeated(attempts, undisturbed, always)
    assert executed(attempts, always) - executed([undisturbed], always) <= 2 * kills


# Before the certify split is looked at (its baseline alone: nothing is spent; the first map: alpha is), within a probe,
# between measuring and committing.
@pytest.mark.parametrize(
    "dies_at",
    ["missing\tcertify\tbaseline", "missing\tcertify\tmap", "forward\t302", "commits\tprobe", "missing\tdraw"],
)
def test_a_kill_at_the_worst_moment(start: Start, undisturbed: Attempt, tmp_path: Path, dies_at: str) -> None:
    first = concluded(undisturbed.folder)["certificates"]["certificates"][0]["map"]
    assert start(tmp_path / "killed", dies_at.replace("\tmap", f"\t{first}")).ended() == -signal.SIGKILL
    if dies_at == "missing\tcertify\tbaseline":
        assert not list((tmp_path / "killed" / "ledger").glob("*.json"))
    if dies_at == "missing\tcertify\tmap":
        assert charged(tmp_path / "killed") == charged(undisturbed.folder), "spent before the split is looked at"
    assert start(tmp_path / "killed").ended() == 0
    assert_same_answer(tmp_path / "killed", undisturbed.folder)
    assert measured(tmp_path / "killed") == measured(undisturbed.folder)
    assert charged(tmp_path / "killed") == charged(undisturbed.folder)


def test_a_second_search_of_the_same_run_is_refused(start: Start, undisturbed: Attempt, tmp_path: Path) -> None:
    first = start(tmp_path / "run of two")
    assert first.has_committed(3)
    os.kill(first.pid, signal.SIGSTOP)  # it holds the run and cannot end before the second has asked
    try:
        with pytest.raises(JournalError, match=f"process {first.pid} is working in this run"):
            searched(task_of(), first.folder)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert first.ended() == 0
    assert_same_answer(first.folder, undisturbed.folder)


# --- interrupted otherwise ----------------------------------------------------------------------------------------


def test_a_run_that_a_fault_interrupted_goes_on_when_it_is_repaired(undisturbed: Attempt, tmp_path: Path) -> None:
    faults = (25, 45, 40, 70)  # forwards until the next one
    stages = []
    for fault in faults:
        left = iter(range(fault))

        def failing(_: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise RuntimeError("the data server is away")

        with pytest.raises(
            TaskError, match=r"forward failed on .* \(test_killed_search\.py, .*the data server is away"
        ):
            searched(task_of(failing), tmp_path)
        assert not (tmp_path / "run" / "map.json").exists()
        with open_journal(tmp_path / "run") as journal:
            stages.append(max(stage for stage, kind in enumerate(STAGES) if journal.count(kind)))
    assert len(set(stages)) == len(faults), "each fault came in another stage"
    searched(task_of(), tmp_path)
    assert_same_answer(tmp_path, undisturbed.folder)
    assert measured(tmp_path) == measured(undisturbed.folder)
    assert charged(tmp_path) == charged(undisturbed.folder)


@pytest.mark.parametrize("fault", range(1, 180, 11))
def test_whichever_forward_fails_is_named_in_the_user_s_words(fault: int, tmp_path: Path) -> None:
    """Also where it is called without being scored: to find layers, to cut a batch, to see what a forward writes."""
    left = iter(range(fault))

    def failing(_: int) -> None:
        if next(left, None) is None:
            raise RuntimeError("the data server is away")

    with pytest.raises(TaskError, match=r"forward failed on .* \(test_killed_search\.py, .*the data server is away"):
        searched(task_of(failing), tmp_path)


def _spoil_weights(task: Task) -> Task:
    with torch.no_grad():
        next(task.model.parameters())[0, 0] += 1e-3
    return task


def _spoil(split: str) -> Callable[[Task], Task]:
    def spoil(task: Task) -> Task:
        getattr(task.splits, split)[1]["x"][0, 0] += 1e-3
        return task

    return spoil


OTHER_PREMISES: dict[str, Callable[[Task], Task]] = {
    "weights": _spoil_weights,
    **{split: _spoil(split) for split in ("calibration", "search")},
    "task": lambda task: replace(task, name="another"),
    "metric": lambda task: replace(task, metric=NDCG(10)),
}


@pytest.mark.parametrize("what", OTHER_PREMISES)
def test_another_premise_is_refused_by_name_and_changes_nothing(what: str, undisturbed: Attempt) -> None:
    before = measured(undisturbed.folder)
    with pytest.raises(JournalError, match=rf"another premise: .*\b{what} was .*take the run up again"):
        searched(OTHER_PREMISES[what](task_of()), undisturbed.folder)
    assert measured(undisturbed.folder) == before


def test_fresh_certify_data_is_judged_from_the_same_measurements(undisturbed: Attempt, tmp_path: Path) -> None:
    """No batch of the search split is scored again; the fresh split has a certificate and a ledger of its own."""
    folder = tmp_path / "again"
    shutil.copytree(undisturbed.folder, folder)
    before = {key: value for key, value in measured(folder).items() if key[0] != "certify"}
    task = task_of()
    fresh = [{**batch, "x": batch["x"] + 1e-3} for batch in task.splits.certify]
    found = searched(replace(task, splits=replace(task.splits, certify=fresh)), folder)
    after = {key: value for key, value in measured(folder).items() if key[0] != "certify"}
    assert after == before
    assert found.certificate is not None
    (judged, *_) = concluded(undisturbed.folder)["certificates"]["certificates"]
    assert found.certificate.split != judged["split"]


def test_a_scheme_of_the_same_name_is_measured_on_its_own(tmp_path: Path) -> None:
    """Schemes are no premise: a run may hold several. One name with two meanings must not share a measurement."""
    usual = SCHEMES["int8-static"]
    clipped = usual.with_range(Percentile(90.0))
    searched(task_of(), tmp_path, schemes=[usual])
    before = measured(tmp_path)
    found = searched(task_of(), tmp_path, schemes=[clipped], ledger=tmp_path / "another ledger")
    alone = searched(task_of(), tmp_path / "alone", schemes=[clipped])
    assert found.map.model_dump() == alone.map.model_dump()
    assert concluded(tmp_path) == concluded(tmp_path / "alone")
    both, only = measured(tmp_path), measured(tmp_path / "alone")
    assert both == before | only
    shared = {kind for kind, _, _ in before.keys() & only.keys()}
    assert shared == {"baseline", "floor", "certify"}
    assert {subject.split(" ")[0] for kind, subject, _ in before.keys() & only.keys() if kind == "certify"} == {
        "baseline"
    }


def test_another_effort_takes_no_measurement_for_another(tmp_path: Path) -> None:
    """The second command looks at more batches, which lie between those of the first."""
    searched(task_of(), tmp_path)
    more = replace(EFFORT, screen_units=150, audit_units=75, check_units=150)
    searched(task_of(), tmp_path, effort=more)
    searched(task_of(), tmp_path / "alone", effort=more)
    assert_same_answer(tmp_path, tmp_path / "alone")


# --- out of time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minutes", [1e-9, 60, 72, 82])
def test_a_run_that_was_out_of_time_is_valid_and_goes_on_later(
    minutes: float, undisturbed: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which each forward takes a minute."""
    calls: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", lambda: 60.0 * len(calls))
        short = searched(task_of(calls.append), tmp_path, effort=replace(EFFORT, minutes=minutes))
    full = PrecisionMap.load(undisturbed.folder / "run" / "map.json")
    assert PrecisionMap.load(tmp_path / "run" / "map.json") == short.map
    assert set(short.map.layers) == set(full.layers)
    assert short.certified == bool(short.map.low) == short.answer.startswith("certified")
    assert short.certified == (minutes == 82), "the first look at a whole map is begun after 72 minutes"
    if not short.certified:
        assert short.answer == "keep the baseline: time ran out before a map was measured as a whole"
        assert not (tmp_path / "ledger").exists(), "no look at the certify split, no alpha"

    searched(task_of(), tmp_path)
    assert_same_answer(tmp_path, undisturbed.folder)
    assert measured(tmp_path) == measured(undisturbed.folder)
    assert charged(tmp_path) == charged(undisturbed.folder)


# --- what lies in the run directory -------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"{}", b"\xff\x00", b""], ids=["no map", "no text", "empty"])
def test_a_map_that_cannot_be_read_does_not_cost_the_answer(
    content: bytes, undisturbed: Attempt, tmp_path: Path
) -> None:
    """It is met after certifying; it stays beside the answer under another name."""
    folder = tmp_path / "again"
    shutil.copytree(undisturbed.folder, folder)
    (folder / "run" / "map.json").write_bytes(content)
    searched(task_of(), folder)
    assert_same_answer(folder, undisturbed.folder)
    (kept,) = (folder / "run").glob("unreadable-*.json")
    assert kept.read_bytes() == content
