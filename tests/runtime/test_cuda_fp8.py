"""The target cuda-fp8: what it refuses, what it deploys, saves and times; on a CPU, which has `_scaled_mm` too.

Only the check of the hardware is turned off there; with a GPU the same tests run on it, and those of time besides.
"""

import io
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from helpers.small_tasks import planted_task
from precimap import (
    CUDA_FP8,
    HardwareProfile,
    Serving,
    Splits,
    bench_device,
    compiled,
    deploy,
    discover,
    graphed,
    load_deployed,
    save_deployed,
    search,
)
from precimap.errors import DeployError
from precimap.hardware_profile import Device
from precimap.layers.emulation import quantized
from precimap.layers.inventory import Layer
from precimap.layers.quantized import InputRange, quantize_layer, quantize_map
from precimap.layers.target import BASE, Turns
from precimap.numerics.schemes import SCHEMES, scheme
from precimap.report.profile_table import profile_page
from precimap.runtime import timing
from precimap.runtime.deploy import deployment_of
from precimap.runtime.nvidia import layer_timer as cuda_timer
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.nvidia.fp8 import Fp8Kernel
from precimap.runtime.nvidia.graphs import Captured
from precimap.runtime.nvidia.layer_timer import CudaTimer
from precimap.runtime.nvidia.target import CudaFp8, missing_hardware
from precimap.runtime.weights.low_weight import LowWeight
from precimap.runtime.weights.placing import low_weights
from precimap.searching.result import SearchResult
from precimap.task import Task

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or missing_hardware(None) is not None, reason="no CUDA device with FP8 here"
)
SERVED = ("fp8", "fp8-tensor", "fp8-static")


class CountedFp8(CudaFp8):
    """Whose layers are chosen by FLOPs: there is nothing to time on a CPU."""

    timer = None  # type: ignore[assignment]
    whole_timer = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU pass for a GPU where there is none."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)


def task_here() -> Task:
    """The planted task, on the GPU where there is one."""
    task = planted_task()
    if not torch.cuda.is_available():
        return task

    def moved(split: Any) -> list[dict[str, torch.Tensor]]:
        return [{name: value.cuda() for name, value in batch.items()} for batch in split]

    torch.set_default_device("cuda")  # the planted forward makes a mask
    splits = Splits(moved(task.splits.calibration), moved(task.splits.search), moved(task.splits.certify))
    return replace(task, model=task.model.cuda(), splits=splits)


