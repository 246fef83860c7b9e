import pytest
import torch
from torch import nn

from helpers import zoo


@pytest.fixture(params=zoo.ZOO, ids=lambda build: build.__name__)
def build(request: pytest.FixtureRequest) -> zoo.Builder:
    return request.param


def test_specimen_is_the_same_each_time_and_leaves_the_seed_alone(build: zoo.Builder) -> None:
    before = torch.get_rng_state()
    first, second = build(), build()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.name == build.__name__
    assert not any(module.training for module in first.model.modules())
    output = first()
    assert output.isfinite().all()
    assert output.std() > 0.01
    assert torch.equal(output, first())
    assert torch.equal(output, second())


def test_torch_counts_its_flops(build: zoo.Builder) -> None:
    specimen = build()
    flops = zoo.matmul_flops(specimen)
    assert flops > 0
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()
    assert zoo.matmul_flops(specimen) == flops


def test_dead_weights_are_those_that_change_nothing(build: zoo.Builder) -> None:
    """Each weight alone is made up to twice as large, element by element; a change below float32's noise is none."""
    specimen = build()
    output = specimen()
    unmoved = set()
    for name, parameter in specimen.model.named_parameters():
        if parameter.dim() < 2:
            continue
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1 + torch.rand_like(parameter))
            change = (specimen() - output).abs().max()
            parameter.copy_(kept)
        if change <= 1e-6 * output.abs().max():
            unmoved.add(name)
    assert unmoved == specimen.dead


def test_flops_of_models_that_can_be_counted_by_hand() -> None:
    rows, tokens = zoo.ROWS, 6
    assert zoo.matmul_flops(zoo.low_rank_cross()) == rows * 3 * 2 * (32 * 16 + 16 * 32)
    assert zoo.matmul_flops(zoo.stacked_experts()) == rows * 2 * (4 * (16 * 32 + 32 * 16) + 16 * 4 + 4 * 16)
    packed = zoo.flops_by_op(zoo.attention_packed())
    attention = packed.pop("aten._scaled_dot_product_flash_attention_for_cpu")
    assert attention == rows * 2 * 2 * tokens * tokens * 32
    assert sum(packed.values()) == rows * tokens * 2 * 4 * 32 * 32
    lstm = rows * 5 * 2 * (4 * 32 * (16 + 32) + 4 * 32 * (32 + 32)) + rows * 2 * 32
    assert zoo.matmul_flops(zoo.lstm()) == lstm


@pytest.mark.parametrize(("build", "hidden"), [(zoo.qwen3_moe, 16), (zoo.mixtral, 48)])
def test_routed_experts_are_stacked_parameters_and_counted(build: zoo.Builder, hidden: int) -> None:
    specimen = build()
    stacked = [parameter for parameter in specimen.model.parameters() if parameter.dim() == 3]
    assert len(stacked) == 2 * 2  # two layers, each one gate-and-up and one down
    assert not any(
        isinstance(module, nn.Linear) for name, module in specimen.model.named_modules() if "experts." in name
    )
    layers, tokens, active = 2, zoo.ROWS * 6, 2
    assert zoo.flops_by_op(specimen)["aten._grouped_mm"] == layers * tokens * active * 2 * (
        32 * 2 * hidden + hidden * 32
    )
