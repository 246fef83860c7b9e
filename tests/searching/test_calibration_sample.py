"""What a static range is fitted on: values spread over all columns, whatever the width, the batch size and the calls."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from precimap import Splits, Task
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES, Percentile
from precimap.searching.calibrate import SAMPLE_OF_A_CALL, calibrate, spread_sample
from precimap.searching.progress import silent


@given(
    width=st.sampled_from([1, 2, 3, 16, 60, 64, 100, 128, 512, 1000, 1024, 4096]) | st.integers(1, 3000),
    rows=st.integers(1, 300),
    count=st.sampled_from([64, 1000, 1024, 4096]),
    seed=st.integers(0, 5),
)
def test_every_column_is_met_as_often_as_it_is_there(width: int, rows: int, count: int, seed: int) -> None:
    """Of each half of the columns, and of each residue that a step could alias with."""
    values = torch.arange(width).repeat(rows)
    found = spread_sample(values, count, seed)
    assert len(found) == min(count, len(values))
    assert torch.equal(found, spread_sample(values, count, seed))
    for part in (values < width / 2, *(values % step == 0 for step in (2, 3, 5, 8, 64) if step <= width)):
        share = float(part.float().mean())
        seen = float(torch.isin(found, values[part]).float().mean())
        assert abs(seen - share) <= 5 * (share * (1 - share) / len(found)) ** 0.5 + 1 / len(found)


@given(size=st.integers(1, 5000), count=st.integers(1, 500), seed=st.integers(0, 3))
def test_the_sample_is_in_order_and_one_of_each_part(size: int, count: int, seed: int) -> None:
    found = spread_sample(torch.arange(size), count, seed)
    assert bool((found.diff() > 0).all())
    if size > count:
        edges = torch.arange(count + 1) * size // count
        assert bool(((edges[:-1] <= found) & (found < edges[1:])).all())


WIDTH = 64


def ranged(rows: int, batches: int, column: int, **changes: Any) -> float:
    """The static range of a layer whose inputs are tiny but in every column except one: 99.9 % of |x|."""
    model = nn.Sequential(nn.Linear(WIDTH, 8)).eval()
    generator = torch.Generator().manual_seed(7)

    def batch() -> dict[str, Tensor]:
        x = torch.randn(rows, WIDTH, generator=generator)
        x[:, column] *= 1e-3
        return {"x": x}

    split = [batch() for _ in range(batches)]
    task = Task(
        model,
        splits=Splits(split, split, split),
        forward=lambda m, b: m(b["x"]),
        loss=lambda s, b: s[:, 0],
        metric=Loss(),
    )
    scheme = SCHEMES["int8-static"].with_range(Percentile(99.9))
    found = calibrate(task, ("0.weight",), silent).input_range("0.weight", scheme)
    assert found is not None
    return 255 * found.scale


@pytest.mark.parametrize("column", [0, 1, 63])
@pytest.mark.parametrize(
    ("rows", "batches"), [(8192, 1), (8192, 3), (2048, 4), (128, 64), (128, 80), (64, 160), (8000, 1)]
)
def test_a_percentile_is_that_of_all_columns(rows: int, batches: int, column: int) -> None:
    """Steps that were multiples of the width, of one call or of all calls together, met one column alone."""
    exact = 2 * float(torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - 0.0005 * 64 / 63)))
    assert SAMPLE_OF_A_CALL == 8192
    assert ranged(rows, batches, column) == pytest.approx(exact, rel=0.08)
