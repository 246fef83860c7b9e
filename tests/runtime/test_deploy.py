"""What is deployed is what was measured: the same codes, outputs within tolerance, refusals instead of fallbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_tasks import COUNTED_INT8, planted_task
from precimap import CPU_INT8, PrecisionMap, SearchResult, deploy, load_deployed, save_deployed, search
from precimap.errors import DeployError, InputError, MapError, PremiseMismatch, SaveError
from precimap.layers.discover import discover
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, quantize_layer, quantize_map
from precimap.numerics.formats import UINT7, UINT8
from precimap.numerics.schemes import SCHEMES, scheme
from precimap.runtime.deploy import deployment_of
from precimap.runtime.timing import interleaved, ratio
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86 import target as cpu_int8
from precimap.runtime.x86.int8 import INT8_KERNEL, Int8Kernel
from precimap.runtime.x86.target import has_bf16, int8_scheme, products_are_exact
from precimap.task import Task

X = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_task()


@pytest.fixture(scope="module")
def int8(task: Task, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    folder = tmp_path_factory.mktemp("int8")
    return search(task, schemes=[int8_scheme()], target=COUNTED_INT8, margin=0.2, ledger=folder)


@pytest.fixture(scope="module")
def fp8(task: Task, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    return search(task, schemes=["fp8"], margin=0.2, ledger=tmp_path_factory.mktemp("fp8"))


def test_int8_runs_the_codes_of_the_map(task: Task, int8: SearchResult) -> None:
    fast = deploy(task.model, int8.map)
    expected = quantize_map(task.model, int8.map)
    weights = low_weights(fast)
    assert set(weights) == set(int8.map.low) == set(expected)
    for name, weight in weights.items():
        assert weight.how.kernel is INT8_KERNEL
        assert weight.codes.dtype == torch.int8
        assert torch.equal(weight.codes, expected[name].codes)
        assert torch.equal(weight.affine.scale, expected[name].weight_affine.scale)


def test_int8_outputs_are_those_of_the_emulation(task: Task, int8: SearchResult) -> None:
    found = deployment_of(deploy(task.model, int8.map, task=task)).agreement
    assert found is not None
    assert found.units == 125
    assert found.relative < 1e-5
    assert 0 < found.rms_difference <= found.largest_difference


def test_emulated_outputs_are_those_of_the_search_to_the_bit(task: Task, fp8: SearchResult) -> None:
    fast = deploy(task.model, fp8.map)
    with torch.no_grad():
        found = fast(X)
        with quantized(task.model, quantize_map(task.model, fp8.map)):
            expected = task.model(X)
        plain = task.model(X)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_the_user_s_model_is_untouched_and_shares_nothing(task: Task, int8: SearchResult) -> None:
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    fast = deploy(task.model, int8.map)
    assert type(task.model.first) is nn.Linear
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())
    own = {tensor.data_ptr() for tensor in task.model.state_dict().values()}
    assert fast.dead.weight.data_ptr() not in own
    with torch.no_grad():
        fast.dead.weight.add_(1)
    fast.requires_grad_(True).bfloat16()
    assert all(torch.equal(before[name], tensor) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("which", ["fp8", "int8"])
def test_a_checkpoint_computes_the_same_bits(
    which: str, task: Task, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    result: SearchResult = request.getfixturevalue(which)
    fast = deploy(task.model, result.map)
    save_deployed(fast, task.model, tmp_path / "model.safetensors")
    skeleton = type(task.model)().eval()
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.zero_()
    loaded = load_deployed(skeleton, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(X), fast(X))
    assert all(not p.any() for p in skeleton.parameters()), "the skeleton's own weights stay as they were"


def test_a_checkpoint_holds_codes_and_not_the_weights_they_replace(
    task: Task, int8: SearchResult, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    save_deployed(deploy(task.model, int8.map), task.model, tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["first.weight.codes"].dtype == torch.int8
    assert "first.weight" not in tensors
    assert torch.equal(tensors["dead.weight"], task.model.dead.weight)


def test_broken_checkpoints_are_refused(task: Task, int8: SearchResult, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_deployed(deploy(task.model, int8.map), task.model, path)
    whole = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MapError, match="safetensors"):
        load_deployed(task.model, tmp_path / "cut.safetensors")
    save_file({"first.weight": task.model.first.weight.detach()}, tmp_path / "plain.safetensors")
    with pytest.raises(MapError, match="without a map"):
        load_deployed(task.model, tmp_path / "plain.safetensors")
    with pytest.raises(MapError, match="another architecture"):
        load_deployed(nn.Linear(64, 128), path)
    with pytest.raises(DeployError, match=r"precimap\.deploy"):
        save_deployed(task.model, task.model, path)
    assert path.read_bytes() == whole


def test_a_full_disk_leaves_the_old_checkpoint(
    task: Task, int8: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = tmp_path / "model.safetensors"
    fast = deploy(task.model, int8.map)
    save_deployed(fast, task.model, path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left"):
        save_deployed(fast, task.model, path)
    assert path.read_bytes() == before


def test_another_model_is_refused(task: Task, int8: SearchResult) -> None:
    other = type(task.model)().eval()
    with torch.no_grad():
        other.first.weight[0, 0] += 1e-3
    with pytest.raises(PremiseMismatch, match="weights"):
        deploy(other, int8.map)


def test_a_layer_that_the_model_lacks_is_named(task: Task, int8: SearchResult) -> None:
    layers = {**int8.map.layers, "nowhere.weight": int8.map.layers["first.weight"]}
    wrong = int8.map.model_copy(update={"layers": layers})
    with pytest.raises(MapError, match=r"nowhere\.weight"):
        deploy(task.model, wrong)


def test_there_is_no_silent_fallback(task: Task, fp8: SearchResult) -> None:
    with pytest.raises(DeployError, match="no arithmetic for it"):
        deploy(task.model, fp8.map, target="cpu-int8")
    with pytest.raises(DeployError, match="expected a target out of"):
        deploy(task.model, fp8.map, target="tpu")
    with pytest.raises(InputError, match=r"made for cuda-fp8 or cuda-fp8-compiled or cuda-fp8-graphs, .* got emulated"):
        deploy(task.model, fp8.map, target="cuda")


def test_a_kernel_that_multiplies_wrongly_is_caught(
    task: Task, int8: SearchResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted saturation, as x86 without VNNI does it."""
    plain = Int8Kernel.rows
    monkeypatch.setattr(Int8Kernel, "rows", lambda self, *given: plain(self, *given).clamp(-0.5, 0.5))
    with pytest.raises(DeployError, match="differs from its emulation"):
        deploy(task.model, int8.map)


