"""A map as AOTInductor's package: what runs it multiplies in INT8, is the certified model, and needs no precimap."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import precimap as pm
from helpers.small_maps import map_of
from helpers.small_tasks import COUNTED_INT8
from precimap.errors import DeployError
from precimap.exporting import aoti
from precimap.exporting.exported import Exported
from precimap.runtime.x86.tokens import instructions

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export and Inductor warn about parts of their own
CPP = Path(__file__).parents[2] / "docs" / "serving" / "serve_package.cpp"


class Clicks(nn.Module):
    """A ranker: a table, two wide layers that read one input, a last logit; keyword arguments, a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.EmbeddingBag(300, 24, mode="sum")
        self.deep, self.gate, self.head = nn.Linear(32 + 24, 96), nn.Linear(32 + 24, 96), nn.Linear(96, 1)

    def forward(self, dense: Tensor, *, ids: Tensor) -> dict[str, Tensor]:
        x = torch.cat([dense, self.table(ids)], 1)
        hidden = torch.relu(self.deep(x)) * torch.sigmoid(self.gate(x))
        return {"logit": self.head(hidden).squeeze(1), "hidden": hidden}


Batch = dict[str, Tensor]


def forward(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(batch["dense"], ids=batch["ids"])["logit"]
    return logits


def clicks_task(size: int = 100, batches: int = 40) -> pm.Task:
    model, generator = Clicks().eval(), torch.Generator().manual_seed(1)
    loader = []
    for _ in range(batches):
        batch = {
            "dense": torch.randn(size, 32, generator=generator),
            "ids": torch.randint(300, (size, 4), generator=generator),
        }
        with torch.no_grad():
            chance = torch.sigmoid(4 * forward(model, batch))
        loader.append({**batch, "labels": torch.bernoulli(chance, generator=generator)})
    return pm.Task.from_loader(model, loader, metric="log-loss", forward=forward, name="clicks")


@pytest.fixture(scope="module")
def task() -> pm.Task:
    return clicks_task()


@pytest.fixture(scope="module")
def certified(task: pm.Task) -> pm.PrecisionMap:
    found = pm.search(task, schemes=["int8-static", "int8-row"], margin=0.05, target=COUNTED_INT8, pinned=["head.*"])
    assert found.certified
    assert {*found.map.low} == {"table.weight", "deep.weight", "gate.weight"}
    return found.map


@pytest.fixture(scope="module")
def package(
    task: pm.Task, certified: pm.PrecisionMap, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Exported]:
    folder = tmp_path_factory.mktemp("served") / "clicks"
    return folder, pm.export(task, certified, to="aoti", output=folder)


def test_the_package_holds_the_int8_products_and_is_the_certified_model(
    package: tuple[Path, Exported], certified: pm.PrecisionMap
) -> None:
    folder, found = package
    assert sorted(path.name for path in folder.iterdir()) == ["export.json", "model.pt2"]
    assert Exported.load(folder) == found
    assert found.map == certified.fingerprint
    assert found.not_certified is None
    assert found.layers["deep.weight"] == "int8-static (oneDNN INT8 product)"
    assert found.layers["head.weight"] == "float32"
    assert found.inputs == ("0: float32 [n, 32]", "ids: int64 [n, 4]")
    assert found.difference is not None
    assert found.difference.rms <= 0.1 * found.difference.quantising
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))
    # Of the code itself, which is another source than Inductor's counters.
    assert code.count("aoti_torch_cpu__qlinear_pointwise_tensor(") == 2


WITHOUT = """
import json, sys
sys.modules["precimap"] = None  # to import it fails
import torch
model = torch._inductor.aoti_load_package(sys.argv[1])
calls = torch.load(sys.argv[2])
torch.save([model(dense, ids=ids) for dense, ids in calls], sys.argv[3])
"""


def calls_of_sizes(*sizes: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        [torch.randn(size, 32, generator=generator), torch.randint(300, (size, 4), generator=generator)]
        for size in sizes
    ]


