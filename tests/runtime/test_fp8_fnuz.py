"""FP8 with AMD's codes (E4M3 FNUZ): what they stand for, who takes them, and the kernel on them; MI300 itself is played.

The product is its definition on a CPU, which has none for these codes; operands go through torch's own rules for CUDA first.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.small_tasks import planted_task
from precimap import CUDA_FP8, deploy, discover, load_deployed, save_deployed, search
from precimap.errors import DeployError
from precimap.layers.emulation import quantized
from precimap.layers.quantized import InputRange, quantize_layer
from precimap.numerics.formats import E4M3, E4M3_FNUZ
from precimap.numerics.quantize import Affine, quantize
from precimap.numerics.schemes import SCHEMES
from precimap.runtime.nvidia import fp8 as kernel
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.nvidia.fp8 import StaticScale, dynamic_codes
from precimap.runtime.nvidia.layer_timer import toolkit
from precimap.runtime.nvidia.target import missing_hardware

NAMES = ("fp8-fnuz", "fp8-fnuz-tensor", "fp8-fnuz-static")
OCP = ("fp8", "fp8-tensor", "fp8-static")


def defined(
    codes: Tensor, weight: Tensor, scales: Tensor, weight_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What `scaled_mm` has to give; with what hipBLASLt asks of its operands (torch's ScaledBlas.cpp)."""
    assert codes.dtype == weight.dtype == torch.float8_e4m3fnuz
    assert scales.numel() == weight_scales.numel() == 1 or dtype == torch.bfloat16
    assert bias is None or (bias.dtype == dtype and dtype != torch.float32)
    turned = weight.t()
    with FakeTensorMode(), torch.device("cuda"):
        fake = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in (codes, turned, scales, weight_scales)]
        shape = torch._scaled_mm(fake[0], fake[1], scale_a=fake[2], scale_b=fake[3], out_dtype=dtype).shape
    result = (codes.double() @ weight.double().t()) * scales * weight_scales
    assert result.shape == shape
    return (result if bias is None else result + bias).to(dtype)


@pytest.fixture
def mi300(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine passes for one with AMD's MI300."""
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
    monkeypatch.setattr(kernel, "scaled_mm", defined)


def test_every_code_is_what_ml_dtypes_and_torch_say() -> None:
    """Bias 8, 240 at most, one NaN and no -0: half the value of the same bits in E4M3, but for those that are special."""
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(torch.float8_e4m3fnuz).double().numpy()
    known = codes.numpy().view(ml_dtypes.float8_e4m3fnuz).astype(np.float64)
    np.testing.assert_array_equal(values, known)
    assert np.isnan(values).sum() == 1
    assert np.isnan(values[0x80])
    assert np.nanmax(values) == E4M3_FNUZ.maximum == 240
    assert not np.signbit(values[values == 0]).any()
    ocp = codes.view(torch.float8_e4m3fn).double().numpy()
    same = ~np.isnan(values) & ~np.isnan(ocp)
    np.testing.assert_array_equal(values[same], ocp[same] / 2)


def test_codes_of_any_value_are_those_of_ml_dtypes() -> None:
    """Random bits, ties and what rounds to zero; beyond the range they saturate, where a plain cast gives NaN."""
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    steps = torch.arange(-4096, 4097, dtype=torch.float32) * 2.0**-12
    x = torch.cat([bits.view(torch.float32), steps, steps * 2000, torch.tensor([-0.0, -(2.0**-12), 240.0, 248.0, 1e9])])
    found = quantize(x, E4M3_FNUZ, Affine(torch.tensor(1.0), None))
    with np.errstate(invalid="ignore"):  # of NaN
        inside = x.numpy().clip(-240, 240).astype(ml_dtypes.float8_e4m3fnuz).view(np.uint8)
    np.testing.assert_array_equal(found.view(torch.uint8).numpy(), inside)
    for scale in (1.0, 0.0137):
        wanted = quantize(x, E4M3_FNUZ, Affine(torch.tensor(scale), None)).view(torch.uint8)
        assert torch.equal(StaticScale(scale, E4M3_FNUZ).codes(x).view(torch.uint8), wanted)
    rows = torch.randn(16, 64)
    codes, scales = dynamic_codes(rows, SCHEMES["fp8-fnuz"].input, 1.0)  # type: ignore[arg-type]
    assert codes.dtype == torch.float8_e4m3fnuz
    assert codes.float().abs().amax(1).tolist() == [240.0] * 16
    assert float((codes.float() * scales - rows).abs().max()) < float(rows.abs().max()) / 16


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.usefixtures("mi300")
def test_deployed_layers_compute_the_emulation(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)).eval().to(dtype)
    x, found = torch.randn(7, 3, 64).to(dtype), SCHEMES[name]
    weights = dict(model.named_parameters())
    layers = {n: quantize_layer(n, weights[n], (1,), found, InputRange(0.02, 0)) for n in ("0.weight", "2.weight")}
    with torch.no_grad():
        fast = CUDA_FP8.deployed(model, layers)
        assert fast[0].weight.codes.dtype == torch.float8_e4m3fnuz
        with quantized(model, layers):
            expected = model(x)
        assert not torch.equal(expected, model(x))
        error = (fast(x).float() - expected.float()).abs().max() / expected.float().abs().max()
    assert float(error) < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype]


