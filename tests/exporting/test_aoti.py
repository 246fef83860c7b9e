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
from precimap.runtime.x86.target import int8_scheme
from precimap.runtime.x86.tokens import instructions

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export and Inductor warn about parts of their own


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
    found = pm.search(task, schemes=[int8_scheme(), "int8-row"], margin=0.05, target=COUNTED_INT8, pinned=["head.*"])
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
    assert found.layers["deep.weight"] == f"{int8_scheme()} (oneDNN INT8 product)"
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


class Projected(nn.Module):
    """Attention across, whose projections are parts of one weight; a weight that matmul repeats for the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mixed = nn.Parameter(torch.randn(6, 16) / 4)
        self.score = nn.Linear(32, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = x + 1
        attended, _ = self.attention(x, y, y, need_weights=False)
        mixed = torch.matmul((attended * mask.unsqueeze(-1)).transpose(1, 2), self.mixed)
        return self.score(mixed.mean(2)).squeeze(1)


def test_a_packed_projection_and_a_repeated_weight_are_int8_products(tmp_path: Path) -> None:
    """Inputs that are not contiguous, too: the package reads memory as it was in the example."""
    model, generator = Projected().eval(), torch.Generator().manual_seed(2)
    x, mask = torch.randn(40, 6, 32, generator=generator), torch.ones(1, 6).expand(40, 6)
    batches = [{"x": x[i : i + 10], "mask": mask[:10], "labels": torch.zeros(10)} for i in (0, 10, 20)]
    task = pm.Task(
        model,
        splits=pm.Splits(*([one] for one in batches)),
        metric="log-loss",
        forward=lambda model, batch: model(batch["x"], batch["mask"]),
    )
    names = ("attention.in_proj_weight", "attention.out_proj.weight", "mixed")
    found = pm.export(
        task, map_of(task, dict.fromkeys(names, int8_scheme())), to="aoti", output=tmp_path / "out", uncertified=True
    )
    assert found.inputs == ("0: float32 [n, 6, 32]", "1: float32 [n, 6]")
    assert found.difference is not None
    assert found.difference.rms <= 0.01 * found.difference.quantising
    with zipfile.ZipFile(tmp_path / "out" / "model.pt2") as archive:
        code = "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".wrapper.cpp"))
    assert code.count("aoti_torch_cpu__qlinear_pointwise_tensor(") == 4  # queries, keys with values, and two more


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
    with pytest.raises(DeployError, match="expected 2 INT8 products in the generated code, found 0"):
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
