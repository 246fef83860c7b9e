"""Batches cut and grown along their units, where these are rows and where they lie end to end, against lists of units."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap.searching.preflight.batches import chosen, cut, resized

FORMS = ("ends", "starts", "lengths")
Unit = tuple[float, list[int]]


def batch_of(units: list[Unit], form: str, dtype: torch.dtype = torch.int64) -> dict[str, Any]:
    """As nn.EmbeddingBag takes it: dense rows, ids end to end with a weight each, and a column that says whose is what."""
    lengths = torch.tensor([len(ids) for _, ids in units])
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    bounds = {"ends": ends, "starts": ends[:-1], "lengths": lengths}[form]
    ids = torch.tensor([one for _, ids in units for one in ids], dtype=torch.int64)
    return {
        "dense": torch.tensor([[value, -value] for value, _ in units]),
        "features": (ids, {"bounds": bounds.to(dtype), "weights": ids.float() / 7}),
        "names": [str(value) for value, _ in units],
    }


def assert_same(found: Any, expected: dict[str, Any]) -> None:
    assert torch.equal(found["dense"], expected["dense"])
    assert torch.equal(found["features"][0], expected["features"][0])
    for name in ("bounds", "weights"):
        assert torch.equal(found["features"][1][name], expected["features"][1][name]), name
        assert found["features"][1][name].dtype == expected["features"][1][name].dtype
    assert found["names"] == expected["names"]


units_of = st.lists(
    st.tuples(st.integers(-50, 50).map(float), st.lists(st.integers(0, 99), max_size=4)), min_size=2, max_size=9
).filter(lambda units: sum(len(ids) for _, ids in units) > len(units) + 1)


@settings(deadline=None, max_examples=200)
@given(
    units_of, st.sampled_from(FORMS), st.sampled_from([torch.int32, torch.int64]), st.integers(1, 12), st.integers(0, 3)
)
def test_units_that_lie_end_to_end_are_grown_and_cut(
    units: list[Unit], form: str, dtype: torch.dtype, size: int, first: int
) -> None:
    n, given_ = len(units), batch_of(units, form, dtype)
    bounds = given_["features"][1]["bounds"]
    total = len(given_["features"][0])
    # Offsets without an end, or lengths? Such a column is left alone.
    assume(form == "ends" or int(bounds[0]) != 0 or int(bounds.sum()) != total or bool((bounds.diff() < 0).any()))
    wanted = batch_of([units[(row + first) % n] for row in range(size)], form, dtype)
    assert_same(resized(given_, n, size, first), wanted)
    parts = cut(given_, n, 2)
    assert parts is not None
    for part, rows in zip(parts, (units[: n // 2], units[n // 2 :]), strict=True):
        assert_same(part, batch_of(rows, form, dtype))
    assert_same(given_, batch_of(units, form, dtype))


@pytest.mark.parametrize("form", FORMS)
def test_bags_give_each_unit_its_own_score(form: str) -> None:
    """By nn.EmbeddingBag itself, with offsets as it asks for them."""
    torch.manual_seed(0)
    bag = nn.EmbeddingBag(100, 8, mode="sum", include_last_offset=form == "ends")
    units = [(float(k), list(range(k, k + k % 4))) for k in range(10)]

    def scores(batch: dict[str, Any]) -> Tensor:
        ids, rest = batch["features"]
        bounds = rest["bounds"]
        offsets = bounds.cumsum(0) - bounds if form == "lengths" else bounds
        found: Tensor = bag(ids, offsets)
        return found

    with torch.no_grad():
        whole = scores(batch_of(units, form))
        grown = resized(batch_of(units, form), 10, 23)
        assert torch.equal(scores(grown), whole[torch.arange(23) % 10])


def test_columns_that_can_be_read_in_two_ways_are_left() -> None:
    ids = torch.arange(4)
    assert (
        chosen({"x": torch.ones(4, 2), "ids": ids, "lengths": torch.tensor([2, 0, 1, 1])}, 4, torch.arange(2))
        is not None
    )
    by_ends = {"x": torch.ones(4, 2), "ids": ids, "ends": torch.tensor([0, 2, 2, 3, 4])}
    assert chosen(by_ends, 4, torch.arange(2)) is None, "ids of all units, or one for each?"
    both = {"x": torch.ones(4), "ids": torch.arange(6), "starts": torch.tensor([0, 2, 2, 2])}
    assert chosen(both, 4, torch.arange(2)) is None, "0 to 2, or none and then two?"
    two = {"a": torch.tensor([0, 1, 3, 6]), "b": torch.tensor([0, 3, 4, 6]), "ids": torch.arange(6), "x": torch.ones(3)}
    assert chosen(two, 3, torch.arange(2)) is None, "both end where the ids do"
