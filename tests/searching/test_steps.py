"""The single steps of a search: calibration, eligibility, probes, the fixed sequence."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.small_tasks import baseline_named, planted_task, subject_on
from precimap.errors import InputError
from precimap.journal import run_journal
from precimap.layers.discover import discover
from precimap.layers.inventory import Inventory, Layer
from precimap.layers.quantized import QuantizedLayer
from precimap.layers.target import EMULATED, Emulated
from precimap.metrics.paired import upper_bound
from precimap.numerics.schemes import MinimumError, Percentile, scheme
from precimap.precision_map import PrecisionMap
from precimap.searching.calibrate import InputRanges, calibrate
from precimap.searching.certificate.certify import Look, certify
from precimap.searching.comparison import compare
from precimap.searching.eligibility import eligibility
from precimap.searching.evidence.floor import rounding_floor
from precimap.searching.evidence.gather import table_of
from precimap.searching.evidence.probe import probe
from precimap.searching.maps.assemble import MapWriter, assemble, premise_of
from precimap.searching.progress import silent
from precimap.searching.question import Effort, Question
from precimap.searching.run import Run, scored_baseline
from precimap.searching.splits.three_splits import fingerprint_splits
from precimap.task import Task, score

QUESTION = Question(margin=0.1)
NAMES = ("first.weight", "outlier.weight", "last.weight")


@pytest.fixture(scope="module")
def task() -> Task:
    return planted_task()


@pytest.fixture(scope="module")
def inventory(task: Task) -> Inventory:
    return discover(task.model, task.forward, task.splits.search[0])


@pytest.fixture(scope="module")
def calibration(task: Task) -> InputRanges:
    return calibrate(task, NAMES, silent)


@pytest.fixture
def run(task: Task) -> Iterator[Run]:
    with run_journal(None, {}) as journal:
        yield Run(task, journal, silent)


def inputs_of_last(task: Task) -> Tensor:
    """What `last` reads on the calibration split, by hand."""
    model, mask = task.model, torch.ones(64)
    mask[0] = 0
    with torch.no_grad():
        rows = [torch.relu(model.outlier(torch.relu(model.first(b["x"]))) * mask) for b in task.splits.calibration]
    return torch.cat(rows)


def test_amax_ranges_reach_the_extremes(task: Task, calibration: InputRanges) -> None:
    values = inputs_of_last(task)
    found = calibration.input_range("last.weight", scheme("int8-static"))
    assert found is not None
    assert found.zero == 0  # after a ReLU nothing is negative
    assert found.scale == pytest.approx(float(values.max()) / 255, rel=1e-6)
    signed = torch.cat([b["x"] for b in task.splits.calibration])
    found = calibration.input_range("first.weight", scheme("int8-static"))
    assert found is not None
    assert found.scale == pytest.approx(float(signed.max() - signed.min()) / 255, rel=1e-6)
    assert found.zero == round(-float(signed.min()) / found.scale)
    symmetric = calibration.input_range("first.weight", scheme("fp8-static"))
    assert symmetric is not None
    assert symmetric.scale == pytest.approx(float(signed.abs().max()) / 448, rel=1e-6)


def test_other_rules_clip(calibration: InputRanges) -> None:
    plain = calibration.input_range("last.weight", scheme("int8-static"))
    clipped = calibration.input_range("last.weight", scheme("int8-static").with_range(Percentile(99.0)))
    least = calibration.input_range("last.weight", scheme("int8-static").with_range(MinimumError()))
    assert plain is not None
    assert clipped is not None
    assert least is not None
    assert clipped.scale < 0.8 * plain.scale
    assert clipped.scale < least.scale <= plain.scale


def test_dynamic_schemes_need_no_range(calibration: InputRanges) -> None:
    assert calibration.input_range("last.weight", scheme("fp8")) is None


def test_an_unquantised_model_probes_to_exactly_zero(run: Run) -> None:
    again = compare(run.task, scored_baseline(run).whole, baseline_named(run, "again").whole, 0.05)
    assert (again.drop.estimate, again.drop.error, again.drop.changed) == (0, 0, 0)


def test_a_probe_is_the_paired_difference_of_the_quantised_layer(
    task: Task, run: Run, inventory: Inventory, calibration: InputRanges
) -> None:
    """By hand: the last layer's weight alone in FP8, weight only, computed without any interception."""
    pairs, numbers = [("last.weight", scheme("fp8-weight"))], range(len(task.splits.search))
    subject = subject_on(run, [scheme("fp8-weight")], inventory, calibration)
    (found,) = probe(subject, QUESTION, scored_baseline(run), pairs, numbers)
    weight = task.model.last.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 448
    coded = ((weight * (1 / scale)).clamp(-448, 448).to(torch.float8_e4m3fn).float()) * scale
    model = planted_task().model
    with torch.no_grad():
        model.last.weight.copy_(coded)
    d = score(task, model, task.splits.search).losses - score(task, task.model, task.splits.search).losses
    assert found.comparison.drop.estimate == pytest.approx(d.mean(), abs=1e-7)
    assert found.comparison.drop.error == pytest.approx(d.std(ddof=1) / np.sqrt(len(d)), rel=1e-3)


