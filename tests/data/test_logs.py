"""Logs read from TSV, CSV and Parquet: the same tensors as a reader in plain Python, in bounded memory, faults by place."""

import builtins
import gzip
import io
import math
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet
from torch import Tensor

from precimap.data import CRITEO, Columns, Encoding, Logs, hashed, hex_modulo, log_counts, vocabulary
from precimap.errors import DataError

# Made up, in Criteo's layout; the last has everything missing.
HEX = [f"{k * 0x1F123BB5 % 2**32:08x}" for k in range(1, 53)]
CRITEO_ROWS = (
    "\t".join(["0", *"1 1 5 0 1382 4 15 2 181 1 2".split(), "", "2", *HEX[:21], "", *HEX[22:26]]),
    "\t".join(["1", *"2 -2 44 1 102 8 2 2 4 1 1".split(), "", "4", *HEX[26:]]),
    "0" + 39 * "\t",
)
SMALL = Columns(label="y", dense=("a", "b"), categorical=("c",), user="u", time="t")
ENCODING = Encoding(dense=log_counts, categorical=hashed(50))


def small_table(rows: int) -> pa.Table:
    """Rows with missing numbers and categories, users as text, times as timestamps."""
    pick = np.random.default_rng(5)
    return pa.table(
        {
            "y": pa.array(pick.integers(0, 2, rows), pa.int8()),
            "a": pa.array(pick.integers(-2, 900, rows), pa.int32(), mask=pick.random(rows) < 0.2),
            "unread": pa.array(["x"] * rows),
            "b": pa.array(pick.random(rows), pa.float64()),
            "c": pa.array([f"item {k}" for k in pick.integers(0, 200, rows)], mask=pick.random(rows) < 0.1),
            "u": pa.array([f"user-{k}" for k in pick.integers(0, 40, rows)]),
            "t": pa.array(1_750_000_000_000_000 + 500_000 * np.arange(rows), pa.timestamp("us")),
        }
    )


def write(table: pa.Table, path: Path) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=700)
        return path
    text = as_text(table, "," if ".csv" in path.name else "\t")
    path.write_bytes(gzip.compress(text, compresslevel=1) if path.suffix == ".gz" else text)
    return path


def as_text(table: pa.Table, separator: str) -> bytes:
    text = io.BytesIO(f"{separator.join(table.column_names)}\n".encode())
    text.seek(0, io.SEEK_END)
    csv.write_csv(table, text, csv.WriteOptions(include_header=False, delimiter=separator, quoting_style="none"))
    return text.getvalue()


def joined(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def expected(table: pa.Table) -> dict[str, Tensor]:
    """The same in plain Python, row by row."""
    rows = table.to_pylist()

    def number(value: float | None) -> float:
        return math.log1p(max(0.0, value or 0.0))

    return {
        "dense": torch.tensor([[number(r["a"]), number(r["b"])] for r in rows]),
        "categorical": torch.tensor([[0 if r["c"] is None else 1 + zlib.crc32(r["c"].encode()) % 49] for r in rows]),
        "label": torch.tensor([float(r["y"]) for r in rows]),
        "time": torch.tensor([r["t"].timestamp() for r in rows], dtype=torch.float64),
    }


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")


@pytest.mark.parametrize("name", ["logs.tsv", "logs.csv", "logs.tsv.gz", "logs.csv.gz", "logs.parquet"])
def test_every_format_gives_the_same_tensors(name: str, tmp_path: Path) -> None:
    table = small_table(2000)
    logs = Logs([write(table, tmp_path / name)], SMALL, ENCODING)
    batches = logs.load(size=300)
    assert [len(batch["label"]) for batch in batches] == [300] * 6 + [200]
    found, right = joined(batches), expected(table)
    for key, values in right.items():
        assert found[key].dtype == values.dtype
        torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-6)
    names = table["u"].to_pylist()
    ids = dict(zip(names, found["user"].tolist(), strict=True))
    assert [ids[name] for name in names] == found["user"].tolist()
    assert len(set(ids.values())) == len(ids)
    assert max(ids.values()) < 2**52
    scan = logs.scan()
    assert scan.labels.tolist() == found["label"].tolist()
    assert scan.users is not None
    assert scan.users.tolist() == found["user"].tolist()
    assert scan.times is not None
    assert scan.times.tolist() == found["time"].tolist()


