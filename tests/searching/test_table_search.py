"""Embedding tables in one search with the other layers: bytes as an objective, budgets of bytes, planted tables."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.small_tasks import COUNTED_INT8
from precimap import SearchResult, Splits, Task, deploy, search
from precimap.errors import InputError
from precimap.hardware_profile import Device
from precimap.layers.discover import discover
from precimap.layers.target import BASE, EMULATED, Emulated, Turns
from precimap.metrics import Loss
from precimap.numerics.schemes import SCHEMES, scheme
from precimap.report.inventory_table import inventory_table
from precimap.report.tables import run_page
from precimap.runtime.x86.target import int8_scheme
from precimap.searching.allocation.knapsack import Constraints
from precimap.searching.allocation.rules import Knapsack, Rule, Threshold
from precimap.searching.allocation.table import Table, gain
from precimap.searching.eligibility import eligibility
from precimap.searching.question import Effort

EFFORT = Effort(rounding_draws=2)
WIDTH, CLASSES = 16, 16


class Tables(nn.Module):
    """Two tables of 16 columns before two linear layers; of `outlier`, a column that is read by nobody is 30 times larger.

    4 bits between -30 and 30 leave one step of 4 for values of size 1, 8 bits leave a step of 1/4.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.plain, self.outlier = nn.Embedding(3000, WIDTH), nn.EmbeddingBag(2000, WIDTH, mode="sum")
        self.hidden, self.last = nn.Linear(2 * WIDTH, 64), nn.Linear(64, CLASSES)
        with torch.no_grad():
            for parameter in self.parameters():
                size = 1.0 if parameter.shape[0] >= 2000 else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)
            self.outlier.weight[:, 0] *= 30

    def forward(self, plain: Tensor, outlier: Tensor) -> Tensor:
        unread = torch.ones(WIDTH)
        unread[0] = 0
        rows = torch.cat([self.plain(plain), self.outlier(outlier.unsqueeze(1)) * unread], dim=1)
        return 3 * self.last(torch.relu(self.hidden(rows)))