def test_each_device_takes_its_own_codes_and_refuses_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
    (layer,) = discover(nn.Linear(32, 16).eval(), lambda m, b: m(b), torch.randn(2, 32)).layers
    model = nn.Linear(32, 16).eval()
    for hip, mine, others, why in ((None, OCP, NAMES, "take fp8$"), ("7.1.0", NAMES, OCP, "take fp8-fnuz$")):
        monkeypatch.setattr(torch.version, "hip", hip)
        for name in mine:
            assert CUDA_FP8.refusal(layer, SCHEMES[name]) is None
        for name in others:
            codes = quantize_layer("weight", model.weight, (1,), SCHEMES[name], InputRange(0.02, 0))
            with pytest.raises(DeployError, match=why):
                CUDA_FP8.deployed(model, {"weight": codes})
            assert "codes" in str(CUDA_FP8.refusal(layer, SCHEMES[name]))
        assert CUDA_FP8.refusal(layer, SCHEMES["bf16"]) is None


def test_the_device_is_told_by_its_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1.0")
    assert toolkit() == "ROCm 7.1.0"
    assert "finds no CUDA device" in str(missing_hardware(None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arch, grouped, said in (
        ("gfx942:sramecc+:xnack-", False, None),
        ("gfx942:sramecc+:xnack-", True, "an AMD device (gfx942), whose grouped FP8 products nobody has tried here"),
        ("gfx950", False, "an AMD device (gfx950), whose FP8 products nobody has tried here"),
        ("gfx90a:sramecc+", False, "an AMD device (gfx90a), whose FP8 products nobody has tried here"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, arch=arch: SimpleNamespace(gcnArchName=arch))
        assert missing_hardware(None, grouped) == said
    with pytest.raises(DeployError, match=r"or AMD's gfx942, got an AMD device .gfx90a."):
        cuda_fp8._check_hardware(None)


class Counted(cuda_fp8.CudaFp8):
    """Whose layers are chosen by FLOPs: there is nothing to time here."""

    timer = None  # type: ignore[assignment]
    whole_timer = None  # type: ignore[assignment]


@pytest.mark.usefixtures("mi300")
def test_what_is_measured_is_what_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Search, certificate, file and deployment are of the same codes, and another device does not take the map."""
    task = planted_task()
    found = search(task, schemes=[*OCP, *NAMES], target=Counted(), margin=0.2, ledger=tmp_path / "ledger")
    assert found.certified
    used = {found.map.layers[name].scheme for name in found.map.low}
    assert used
    assert used <= set(NAMES)
    x: Any = task.splits.search[0]["x"]
    fast = deploy(task.model, found.map, task=task)
    save_deployed(fast, task.model, tmp_path / "fast.safetensors")
    with torch.no_grad():
        expected = fast(x)
        again = load_deployed(type(task.model)().eval(), tmp_path / "fast.safetensors")
        assert torch.equal(again(x), expected)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeployError, match=r"codes are those of AMD's gfx942"):
        deploy(task.model, found.map)
    assert E4M3.maximum != E4M3_FNUZ.maximum