def test_criteo_as_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text("\n".join(CRITEO_ROWS) + "\n")
    (batch,) = Logs([path], CRITEO, Encoding(log_counts, hex_modulo(1000))).load()
    assert set(batch) == {"dense", "categorical", "label"}
    assert batch["label"].tolist() == [0, 1, 0]
    fields = [row.split("\t") for row in CRITEO_ROWS]
    dense = [[math.log1p(max(0, int(field or 0))) for field in row[1:14]] for row in fields]
    torch.testing.assert_close(batch["dense"], torch.tensor(dense))
    assert batch["categorical"].tolist() == [[int(field or "0", 16) % 1000 for field in row[14:]] for row in fields]


def test_rows_are_picked_across_blocks_and_files_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precimap.data.files.BLOCK_BYTES", 4096)
    monkeypatch.setattr("precimap.data.files.PARQUET_ROWS", 150)
    table = small_table(3000)
    files = [
        write(table[:1000], tmp_path / "1.tsv"),
        write(table[1000:1001], tmp_path / "2.csv.gz"),
        write(table[1001:], tmp_path / "3.parquet"),
    ]
    rows = np.unique(np.random.default_rng(2).integers(0, 3000, 800))
    batches = Logs(files, SMALL, ENCODING).batches(rows, size=64)
    first, second = list(batches), list(batches)
    right = expected(table.take(pa.array(rows)))
    for found in (joined(first), joined(second)):
        for key, values in right.items():
            torch.testing.assert_close(found[key], values, rtol=1e-6, atol=1e-6)
    assert {len(batch["label"]) for batch in first[:-1]} == {64}
    with pytest.raises(DataError, match=r"expected row 3000 \(counted from 0\), got 3000 rows"):
        list(Logs(files, SMALL, ENCODING).batches(np.array([5, 3000])))
    with pytest.raises(DataError, match="ascending"):
        Logs(files, SMALL, ENCODING).batches(np.array([5, 4]))


@pytest.mark.parametrize("name", ["logs.tsv", "logs.tsv.gz", "logs.parquet"])
def test_memory_is_bounded_by_blocks_and_progress_is_of_what_came_out(name: str, tmp_path: Path) -> None:
    """40 MB in memory, of which no more is held than a few blocks; and the bar is where the rows are."""
    table = pa.concat_tables([small_table(50_000)] * 16)
    path = write(table, tmp_path / name)
    size, told, most, seen = table.nbytes, [], 0, [0]
    before = pa.total_allocated_bytes()
    batches = Logs([path], SMALL, ENCODING).batches(size=10_000)
    for batch in batches.read(lambda stage, done, total: told.append((sum(seen), done, total))):
        seen.append(len(batch["label"]))
        most = max(most, pa.total_allocated_bytes() - before)
    assert sum(seen) == 800_000
    assert most < 4 << 20 < size / 8
    assert told[-1][1:] == (path.stat().st_size, path.stat().st_size)
    done = [one[1] for one in told]
    assert done == sorted(done)
    assert len(done) > 20
    # A row is out when its batch is: a block and a batch lie between; gzip's ratio varies a little.
    assert all(abs(rows / 800_000 - d / total) < 0.1 for rows, d, total in told)