def batches(model: nn.Module, units: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    plain, outlier = (torch.randint(rows, (units,), generator=generator) for rows in (3000, 2000))
    with torch.no_grad():
        scores = model(plain, outlier)
    labels = (scores + torch.randn(scores.shape, generator=generator)).argmax(1)
    whole = {"plain": plain, "outlier": outlier, "labels": labels}
    return [{key: value[i : i + 250] for key, value in whole.items()} for i in range(0, units, 250)]


def task_of(model: nn.Module) -> Task:
    return Task(
        model,
        splits=Splits(batches(model, 250, 1), batches(model, 1000, 2), batches(model, 2000, 3)),
        forward=lambda model, batch: model(batch["plain"], batch["outlier"]),
        loss=lambda scores, batch: F.cross_entropy(scores, batch["labels"], reduction="none"),
        metric=Loss(),
        name="planted tables",
    )


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(Tables().eval())


def found(task: Task, folder: Path, schemes: list[str], **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"margin": 0.05, "rule": Knapsack(bytes_worth=1.0), "effort": EFFORT}
    return search(task, schemes=schemes, ledger=folder, **{**asked, **changes})


def chosen(result: SearchResult) -> dict[str, str | None]:
    return {name: decision.scheme for name, decision in result.map.layers.items()}


def test_each_layer_takes_the_scheme_that_the_metric_allows(task: Task, tmp_path: Path) -> None:
    """FP8 for products, 4 bits for the plain table, 8 for the one that 4 would ruin."""
    result = found(task, tmp_path, ["fp8", "int8-row", "int4-row"])
    assert result.certified
    assert chosen(result) == {
        "plain.weight": "int4-row",
        "outlier.weight": "int8-row",
        "hidden.weight": "fp8",
        "last.weight": "fp8",
    }
    assert result.map.bytes_before == 4 * (5000 * WIDTH + 64 * 32 + CLASSES * 64)
    assert result.map.bytes_after == 3000 * 12 + 2000 * 24 + (64 * 32 + 64 * 4) + (CLASSES * 64 + CLASSES * 4)
    every = sum(p.nbytes for p in task.model.parameters())  # the biases are in no layer
    assert result.map.bytes_share == result.map.bytes_before / every < 1
    assert "100.0% of the FLOPs, 99.9% of the bytes" in result.answer


def test_every_gain_of_a_search_has_the_worth_that_was_asked_for(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where room that the chain leaves is filled up: gains of two worths could not be compared."""
    worths = []

    def recorded(table: Table, worth: float, counted: Any) -> Any:
        worths.append(worth)
        return options(table, worth, counted)

    options = Table.options
    monkeypatch.setattr(Table, "options", recorded)
    found(task, tmp_path, ["fp8", "int8-row", "int4-row"], rule=Knapsack(bytes_worth=0.7))
    assert worths
    assert set(worths) == {0.7}


class Slow:
    """Packed rows take half as long again, bags and products half of the time."""

    def device(self) -> Device:
        return Device(name="a", capability="b", threads=1, allocator="c", clock="d", torch="2", precimap="0")

    def seconds(self, module: nn.Module, forms: Any, rows: int, each: int) -> Turns:
        took = 1.5 if isinstance(module, nn.Embedding) else 0.5
        return Turns({BASE: [1.0] * 3, **{name: [took] * 3 for name in forms}}, {})


class Timed(Emulated):
    name = "timed"
    timer = Slow()  # type: ignore[assignment]


@pytest.mark.parametrize("rule", [Knapsack(bytes_worth=0.01), Knapsack(bytes_worth=1.0), Threshold()])
def test_a_table_that_its_time_keeps_is_called_slower(rule: Rule, task: Task, tmp_path: Path) -> None:
    """One of four layers with a second each: it would lose an eighth of the time and save a third of the bytes."""
    result = found(task, tmp_path, ["fp8", "int8-row"], rule=rule, target=Timed())
    assert result.certified
    decision = result.map.layers["plain.weight"]
    if rule == Knapsack(bytes_worth=0.01):
        assert (decision.scheme, decision.verdict) == (None, "slower")
        assert decision.reason == (
            "int8-row takes 1.50 [1.50, 1.50] times as long as base precision (n = 3), more than its bytes are worth"
        )
        assert decision.predicted, "what is known of it is told"
    else:
        assert (decision.scheme, decision.verdict) == ("int8-row", "tolerant")
    assert chosen(result)["outlier.weight"] == "int8-row"


def test_a_table_that_the_metric_needs_is_kept(task: Task, tmp_path: Path) -> None:
    result = found(task, tmp_path, ["int4-row"])
    assert result.certified
    assert chosen(result)["plain.weight"] == "int4-row"
    assert chosen(result)["outlier.weight"] is None
    assert result.map.layers["outlier.weight"].verdict == "sensitive"
    assert "for embedding tables" in result.map.layers["hidden.weight"].reason


def test_without_a_worth_of_bytes_a_table_saves_nothing(task: Task, tmp_path: Path) -> None:
    result = found(task, tmp_path, ["fp8", "int8-row"], rule=Knapsack(bytes_worth=0.0))
    assert chosen(result)["hidden.weight"] == "fp8"
    assert chosen(result)["plain.weight"] is chosen(result)["outlier.weight"] is None


@pytest.mark.parametrize(("megabytes", "expected"), [(0.30, {"int8-row"}), (0.10, {"int8-row", "int4-row"})])
def test_a_budget_of_bytes_decides_the_bits(megabytes: float, expected: set[str], task: Task, tmp_path: Path) -> None:
    """Bytes are worth nothing here, so that the budget alone puts tables into fewer bits."""
    rule = Knapsack(Constraints(maximum_bytes=int(megabytes * 1e6)), bytes_worth=0.0)
    result = found(task, tmp_path, ["int8-row", "int4-row"], rule=rule)
    assert result.certified
    assert result.map.bytes_after <= megabytes * 1e6
    assert {name for name in chosen(result).values() if name is not None} == expected


def test_a_budget_that_no_map_meets_is_refused(task: Task, tmp_path: Path) -> None:
    rule = Knapsack(Constraints(maximum_bytes=5000 * 12 - 1))
    with pytest.raises(InputError, match="no map has at most"):
        found(task, tmp_path, ["int4-row"], rule=rule)


def test_a_mixed_map_for_this_cpu_deploys(task: Task, tmp_path: Path) -> None:
    result = found(task, tmp_path, [int8_scheme(), "int8-row", "int4-row"], target=COUNTED_INT8)
    assert result.certified
    assert {"plain.weight", "outlier.weight"} <= set(result.map.low)
    fast = deploy(task.model, result.map, task=task)
    assert fast.precimap.agreement.relative < 1e-5
    assert "of the bytes" in result.answer


def test_a_scheme_that_no_layer_takes_is_named_first(task: Task, tmp_path: Path) -> None:
    notes: list[str] = []
    linear = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    inventory = discover(linear, lambda m, b: m(b), torch.randn(3, 64))
    told = eligibility(inventory, [scheme("fp8"), scheme("int8-row")], EMULATED, [])
    assert told.idle() == (
        "no layer can take int8-row: packed rows are for embedding tables: no matrix product reads them (2)",
    )
    assert eligibility(inventory, [scheme("fp8")], EMULATED, ["2"]).idle() == ()
    assert "kept by the user (2)" in eligibility(inventory, [scheme("fp8")], EMULATED, ["0", "2"]).idle()[0]
    found(
        task,
        tmp_path,
        ["int8-row", "fp8"],
        pinned=["hidden", "last"],
        on_preflight=lambda checked: notes.extend(checked.notes),
    )
    assert any(note.startswith("no layer can take fp8: ") and "kept by the user (2)" in note for note in notes)


def test_gain_counts_packed_rows_and_what_bytes_are_worth(task: Task) -> None:
    inventory = discover(task.model, task.forward, batches(task.model, 4, 9)[0])
    table, total = inventory.layer("plain.weight"), inventory.layer_bytes
    assert table.bytes == 3000 * 64
    for name, packed in (("int8-row", 3000 * 24), ("int8-row-half", 3000 * 20), ("int4-row", 3000 * 12)):
        assert gain(inventory, table.name, scheme(name), 1.0) == pytest.approx((table.bytes - packed) / total)
        assert gain(inventory, table.name, scheme(name), 0.0) == 0
    linear = inventory.layer("hidden.weight")
    product = 0.75 * linear.flops / inventory.weight_flops  # 8 bits beside 32
    assert gain(inventory, linear.name, SCHEMES["fp8"], 0.0) == product
    assert gain(inventory, linear.name, SCHEMES["bf16"], 0.0) == product * 2 / 3
    saved = (linear.bytes - 64 * 32) / total
    assert gain(inventory, linear.name, SCHEMES["fp8"], 2.0) == pytest.approx(product + 2 * saved)


@pytest.mark.parametrize("worth", [-1.0, float("nan"), float("inf")])
def test_a_worth_that_is_none_is_refused(worth: float) -> None:
    with pytest.raises(InputError, match="bytes_worth"):
        Knapsack(bytes_worth=worth)


def test_bytes_of_every_scheme() -> None:
    shape, contracted = (6, 32), (1,)
    sizes = {name: found.stored_bytes(shape, contracted) for name, found in SCHEMES.items()}
    codes = 6 * 32
    assert sizes["fp8"] == sizes["int8"] == sizes["int8-weight"] == codes + 6 * 4
    assert sizes["fp8-tensor"] == sizes["fp8-static"] == codes + 4
    assert (sizes["int8-row"], sizes["int8-row-half"], sizes["int4-row"]) == (6 * 40, 6 * 36, 6 * 20)
    assert SCHEMES["fp8-tensor"].stored_bytes(shape, None) == codes + 4


def test_tables_show_where_the_bytes_are(task: Task, tmp_path: Path) -> None:
    from rich.console import Console

    from precimap.report.run_record import read_run

    result = found(task, tmp_path, ["int8-row", "int4-row", "fp8"], run=tmp_path / "run")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(run_page(read_run(tmp_path / "run")))
    console.print(inventory_table(result.inventory))
    page = console.export_text()
    before, after = result.map.bytes_before, result.map.bytes_after
    rest = sum(p.nbytes for p in task.model.parameters()) - before
    flat = " ".join(page.split())
    assert f"shrink from {(before + rest) / 1e3:.1f} kB to {(after + rest) / 1e3:.1f} kB; 99.9% of" in flat
    assert "In 0 of 2 layers int4-row is predicted to change the scores less than int8-row" in flat
    assert "layers fp8 is predicted" not in flat
    assert "96.2% in embedding tables" in page
