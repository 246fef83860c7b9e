"""Batches through graphs of fixed size: which one, what is filled in, what comes back. The capture itself needs a GPU."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from helpers.gpu_played import played
from precimap import graphed
from precimap.errors import DeployError, InputError
from precimap.runtime.nvidia import graphs as cuda_graphs
from precimap.runtime.nvidia.graphs import Captured, GraphedModel

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Ranker(nn.Module):
    """Ids and floats in, a tuple and a dict out; one scale for the whole batch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(10, 8), nn.Linear(11, 3)
        self.sizes: list[int] = []

    def forward(self, ids: Tensor, dense: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        self.sizes.append(len(ids))
        x = torch.cat([self.table(ids), dense * scale], 1)
        x = (x / x.abs().amax() * 448).to(torch.float8_e4m3fn).to(x.dtype)
        scores = self.linear(x)
        return scores, {"probability": scores.sigmoid(), "best": scores.argmax(1)}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "capture", played)


def example(size: int, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, (size,), generator=generator)
    return ids.to(device), torch.randn(size, 3, generator=generator).to(device), 0.5


def model_of(device: str = "cpu") -> Ranker:
    torch.manual_seed(0)
    return Ranker().eval().to(device)


def assert_same(found: Any, expected: Any, **how: float) -> None:
    torch.testing.assert_close(found, expected, **{"rtol": 0.0, "atol": 0.0, **how})


@pytest.mark.usefixtures("host")
def test_each_batch_runs_on_the_smallest_that_holds_it() -> None:
    """The scale of the batch stays what it is, too: what is filled in are copies."""
    model = model_of()
    fast = graphed(model, example(8), example(2), example(4))
    for units, size in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)):
        given_batch = example(units, seed=units)
        with torch.no_grad():
            expected = model(*given_batch)
        model.sizes.clear()
        found = fast(*given_batch)
        assert model.sizes == [size]
        assert_same(found, expected, rtol=1e-5, atol=1e-3)
        assert not found[0].requires_grad


@pytest.mark.usefixtures("host")
def test_arguments_may_have_names() -> None:
    model, names = model_of(), ("ids", "dense", "scale")
    fast = graphed(model, *(dict(zip(names, example(size), strict=True)) for size in (4, 2)))
    asked = dict(zip(names, example(3, seed=1), strict=True))
    with torch.no_grad():
        expected = model(**asked)
    for given_batch in (asked, dict(reversed(asked.items()))):
        assert_same(fast(**given_batch), expected, rtol=1e-5, atol=1e-3)
    for wrong in ({}, {"ids": asked["ids"]}, {**asked, "more": 1}):
        with pytest.raises(InputError, match="expected the arguments ids, dense, scale by name as in the examples"):
            fast(**wrong)
    with pytest.raises(InputError, match="got 3 positional"):
        fast(*example(3))
    with pytest.raises(InputError, match="expected positional arguments"):
        graphed(model, example(2))(**asked)
    with pytest.raises(InputError, match="expected examples with the same arguments"):
        graphed(model, asked, example(2))


@pytest.mark.usefixtures("host")
def test_results_outlive_the_next_call() -> None:
    fast = graphed(model_of(), example(4))
    first = fast(*example(3, seed=1))
    kept = tree_map_only(Tensor, torch.clone, first)
    fast(*example(4, seed=2))
    assert_same(first, kept)


@pytest.mark.usefixtures("host")
@given(st.sets(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 99))
def test_any_sizes(sizes: set[int], units: int, seed: int) -> None:
    model = model_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graphs, "capture", played)
        fast = graphed(model, *(example(size, seed) for size in sizes))
    if units > max(sizes):
        with pytest.raises(InputError, match=f"1 to {max(sizes)} units"):
            fast(*example(units))
        return
    with torch.no_grad():
        expected = model(*example(units, seed + 1))
    assert_same(fast(*example(units, seed + 1)), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.usefixtures("host")
def test_calls_unlike_the_examples_are_refused() -> None:
    fast = graphed(model_of(), example(4))
    ids, dense, scale = example(3)
    for arguments, what in (
        ((ids[:0], dense[:0], scale), "got 0"),
        ((ids, dense), "expected 3 positional arguments"),
        ((ids, dense, 2.0), r"0\.5 among them, got 2\.0"),
        ((ids, dense[:2], scale), "of one size"),
        ((ids, dense[:, :2], scale), r"\(3,\)"),
        ((ids.int(), dense, scale), "int64"),
        ((ids, dense.double(), scale), "float32"),
        ((3, dense, scale), "among them"),
        ((), "no tensor"),
    ):
        with pytest.raises(InputError, match=what):
            fast(*arguments)


@pytest.mark.usefixtures("host")
def test_examples_and_results_without_a_batch_are_refused() -> None:
    for examples in ((), (example(2), example(2, seed=1)), (example(0),)):
        with pytest.raises(InputError, match="different batch sizes"):
            graphed(model_of(), *examples)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0)

    with pytest.raises(InputError, match="first dim is the batch of 4"):
        graphed(Mean(), (torch.randn(4, 3),))


def test_a_graph_that_does_not_follow_its_inputs_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a replay that gives what was captured, as a model does that computes on the host."""

    @torch.no_grad()
    def frozen(model: nn.Module, example: tuple[Any, ...], pool: Any = None) -> tuple[Captured, Any]:
        return Captured(example, model(*example), lambda: None), pool

    monkeypatch.setattr(cuda_graphs, "capture", frozen)
    with pytest.raises(DeployError, match="differs from the model"):
        graphed(nn.Linear(3, 2).eval(), (torch.randn(4, 3),))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_there_are_no_graphs() -> None:
    with pytest.raises(DeployError, match="CUDA device"):
        graphed(model_of(), example(4))


@needs_gpu
def test_graphs_of_this_gpu_compute_the_model() -> None:
    """Batches from the host and from the device, and one graph after another."""
    model = model_of("cuda")
    fast = graphed(model, example(2, device="cuda"), example(64, device="cuda"))
    assert isinstance(fast, GraphedModel)
    for units in (1, 2, 3, 64, 2, 40):
        for device in ("cpu", "cuda"):
            with torch.no_grad():
                expected = model(*example(units, units, "cuda"))
            assert_same(fast(*example(units, units, device))[0], expected[0], rtol=1e-2, atol=1e-2)