def test_the_floor_is_what_rounding_to_bf16_does(run: Run, inventory: Inventory) -> None:
    question = replace(QUESTION, effort=Effort(check_units=250))
    floor = rounding_floor(subject_on(run, [scheme("fp8")], inventory), question, scored_baseline(run))
    assert floor.drop.changed == floor.drop.n == 250
    assert 0 < abs(floor.drop.estimate) < 0.01


def _layer(name: str, fused: str | None = None, outputs: int = 32) -> Layer:
    return Layer(
        name=name,
        shape=(outputs, 32),
        dtype="float32",
        element_bytes=4,
        ops=("linear",),
        calls=1,
        flops=1,
        contracted=(1,),
        inputs=32,
        outputs=outputs,
        fused=fused,
    )


def test_a_fused_group_is_out_when_one_member_is() -> None:
    layers = (_layer("q", "qkv"), _layer("k", "qkv", outputs=24), _layer("o"))
    found = eligibility(
        Inventory(layers=layers, others=(), units=1, hidden_flops=(), products=()), (scheme("fp8"),), EMULATED, ()
    )
    assert found.open_pairs() == (("o", "fp8"),)
    assert found.reasons("q") == ("engines fuse it with k, which stays in base precision",)
    assert "24" in found.reasons("k")[0]


def test_a_pin_pins_the_group() -> None:
    layers = (_layer("q", "qkv"), _layer("k", "qkv"), _layer("o"))
    found = eligibility(
        Inventory(layers=layers, others=(), units=1, hidden_flops=(), products=()), (scheme("fp8"),), EMULATED, ("q",)
    )
    assert found.open_pairs() == (("o", "fp8"),)


_FEATURES = (
    "t.user[id].weight",
    "t.useri.weight",
    "t.item*.weight",
    "t.item2.weight",
    "t.age?",
    "t.age1",
    "t.[!a]",
    "t.b",
)


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ("t.user[id].weight", {"t.user[id].weight"}),
        ("t.user[id]", {"t.user[id].weight"}),
        ("t.item*", {"t.item*.weight"}),
        ("t.age?", {"t.age?"}),
        ("t.[!a]", {"t.[!a]"}),
        ("t.item[*]*", {"t.item*.weight"}),  # a pattern still
        ("t.us*", {"t.user[id].weight", "t.useri.weight"}),
        ("t.age*", {"t.age?", "t.age1"}),
        ("t.?", {"t.b"}),
    ],
)
def test_a_name_means_that_layer_whatever_it_holds(asked: str, kept: set[str]) -> None:
    inventory = Inventory(
        layers=tuple(_layer(name) for name in _FEATURES), others=(), units=1, hidden_flops=(), products=()
    )
    assert eligibility(inventory, (scheme("fp8"),), EMULATED, (asked,)).pinned == kept
    allowed = eligibility(inventory, (scheme("fp8"),), EMULATED, (), {asked: ()})
    assert {layer for (layer, _), reason in allowed.refusals.items() if reason is not None} == kept


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected a name or a pattern that matches a layer.*got 't\.nobody'"):
        eligibility(
            Inventory(layers=tuple(map(_layer, _FEATURES)), others=(), units=1, hidden_flops=(), products=()),
            (scheme("fp8"),),
            EMULATED,
            ("t.nobody",),
        )