@pytest.fixture(scope="module")
def task() -> Any:
    yield task_here()
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def result(task: Task, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    """A whole search on the deployed model, three schemes at once."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
        return search(task, schemes=SERVED, target=CountedFp8(), margin=0.2, ledger=tmp_path_factory.mktemp("fp8"))


def test_a_search_certifies_the_deployed_model(task: Task, result: SearchResult) -> None:
    assert result.certified
    assert result.map.target == "cuda-fp8"
    assert result.map.low
    fast = deploy(task.model, result.map, task=task)
    expected = quantize_map(task.model, result.map)
    weights = low_weights(fast)
    assert set(weights) == set(expected)
    for name, weight in weights.items():
        assert torch.equal(weight.codes.view(torch.uint8), expected[name].codes.view(torch.uint8))
    found = deployment_of(fast).agreement
    assert found is not None
    assert found.relative < (2**-6 if torch.cuda.is_available() else 1e-5)
    assert type(task.model.first) is nn.Linear


def test_a_checkpoint_computes_the_same_bits(task: Task, result: SearchResult, tmp_path: Path) -> None:
    fast = deploy(task.model, result.map)
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    skeleton = type(task.model)().eval()
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.zero_()
        loaded = load_deployed(skeleton, tmp_path / "model.safetensors")
        x = task.splits.search[0]["x"]
        assert torch.equal(loaded(x), fast(x))


def test_a_kernel_that_multiplies_wrongly_is_caught(
    task: Task, result: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: one result in sixteen is half as large, as if a tile had the scale of its neighbour; then a NaN."""
    plain = Fp8Kernel.rows

    def halved(self: Fp8Kernel, *given: Any) -> torch.Tensor:
        result = plain(self, *given)
        result[..., ::16] *= 0.5
        return result

    for wrong in (halved, lambda self, x, *rest: plain(self, x, *rest).masked_fill(x[..., :1] > 1, torch.nan)):
        monkeypatch.setattr(Fp8Kernel, "rows", wrong)
        with pytest.raises(DeployError, match="differs from its emulation"):
            deploy(task.model, result.map)


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_deployed_encoders_compute_the_emulation(name: str, dtype: torch.dtype) -> None:
    """Also where torch would take its fused encoder path past the modules. A code that moves is worth a step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    )
    model, x = encoder.eval().to(device, dtype), torch.randn(3, 5, 32).to(device, dtype)
    inventory = discover(model, lambda m, b: m(b), x)
    chosen = SCHEMES[name]
    names = [found.name for found in inventory.layers if CUDA_FP8.refusal(found, chosen) is None]
    inside = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in inside]
    weights = dict(model.named_parameters())
    layers = {n: quantize_layer(n, weights[n], (1,), chosen, InputRange(0.01, 0)) for n in names}
    with torch.no_grad():
        found = CUDA_FP8.deployed(model, layers)(x)
        with quantized(model, layers):
            expected = model(x)
        assert not torch.equal(found, model(x))
    error = (found.float() - expected.float()).square().mean().sqrt()
    assert float(error) < (1e-4 if dtype == torch.float32 and device == "cpu" else 0.02)


def linear_layer(**changes: Any) -> Layer:
    inventory = discover(nn.Linear(32, 16).eval(), lambda m, b: m(b), torch.randn(2, 32))
    return replace(inventory.layer("weight"), **changes)


def test_refusals_name_their_reason() -> None:
    for name in SCHEMES:
        assert (CUDA_FP8.refusal(linear_layer(), SCHEMES[name]) is None) == (name in (*SERVED, "bf16", "fp16")), name
    for changes, reason in (
        ({"ops": ("bilinear",)}, "bilinear"),
        ({"dtype": "float64"}, "float64"),
        ({"inputs": 40}, "multiples of 16, not 40"),
    ):
        assert reason in str(CUDA_FP8.refusal(linear_layer(**changes), SCHEMES["fp8"]))
    assert "decode" in str(CUDA_FP8.refusal(linear_layer(), SCHEMES["fp8-weight"]))
    assert "E5M2" in str(CUDA_FP8.refusal(linear_layer(), SCHEMES["fp8-e5m2"]))


def test_a_machine_without_fp8_says_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fp8, "missing_hardware", missing_hardware)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeployError, match=r"experimental.*8\.9.*finds no CUDA device.*target emulated and a profile"):
        CUDA_FP8.refusal(linear_layer(), SCHEMES["fp8"])
    with pytest.raises(DeployError, match="no CUDA device"):
        search(planted_task(), schemes=["fp8"], target=CUDA_FP8, margin=0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "NVIDIA A10")
    with pytest.raises(DeployError, match=r"NVIDIA A10 of capability 8\.6"):
        CUDA_FP8.refusal(linear_layer(), SCHEMES["fp8"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    assert CUDA_FP8.refusal(linear_layer(), SCHEMES["fp8"]) is None
    model = nn.Linear(32, 16, device="cpu")
    layer = quantize_layer("weight", model.weight, (1,), scheme("fp8"), None)
    with pytest.raises(DeployError, match="a model on cpu; move it"):
        CUDA_FP8.deployed(model, {"weight": layer})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real timer runs here")
def test_the_timer_asks_each_form_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the graph and the events played by the host: the forms are called, their times kept apart, in seconds."""
    seen: list[tuple[str, tuple[int, ...]]] = []

    def captured(form: nn.Module, example: tuple[Any, ...]) -> tuple[Captured, None]:
        def replay() -> None:
            seen.append((type(form.weight).__name__, tuple(example[0].shape)))
            form(*example)
            time.sleep(0.002 if isinstance(form.weight, LowWeight) else 0.0)

        return Captured(example, None, replay), None

    def timed(replays: Mapping[str, Callable[[], None]], turns: int, _: torch.device) -> dict[str, list[float]]:
        from precimap.runtime.timing import interleaved

        return interleaved(replays, turns)

    monkeypatch.setattr(cuda_timer, "capture", captured)
    monkeypatch.setattr(cuda_timer, "event_seconds", timed)
    module = nn.Linear(32, 16).eval()
    forms = {"fp8": quantize_layer("weight", module.weight, (1,), scheme("fp8"), None)}
    timer = CUDA_FP8.timer
    found = CudaTimer(timer.place, rounds=2, turns=3).seconds(module, forms, rows=5, each=1)
    assert {name: len(seconds) for name, seconds in found.alone.items()} == {BASE: 6, "fp8": 6}
    assert not found.shared
    assert min(found.alone["fp8"]) >= 0.002
    assert {shape for _, shape in seen} == {(5, 32)}
    assert {name for name, _ in seen} == {"Parameter", "LowWeight"}


@pytest.mark.filterwarnings("ignore")  # Inductor and dynamo warn about parts of their own
def test_whole_models_are_timed_eager_and_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without waiting for a device. Every form is a tree of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr(timing, "_wait_for", lambda _: None)
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(32, 48), nn.ReLU()).eval().to(device), torch.randn(8, 32).to(device)
    layers = {"0.weight": quantize_layer("0.weight", model[0].weight, (1,), SCHEMES["fp8"], None)}
    timer = CUDA_FP8.whole_timer
    made = {name: make() for name, make in timer.forms(model, layers).items()}
    assert set(made) == {"eager", "compiled", "graphs"}
    if device == "cpu":
        with pytest.raises(DeployError, match="expected a CUDA device to capture graphs on"):
            made["graphs"](x)
        del made["graphs"]
    assert timer.served == "eager"
    base = timer.forms(model, {})["eager"]()
    with torch.no_grad():
        expected = made["eager"](x)
        torch.testing.assert_close(made["compiled"](x), expected, rtol=1e-2, atol=1e-2)
        assert torch.equal(base(x), model(x))
        assert not torch.equal(base(x), expected)
        seconds = timer.turns({name: (lambda form=form: form(x)) for name, form in made.items()}, 0.01)
    assert base is not model
    assert type(model[0]) is nn.Linear
    assert all(15 <= len(values) <= 200 for values in seconds.values())
    assert set(seconds) == set(made)


