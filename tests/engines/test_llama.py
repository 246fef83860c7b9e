"""A mixed checkpoint of a Llama on vLLM itself and on transformers: each product is the one that the map says."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import precimap as pm
from helpers.engines import Answer, asked, needs_engines
from helpers.small_maps import map_of
from helpers.tiny_llama import VOCABULARY, llama_task, load_llama, mixed_choice, save_llama
from precimap.layers.emulation import quantized
from precimap.layers.quantized import QuantizedLayer, quantize_map

pytestmark = [needs_engines, pytest.mark.filterwarnings("ignore")]  # transformers warns about parts of its own
NEAR = 0.003  # relative, of which the rounding of outputs to BF16 alone is .0017 to .0024
KERNELS = {
    "int8": "CompressedTensorsW8A8Int8 CPUInt8ScaledMMLinearKernel",
    "fp8": "CompressedTensorsW8A8Fp8 ChannelWiseTorchFP8ScaledMMLinearKernel",
    None: "not quantised",
}
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {str(width): torch.randn(64, width, generator=generator).bfloat16() for width in (256, 512)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def task(folder: Path) -> pm.Task:
    return llama_task(load_llama(save_llama(folder / "base")))


@pytest.fixture(scope="module")
def layers(task: pm.Task) -> dict[str, QuantizedLayer]:
    return quantize_map(task.model, map_of(task, mixed_choice(), "emulated"))


@pytest.fixture(scope="module")
def exported(folder: Path, task: pm.Task) -> Path:
    pm.export(task, map_of(task, mixed_choice(), "emulated"), to="vllm", output=folder / "out", uncertified=True)
    return folder / "out"


def parts_of(module: str) -> list[str]:
    """The checkpoint's modules of one of vLLM's."""
    prefix, dot, last = module.rpartition(".")
    return [f"{prefix}{dot}{part}" for part in PARTS.get(last, (last,))]


def simulated(model: nn.Module, layers: dict[str, QuantizedLayer], module: str, given: dict[str, Tensor]) -> Tensor:
    """What ours computes in the parts of one of vLLM's modules; of one of transformers', in it."""
    with torch.no_grad(), quantized(model, layers):
        parts = [model.get_submodule(part) for part in parts_of(module)]
        return torch.cat([part(given[str(part.in_features)]) for part in parts], dim=1)  # type: ignore[operator,index]


def off(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def weights_alone(model: nn.Module, layers: dict[str, QuantizedLayer], module: str, given: dict[str, Tensor]) -> Tensor:
    """The same with inputs that are not quantised."""
    parts = [model.get_submodule(part) for part in parts_of(module)]
    made = [layers[f"{part}.weight"].weight() for part in parts_of(module)]
    return torch.cat(
        [given[str(part.in_features)].double() @ one.double().T for part, one in zip(parts, made, strict=True)], dim=1
    )


def test_vllm_runs_each_product_as_the_map_says(
    exported: Path, task: pm.Task, layers: dict[str, QuantizedLayer], tmp_path: Path
) -> None:
    given, choice = inputs(), mixed_choice()
    found: Answer = asked("vllm_layers.py", exported, given, tmp_path)
    assert not found.error
    assert len(found.kernels) == 13
    for module, kernel in found.kernels.items():
        (scheme,) = {choice.get(f"{part}.weight") for part in parts_of(module)}
        assert kernel == KERNELS[scheme], module
        error = off(found.outputs[module], simulated(task.model, layers, module, given))
        assert error < NEAR, (module, error)
        if scheme is not None:  # what is compared tells a quantised input from one that is not
            assert off(found.outputs[module], weights_alone(task.model, layers, module, given)) > 2 * NEAR, module


def test_transformers_multiplies_the_certified_weights(
    exported: Path, layers: dict[str, QuantizedLayer], task: pm.Task, folder: Path, tmp_path: Path
) -> None:
    """In float32 in every bit, FP8 inputs as certified; INT8 inputs on the grid that the export speaks of."""
    tokens = torch.randint(VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))
    given = {"tokens": tokens, **inputs()}
    found = asked("transformers_weights.py", exported, given, tmp_path / "float32", "float32")
    assert not found.error
    wide = copy.deepcopy(task.model).float()
    floats = {name: tensor.float() for name, tensor in inputs().items()}
    for file in (folder / "base").glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if name in found.outputs:
                assert found.outputs[name].equal(layers[name].weight() if name in layers else weight.float()), name
    for name, layer in layers.items():
        module = name.removesuffix(".weight")
        output, x = found.outputs[f"{module}.output"], floats[str(layer.codes.shape[1])]
        if layer.scheme.name == "fp8":
            assert off(output, simulated(wide, layers, module, floats)) < NEAR, name
        else:
            scale = x.abs().amax(1, keepdim=True) / 127.5
            rounded = (x / scale).round().clamp(-128, 127) * scale
            assert off(output, rounded.double() @ layer.weight().double().T) < 1e-5, name
    in_bfloat16 = asked("transformers_weights.py", exported, given, tmp_path / "bfloat16")
    assert not in_bfloat16.error
    for name, layer in layers.items():
        assert 0 < off(in_bfloat16.outputs[name], layer.weight()) < NEAR