def test_int8_kernels_are_exact_or_refused() -> None:
    """The largest products, the case in which 16-bit sums saturate: exact against integer arithmetic, or refused."""
    assert products_are_exact(UINT7)
    generator = torch.Generator().manual_seed(0)
    for format, name in ((UINT8, "int8-static"), (UINT7, "int8-static-u7")):
        if not products_are_exact(format):
            assert "saturates" in str(CPU_INT8.refusal(_linear_layer(), scheme(name)))
            continue
        codes = torch.randint(-127, 128, (48, 256), generator=generator, dtype=torch.int8)
        inputs = torch.randint(0, format.maximum + 1, (33, 256), generator=generator, dtype=torch.uint8)
        inputs[0], codes[0], codes[1] = format.maximum, 127, -127
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        found = torch.ops.onednn.qlinear_pointwise(
            inputs, 1.0, 0, packed, torch.ones(48), torch.zeros(48, dtype=torch.int32), None, 1.0, 0,
            torch.float32, "none", [], "",
        )  # fmt: skip
        assert torch.equal(found, (inputs.long() @ codes.long().T).float())


def _linear_layer(**changes: Any) -> Any:
    from dataclasses import replace

    inventory = discover(nn.Linear(32, 16).eval(), lambda m, b: m(b), torch.randn(2, 32))
    return replace(inventory.layer("weight"), **changes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (1, 64), (64,)])