class _Scripted(Emulated):
    """A target whose models score as told: each map adds a constant to the loss of every unit."""

    def __init__(self, drops: dict[int, float]) -> None:
        self.drops, self.asked = drops, []  # type: ignore[var-annotated]

    @contextmanager
    def running(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
        self.asked.append(len(layers))
        yield lambda x: (model(x), self.drops[len(layers)])  # type: ignore[misc]


@pytest.mark.parametrize(
    ("drops", "asked", "answers"),
    [
        ({0: 0.0, 1: 0.01, 2: 0.02, 3: 0.03}, [0, 1, 2, 3], [True, True, True]),
        ({0: 0.0, 1: 0.01, 2: 0.30, 3: 0.03}, [0, 1, 2], [True, False]),
        ({0: 0.0, 1: 0.30, 2: 0.01, 3: 0.01}, [0, 1], [False]),
    ],
)
def test_the_sequence_stops_at_the_first_failure(
    task: Task,
    inventory: Inventory,
    calibration: InputRanges,
    drops: dict[int, float],
    asked: list[int],
    answers: list[bool],
) -> None:
    chain = [_map(task, inventory, calibration, NAMES[: k + 1]) for k in range(3)]
    target = _Scripted(drops)
    noise = torch.Generator().manual_seed(0)

    scripted = _scripted(task, 0.001, noise)
    look = Look(target=target, margin=0.1, alpha=0.05, spent_alpha=0.05, split="s")
    with run_journal(None, {}) as journal:
        certificates = certify(Run(scripted, journal, silent), look, [(one, None) for one in chain])
    assert target.asked == asked
    assert [c.certified for c in certificates] == answers
    for certificate, joint in zip(certificates, chain, strict=False):
        assert certificate.map == joint.fingerprint
    if not answers[-1]:
        assert certificates[-1].verdict == "no: the drop is above the margin"


def _scripted(task: Task, sd: float, generator: torch.Generator) -> Task:
    """The task on a `_Scripted` target: the scripted drop of a map, with noise, is added to each unit's loss."""

    def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        scores, drop = model(batch["x"])
        return torch.cat([scores, drop + (drop > 0) * sd * torch.randn(len(scores), 1, generator=generator)], 1)

    return replace(
        task,
        forward=forward,
        loss=lambda s, b: nn.functional.cross_entropy(s[:, :-1], b["labels"], reduction="none") + s[:, -1],
    )


def _map(task: Task, inventory: Inventory, calibration: InputRanges, names: tuple[str, ...]) -> PrecisionMap:
    with run_journal(None, {}) as journal:
        subject = subject_on(Run(task, journal, silent), [scheme("fp8")], inventory, calibration)
    writer = MapWriter(
        subject=subject,
        table=table_of(subject, QUESTION, ()),
        premise=premise_of(task, "w", fingerprint_splits(task), "0"),
        alpha=0.05,
        cutoff=0.01,
    )
    return assemble(writer, dict.fromkeys(names, "fp8"))


def test_too_few_units_is_an_answer_with_a_number(task: Task, inventory: Inventory, calibration: InputRanges) -> None:
    """60 units, a small drop and much noise: not certified, and the sample size that would do certifies indeed."""
    generator = torch.Generator().manual_seed(3)
    few = replace(task, splits=replace(task.splits, certify=[{k: v[:60] for k, v in task.splits.certify[0].items()}]))

    scripted = _scripted(few, 0.4, generator)
    only = _map(task, inventory, calibration, NAMES[:1])
    look = Look(target=_Scripted({0: 0.0, 1: 0.01}), margin=0.1, alpha=0.05, spent_alpha=0.05, split="s")
    with run_journal(None, {}) as journal:
        (found,) = certify(Run(scripted, journal, silent), look, [(only, None)])
    assert not found.certified
    assert found.needed is not None
    fewest, most = found.needed
    assert most is not None
    assert 60 < fewest < 1000
    assert fewest < most
    assert re.search(r"needs about \d+ to [\d,]+ units for the drop", found.verdict)
    d = 0.01 + 0.4 * torch.randn(2 * most, generator=generator).double().numpy()
    assert upper_bound(d, _units(len(d)), 0.05, None) <= 0.1


def _units(n: int):
    from precimap.metrics.units import Units

    return Units(n=n)
