"""The form `graphs`: compiled calls as CUDA graphs. The capture itself needs a GPU, and is played by the host elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.gpu_played import plant_times, play_a_gpu, played
from helpers.small_tasks import planted_task
from precimap import CUDA_FP8_GRAPHS, Effort, Serving, deploy, load_deployed, save_deployed, search
from precimap.errors import BatchSizeWarning, DeployError
from precimap.layers.quantized import quantize_layer
from precimap.numerics.schemes import scheme
from precimap.runtime.compiling.compiled import no_compiler
from precimap.runtime.nvidia import graph_calls as module
from precimap.runtime.nvidia import graphs as cuda_graphs
from precimap.runtime.nvidia.graph_calls import MOST_SHAPES, GraphCalls, graph_calls
from precimap.runtime.nvidia.graphs import Captured, capture, difference, waiting_refused

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # Inductor and dynamo warn about parts of their own
    pytest.mark.skipif(no_compiler() is not None, reason="compiled models need a C++ compiler"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the real thing runs here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Net(nn.Module):
    """Tensors in a dict, a number and a text in; a tuple with a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32)
        self.register_buffer("shift", torch.ones(32))

    def forward(self, given: dict[str, Tensor], factor: float = 1.0, *, how: str = "plain") -> Any:
        y = torch.relu(self.linear(given["x"])) * factor + self.shift
        return y, {"sum": y.sum(1), "how": how}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """The device: a CPU that plays one where there is none."""
    torch._dynamo.reset()
    if torch.cuda.is_available():
        return "cuda"
    play_a_gpu(monkeypatch)
    return "cpu"


def net(device: str, of: Callable[[], nn.Module] = Net) -> tuple[nn.Module, GraphCalls]:
    torch.manual_seed(0)
    model = of().eval().to(device)
    return model, graph_calls(model)


def x_of(rows: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def test_each_set_of_shapes_has_a_graph_that_computes_the_model(gpu: str) -> None:
    model, calls = net(gpu)
    plain = Net().eval().to(gpu)
    plain.load_state_dict(model.state_dict())
    for number, (rows, factor) in enumerate(((4, 1.0), (7, 1.0), (4, 2.0), (4, 1.0), (7, 1.0))):
        given = {"x": x_of(rows, gpu, number)}
        with torch.no_grad():
            found, expected = model(given, factor, how="so"), plain(given, factor, how="so")
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1]["sum"], expected[1]["sum"])
        assert found[1]["how"] == "so"
        assert not found[0].requires_grad
    assert calls.graphs == 3


def test_results_outlive_the_next_call_and_inputs_stay(gpu: str) -> None:
    model, _ = net(gpu)
    given = {"x": x_of(4, gpu)}
    first = model(given)[0]
    kept, before = first.clone(), given["x"].clone()
    for seed in (1, 2):
        assert not torch.equal(model({"x": x_of(4, gpu, seed)})[0], kept)
    assert torch.equal(first, kept)
    assert torch.equal(given["x"], before)
    assert torch.equal(model(given)[0], kept)


def test_values_that_are_no_numbers_follow_the_model(gpu: str) -> None:
    model, _ = net(gpu)
    x = x_of(4, gpu)
    model({"x": x})
    x[1, 3] = torch.nan
    found = model({"x": x})[0]
    assert found[1].isnan().all()
    assert not found[[0, 2, 3]].isnan().any()