def test_it_runs_without_precimap_at_any_batch_size(
    package: tuple[Path, Exported], task: pm.Task, certified: pm.PrecisionMap, tmp_path: Path
) -> None:
    calls = calls_of_sizes(1, 3, 257)
    torch.save(calls, tmp_path / "calls.pt")
    subprocess.run(
        [sys.executable, "-c", WITHOUT, package[0] / "model.pt2", tmp_path / "calls.pt", tmp_path / "scores.pt"],
        check=True,
    )
    deployed = pm.deploy(task.model, certified, target="cpu-int8")
    for (dense, ids), scores in zip(calls, torch.load(tmp_path / "scores.pt"), strict=True):
        expected, base = deployed(dense, ids=ids), task.model(dense, ids=ids)
        assert list(scores) == ["logit", "hidden"]
        for name in scores:
            off, low = (scores[name] - expected[name]).abs().mean(), (base[name] - expected[name]).abs().mean()
            assert off <= 0.1 * low, name


def test_it_runs_from_cpp(package: tuple[Path, Exported], tmp_path: Path) -> None:
    root = Path(torch.__file__).parent
    include = ["-I", root / "include", "-I", root / "include" / "torch" / "csrc" / "api" / "include"]
    libraries = [
        "-L",
        root / "lib",
        f"-Wl,-rpath,{root / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    program = tmp_path / "serve_package"
    subprocess.run(["g++", "-std=c++20", "-O0", CPP, "-o", program, *include, *libraries], check=True)
    calls, model = calls_of_sizes(2, 31), torch._inductor.aoti_load_package(str(package[0] / "model.pt2"))
    torch.save(calls, tmp_path / "calls.pt")
    subprocess.run([program, package[0] / "model.pt2", tmp_path / "calls.pt", tmp_path / "scores.pt"], check=True)
    for (dense, ids), (logit, hidden) in zip(calls, torch.load(tmp_path / "scores.pt"), strict=True):
        expected = model(dense, ids=ids)
        assert logit.equal(expected["logit"])
        assert hidden.equal(expected["hidden"])
    ended = subprocess.run(
        [program, "none.pt2", tmp_path / "calls.pt", tmp_path / "x.pt"], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert "file open failed" in ended.stderr


@pytest.mark.skipif(instructions() is None, reason="scheme int8 runs on CPUs with AMX or AVX-512 VNNI")
def test_scheme_int8_takes_its_operator_along(task: pm.Task, tmp_path: Path) -> None:
    names = {"deep.weight": "int8", "gate.weight": "int8", "head.weight": "int8"}
    found = pm.export(task, map_of(task, names), to="aoti", output=tmp_path / "out", uncertified=True)
    assert found.files == ("model.pt2", "libprecimap_int8.so")
    assert found.layers["deep.weight"] == "int8 (product of libprecimap_int8.so)"
    assert found.not_certified == "it has no certificate"
    assert found.difference is not None
    assert found.difference.rms <= 1e-6 * found.difference.largest_output
    calls = calls_of_sizes(1, 33)
    torch.save(calls, tmp_path / "calls.pt")
    files = [tmp_path / "out" / "model.pt2", tmp_path / "calls.pt", tmp_path / "scores.pt"]
    without = WITHOUT.replace("model =", "torch.ops.load_library(sys.argv[4])\nmodel =")
    subprocess.run([sys.executable, "-c", without, *files, tmp_path / "out" / "libprecimap_int8.so"], check=True)
    deployed = pm.deploy(task.model, map_of(task, names), target="cpu-int8")
    for (dense, ids), scores in zip(calls, torch.load(tmp_path / "scores.pt"), strict=True):
        torch.testing.assert_close(scores["logit"], deployed(dense, ids=ids)["logit"], rtol=1e-5, atol=1e-6)


def test_a_package_that_lost_int8_is_refused(
    task: pm.Task, certified: pm.PrecisionMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(aoti._SETTINGS, "freezing", False)
    with pytest.raises(DeployError, match="expected 2 INT8 products in the package, found 0"):
        pm.export(task, certified, to="aoti", output=tmp_path / "lost")
    assert not list(tmp_path.iterdir())


def test_a_package_of_another_model_is_refused(
    task: pm.Task, certified: pm.PrecisionMap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiler that computes something else would give it: the sigmoid left out."""
    right = aoti.exported_program

    def wrong(deployed: nn.Module, calls: object) -> torch.export.ExportedProgram:
        program = right(deployed, calls)  # type: ignore[arg-type]
        for node in list(program.graph.nodes):
            if node.target is torch.ops.aten.sigmoid.default:
                node.replace_all_uses_with(node.args[0])
        return program

    monkeypatch.setattr(aoti, "exported_program", wrong)
    with pytest.raises(DeployError, match="computes another model"):
        pm.export(task, certified, to="aoti", output=tmp_path / "wrong")
    assert not list(tmp_path.iterdir())
