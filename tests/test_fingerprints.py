"""Content is hashed, all of it and nothing else: no `repr`, no address, no order that says nothing."""

import copy
import datetime
import decimal
import enum
import io
import pathlib
import threading
import uuid
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from precimap.errors import TaskError
from precimap.fingerprints import of_architecture, of_value


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


Point = namedtuple("Point", "x y")


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any = None


class Plain:
    def __init__(self, x: Any) -> None:
        self.x = x


class BySlots:
    __slots__ = ("x", "y")

    def __init__(self, x: Any) -> None:
        self.x = x


@dataclass
class Holder:
    reader: Any = field(default_factory=lambda: (number for number in range(3)))


def long_array(at: int | None = None) -> np.ndarray:
    """More than repr shows; one element of its middle is changed."""
    values = np.zeros((200, 32), np.float32)
    if at is not None:
        values.flat[at] = 1e-30
    return values


WRAPS = {
    "array": lambda a: a,
    "in a dict": lambda a: {"x": a},
    "slots dataclass": lambda a: Slotted(a),
    "object": lambda a: Plain(a),
    "object with slots": lambda a: BySlots(a),
    "namedtuple": lambda a: Point(a, 1),
    "objects in an array": lambda a: np.array([a, None], dtype=object),
    "arrow table": lambda a: pa.table({"x": a.reshape(-1)}),
    "arrow array": lambda a: pa.array(a.reshape(-1)),
    "arrow lists": lambda a: pa.array(a.tolist()),
    "arrow with nulls": lambda a: pa.array([None, *a.reshape(-1).tolist()]),
    "deque": lambda a: deque([a]),
    "user's mapping": lambda a: UserDict(x=a),
    "masked": lambda a: np.ma.masked_array(a, a < 0),
    "structured": lambda a: a.reshape(-1).view([("u", np.float32), ("v", np.float32)]),
    "bytes": lambda a: a.tobytes(),
    "memoryview": lambda a: memoryview(a),
    "sparse": lambda a: scipy.sparse.csr_matrix(a),
    "tensor": torch.from_numpy,
    "bfloat16": lambda a: torch.from_numpy(a).bfloat16(),
    "sparse tensor": lambda a: torch.from_numpy(a).to_sparse(),
    "csr tensor": lambda a: torch.from_numpy(a).to_sparse_csr(),
    "csc tensor": lambda a: torch.from_numpy(a).to_sparse_csc(),
    "nested tensor": lambda a: torch.nested.as_nested_tensor([torch.from_numpy(a), torch.from_numpy(a[:3])]),
    "io": lambda a: io.BytesIO(a.tobytes()),
    "text": lambda a: a.tobytes().hex(),
}


@pytest.mark.filterwarnings("ignore")  # torch warns that some layouts are young
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("at", [0, 3200, 6399])
def test_one_element_anywhere_makes_another_content(wrap: Any, at: int) -> None:
    plain, changed = of_value(wrap(long_array())), of_value(wrap(long_array(at)))
    assert plain == of_value(wrap(long_array()))
    assert plain != changed


DTYPES = ["?", "i1", "u8", "f2", ">f4", "f8", "c16", "U7", "S7", "M8[ns]", "m8[s]"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_every_dtype_are_known_by_value_and_not_by_layout(dtype: str) -> None:
    rows = np.arange(60).reshape(6, 10).astype("i8").astype(dtype)
    spread = np.empty((12, 20), dtype)
    spread[::2, ::2] = rows
    for same in (rows.copy(), np.asfortranarray(rows), spread[::2, ::2], rows.T.T):
        assert of_value(same) == of_value(rows)
    other = rows.copy()
    other[3, 5] = other[0, 0] if dtype == "?" else other[3, 6]
    assert of_value(other) != of_value(rows)
    assert of_value(rows.reshape(10, 6)) != of_value(rows)
    assert of_value(rows[:1]) != of_value(rows[0])
    assert of_value(rows[0, 0]) == of_value(rows.copy()[0, 0])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_views_of_tensors_are_their_values() -> None:
    whole = torch.randn(8, 6)
    assert of_value(whole[::2, 1:4]) == of_value(whole[::2, 1:4].clone())
    assert of_value(whole.t()) == of_value(whole.t().contiguous())
    waves = torch.randn(4, dtype=torch.complex64)
    assert of_value(waves.conj()) == of_value(waves.conj().resolve_conj()) != of_value(waves)
    codes = torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8)
    assert of_value(codes) != of_value(torch.quantize_per_tensor(whole, 0.2, 0, torch.qint8))
    assert of_value(torch.tensor(1.0)) != of_value(torch.tensor([1.0]))


def test_not_a_number_is_known_by_its_bits() -> None:
    payloads = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert of_value(payloads[:1]) != of_value(payloads[1:])
    assert of_value(float("nan")) == of_value(float("nan"))
    assert of_value(0.0) != of_value(-0.0)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.sampled_from([Colour.RED, Colour.BLUE, np.float32(1), np.int64(1), torch.float16]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 2), inner, max_size=3)
        | st.frozensets(st.text(max_size=2), max_size=3)
    ),
    max_leaves=6,
)


