"""What is added to the best map: credit in the plan, layers that break a map, nested sequences, few looks."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.small_tasks import planted_task
from precimap import Effort, SearchResult, Splits, Task, search
from precimap.layers.inventory import Inventory, Layer
from precimap.metrics import LogLoss
from precimap.metrics.paired import Drop
from precimap.numerics.schemes import scheme
from precimap.searching.allocation.knapsack import Constraints, Step
from precimap.searching.allocation.layer_evidence import LayerEvidence
from precimap.searching.allocation.price import Currency, Price
from precimap.searching.allocation.rules import KNAPSACK, Knapsack, Threshold
from precimap.searching.allocation.table import Table
from precimap.searching.comparison import Comparison
from precimap.searching.evidence import gather
from precimap.searching.evidence.gather import EvidenceTable
from precimap.searching.maps import choosing, growing
from precimap.searching.maps.candidates import (
    CERTIFIED_BELOW,
    MOST_LOOKS,
    Chain,
    Looking,
    MapCandidate,
    choose,
    sequence,
)
from precimap.searching.maps.growing import MOST_CONFIRMED, MOST_GROWTH, eager, grown

MARGIN = 1.0
ERROR = 0.01


def compared(drop: float) -> Comparison:
    return Comparison(
        drop=Drop(estimate=drop, error=ERROR, n=100, clusters=100, changed=100),
        lower=drop - 2 * ERROR,
        upper=drop + 2 * ERROR,
        reported={},
        largest=1.0,
    )


@dataclass
class Invented:
    """Layers of equal size with known drops. predicted: what a plan adds up; truth: what a look finds of a map."""

    predicted: dict[str, float]
    added: dict[str, float] = field(default_factory=dict)  # beside what is predicted, when the layer is in
    together: tuple[str, str, float] | None = None  # two layers that make good for each other, and by how much
    looks: list[frozenset[str]] = field(default_factory=list)
    screen: Any = None

    predicts_metric = True

    def tells(self, key: object) -> bool:
        return True

    def __post_init__(self) -> None:
        self.screen = type("NoScreen", (), {"pairs": {}})()

    def comparison(self, keys: Iterable[tuple[str, str]]) -> Comparison:
        return compared(self.summed(name for name, _ in keys))

    def summed(self, names: Iterable[str]) -> float:
        chosen = set(names)
        bonus = 0.0 if self.together is None or not chosen.issuperset(self.together[:2]) else self.together[2]
        return sum(self.predicted[name] for name in chosen) - bonus

    def fitted(self, keys: object, measured: object) -> "Invented":
        return self

    def truth(self, names: Iterable[str]) -> float:
        chosen = list(names)
        return self.summed(chosen) + sum(self.added.get(name, 0.0) for name in chosen)

    def look(self, joint: MapCandidate) -> MapCandidate:
        self.looks.append(frozenset(joint.step.choice))
        found = compared(self.truth(joint.step.choice))
        return replace(joint, measured=found, on_screened=found)

    def searched(
        self, known: Mapping[str, LayerEvidence] | None = None, suspects: Any = None, rule: Any = KNAPSACK
    ) -> Chain:
        """The chain, the looks, and what is grown, as `chosen_maps` does it."""
        layers = tuple(
            Layer(
                name=n,
                shape=(16, 16),
                dtype="float32",
                element_bytes=4,
                ops=("linear",),
                calls=1,
                flops=1,
                contracted=(1,),
                inputs=16,
                outputs=16,
            )
            for n in self.predicted
        )
        inventory = Inventory(layers=layers, others=(), units=1, hidden_flops=(), products=())
        rows = tuple(
            LayerEvidence(
                layer=n,
                scheme="fp8",
                predicted=compared(d),
                probed=None,
                loss_square=0.0,
                output_error=None,
                drift=None,
                trusted=True,
            )
            for n, d in self.predicted.items()
        )
        evidence = EvidenceTable(
            known=rows, predictor=self, audit=None, suspects=suspects or (lambda keys: frozenset())
        )  # type: ignore[arg-type]
        price = Price(Currency.MEAN, MARGIN)
        table = table_of(inventory, rows)
        candidates = [
            MapCandidate(step=step, predicted=self.comparison(step.choice.items())) for step in rule.steps(table)
        ]
        known = evidence.by_key()
        looking = Looking(inventory=inventory, rule=rule, known=known, margin=MARGIN, look=self.look)
        chosen = choose(candidates, self, looking)  # type: ignore[arg-type]
        return grown(looking, chosen, evidence, eager(table.options(rule.bytes_worth, price), known, price))


def table_of(inventory: Inventory, rows: Sequence[LayerEvidence]) -> Table:
    return Table(
        inventory=inventory,
        metric=LogLoss(),
        schemes={"fp8": scheme("fp8")},
        known=tuple(rows),
        margin=MARGIN,
        given_cutoff=0.1,
    )


def names(chosen: Chain) -> set[str]:
    return set() if chosen.best is None else set(chosen.candidates[chosen.best].step.choice)


def test_an_improvement_buys_room_in_the_plan() -> None:
    """.9 is free, .6 more is paid by the .8 that another layer improves: measured together, all of it passes."""
    invented = Invented({"better": -0.8, "cheap": 0.9, "dear": 0.6})
    assert names(invented.searched()) == {"better", "cheap", "dear"}
    assert names(Invented({"worse": 0.05, "cheap": 0.8, "dear": 0.6}).searched()) != {"worse", "cheap", "dear"}


def test_layers_that_make_good_for_each_other_stay_together() -> None:
    """No step up from the best map finds them: each alone is beyond the margin, and another lies between."""
    invented = Invented({"a": 0.1, "b": 1.0, "x": 1.1, "c": 1.2}, together=("b", "c", 1.9))
    assert names(invented.searched()) == {"a", "b", "c"}
    assert len(invented.looks) <= 4 + MOST_CONFIRMED


def test_a_layer_that_breaks_a_map_costs_itself_alone() -> None:
    """It looks like the safest of sixteen, so that every map of the chain holds it."""
    drops = {f"l{k:02}": 0.001 * k for k in range(16)}
    invented = Invented(drops, added={"l00": 5.0})
    found = invented.searched()
    assert names(found) == set(drops) - {"l00"}
    assert len(invented.looks) <= MOST_LOOKS + MOST_GROWTH + MOST_CONFIRMED


def test_one_in_the_middle_does_not_cost_what_stands_behind_it() -> None:
    drops = {f"l{k:02}": 0.001 * k for k in range(16)}
    for guilty in ("l03", "l08", "l14"):
        found = Invented(drops, added={guilty: 5.0}).searched()
        assert len(names(found)) >= 14
        assert guilty not in names(found)


def test_suspects_are_left_out_without_more_looks() -> None:
    """Three of sixteen break maps: halving for each would take more looks than there are."""
    drops = {f"l{k:02}": 0.001 * k for k in range(16)}
    guilty = {"l00", "l05", "l11"}
    invented = Invented(drops, added=dict.fromkeys(guilty, 5.0))
    found = invented.searched(suspects=lambda keys: frozenset((n, s) for n, s in keys if n in guilty))
    assert names(found) == set(drops) - guilty
    assert len(invented.looks) <= MOST_LOOKS + 2 + MOST_CONFIRMED


def test_what_passed_with_a_suspect_passed_by_luck() -> None:
    """The map of the suspect alone passed; once it is known, nothing that holds it is sent."""
    drops = {f"l{k:02}": 0.001 * k for k in range(8)}
    invented = Invented(drops, added={"l00": 0.3, "l01": 5.0})
    found = invented.searched(suspects=lambda keys: frozenset((n, s) for n, s in keys if n in ("l00", "l01")))
    assert names(found) == set(drops) - {"l00", "l01"}
    for joint in sequence(found):
        assert "l00" not in joint.step.choice


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-0.5, 0.9), min_size=1, max_size=14),
    st.dictionaries(st.integers(0, 13), st.floats(-0.4, 3.0), max_size=4),
)
def test_what_is_sent_is_nested_and_lies_below_what_passed(drops: list[float], wrong: dict[int, float]) -> None:
    predicted = {f"l{k:02}": drop for k, drop in enumerate(drops)}
    invented = Invented(predicted, added={f"l{k:02}": more for k, more in wrong.items()})
    found = invented.searched()
    sent = sequence(found)
    assert len(invented.looks) <= MOST_LOOKS + MOST_GROWTH + MOST_CONFIRMED
    assert len(set(invented.looks)) == len(invented.looks), "no map is measured twice"
    assert len(sent) <= CERTIFIED_BELOW + 2
    for small, large in itertools.pairwise(sent):
        assert small.step.choice.items() < large.step.choice.items()
    if sent:
        assert sent[-1].measured is not None
        assert invented.truth(sent[-1].step.choice) + 2 * ERROR <= MARGIN
        best = max((names for names in invented.looks if invented.truth(names) + 2 * ERROR <= MARGIN), key=len)
        assert len(sent[-1].step.choice) == len(best), "the largest that passed is sent"


def test_limits_of_the_rule_are_kept() -> None:
    drops = {f"l{k:02}": 0.05 for k in range(6)}
    rule = Knapsack(Constraints(minimum_gain=2.0))  # more than all of them gain
    assert Invented(drops).searched(rule=rule).best is None
    assert names(Invented(drops).searched(rule=Knapsack(Constraints(minimum_gain=0.1)))) == set(drops)


def test_the_plain_rule_never_adds_a_sensitive_layer(tmp_path: Path) -> None:
    found = search(
        planted_task(), schemes=["fp8"], margin=0.2, cutoff=0.002, rule=Threshold(), ledger=tmp_path,
        effort=Effort(rounding_draws=0),
    )  # fmt: skip
    decisive = {row.layer: row.decisive for row in found.evidence.known}
    sensitive = {name for name, known in decisive.items() if known is not None and known.lower > 0.002}
    assert sensitive
    for joint in found.chain:
        assert not sensitive & set(joint.step.choice)


# The order in which layers are added


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=8, unique=True))
def test_layers_are_ordered_by_their_mean_alone(drops: list[float]) -> None:
    rows = [
        LayerEvidence(
            layer=f"l{k}",
            scheme="fp8",
            predicted=compared(d),
            probed=None,
            loss_square=0.0,
            output_error=None,
            drift=None,
            trusted=True,
        )
        for k, d in enumerate(drops)
    ]
    layers = tuple(
        Layer(
            name=row.layer,
            shape=(16, 16),
            dtype="float32",
            element_bytes=4,
            ops=("linear",),
            calls=1,
            flops=1,
            contracted=(1,),
            inputs=16,
            outputs=16,
        )
        for row in rows
    )
    price = Price(Currency.MEAN, MARGIN)
    table = table_of(Inventory(layers=layers, others=(), units=1, hidden_flops=(), products=()), rows)
    costs = [row.cost for row in eager(table.options(1e-3, price), table.by_key(), price)]
    assert min(costs) > 0, "a knapsack takes what costs nothing all at once"
    assert list(np.argsort(costs)) == list(np.argsort(drops)) or len(set(costs)) < len(costs)


# In a search: a threshold that no gradient sees


class Stepped(nn.Module):
    """Residual layers; the sign of one of them switches the score, by way of a fine grid, so that its rounding matters."""

    def __init__(self, layers: int, at: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.first = nn.Linear(24, 32)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(layers))
        self.last = nn.Linear(32, 16)
        self.at = at
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.6 * parameter.shape[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, switch = torch.relu(self.first(x)), torch.zeros(len(x))
        for number, block in enumerate(self.blocks):
            result = block(hidden)
            if number == self.at:
                switch = 2.0 * (torch.floor(result.sum(1) / 0.1) % 2)
            hidden = hidden + 0.3 * torch.relu(result)
        return self.last(hidden).sum(1) + switch


def stepped_task(layers: int = 16, at: int = 0) -> Task:
    model = Stepped(layers, at).eval().requires_grad_(False)

    def split(seed: int, n: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 24, generator=generator)
        labels = torch.bernoulli(torch.sigmoid(model(x)), generator=generator)
        return [{"x": x[k : k + 250], "labels": labels[k : k + 250]} for k in range(0, n, 250)]

    return Task(
        model,
        splits=Splits(split(1, 250), split(2, 1000), split(3, 2000)),
        forward=lambda m, batch: m(batch["x"]),
        loss=lambda z, batch: F.binary_cross_entropy_with_logits(z, batch["labels"], reduction="none"),
        metric=LogLoss(),
    )


def on_steps(folder: Path, **changes: Any) -> SearchResult:
    return search(
        stepped_task(),
        schemes=["fp8"],
        margin=0.02,
        ledger=folder,
        effort=Effort(rounding_draws=0, **changes),
        pinned=["first.weight"],
    )


NOT_DRAWN = 1  # a seed of the audit's sample, in which the step's layer is not


@pytest.mark.parametrize(("seed", "all_probed"), [(8, False), (NOT_DRAWN, False), (8, True)])
def test_a_planted_step_costs_its_own_layer(
    seed: int, all_probed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the audit happens to draw it or not, and also where nothing is screened."""
    monkeypatch.setattr(gather, "AUDIT_SEED", seed)
    found = on_steps(tmp_path, probe_all=all_probed)
    if found.evidence.audit is not None:
        drawn = {row.layer for row in found.evidence.audit.rows}
        assert ("blocks.0.weight" in drawn) == (seed != NOT_DRAWN)
    assert found.certified
    assert {found.inventory.layers[k].name for k in range(18)} - set(found.map.low) == {
        "first.weight",  # pinned: it feeds the step
        "blocks.0.weight",
    }
    assert len(found.certificates) == CERTIFIED_BELOW + 2, "a fixed sequence of nested maps"


def test_without_growing_the_step_costs_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail."""
    monkeypatch.setattr(gather, "AUDIT_SEED", NOT_DRAWN)
    monkeypatch.setattr(growing, "MOST_GROWTH", 0)
    assert len(on_steps(tmp_path).map.low) < 16


def test_below_a_map_that_was_given_back_to_there_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the largest map is looked at, and fails; what is left when its worst layers are gone is not sent alone."""

    def top_only(candidates: Any, predictor: Any, looking: Looking) -> Chain:
        return Chain((*candidates[:-1], looking.look(candidates[-1])), None, predictor)

    monkeypatch.setattr(choosing, "choose", top_only)
    monkeypatch.setattr(growing, "MOST_GROWTH", 0)

    def given_back(step: Step, measured: object, added: object, fused: object, margin: float) -> dict[str, str]:
        return {name: kept for name, kept in step.choice.items() if name != "blocks.0.weight"}

    monkeypatch.setattr(choosing, "reverted", given_back)
    found = on_steps(tmp_path)
    assert found.certified
    assert len(found.certificates) == CERTIFIED_BELOW + 2
    sizes = [certificate.map for certificate in found.certificates]
    assert len(set(sizes)) == len(sizes)
    assert found.map.fingerprint == sizes[-1]
