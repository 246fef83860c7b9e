"""A forward computes with the model that it is given, and leaves it as it was: else no map of it is of any use."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.small_tasks import COUNTED_INT8
from precimap import Effort, Splits, Task, search
from precimap.errors import TaskError
from precimap.metrics import Loss
from precimap.searching.preflight.checks import check_task
from precimap.searching.preflight.own_model import check_given_model


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.cache: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.last(torch.relu(self.first(self.table(ids))))
        return scores


def split(seed: int, n: int = 64) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (n, 6), generator=generator)
    return [{"ids": ids, "labels": torch.randint(4, (n,), generator=generator)}]


def task_of(model: nn.Module, forward: Any) -> Task:
    return Task(
        model,
        splits=Splits(split(1), split(2), split(3)),
        forward=forward,
        loss=lambda s, b: nn.functional.cross_entropy(s, b["labels"], reduction="none"),
        metric=Loss(),
    )


def mean(model: Any, batch: Any) -> Tensor:
    scores: Tensor = model(batch["ids"]).mean(1)
    return scores


MODEL = Body().eval()
OTHER = copy.deepcopy(MODEL)
INDEX = MODEL.last.weight.detach().clone()
STATELESS: dict[str, tuple[Any, str]] = {
    "closes over the model": (lambda _, b: mean(MODEL, b), "computed with .* of the Task's model all the same"),
    "closes over a part": (
        lambda m, b: MODEL.last(torch.relu(m.first(m.table(b["ids"])))).mean(1),
        r"computed with last\.(weight|bias), last\.\w+ of the Task's model",
    ),
    "closes over a tensor": (
        lambda m, b: mean(m, b) @ (MODEL.last.weight @ MODEL.last.weight.T),
        r"computed with last\.weight of the Task's model",
    ),
    "calls its functions": (
        lambda m, b: nn.functional.linear(m.table(b["ids"]).mean(1), MODEL.first.weight)[:, :4],
        r"first\.weight of the Task's model",
    ),
    "another model altogether": (
        lambda _, b: mean(OTHER, b),
        "computed with no parameter of the model that it is given",
    ),
    "no model": (lambda _, b: nn.functional.one_hot(b["labels"], 4).float(), "no parameter of the model"),
}


@pytest.mark.parametrize(("forward", "said"), STATELESS.values(), ids=STATELESS)
def test_a_forward_that_computes_with_another_model_is_refused(forward: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        check_task(task_of(MODEL, forward))


def test_it_is_refused_before_anything_is_asked_or_written(tmp_path: Path) -> None:
    for target in ({}, {"target": COUNTED_INT8}):
        with pytest.raises(TaskError, match="it must compute with the model that it is given"):
            search(
                task_of(MODEL, lambda _, b: mean(MODEL, b)),
                schemes=["int8-static-u7"],
                margin=1.0,
                run=tmp_path / "run",
                ledger=tmp_path / "ledger",
                **target,  # type: ignore[arg-type]
            )
    assert not list(tmp_path.iterdir())


HONEST: dict[str, Any] = {
    "as it is": mean,
    "by name": lambda m, b: m.last(torch.relu(m.first(m.table(b["ids"])))).mean(1),
    "asks the model outside for its device": lambda m, b: mean(m, b).to(
        MODEL.first.weight.device, MODEL.first.weight.dtype
    ),
    "functional": lambda m, b: torch.func.functional_call(m, dict(m.named_parameters()), (b["ids"],)).mean(1),
    "keeps a result of before": lambda m, b: mean(m, b) @ (INDEX @ INDEX.T),
}


@pytest.mark.parametrize("forward", HONEST.values(), ids=HONEST)
def test_a_forward_that_uses_its_model_passes(forward: Any) -> None:
    assert check_task(task_of(MODEL, forward)).notes == ()


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Embedding(50, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 4)),
        nn.Sequential(nn.Embedding(50, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))),
    ],
    ids=["attention", "weight_norm"],
)
def test_modules_that_call_otherwise_pass(model: nn.Module) -> None:
    check_task(task_of(model.eval(), mean))


def test_a_recurrent_layer_is_its_own() -> None:
    """It keeps its weights in a list of its own, beside its parameters."""
    model = nn.Sequential(nn.Embedding(50, 8), nn.LSTM(8, 4, batch_first=True)).eval()
    check_task(task_of(model, lambda m, b: m[1](m[0](b["ids"]))[0].mean(1)))


def test_a_model_that_cannot_be_copied_is_a_note() -> None:
    model = Body().eval()
    model.reader = (n for n in range(3))  # type: ignore[assignment]
    (note,) = check_task(task_of(model, mean)).notes
    assert "was not checked: the model cannot be copied" in note
    assert check_given_model(task_of(nn.Identity(), mean), {}) is None


# Writing


def writes_buffer(m: Any, b: Any) -> Tensor:
    m.seen += len(b["ids"])
    return mean(m, b)


def replaces_buffer(m: Any, b: Any) -> Tensor:
    m.seen = m.seen + 1
    return mean(m, b)


def writes_weight(m: Any, b: Any) -> Tensor:
    m.last.bias.data.add_(0)
    with torch.no_grad():
        m.last.weight.mul_(1)
    return mean(m, b)


def adds_buffer(m: Any, b: Any) -> Tensor:
    m.register_buffer("late", torch.ones(1))
    return mean(m, b)


@pytest.mark.parametrize(
    ("forward", "what"),
    [(writes_buffer, "seen"), (replaces_buffer, "seen"), (writes_weight, r"last\.weight"), (adds_buffer, "late")],
)
def test_a_forward_that_writes_the_model_is_refused_and_the_model_is_as_before(forward: Any, what: str) -> None:
    model = Body().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TaskError, match=f"forward writes {what} of the model"):
        check_task(task_of(model, forward))
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_table_that_renormalises_itself_is_named_and_left_as_it_was() -> None:
    model = Body().eval()
    model.table.max_norm = 0.5
    before = model.table.weight.detach().clone()
    with pytest.raises(
        TaskError, match=r"the table table has max_norm=0\.5 and rows beyond it.*table\.max_norm = None"
    ):
        check_task(task_of(model, mean))
    assert torch.equal(model.table.weight, before)


def test_a_batch_norm_in_evaluation_writes_nothing() -> None:
    check_task(task_of(nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 4)).eval(),
                       lambda m, b: m(b["ids"])))  # fmt: skip


def test_what_is_built_once_is_no_matter_and_what_grows_is_said() -> None:
    def once(m: Any, b: Any) -> Tensor:
        m.scratch = torch.arange(3.0)
        if not m.cache:
            m.cache.append(b["ids"])
        return mean(m, b)

    def grows(m: Any, b: Any) -> Tensor:
        m.cache.append(b["ids"])
        return mean(m, b)

    assert check_task(task_of(Body().eval(), once)).notes == ()
    (note,) = check_task(task_of(Body().eval(), grows)).notes
    assert note == "forward adds to cache of the model with every call; is that a cache?"


def test_a_search_after_the_checks_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Body().eval()
    before = copy.deepcopy(model.state_dict())
    search(task_of(model, mean), schemes=["fp8"], margin=5.0, ledger=tmp_path, effort=Effort(rounding_draws=0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Remembering(Body):
    """Keeps the mean of the embeddings of the last batch it saw."""

    def remembered(self, ids: Tensor) -> Tensor:
        key = (ids.shape, int(ids.sum()))
        if vars(self).get("_key") != key:
            vars(self)["_key"], vars(self)["_kept"] = key, self.table(ids).mean(1)
        kept: Tensor = vars(self)["_kept"]
        return kept


def test_results_of_the_call_before_are_refused() -> None:
    """A map would be scored with what the baseline computed for the same batch."""
    with pytest.raises(TaskError, match=r"does not compute with table\.weight when it is given the same batch again"):
        check_task(task_of(Remembering().eval(), lambda m, b: m.last(m.first(m.remembered(b["ids"])))))