def test_int8_linear_takes_inputs_of_any_rank(bias: bool, shape: tuple[int, ...]) -> None:
    linear = nn.Linear(64, 48, bias=bias).eval()
    layer = quantize_layer("weight", linear.weight, (1,), scheme(int8_scheme()), InputRange(0.05, 60))
    fast = CPU_INT8.deployed(linear, {"weight": layer})
    x = torch.randn(shape)
    with torch.no_grad(), quantized(linear, {"weight": layer}):
        expected = linear(x)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)


def test_cpu_refusals_name_their_reason() -> None:
    layer, static = _linear_layer(), scheme(int8_scheme())
    assert CPU_INT8.refusal(layer, static) is None
    served = {"int8", "int8-static", "int8-static-u7", "fp8-weight", "int8-weight", "bf16"}  # and test_half.py
    for name in sorted(set(SCHEMES) - served):
        assert CPU_INT8.refusal(layer, SCHEMES[name]) is not None, name
    for changes, reason in (
        ({"ops": ("bilinear",)}, "bilinear"),
        ({"dtype": "float16"}, "float16"),
    ):
        assert reason in str(CPU_INT8.refusal(_linear_layer(**changes), static))
    assert (CPU_INT8.refusal(_linear_layer(dtype="bfloat16"), static) is None) == has_bf16()


def test_a_machine_without_kernels_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_int8, "has_qlinear", lambda: False)
    assert "no oneDNN" in str(CPU_INT8.refusal(_linear_layer(), scheme("int8-static")))
    with pytest.raises(DeployError, match="no INT8 scheme"):
        int8_scheme()


def test_a_subclass_of_linear_keeps_its_forward() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, x = Doubling(32, 16).eval(), torch.randn(2, 32)
    inventory = discover(model, lambda m, b: m(b), x)
    assert CPU_INT8.refusal(inventory.layer("weight"), scheme(int8_scheme())) is None
    layer = quantize_layer("weight", model.weight, (1,), scheme(int8_scheme()), InputRange(0.05, 60))
    fast = CPU_INT8.deployed(model, {"weight": layer})
    assert type(fast) is Doubling
    with torch.no_grad():
        found = fast(x)
        with quantized(model, {"weight": layer}):
            expected = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_fused_encoder_path_does_not_bypass_the_kernels() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(3, 5, 32)
    inventory = discover(model, lambda m, b: m(b), x)
    chosen = scheme(int8_scheme())
    names = [found.name for found in inventory.layers if CPU_INT8.refusal(found, chosen) is None]
    inside = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert names == [f"layers.{i}.{name}" for i in range(2) for name in inside]
    weights = dict(model.named_parameters())
    layers = {n: quantize_layer(n, weights[n], (1,), chosen, InputRange(0.05, 60)) for n in names}
    with torch.no_grad():
        found = CPU_INT8.deployed(model, layers)(x)
        with quantized(model, layers):
            expected = model(x)
        assert not torch.allclose(found, model(x), atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.stream = (i for i in range(3))

    with pytest.raises(DeployError, match="cannot be copied"):
        CPU_INT8.deployed(Locked(), {})


def test_a_map_survives_the_file_and_deploys(task: Task, int8: SearchResult, tmp_path: Path) -> None:
    int8.map.save(tmp_path / "map.json")
    with torch.no_grad():
        assert torch.equal(
            deploy(task.model, PrecisionMap.load(tmp_path / "map.json"))(X), deploy(task.model, int8.map)(X)
        )


def test_ratios_are_taken_within_turns() -> None:
    """A machine that becomes twice as slow in the middle of a run does not change a ratio."""
    now, slowness, turn = 0.0, 1.0, 0

    def run(seconds: float) -> None:
        nonlocal now, turn, slowness
        now += seconds * slowness
        turn += 1
        slowness = 2.0 if turn > 8 else 1.0

    seconds = interleaved({"fast": lambda: run(1), "slow": lambda: run(4)}, turns=4, clock=lambda: now)
    assert seconds["fast"] == [1, 1, 2, 2]
    found = ratio(seconds["slow"], seconds["fast"])
    assert (found.median, found.lower, found.upper, found.n) == (4, 4, 4, 4)