def damaged(line: str, number: int = 1500) -> bytes:
    """A TSV of 2,000 rows whose line of this number is another."""
    lines = as_text(small_table(2000), "\t").decode().splitlines()
    lines[number - 1] = line
    return ("\n".join(lines) + "\n").encode()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1\t3\tx\t0.5\tc\tu\t7", "line 1500, column t: expected a number or a time such as .*, got '7x'"),
        ("1\t3\tx\t0.5\tc\tu", "line 1500: expected 7 fields, got 6: 1\t3\tx"),
        ("yes\t3\tx\t0.5\tc\tu\t2026-01-01", "line 1500, column y: expected a number, got 'yes'"),
        ("\t3\tx\t0.5\tc\tu\t2026-01-01", "line 1500, column y: expected a label that is a number, got nothing"),
        ("1\tthree\tx\t0.5\tc\tu\t2026-01-01", "line 1500, column a: expected a number, got 'three'"),
        (
            "1\t3\tx\tinf\tc\tu\t2026-01-01",
            "line 1500, column b: expected a finite number after Encoding.dense, got 'inf'",
        ),
        ("1\t3\tx\t0.5\tc\t\t2026-01-01", "line 1500, column u: got None: every row needs a user"),
        ("1\t3\tx\t0.5\tc\tu\t", "line 1500, column t: expected a time, got nothing"),
        ("", "line 1500"),
    ],
)
def test_a_damaged_line_is_named(line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precimap.data.files.BLOCK_BYTES", 8192)  # so that the line is not in the first block
    path = tmp_path / "logs.tsv"
    path.write_bytes(damaged(line.replace("\t7", "\t7x") if line.endswith("\t7") else line))
    with pytest.raises(DataError, match=said) as caught:
        Logs([path], SMALL, ENCODING).load()
    assert str(path) in str(caught.value)


def test_a_damaged_line_is_named_where_rows_were_picked(tmp_path: Path) -> None:
    path = tmp_path / "logs.tsv"
    path.write_bytes(damaged("1\tthree\tx\t0.5\tc\tu\t2026-01-01"))
    logs = Logs([path], SMALL, ENCODING)
    with pytest.raises(DataError, match="line 1500, column a"):
        logs.load(np.arange(1400, 1600))


def test_nothing_is_read_after_the_last_row_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precimap.data.files.BLOCK_BYTES", 8192)
    path = tmp_path / "logs.tsv"
    path.write_bytes(damaged("1\tthree\tx\t0.5\tc\tu\t2026-01-01"))
    told: list[tuple[str, int, int]] = []
    batches = Logs([path], SMALL, ENCODING).load(np.arange(200), progress=lambda *one: told.append(one))
    assert [len(batch["label"]) for batch in batches] == [200]
    size = path.stat().st_size
    assert told[-2][1] < size / 2
    assert told[-1] == ("read logs.tsv", size, size)


def test_a_category_that_the_function_refuses_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(CRITEO_ROWS[0] + "\n" + CRITEO_ROWS[1].replace(HEX[27], "no hex") + "\n")
    with pytest.raises(DataError, match=r"train.txt, line 2, column C2: got 'no hex': invalid literal"):
        Logs([path], CRITEO, Encoding(log_counts, hex_modulo(10))).load()
    with pytest.raises(DataError, match=r"train.txt, line 1, column C1: expected an index from 0, got -1"):
        Logs([path], CRITEO, Encoding(log_counts, lambda value: -1)).load()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def refused(path: Path, said: str, columns: Columns = SMALL) -> None:
        with pytest.raises(DataError, match=said):
            Logs([path], columns, ENCODING).load()

    refused(tmp_path / "nowhere.tsv", "nowhere.tsv .no such file")
    whole = write(small_table(2000), tmp_path / "whole.tsv.gz").read_bytes()
    cut = tmp_path / "cut.tsv.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    refused(cut, "cut.tsv.gz cannot be read to its end")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 but no more")
    refused(broken, "broken.parquet cannot be read as Parquet")
    (tmp_path / "empty.tsv").write_bytes(b"")
    refused(tmp_path / "empty.tsv", "names of the columns in the first line")
    tsv = write(small_table(3), tmp_path / "small.tsv")
    refused(tsv, "expected the columns z, got y, a, unread", replace(SMALL, dense=("a", "z")))
    lists = tmp_path / "lists.parquet"
    parquet.write_table(small_table(2).set_column(1, "a", pa.array([[1], [2, 3]])), lists)
    refused(lists, r"column a: expected one value a row, got list<.*; read it yourself")


def test_what_belongs_to_the_model_has_no_default(tmp_path: Path) -> None:
    path = write(small_table(3), tmp_path / "small.tsv")
    for encoding, said in (
        (Encoding(categorical=hashed(9)), "numbers and missing values enter the model"),
        (Encoding(dense=log_counts), "how column c becomes an index"),
        (Encoding(log_counts, {"d": hashed(9)}), "how column c becomes an index"),
        (Encoding(lambda x: x[:, :1], hashed(9)), r"the shape \(3, 2\), got \(3, 1\)"),
    ):
        with pytest.raises(DataError, match=said):
            Logs([path], SMALL, encoding).load()
    for size in (0, 1):
        with pytest.raises(DataError, match="at least one value"):
            hashed(size)("x")


