"""A search of a model that its first batch does not reach, or that is mostly no layer: what it finds and what it says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from precimap.errors import ModelError
from precimap.fingerprints import of_weights
from precimap.journal import open_journal
from precimap.metrics import Loss
from precimap.precision_map import OfModel, PrecisionMap
from precimap.searching.pipeline import search
from precimap.searching.question import Effort
from precimap.searching.subject import inventory_of
from precimap.task import Splits, Task


class Routed(nn.Module):
    """The first value of a row names its expert."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(experts))
        self.head = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = x[:, 0].long() == number
            if rows.any():
                mixed[rows] = torch.relu(expert(x[rows]))
        return self.head(mixed)


class Session(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (1, 16)).expand(-1, 3, -1))[0][:, -1])


def task_of(model: nn.Module, first_experts: int, experts: int) -> Task:
    """Search batches of 50 units; the first goes to `first_experts` alone, those after it and calibration to all."""

    def batches(seed: int, count: int, narrow: bool) -> list[dict[str, Tensor]]:
        generator, found = torch.Generator().manual_seed(seed), []
        for number in range(count):
            x = torch.randn(50, 16, generator=generator)
            x[:, 0] = torch.randint(first_experts if narrow and not number else experts, (50,), generator=generator)
            with torch.no_grad():
                found.append({"x": x, "labels": model(x).argmax(1)})
        return found

    return Task(
        model,
        splits=Splits(batches(0, 3, False), batches(1, 4, True), batches(2, 6, False)),
        forward=lambda m, b: m(b["x"]),
        loss=lambda s, b: nn.functional.cross_entropy(s, b["labels"], reduction="none"),
        metric=Loss(),
        name="routed",
    )


@pytest.fixture
def routed() -> Task:
    torch.manual_seed(5)
    return task_of(Routed(4).eval(), 2, 4)


@pytest.mark.parametrize("schemes", [["fp8"], ["int8-static"]])
def test_experts_that_the_first_batch_does_not_reach_are_searched(
    routed: Task, tmp_path: Path, schemes: list[str]
) -> None:
    asked = {"schemes": schemes, "margin": 10.0, "ledger": tmp_path, "effort": Effort(rounding_draws=0)}
    found = search(routed, run=tmp_path / "run", **asked)
    weights = {name for name, _ in routed.model.named_parameters() if name.endswith("weight")}
    assert set(found.map.layers) == weights == set(found.map.low)
    assert found.certificate is not None
    assert found.certificate.certified

    again = search(routed, run=tmp_path / "run", **asked)  # taken up: the same inventory, the same answer
    assert (again.map, again.inventory) == (found.map, found.inventory)
    with open_journal(tmp_path / "run") as journal:
        assert journal.count("probe") >= 0


def test_the_inventory_of_a_task_is_the_same_each_time_and_spares_the_certify_split(routed: Task) -> None:
    class Closed:
        def __iter__(self) -> None:
            raise AssertionError("looked at the certify split")

    spared = Task(
        routed.model,
        splits=Splits(routed.splits.calibration, routed.splits.search, Closed()),  # type: ignore[arg-type]
        forward=routed.forward,
        loss=routed.loss,
        metric=Loss(),
    )
    assert inventory_of(spared) == inventory_of(routed)
    assert {layer.name for layer in inventory_of(spared).layers} == {
        *(f"experts.{n}.weight" for n in range(4)),
        "head.weight",
    }


def test_a_share_is_of_the_whole_model(tmp_path: Path) -> None:
    torch.manual_seed(6)
    task = task_of(Session().eval(), 2, 2)
    found = search(task, schemes=["fp8"], margin=10.0, ledger=tmp_path, effort=Effort(rounding_draws=0))
    assert found.map.low == ("head.weight",)
    lstm, head = 2 * 3 * 4 * 32 * (16 + 32), 2 * 32 * 16
    assert found.map.flops_share == pytest.approx(head / (lstm + head)) == found.inventory.covered
    every = sum(p.nbytes for p in task.model.parameters())
    assert found.map.bytes_share == pytest.approx(4 * 32 * 16 / every)
    assert f"{head / (lstm + head):.1%} of the FLOPs, {4 * 32 * 16 / every:.1%} of the bytes" in found.answer
    assert any("lstm (LSTM): lstm / aten.mkldnn_rnn_layer" in note for note in found.preflight.notes)


def test_a_map_without_totals_says_of_what_it_speaks(routed: Task, tmp_path: Path) -> None:
    """As maps were written before: they load, with the digest that they have."""
    found = search(routed, schemes=["fp8"], margin=10.0, ledger=tmp_path, effort=Effort(rounding_draws=0)).map
    assert found.of_model == OfModel(weights_share=1.0, bytes=sum(p.nbytes for p in routed.model.parameters()))
    older = found.model_copy(update={"of_model": None})
    older.save(tmp_path / "older.json")
    assert "of_model" not in (tmp_path / "older.json").read_text()
    read = PrecisionMap.load(tmp_path / "older.json")
    assert read.flops_said.endswith("of the weight FLOPs")
    assert found.flops_said.endswith("of the FLOPs")
    assert read.bytes_share == 1.0 > found.bytes_share


class Odd(nn.Module):
    """A weight of another kind before an ordinary layer."""

    def __init__(self, weight: Tensor, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.odd, self.head = nn.Parameter(weight, requires_grad=False), nn.Linear(16, 16)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(x, self.odd))


SQUARE = torch.randn(16, 16, generator=torch.Generator().manual_seed(3))
KINDS: dict[str, Callable[[], nn.Module]] = {
    "complex": lambda: Odd(SQUARE.to(torch.complex64), lambda x, w: (x.to(w.dtype) @ w).real),
    "float8": lambda: Odd(SQUARE.to(torch.float8_e4m3fn), lambda x, w: x @ w.to(x.dtype)),
    "int8": lambda: Odd(SQUARE.to(torch.int8), lambda x, w: x @ w.to(x.dtype)),
    "sparse": lambda: Odd(SQUARE.relu().to_sparse(), lambda x, w: torch.sparse.mm(w, x.t()).t()),
    "exported": lambda: exported(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))),
}


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(
        model.eval(), (torch.randn(8, 16),), dynamic_shapes=({0: torch.export.Dim("n")},)
    ).module()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_weight_of_another_kind_stops_no_search(name: str, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model = KINDS[name]()
    task = task_of(model if name == "exported" else model.eval(), 2, 2)
    found = search(task, schemes=["fp8"], margin=10.0, ledger=tmp_path, effort=Effort(rounding_draws=0))
    assert found.map.low == (("0.weight", "2.weight") if name == "exported" else ("head.weight",))
    assert found.certificate is not None
    assert found.certificate.certified
    assert (found.map.flops_share == 1) == (name == "exported")


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_stops_it_is_named_before_anything_is_run() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    task = task_of(model, 2, 2)
    model[1].register_parameter(
        "coded", nn.Parameter(torch.quantize_per_tensor(SQUARE, 0.1, 0, torch.qint8), requires_grad=False)
    )
    with pytest.raises(ModelError, match=r"1\.coded in torch\.qint8"):
        search(task, schemes=["fp8"], margin=10.0)


def test_the_bits_of_a_sparse_weight_are_in_the_weights_fingerprint() -> None:
    one, other = (Odd(tensor.to_sparse(), lambda x, w: x) for tensor in (SQUARE.relu(), SQUARE.relu().t()))
    assert of_weights(one) == of_weights(one) != of_weights(other)
