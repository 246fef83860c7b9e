"""Two uncertainties of a map: over units, and over where its rounding grids lie."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import nn

from precimap.errors import InputError, MapError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_map
from precimap.metrics.paired import Drop
from precimap.metrics.units import Units
from precimap.numerics.grid_shift import GridShift
from precimap.numerics.schemes import Scheme, scheme
from precimap.precision_map import Decision, PrecisionMap, Premise, Verdict
from precimap.searching.certificate.rounding_draws import rounding_spread

SHIPPED = Drop(estimate=0.25, error=0.5, n=40, clusters=10, changed=7)
NOWHERE = Premise(
    weights="", task="", metric="", calibration="", search="", certify="", base_precision="", device="", precimap="",
    torch="",
)  # fmt: skip


UNITS = Units(n=40)


@given(arrays(np.float64, st.tuples(st.integers(2, 12), st.just(40)), elements=st.floats(-100, 100)))
def test_the_spread_is_that_of_numpy(draws: NDArray[np.float64]) -> None:
    found = rounding_spread(SHIPPED, draws, UNITS)
    means = draws.mean(1)
    assert (found.shipped, found.error_over_units, found.n) == (0.25, 0.5, 40)
    assert found.drops == pytest.approx(means, rel=1e-9, abs=1e-9)
    assert found.mean == pytest.approx(means.mean(), rel=1e-9, abs=1e-9)
    assert found.error_over_rounding == pytest.approx(np.std(means, ddof=1), rel=1e-6, abs=1e-9)
    assert 0 <= found.common <= found.error_over_rounding * (1 + 1e-9)


@pytest.mark.parametrize(("common", "own"), [(0.0, 1.0), (0.5, 1.0), (1.0, 0.1)])
def test_the_common_part_is_told_from_the_units_own_luck(common: float, own: float) -> None:
    """Simulated: a shift of a whole draw with a known standard deviation, and each unit's own noise, 400 times."""
    rng = np.random.default_rng(4)
    squares = [
        rounding_spread(SHIPPED, common * rng.normal(size=(8, 1)) + own * rng.normal(size=(8, 40)), UNITS).common ** 2
        for _ in range(400)
    ]
    total = common**2 + own**2 / 40
    # Cutting negative estimates off at 0 only adds, at most as much as the estimate's own spread.
    slack = 3 * total * np.sqrt(2 / 7 / 400) + (0.4 * total if common == 0 else 0)
    assert abs(np.mean(squares) - common**2) <= slack


def test_what_is_no_spread_is_refused() -> None:
    for count in (0, 1):
        with pytest.raises(InputError, match=f"expected at least two rounding draws to tell a spread, got {count}"):
            rounding_spread(SHIPPED, np.zeros((count, 40)), UNITS)
    faulty = np.zeros((3, 40))
    faulty[1, 2] = math.nan
    with pytest.raises(InputError, match="got NaN or infinity in 1 of 3"):
        rounding_spread(SHIPPED, faulty, UNITS)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))


def a_map(model: nn.Module, chosen: Scheme) -> PrecisionMap:
    low = {"0.weight", "2.weight"}
    layers = {
        name: Decision(
            scheme=chosen.name if name in low else None, verdict=Verdict.TOLERANT if name in low else Verdict.SENSITIVE,
            reason="planted", shape=tuple(weight.shape), ops=("linear",), contracted=(1,),
            input_scale=0.02 if name in low and chosen.needs_calibration else None,
        )
        for name, weight in model.named_parameters() if name.endswith("weight")
    }  # fmt: skip
    return PrecisionMap(target="emulated", schemes={chosen.name: chosen.row()}, layers=layers, premise=NOWHERE)


@pytest.mark.parametrize("name", ["fp8", "fp8-static", "int8"])
def test_a_draw_is_the_map_on_other_grids(name: str) -> None:
    model = two_layers()
    precision_map, x = a_map(model, scheme(name)), torch.randn(64, 32)
    before = [parameter.clone() for parameter in model.parameters()]
    outputs = []
    for layers in (
        quantize_map(model, precision_map),
        *(quantize_map(model, precision_map, GridShift(seed)) for seed in (1, 1, 2)),
    ):
        assert sorted(layers) == ["0.weight", "2.weight"]
        with torch.no_grad(), quantized(model, layers):
            outputs.append(model(x))
    shipped, first, again, second = outputs
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, shipped)
    assert all(map(torch.equal, before, model.parameters()))
    with torch.no_grad():
        errors = [float((output - model(x)).square().mean().sqrt()) for output in (shipped, first, second)]
    assert max(errors) < 2.5 * min(errors)  # another draw of the same lottery, not another format


def test_draws_are_of_the_maps_own_layers() -> None:
    model = two_layers()
    with pytest.raises(MapError, match="the model has none of that name"):
        quantize_map(nn.Linear(2, 2), a_map(model, scheme("fp8")), GridShift(1))
