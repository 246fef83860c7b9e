"""What cannot be exported is refused in a sentence, before anything is written; and nothing half-written is left."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import precimap as pm
from helpers.small_maps import map_of
from helpers.small_tasks import planted_task
from precimap.errors import DeployError, InputError, MapError, PremiseMismatch, SaveError
from precimap.exporting import export as writing
from precimap.exporting.calls import calls_of
from precimap.exporting.folder import new_folder


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "a").read_text() == "a"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "other") as folder:
        (folder / str(1 // 0)).touch()
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(SaveError, match="which is left alone"), new_folder(tmp_path / name):
            pytest.fail("the block ran")
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()
    assert (tmp_path / "full" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "write", ["(folder / 'a').write_bytes(bytes(5000))", "save_file({'a': zeros(5000)}, folder / 'a')"]
)
def test_a_disk_that_is_full_leaves_nothing(write: str, tmp_path: Path) -> None:
    """Also where it is safetensors that meets it, whose errors are of its own."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pathlib import Path\n"
        "from torch import zeros\n"
        "from safetensors.torch import save_file\n"
        "from precimap.errors import SaveError\n"
        "from precimap.exporting.folder import new_folder\n"
        "try:\n"
        "    with new_folder(Path(sys.argv[1])) as folder:\n"
        f"        {write}\n"
        "except SaveError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], preexec_fn=limited, capture_output=True, text=True, check=True
    )
    assert "no folder was made" in ended.stdout
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from precimap.exporting.folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'a').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    with new_folder(tmp_path / "out"), new_folder(tmp_path / "out"):  # one that is being written is locked, and stays
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_map_that_must_not_ship_is_refused(tmp_path: Path) -> None:
    task = planted_task()
    plain = map_of(task, {"first.weight": "fp8"})
    with pytest.raises(MapError, match=r"not certified: it has no certificate.*--uncertified"):
        pm.export(task, plain, to="aoti", output=tmp_path / "out")
    with pytest.raises(MapError, match="nothing to export"):
        pm.export(task, map_of(task, {}), to="aoti", output=tmp_path / "out", uncertified=True)
    with pytest.raises(InputError, match="expected a target out of aoti"):
        pm.export(task, plain, to="tensorrt", output=tmp_path / "out", uncertified=True)
    with pytest.raises(DeployError, match=r"first\.weight: this CPU has no arithmetic for it"):
        pm.export(task, plain, to="aoti", output=tmp_path / "out", uncertified=True)
    with torch.no_grad():
        task.model.first.weight[0, 0] += 1
    with pytest.raises(PremiseMismatch):
        pm.export(task, plain, to="aoti", output=tmp_path / "out", uncertified=True)
    assert not list(tmp_path.iterdir())


class Parts(nn.Module):
    """A model that its task may call in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0, other: Tensor | None = None) -> Tensor:
        scores: Tensor = self.layer(x) * scale
        return scores if other is None else scores + other


def calls(forward: Any, rows: tuple[int, ...] = (6, 4)) -> Any:
    batches = [{"x": torch.randn(n, 4), "labels": torch.zeros(n, dtype=torch.int64)} for n in rows]
    splits = pm.Splits(batches, batches, batches)
    return calls_of(pm.Task(Parts().eval(), splits=splits, metric="log-loss", forward=forward), Parts().eval())


def test_calls_are_those_of_the_task() -> None:
    found = calls(lambda model, batch: model(batch["x"], other=batch["x"][:1, :2]))
    assert found.example.names == ["0", "other"]
    assert found.varying == [(0,), ()]
    assert [len(call.tensors[0]) for call in found.each] == [12, 6, 4, 3]


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        (lambda model, batch: model.layer(batch["x"]), "it called parts of it only"),
        (lambda model, batch: model(batch["x"], float(len(batch["x"]))), "as 6.0 and as 4.0"),
        (
            lambda model, batch: (
                model(batch["x"]) if len(batch["x"]) > 4 else model(batch["x"], other=batch["x"][:, :2])
            ),
            "calls the model in two ways",
        ),
        (
            lambda model, batch: model(batch["x"] if len(batch["x"]) > 4 else batch["x"][None]).reshape(-1, 2),
            "with 2 dims and as torch.float32 with 3 dims",
        ),
    ],
)
def test_calls_that_no_one_program_is_are_refused(forward: Any, said: str) -> None:
    with pytest.raises(DeployError, match=said):
        calls(forward)


def test_every_target_has_a_writer() -> None:
    from precimap.cli_serving_options import ToName

    assert [name.value for name in ToName] == list(writing.WRITERS)
