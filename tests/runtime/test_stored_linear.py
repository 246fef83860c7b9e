"""A weight-only layer on the CPU computes its emulation, and a file holds its codes alone."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers.small_tasks import COUNTED_INT8, planted_task
from precimap import CPU_INT8, Knapsack, SearchResult, deploy, load_deployed, save_deployed, search
from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import quantize_layer, quantize_map
from precimap.numerics.schemes import scheme
from precimap.runtime.deploy import deployment_of
from precimap.runtime.weights.placing import low_weights
from precimap.runtime.x86.stored import STORED_KERNEL, StoredKernel
from precimap.task import Task

X = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_task()


@pytest.fixture(scope="module", params=["fp8-weight", "int8-weight"])
def result(request: pytest.FixtureRequest, task: Task, tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    rule, folder = Knapsack(bytes_worth=1.0), tmp_path_factory.mktemp("stored")
    return search(task, schemes=[request.param], target=COUNTED_INT8, margin=0.2, rule=rule, ledger=folder)


def test_it_computes_what_the_codes_stand_for(task: Task, result: SearchResult) -> None:
    deployed = deploy(task.model, result.map, task=task)
    expected = quantize_map(task.model, result.map)
    stored = {name: weight for name, weight in low_weights(deployed).items() if weight.how.kernel is STORED_KERNEL}
    assert set(stored) == set(expected) >= {"first.weight", "last.weight"}
    assert all(torch.equal(weight.read(), expected[name].weight()) for name, weight in stored.items())
    found = deployment_of(deployed).agreement
    assert found is not None
    assert found.relative < 1e-6


def test_the_file_holds_codes_and_gives_the_same_bits(task: Task, result: SearchResult, tmp_path: Path) -> None:
    deployed, path = deploy(task.model, result.map), tmp_path / "model.safetensors"
    save_deployed(deployed, task.model, path)
    tensors = load_file(path)
    for name in result.map.low:
        assert tensors[f"{name}.codes"].element_size() == 1
        assert name not in tensors
    skeleton = type(task.model)().eval()
    with torch.no_grad():
        for parameter in skeleton.parameters():
            parameter.zero_()
        assert torch.equal(load_deployed(skeleton, path)(X), deployed(X))


@pytest.mark.parametrize("name", ["fp8-weight", "int8-weight"])
def test_in_bf16_it_is_the_emulation_to_one_rounding_of_the_weight(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32)).bfloat16().eval(), X.bfloat16()
    layers = {"0.weight": quantize_layer("0.weight", model[0].weight, (1,), scheme(name), None)}
    deployed = CPU_INT8.deployed(model, layers)
    with torch.no_grad():
        found = deployed(x)
        with quantized(model, layers):
            expected = model(x)
    assert found.dtype == torch.bfloat16
    bound = 2**-7 * (x.float().abs() @ layers["0.weight"].weight().abs().T)
    assert ((found.float() - expected.float()).abs() <= bound).all()
    assert not torch.equal(model(x), found), "the base weight is not what runs"


def test_a_layer_decoded_wrongly_is_caught(task: Task, result: SearchResult, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = StoredKernel.rows
    monkeypatch.setattr(StoredKernel, "rows", lambda self, *given: 1.01 * plain(self, *given))
    with pytest.raises(DeployError, match="differs from its emulation"):
        deploy(task.model, result.map)
