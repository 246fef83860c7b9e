"""A map belongs to the modules it was made for: the same weights in other modules compute something else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import EMULATED, Effort, PrecisionMap, Splits, Task, deploy, load_deployed, save_deployed, search
from precimap.errors import MapError, PremiseMismatch
from precimap.fingerprints import modules_of, of_architecture
from precimap.metrics import Loss
from precimap.searching.certificate.one_map import certify

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
QUICK = Effort(screen_units=32, audit_units=16, check_units=32, rounding_draws=0)


class Printing(nn.Module):
    """A module that shows an address, a device and a value of its own, none of which is architecture."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("scale", torch.ones(2, 2))

    def extra_repr(self) -> str:
        return f"power={self.power}, scale={self.scale}, device={self.scale.device}, of={object()}"

    def forward(self, x: Tensor) -> Tensor:
        return x**self.power * self.scale[0, 0]


class Wanting(nn.Module):
    """A module that cannot print itself without values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("top", torch.full((), 9.0))

    def extra_repr(self) -> str:
        return f"top={self.top.item()}"

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.top)


class Click(nn.Module):
    def __init__(self, act: nn.Module | None = None, power: int = 1, last: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.first, self.act, self.drop = nn.Linear(16, 32), act or nn.ReLU(), nn.Dropout(0.2)
        self.printing, self.wanting = Printing(power), Wanting()
        self.second, self.last = nn.Linear(32, 16), last()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.wanting(self.printing(self.drop(self.act(self.first(x)))))
        scores: Tensor = self.last(self.second(hidden))
        return scores.mean(1)


def model_of(**changes: Any) -> Click:
    torch.manual_seed(0)
    return Click(**changes).eval()


def split(seed: int, units: int = 200) -> list[dict[str, Tensor]]:
    x = torch.randn(units, 16, generator=torch.Generator().manual_seed(seed))
    return [{"x": x, "labels": (x[:, 0] > 0).float()}]


def task_of(model: nn.Module) -> Task:
    return Task(
        model,
        splits=Splits(split(1), split(2), split(3)),
        forward=lambda model, batch: model(batch["x"]),
        loss=lambda scores, batch: F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none"),
        metric=Loss(),
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> PrecisionMap:
    folder = tmp_path_factory.mktemp("ledger")
    made = search(task_of(model_of()), schemes=["fp8"], margin=5.0, effort=QUICK, ledger=folder).map
    assert made.low
    return made


@pytest.fixture
def saved(found: PrecisionMap, tmp_path: Path) -> Path:
    model = model_of()
    save_deployed(deploy(model, found), model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "activation": (model_of(act=nn.GELU()), r"module act: ReLU\(\) -> GELU\(approximate='none'\)"),
    "parameter": (
        model_of(act=nn.Threshold(0.0, 0.1)),
        r"module act: ReLU\(\) -> Threshold\(threshold=0.0, value=0.1\)",
    ),
    "attribute": (model_of(power=2), r"module printing: Printing\(power=1.* -> Printing\(power=2"),
    "one module more": (model_of(last=lambda: nn.Sequential(nn.Tanh())), r"module last\.0: no module -> Tanh\(\)"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_same_weights_in_other_modules_are_refused(
    found: PrecisionMap, saved: Path, tmp_path: Path, case: str
) -> None:
    other, says = OTHERS[case]
    with pytest.raises(PremiseMismatch, match=says):
        deploy(other, found)
    with pytest.raises(PremiseMismatch, match=says):
        load_deployed(other, saved)
    with pytest.raises(PremiseMismatch, match=says):
        certify(task_of(other), found, target=EMULATED, margin=5.0, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def in_training(model: nn.Module) -> nn.Module:
    return model.train()


def with_compiled_part(model: Any) -> nn.Module:
    model.act = torch.compile(model.act)
    whole: nn.Module = model
    return whole


SAME = {"as it is": lambda m: m, "training": in_training, "compiled": torch.compile, "a part": with_compiled_part}


@pytest.mark.parametrize("form", SAME.values(), ids=SAME)
def test_what_is_no_architecture_changes_nothing(found: PrecisionMap, saved: Path, form: Any) -> None:
    plain, other = model_of(), form(model_of())
    assert modules_of(other) == modules_of(plain) == found.premise.architecture
    assert of_architecture(torch.compile(nn.Linear(2, 2))) == of_architecture(nn.Linear(2, 2))
    found.check(architecture=modules_of(other))
    x = split(5)[0]["x"]
    if form is not torch.compile:
        assert torch.equal(deploy(other, found)(x), deploy(plain, found)(x))
    assert torch.equal(load_deployed(other if form is not torch.compile else plain, saved)(x), deploy(plain, found)(x))


def test_a_tree_without_weights_takes_a_checkpoint(found: PrecisionMap, saved: Path) -> None:
    """Other values, or none: on the meta device a module may fail to print itself."""
    other = model_of()
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(3.0)
    x = split(5)[0]["x"]
    assert torch.equal(load_deployed(other, saved)(x), deploy(model_of(), found)(x))
    with torch.device("meta"):
        bare = Click().eval()
    assert modules_of(bare)["wanting"] == "Wanting"
    found.check(architecture=modules_of(bare))
    with torch.device("meta"):
        unlike = Click(act=nn.GELU()).eval()
    with pytest.raises(PremiseMismatch, match="module act"):
        load_deployed(unlike, saved)


def test_a_map_from_before_binds_weights_alone(found: PrecisionMap, tmp_path: Path) -> None:
    older = found.model_copy(update={"premise": found.premise.model_copy(update={"architecture": None})})
    older.save(tmp_path / "map.json")
    read = PrecisionMap.load(tmp_path / "map.json")
    deploy(model_of(act=nn.GELU()), read)
    assert read.fingerprint == found.fingerprint, "what runs is the same, and so is the question to a certify split"
    assert older.diff(found) == found.diff(older) == ()


def test_two_maps_differ_by_their_modules_in_a_phrase(found: PrecisionMap) -> None:
    gelu = {"architecture": modules_of(model_of(act=nn.GELU()))}
    other = found.model_copy(update={"premise": found.premise.model_copy(update=gelu)})
    assert found.diff(other) == ("module act: ReLU() -> GELU(approximate='none')",)


def test_a_broken_file_is_still_said_to_be_broken(found: PrecisionMap, saved: Path) -> None:
    with pytest.raises(MapError, match="another architecture"):
        load_deployed(nn.Linear(16, 32), saved)