def test_more_shapes_than_there_may_be_graphs_are_refused(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a graph goes on."""
    monkeypatch.setattr(module, "MOST_SHAPES", 2)
    model, _ = net(gpu)
    for rows in (2, 3, 2):
        model({"x": x_of(rows, gpu)})
    with pytest.raises(DeployError, match=r"at most 2 different shapes.*one more: \(5, 16\), 1\.5.*form compiled"):
        model({"x": x_of(5, gpu)}, 1.5)
    assert model({"x": x_of(3, gpu)})[0].shape == (3, 32)
    assert MOST_SHAPES > 2


class Broken(Net):
    """Code on the host in the middle."""

    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        y = self.linear(given["x"])
        torch._dynamo.graph_break()
        return y + 1


class Writing(Net):
    def forward(self, given: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        self.shift.add_(1)
        return self.linear(given["x"]) + self.shift


@dataclass
class Pair:
    x: Tensor


class Opaque(Net):
    def forward(self, given: Any) -> Any:  # type: ignore[override]
        x = given.x if isinstance(given, Pair) else given
        return Pair(self.linear(x)) if isinstance(given, Tensor) else self.linear(x)


@pytest.mark.parametrize(
    ("of", "given", "why"),
    [
        (Broken, lambda x: {"x": x}, "compiled in one piece, got 2"),
        (Writing, lambda x: {"x": x}, "a call writes into shift"),
        (Opaque, Pair, "expected arguments that are tensors, .* got a Pair"),
        (Opaque, lambda x: x, "expected results that are tensors, .* got a Pair"),
        (Net, lambda x: {"x": x.to_sparse()}, "got a torch.sparse_coo tensor"),
    ],
    ids=["a piece of host code", "a buffer that is written", "an object in", "an object out", "a sparse tensor"],
)
def test_what_a_graph_would_not_do_again_is_refused(
    of: Callable[[], nn.Module], given: Callable[[Tensor], Any], why: str, gpu: str
) -> None:
    """Also where the pieces were made by a compiled model before, which shares its code."""
    model, calls = net(gpu, of)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(DeployError, match=why):
                model(given(x_of(4, gpu)))
    assert not calls.graphs


@no_gpu
def test_a_graph_that_does_not_follow_its_inputs_is_found(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a replay that gives what was captured. It is found at the first inputs that are others."""

    @torch.no_grad()
    def frozen(model: Callable[..., Any], example: tuple[Any, ...], pool: Any = None) -> tuple[Captured, Any]:
        made, pool = played(model, example, pool)
        return Captured(made.arguments, made.outputs, lambda: None), pool

    monkeypatch.setattr(module, "capture", frozen)
    model, _ = net(gpu)
    for _ in range(2):
        model({"x": x_of(4, gpu)})
    with pytest.raises(DeployError, match="differs from the model by"):
        model({"x": x_of(4, gpu, 1)})


@no_gpu
def test_a_graph_that_computes_otherwise_is_found_at_once(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: Callable[..., Any], example: tuple[Any, ...], pool: Any = None) -> tuple[Captured, Any]:
        return played(
            lambda *given: tuple(x * 1.1 if isinstance(x, Tensor) else x for x in model(*given)), example, pool
        )

    monkeypatch.setattr(module, "capture", wrong)
    model, _ = net(gpu)
    with pytest.raises(DeployError, match=r"differs from the model by 0\.1"):
        model({"x": x_of(4, gpu)})


def test_differences_are_of_the_largest_result() -> None:
    nan, inf = torch.nan, torch.inf
    assert difference((torch.tensor([1.0, 4.0]), 3), (torch.tensor([1.0, 5.0]), 3)) == pytest.approx(0.2)
    assert difference(torch.tensor([nan, inf, 1.0]), torch.tensor([nan, inf, 1.0])) == 0
    for one in (torch.tensor([nan, 1.0]), torch.tensor([inf, 1.0])):
        assert not difference([one, torch.ones(2)], [torch.ones(2), torch.ones(2)]) <= 1
    assert difference(torch.zeros(0), torch.zeros(0)) == 0


@no_gpu
def test_a_call_that_waits_is_found_before_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own switch is on for the length of one call, and as it was before afterwards."""
    modes: list[Any] = [1]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits() -> None:
        raise RuntimeError(f"planted under {modes[-1]}")

    with pytest.raises(RuntimeError, match="planted under error"), waiting_refused():
        waits()
    assert modes[-1] == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeployError, match="one CUDA device, got cpu"):
        capture(nn.Linear(2, 2), (torch.ones(1, 2),))


@needs_gpu
def test_code_that_waits_for_the_device_is_refused_on_this_gpu() -> None:
    with pytest.raises(DeployError, match="runs on the host, or waits for the device"):
        capture(lambda x: x * float(x.sum()), (torch.ones(4, device="cuda"),))
    graph, _ = capture(lambda x: x * x.sum(), (torch.ones(4, device="cuda"),))
    graph.replay()
    assert graph.outputs.tolist() == [4.0] * 4


def test_a_forward_that_passes_the_model_by_is_refused(gpu: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU()).eval().to(gpu)
    layers = {"0.weight": quantize_layer("0.weight", model[0].weight, (1,), scheme("fp8"), None)}
    with (
        pytest.raises(DeployError, match="called parts of it only"),
        CUDA_FP8_GRAPHS.running(model, layers) as fast,
    ):
        fast[0](x_of(4, gpu))


@no_gpu
def test_from_a_search_to_a_served_model(gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted times: graphs of the map are the fastest. What is certified, deployed and loaded are graphs."""
    plant_times(
        monkeypatch,
        {
            "fp8": 0.5,
            "blanket": 0.8,
            "blanket, graphs": 0.5,
            "blanket fp8, graphs": 0.5,
            "map": 0.7,
            "map, graphs": 0.4,
        },
    )
    task, captured = planted_task(), list[int]()
    plain = GraphCalls._captured
    monkeypatch.setattr(GraphCalls, "_captured", lambda *given: captured.append(1) or plain(*given))
    found = search(
        task,
        schemes="fp8",
        margin=0.2,
        target="cuda",
        serving=Serving(form="auto"),
        effort=Effort(rounding_draws=0, timing_seconds=1.0),
        ledger=tmp_path / "ledger",
    )
    assert found.certified
    assert found.map.target == "cuda-fp8-graphs"
    assert found.map.low
    assert found.certificate is not None
    assert "CUDA graphs" in found.certificate.claim
    assert captured
    assert found.end_to_end is not None
    assert found.end_to_end.served == "graphs"
    batch = task.splits.search[0]["x"]
    fast = deploy(task.model, found.map, target="cuda", task=task)
    assert isinstance(fast._compiled_call_impl, GraphCalls)
    with torch.no_grad():
        expected = deploy(task.model, found.map, target="cuda-fp8-compiled")(batch)
        assert torch.equal(fast(batch), expected)
        with pytest.warns(BatchSizeWarning):
            fast(batch[:3])
        save_deployed(fast, task.model, tmp_path / "fast.safetensors")
        again = load_deployed(type(task.model)().eval(), tmp_path / "fast.safetensors")
        assert isinstance(again._compiled_call_impl, GraphCalls)
        assert torch.equal(again(batch), expected)


def test_without_a_gpu_the_form_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    model, _ = net("cpu")
    with pytest.raises(DeployError, match="expected a CUDA device to capture graphs on"):
        model({"x": x_of(4, "cpu")})
    assert cuda_graphs.WARM_UP >= 2