@needs_gpu
def test_the_memory_and_the_peak_of_this_gpu() -> None:
    """A result of 64 MB is seen; a product in BF16 is faster than one in float32, which is faster than a CPU's."""
    timer, x = CUDA_FP8.whole_timer, torch.randn(4096, 4096, device="cuda")
    memory = timer.peak_memory(lambda: x + 1)
    assert memory is not None
    assert 64 << 20 <= memory < 80 << 20
    assert timer.peak_flops(torch.bfloat16) > timer.peak_flops(torch.float32) > 5e12


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real timer runs here")
def test_a_profile_of_a_gpu_plans_for_it_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Planted times: the widest layer takes half as long in FP8, the others twice; so it alone is in the map."""

    def planted(self: CudaTimer, module: nn.Linear, forms: Mapping[str, Any], *_: int) -> Turns:
        faster = module.out_features == 128
        return Turns({BASE: [1e-5] * 3, **{name: [5e-6 if faster else 2e-5] * 3 for name in forms}}, {})

    device = Device(
        name="NVIDIA H100", capability="9.0", threads=1, allocator="default", clock="CUDA events", torch="2.11.0",
        precimap="0.1.0", driver="driver 580.65.06, CUDA 13.0",
    )  # fmt: skip
    monkeypatch.setattr(CudaTimer, "seconds", planted)
    monkeypatch.setattr(CudaTimer, "device", lambda _: device)
    profile = bench_device(planted_task(), target=CUDA_FP8, batch_sizes=(64,))
    profile.save(tmp_path / "h100.json")
    assert set(profile.schemes) == {*SERVED, "bf16", "fp16"}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(profile_page(profile, tmp_path / "h100.json"))
    assert "cuda-fp8 (experimental: not yet measured on a GPU) on NVIDIA H100, 9.0" in console.export_text()
    monkeypatch.setattr(cuda_fp8, "missing_hardware", missing_hardware)
    serving = Serving(profile=HardwareProfile.load(tmp_path / "h100.json"))
    found = search(planted_task(), schemes=["fp8"], margin=0.2, serving=serving, ledger=tmp_path / "ledger")
    assert found.certified
    assert set(found.map.low) == {"first.weight"}


@needs_gpu
@pytest.mark.filterwarnings("ignore")
def test_a_deployed_model_runs_compiled_and_as_graphs(task: Task, result: SearchResult) -> None:
    """Compiled, a code moves now and then; as graphs of the eager model, to the bit."""
    fast, batch = deploy(task.model, result.map), task.splits.search[0]["x"]
    both = compiled(fast, (batch,))
    eager_graphs, compiled_graphs = graphed(fast, (batch[:16],), (batch,)), graphed(both, (batch,))
    with torch.no_grad():
        expected = fast(batch)
        assert torch.equal(eager_graphs(batch), expected)
        for found in (both(batch), compiled_graphs(batch), eager_graphs(batch[:7])):
            wanted = expected[: len(found)]
            assert float((found - wanted).square().mean()) < 1e-3 * float(wanted.square().mean())


@needs_gpu
def test_the_timer_takes_the_times_of_this_gpu() -> None:
    """A product of 64 times the FLOPs takes longer; every turn has a time of microseconds."""
    timer = replace(CUDA_FP8.timer, rounds=1, turns=5)
    assert timer.device().driver is not None
    medians = []
    for width in (512, 4096):
        module = nn.Linear(width, width, device="cuda", dtype=torch.bfloat16).eval()
        forms = {"fp8": quantize_layer("weight", module.weight, (1,), scheme("fp8"), None)}
        found = timer.seconds(module, forms, rows=4096, each=1).alone
        assert all(1e-6 < value < 1e-1 for values in found.values() for value in values)
        medians.append(sorted(found[BASE])[2])
    assert medians[1] > 4 * medians[0]


def test_a_device_of_an_older_profile_has_no_driver() -> None:
    row = {
        "name": "cpu", "capability": "AVX2", "threads": 1, "allocator": "default", "clock": "wall time",
        "torch": "2.13.0", "precimap": "0.1.0",
    }  # fmt: skip
    older = Device.model_validate_json(json.dumps(row))
    newer = Device.model_validate_json(json.dumps({**row, "driver": "driver 580.65.06, CUDA 13.0"}))
    assert older.driver is None
    assert "driver" not in str(older)
    assert "driver 580.65.06, CUDA 13.0" in str(newer)
    assert older.differences(newer) == ("driver None, not driver 580.65.06, CUDA 13.0",)