def alike(a: Any, b: Any) -> bool:
    """An independent oracle: equal, and of the same types all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return {(type(k), k) for k in a} == {(type(k), k) for k in b} and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return bool(a == b and repr(a) == repr(b)) or (isinstance(a, frozenset) and a == b)


@given(values, values)
def test_contents_are_equal_only_if_the_values_are(a: Any, b: Any) -> None:
    assert (of_value(a) == of_value(b)) == alike(a, b)
    assert of_value(a) == of_value(copy.deepcopy(a))


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_pieces_do_not_run_together(a: list[str], b: list[str]) -> None:
    """("ab", "c") and ("a", "bc") are two contents, in every container."""
    for wrap in (list, tuple, lambda x: np.array(x, object), lambda x: {"k": x}, lambda x: [[y] for y in x]):
        assert (of_value(wrap(a)) == of_value(wrap(b))) == (a == b)


def test_order_counts_where_it_says_something() -> None:
    assert of_value({"a": 1, "b": 2}) == of_value({"b": 2, "a": 1}) == of_value(OrderedDict(b=2, a=1))
    assert of_value({3, 1, 2}) == of_value({2, 3, 1})
    assert of_value({"a": 1, "b": 2}) != of_value({"a": 2, "b": 1})
    assert of_value([1, 2]) != of_value([2, 1])
    assert of_value([1, 2]) != of_value((1, 2))


def test_chunks_and_slices_of_a_column_are_no_content() -> None:
    whole = pa.array(["a", None, "ccc", "d"])
    assert of_value(whole[1:3]) == of_value(pa.array([None, "ccc"]))
    cut = pa.chunked_array([["a", None], ["ccc", "d"]])
    assert of_value(pa.table({"x": cut})) == of_value(pa.table({"x": pa.chunked_array([["a"], [None, "ccc", "d"]])}))
    assert of_value(pa.array([1, 2], pa.int32())) != of_value(pa.array([1, 2], pa.int64()))
    assert of_value(pa.array([1, None])) != of_value(pa.array([1, 0]))


def test_what_a_jagged_container_caches_is_no_content() -> None:
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor")

    def made(last: int) -> Any:
        lengths = torch.tensor([2, 0, 1, 1])
        return sparse.KeyedJaggedTensor.from_lengths_sync(["a", "b"], torch.tensor([1, 2, 3, last]), lengths)

    asked = made(4)
    before = of_value(asked)
    asked.offsets(), asked.to_dict(), asked.length_per_key()
    assert of_value(asked) == before == of_value(made(4))
    assert of_value(made(5)) != before


KNOWN = [
    datetime.datetime(2026, 5, 4, tzinfo=datetime.UTC),
    datetime.date(2026, 5, 4),
    datetime.timedelta(1),
    decimal.Decimal("1.10"),
    pathlib.PurePosixPath("a/b"),
    uuid.UUID(int=7),
    range(3),
    slice(1, 2),
    torch.Size([2]),
    torch.device("cpu"),
    complex(1, -2),
    bytearray(b"x"),
    np.datetime64("2026-05-04"),
    np.void(b"xy"),
]


@pytest.mark.parametrize("value", KNOWN, ids=lambda value: type(value).__name__)
def test_small_values_are_known_by_content(value: Any) -> None:
    assert of_value([value]) == of_value([copy.deepcopy(value)])
    others = [of_value([other]) for other in KNOWN if other is not value]
    assert of_value([value]) not in others


@pytest.mark.parametrize(
    ("value", "where", "kind"),
    [
        ({"x": [1, (n for n in range(3))]}, r"the batch\['x'\]\[1\]", "generator"),
        ({"f": lambda batch: batch}, r"the batch\['f'\]", "function"),
        ([threading.Lock()], r"the batch\[0\]", "lock"),
        (Holder(), r"the batch\.reader", "generator"),
        ({"m": nn.Linear(2, 2)}, r"the batch\['m'\]", r"torch\.nn\.modules\.linear\.Linear"),
        (torch.empty(3, device="meta"), "the batch", "Tensor"),
        ({"len": len}, r"the batch\['len'\]", "builtin_function_or_method"),
    ],
)
def test_what_has_no_content_is_refused_with_its_place_and_type(value: Any, where: str, kind: str) -> None:
    with pytest.raises(TaskError, match=rf"{where} is a \S*{kind}.*no content.*give tensors, NumPy arrays"):
        of_value(value, "the batch")


def test_an_open_file_is_refused(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "x").open("w") as file, pytest.raises(TaskError, match="TextIOWrapper"):
        of_value([file], "the batch")


def test_what_contains_itself_is_refused() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    with pytest.raises(TaskError, match=r"the value\[1\] is a list.*contains itself"):
        of_value(ring)
    deep: Any = 0
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(TaskError, match="nested too deeply"):
        of_value(deep)


def test_the_same_thing_twice_is_no_ring() -> None:
    part = [1, 2]
    assert of_value([part, part]) == of_value([[1, 2], [1, 2]])


class Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(x)


def test_an_architecture_is_its_modules_and_what_they_print() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    assert of_architecture(plain) == of_architecture(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    others = [
        nn.Sequential(nn.Linear(3, 4), Swish()),
        nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1)),
        nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2)),
        nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU()),
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.ReLU()),
    ]
    prints = {of_architecture(model) for model in (plain, *others)}
    assert len(prints) == 1 + len(others)
    with torch.no_grad():
        plain[0].weight.zero_()
    assert of_architecture(plain) in prints, "weights have a print of their own"
