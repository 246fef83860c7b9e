"""The journal: what was measured is measured once, whatever happens to the process."""

import json
import math
import os
import resource
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from precimap.errors import JournalError
from precimap.journal import FILE_NAME, LOCK_NAME, SCHEMA_VERSION, Journal, open_journal, run_journal

PREMISE = {"weights": "5f3a", "data": "77b1", "precimap": "0.1.0"}

DTYPES = st.sampled_from(["float64", "float32", "float16", "int64", "uint8", "bool", ">f4", "complex64"])
ARRAYS = DTYPES.flatmap(lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, max_dims=3, min_side=0)))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in type and bits, where == says that NaN differs from itself and that 1 is 1.0 is True."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    return type(a) is type(b) and a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(ARRAYS)
def test_arrays_come_back_bit_for_bit(array: np.ndarray) -> None:
    with run_journal(None, PREMISE) as journal:
        journal.record("screen", "a.weight", {}, arrays={"dz": array})
        found = journal.find("screen", "a.weight")
    assert found is not None
    assert list(found.arrays) == ["dz"]
    back = found.arrays["dz"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_arrays_keep_their_names_and_nan_payloads() -> None:
    payload = np.array([0x7FF8000000000123, 0xFFF0000000000000, 0x8000000000000000], dtype=np.uint64).view(np.float64)
    arrays = {
        "file": payload,
        "arr_0": np.zeros(2),
        "a/b.npy": np.zeros(()),
        "": np.arange(3),
        "größe": np.zeros((0, 4)),
    }
    with run_journal(None, {}) as journal:
        journal.record("screen", "w", {}, "fp8", arrays)
        found = journal.find("screen", "w", "fp8")
    assert found is not None
    assert list(found.arrays) == list(arrays)
    assert all(found.arrays[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert all(found.arrays[name].shape == array.shape for name, array in arrays.items())


def test_objects_are_no_measurement() -> None:
    with run_journal(None, {}) as journal:
        with pytest.raises(JournalError, match="screen of w: expected arrays of numbers, got objects in bad"):
            journal.record("screen", "w", {}, arrays={"bad": np.array([{}], dtype=object)})
        assert journal.find("screen", "w") is None


@given(st.dictionaries(st.text(), JSON, max_size=5))
def test_values_come_back_as_they_were(value: dict[str, Any]) -> None:
    with run_journal(None, PREMISE) as journal:
        journal.record("probe", "a", value, "fp8")
        journal.conclude("summary", "a", value)
        found = journal.find("probe", "a", "fp8")
        (concluded,) = journal.conclusions("summary")
    assert found is not None
    assert same(found.value, value)
    assert same(concluded.value, value)


def test_values_survive_the_file(tmp_path: Path) -> None:
    value = {"drop": 0.1 + 0.2, "upper": math.inf, "lower": -math.inf, "error": math.nan, "least": 5e-324, "n": 2**70}
    with run_journal(tmp_path / "made" / "here", PREMISE) as journal:
        journal.record("probe", "layer\0größe", value, "fp8", {"d": np.linspace(0, 1, 5, dtype=np.float32)})
    with open_journal(tmp_path / "made" / "here") as journal:
        assert journal.premise() == PREMISE
        (row,) = journal.measurements("probe")
    assert same(row.value, value)
    assert (row.kind, row.subject, row.scheme) == ("probe", "layer\0größe", "fp8")
    assert row.arrays["d"].tobytes() == np.linspace(0, 1, 5, dtype=np.float32).tobytes()
    assert row.made_at.endswith("Z")


def test_measuring_twice_is_refused() -> None:
    with run_journal(None, PREMISE) as journal:
        journal.record("probe", "a", {"drop": 1.0}, "fp8")
        with pytest.raises(JournalError, match="expected a new measurement, got probe a fp8 again"):
            journal.record("probe", "a", {"drop": 2.0}, "fp8")
        journal.record("probe", "a", {"drop": 3.0}, "int8")
        journal.record("joint", "a", {"drop": 4.0}, "fp8")
        journal.record("probe", "b", {"drop": 5.0}, "fp8")
        assert [(m.subject, m.value["drop"]) for m in journal.measurements("probe")] == [
            ("a", 1.0),
            ("a", 3.0),
            ("b", 5.0),
        ]
        assert journal.find("probe", "a", "e5m2") is None
        assert journal.find("probe", "a") is None


def test_a_conclusion_is_replaced() -> None:
    with run_journal(None, PREMISE) as journal:
        for subject, answer in (("m1", "one"), ("m2", "two"), ("m1", "three")):
            journal.conclude("summary", subject, {"answer": answer})
        assert [(m.subject, m.value["answer"]) for m in journal.conclusions("summary")] == [
            ("m2", "two"),
            ("m1", "three"),
        ]
        assert journal.measurements("summary") == ()


def test_a_run_is_taken_up_again(tmp_path: Path) -> None:
    with run_journal(tmp_path, PREMISE) as journal:
        journal.record("probe", "b", {"drop": 1.0})
    with run_journal(tmp_path, dict(reversed(PREMISE.items()))) as journal:
        journal.record("probe", "a", {"drop": 2.0})
        with pytest.raises(JournalError, match="probe b again"):
            journal.record("probe", "b", {"drop": 3.0})
    with run_journal(tmp_path, PREMISE) as journal:
        assert [(m.subject, m.value["drop"]) for m in journal.measurements("probe")] == [("b", 1.0), ("a", 2.0)]


def test_a_changed_premise_is_named(tmp_path: Path) -> None:
    with run_journal(tmp_path, PREMISE):
        pass
    other = {"weights": "ffff", "data": "77b1", "torch": "2.13"}
    with pytest.raises(JournalError, match="another premise") as refused, run_journal(tmp_path, other):
        pass
    told = str(refused.value)
    assert "weights was 5f3a, is ffff" in told
    assert "precimap was 0.1.0, is not stated" in told
    assert "torch was not stated, is 2.13" in told
    assert "77b1" not in told
    with run_journal(tmp_path, PREMISE):  # neither changed nor locked by the refusal
        pass


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with run_journal(tmp_path, PREMISE):
        with pytest.raises(JournalError, match="this process is working in this run"), run_journal(tmp_path, PREMISE):
            pass
        with (
            pytest.raises(JournalError, match="this process"),
            run_journal(tmp_path, PREMISE),
        ):  # not let in by the first
            pass
    assert (tmp_path / LOCK_NAME).exists()


def test_an_empty_file_is_a_new_run(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    (tmp_path / LOCK_NAME).touch()
    with run_journal(tmp_path, PREMISE) as journal:
        assert journal.premise() == PREMISE


def filled(directory: Path) -> Path:
    with run_journal(directory, PREMISE) as journal:
        for number in range(200):
            journal.record("probe", f"layer {number}", {"drop": 1.0}, "fp8", {"d": np.arange(300.0)})
    assert sorted(path.name for path in directory.iterdir()) == sorted([FILE_NAME, LOCK_NAME])
    return directory / FILE_NAME


@pytest.mark.parametrize("cut", ["head", "middle", "end", "text"])
def test_a_damaged_file_is_refused(tmp_path: Path, cut: str) -> None:
    path = filled(tmp_path)
    data = bytearray(path.read_bytes())
    if cut == "head":
        data[:100] = bytes(100)
    elif cut == "middle":
        data[4096 * 3 : 4096 * 20] = b"\xff" * (4096 * 17)
    elif cut == "end":
        del data[len(data) // 2 :]
    else:
        data[:] = b"layer,drop\n" * 500
    path.write_bytes(data)
    for opened in (open_journal(tmp_path), run_journal(tmp_path, PREMISE)):
        with pytest.raises(JournalError, match="damaged: restore it from a backup"), opened:
            pass


def test_damage_inside_a_row_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = filled(tmp_path)
    with sqlite3.connect(path) as connection:
        connection.execute("update measurement set arrays = zeroblob(length(arrays)) where number = 5")
        connection.execute("update measurement set value = '{\"drop\":' where number = 6")
    connection.close()
    with open_journal(tmp_path) as journal:
        assert journal.find("probe", "layer 3", "fp8") is not None
        for layer in ("layer 4", "layer 5"):
            with pytest.raises(JournalError, match=rf"probe of {layer} could not be read.*damaged"):
                journal.find("probe", layer, "fp8")


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path)
    for version in (0, SCHEMA_VERSION + 1):
        with sqlite3.connect(path) as connection:
            connection.execute(f"pragma user_version = {version}")
        connection.close()
        for opened in (open_journal(tmp_path), run_journal(tmp_path, PREMISE)):
            with pytest.raises(JournalError, match=f"expected journal schema {SCHEMA_VERSION}, got "), opened:
                pass


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="expected a run directory"), open_journal(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match="cannot be made a run directory"), run_journal(tmp_path / "file", PREMISE):
        pass


def test_reading_writes_nothing(tmp_path: Path) -> None:
    before = filled(tmp_path).read_bytes()
    with open_journal(tmp_path) as journal, pytest.raises(JournalError, match="could not be written"):
        journal.record("probe", "new", {})
    with open_journal(tmp_path) as journal, pytest.raises(JournalError, match="could not be written"):
        journal.conclude("summary", "new", {})
    assert (tmp_path / FILE_NAME).read_bytes() == before


def keeps_on(journal: Journal) -> None:
    assert [m.subject for m in journal.measurements("probe")] == ["before"]
    journal.record("probe", "after", {})
    assert [m.subject for m in journal.measurements("probe")] == ["before", "after"]


def test_a_full_disk_is_told_and_survived(tmp_path: Path) -> None:
    large = {"d": np.random.default_rng(0).random(100_000)}
    with run_journal(tmp_path, PREMISE) as journal:
        journal.record("probe", "before", {})
        journal._connection.execute("pragma max_page_count = 12")
        with pytest.raises(JournalError, match=r"could not be written .*full.*free space"):
            journal.record("probe", "large", {}, arrays=large)
        keeps_on(journal)
    with open_journal(tmp_path) as journal:
        assert len(journal.measurements("probe")) == 2


def test_a_failing_write_is_told_and_survived(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with run_journal(tmp_path, PREMISE) as journal:
        journal.record("probe", "before", {})
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
            with pytest.raises(JournalError, match=r"could not be written .*what is measured is kept"):
                journal.record("probe", "large", {}, arrays={"d": np.random.default_rng(0).random(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        keeps_on(journal)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    filled(tmp_path / "run")
    (tmp_path / "run" / FILE_NAME).chmod(0o444)
    (tmp_path / "run").chmod(0o555)
    (tmp_path / "empty").mkdir(mode=0o555)
    try:
        with open_journal(tmp_path / "run") as journal:  # a finished run on read-only media
            assert len(journal.measurements("probe")) == 200
        with pytest.raises(JournalError, match="choose another run directory"), run_journal(tmp_path / "run", PREMISE):
            pass
        with pytest.raises(JournalError, match="Permission denied"), run_journal(tmp_path / "empty", PREMISE):
            pass
    finally:
        (tmp_path / "run").chmod(0o755)


def test_the_file_is_plain_sqlite(tmp_path: Path) -> None:
    """What another tool reads: the columns, JSON text, and an .npz."""
    connection = sqlite3.connect(filled(tmp_path))
    kind, value, names = connection.execute("select kind, value, names from measurement where number = 7").fetchone()
    connection.close()
    assert (kind, json.loads(value), json.loads(names)) == ("probe", {"drop": 1.0}, ["d"])
