"""What vLLM itself does with faults that the linter refuses: it stops, or computes something else without a word."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.engines import Answer, asked, needs_engines
from helpers.planted_faults import EXPORTED, FIRST, Fault, edited, exported_llama

pytestmark = [needs_engines, pytest.mark.filterwarnings("ignore")]  # transformers warns about parts of its own
NEAR = 0.003


def planted(name: str) -> Fault:
    return next(fault for fault in EXPORTED if fault.name == name)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_llama(tmp_path_factory.mktemp("llama"))


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {str(width): torch.randn(64, width, generator=generator).bfloat16() for width in (256, 512)}


def vllm(right: Path, name: str, into: Path) -> tuple[Path, Answer]:
    folder = edited(right, into / "planted", planted(name).edit)
    return folder, asked("vllm_layers.py", folder, inputs(), into)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def by_the_file(folder: Path, module: str, static: Tensor | None = None) -> Tensor:
    """What a module of the files computes, by the formula of the format."""
    tensors = load_file(folder / "model.safetensors")
    codes, scale = tensors[f"{module}.weight"].double(), tensors[f"{module}.weight_scale"].double()
    x = inputs()[str(codes.shape[1])].double()
    if tensors[f"{module}.weight"].dtype is torch.float8_e4m3fn:
        grid = x.abs().amax(1, keepdim=True) / 448
        rounded = (x / grid).float().to(torch.float8_e4m3fn).double() * grid
    else:
        grid = x.abs().amax(1, keepdim=True) / 127 if static is None else static.double()
        rounded = (x / grid).round().clamp(-128, 127) * grid
    return rounded @ (codes * scale).T


def test_a_value_in_fp8_is_computed_as_garbage(right: Path, tmp_path: Path) -> None:
    """q and k in INT8 and v in FP8: vLLM takes INT8 for all three, reads the codes of v by it, and says nothing."""
    folder, found = vllm(right, "value_in_fp8", tmp_path)
    assert not found.error
    parts = [by_the_file(folder, f"{FIRST}.self_attn.{one}_proj") for one in "qkv"]
    widths = [part.shape[1] for part in parts]
    q, k, v = found.outputs[f"{FIRST}.self_attn.qkv_proj"].split(widths, dim=1)
    assert "Int8" in found.kernels[f"{FIRST}.self_attn.qkv_proj"]
    assert off(q, parts[0]) < NEAR
    assert off(k, parts[1]) < NEAR
    assert off(v, parts[2]) > 0.1


def test_static_inputs_are_ignored_on_a_cpu(right: Path, tmp_path: Path) -> None:
    folder, found = vllm(right, "static_inputs", tmp_path)
    assert not found.error
    name = f"{FIRST}.mlp.down_proj"
    said = load_file(folder / "model.safetensors")[f"{name}.input_scale"]
    assert off(found.outputs[name], by_the_file(folder, name)) < NEAR
    assert off(found.outputs[name], by_the_file(folder, name, static=said)) > 0.1


@pytest.mark.parametrize("name", ["no_scale", "target_not_quantised"])
def test_missing_tensors_are_computed_as_garbage(name: str, right: Path, tmp_path: Path) -> None:
    """Memory that nobody wrote is multiplied, or a weight is cast to codes; nothing is said."""
    _, found = vllm(right, name, tmp_path)
    (module,) = planted(name).layers
    assert not found.error
    assert "Int8" in found.kernels[module]
    tensors = load_file(right / "model.safetensors")
    scale = tensors.get(f"{module}.weight_scale", torch.ones(1)).double()
    expected = inputs()["512"].double() @ (tensors[f"{module}.weight"].double() * scale).T
    assert not off(found.outputs[module], expected) < 0.1  # NaN, too


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("value_unquantised", "Found different quantization schemes for the shards"),
        ("newer_field", "ValidationError"),
        ("no_format", "No compressed-tensors compatible scheme was found"),
        ("per_tensor", "static_scaled_fp8_quant"),
        ("codes_ignored", "There is no module or parameter named"),
        ("scale_of_another_shape", "AssertionError"),
    ],
)
def test_vllm_stops(name: str, said: str, right: Path, tmp_path: Path) -> None:
    _, found = vllm(right, name, tmp_path)
    assert said in found.error