def test_a_vocabulary_knows_its_values_and_nothing_else(tmp_path: Path) -> None:
    path = write(small_table(400), tmp_path / "small.parquet")
    known = [f"item {k}" for k in range(100)]
    (batch,) = Logs([path], SMALL, Encoding(log_counts, {"c": vocabulary(known)})).load()
    values = small_table(400)["c"].to_pylist()
    assert batch["categorical"].flatten().tolist() == [1 + known.index(v) if v in known else 0 for v in values]
    assert 0 < (batch["categorical"] == 0).sum() < 400


def test_users_and_times_as_numbers_and_texts(tmp_path: Path) -> None:
    path = tmp_path / "logs.tsv"
    path.write_text(f"y\tu\tt\n1\t17\t5\n0\t007\t6.5\n1\t{2**60}\t7\n")
    scan = Logs([path], Columns(label="y", user="u", time="t"), Encoding()).scan()
    assert scan.users is not None
    assert scan.users[0] == 17
    assert len(set(scan.users.tolist())) == 3
    assert scan.users.max() < 2**52
    assert scan.users.astype(np.float64).astype(np.int64).tolist() == scan.users.tolist()
    assert scan.times is not None
    assert scan.times.tolist() == [5, 6.5, 7]


@pytest.mark.parametrize(
    "times",
    [
        pa.array(["2026-03-31T12:00:00Z", "2026-03-31 12:00:01.5+02:00"]),
        pa.array(["2026-03-31T12:00:00", "2026-03-31 10:00:01.5"]),
        pa.array([1_774_958_400_000_000_001, 1_774_951_201_500_000_999], pa.timestamp("ns", tz="Europe/Berlin")),
        pa.array([1_774_958_400, 1_774_951_201.5]),
    ],
)
def test_times_of_any_kind_are_seconds(times: pa.Array, tmp_path: Path) -> None:
    parquet.write_table(pa.table({"y": [True, False], "t": times}), tmp_path / "logs.parquet")
    scan = Logs([tmp_path / "logs.parquet"], Columns(label="y", time="t"), Encoding()).scan()
    assert scan.times is not None
    assert scan.times.tolist() == pytest.approx([1_774_958_400, 1_774_951_201.5], abs=1e-6)
    assert scan.labels.tolist() == [1, 0]


def test_a_time_of_day_and_a_category_with_a_point_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "logs.parquet"
    parquet.write_table(pa.table({"y": [1.0], "t": pa.array([1], pa.time32("s")), "c": [17.0]}), path)
    with pytest.raises(DataError, match="row 1, column t: expected a number or a time"):
        Logs([path], Columns(label="y", time="t"), Encoding()).load()
    for columns in (Columns(label="y", categorical=("c",)), Columns(label="y", user="c")):
        with pytest.raises(DataError, match="column c: expected texts or integers, got double"):
            Logs([path], columns, ENCODING).load()


def test_lines_of_other_systems_and_quoted_fields(tmp_path: Path) -> None:
    path = tmp_path / "logs.csv"
    path.write_bytes('\ufeffy,a,b,c,u,t\r\n1,3,0.5,"a ""b"", c",u,5\r\n0,,,,v,6'.encode())
    seen: list[object] = []

    def index(value: object) -> int:
        seen.append(value)
        return 0

    (batch,) = Logs([path], SMALL, Encoding(log_counts, index)).load()
    assert seen == ['a "b", c', None]
    assert batch["dense"].tolist() == [[pytest.approx(math.log(4)), pytest.approx(math.log(1.5))], [0, 0]]
    assert batch["time"].tolist() == [5, 6]


def test_columns_are_checked() -> None:
    with pytest.raises(DataError, match=r"a list of files, got 'logs.tsv'"):
        Logs("logs.tsv", CRITEO, ENCODING)
    with pytest.raises(DataError, match="I1 more than once"):
        Columns(label="label", dense=("I1", "I1"))
    with pytest.raises(DataError, match="out of the header given, got user"):
        replace(CRITEO, user="user")


def test_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(small_table(3), tmp_path / "small.tsv")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'precimap\[data\]'"):
        Logs([path], SMALL, ENCODING).load()
