"""A function of the user's own is known by its code and by the plain values it holds: equal ones are one, others are not."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precimap import Effort, SearchResult, Splits, Task, search
from precimap.errors import AlphaSpent, JournalError
from precimap.metrics import NE, LogLoss, Loss, Perplexity
from precimap.searching.function_code import code_of
from precimap.searching.preflight.checks import check_task
from precimap.searching.same_task import question_terms
from precimap.searching.splits.three_splits import fingerprint_splits

QUICK = Effort(screen_units=32, audit_units=16, check_units=32, rounding_draws=0)


def split(seed: int, units: int = 200) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(units, 16, generator=generator)
    return [{"x": x, "labels": (x[:, 0] > torch.rand(units, generator=generator)).float()}]


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(batch["x"]).squeeze(1)
    return scores


def loss(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores, batch["labels"], reduction="none")


def task_of(**changes: Any) -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)).eval()
    fields: dict[str, Any] = {"forward": forward, "loss": loss, "metric": Loss(), "name": "clicks"}
    return Task(model, splits=Splits(split(1), split(2), split(3)), **{**fields, **changes})


def searched(task: Task, folder: Path, **changes: Any) -> SearchResult:
    asked: dict[str, Any] = {"schemes": ["fp8"], "margin": 5.0, "effort": QUICK, "run": folder / "run"}
    return search(task, **{**asked, "ledger": folder / "ledger", **changes})


def clipped(limit: float) -> Callable[..., Tensor]:
    return lambda scores, batch: loss(scores, batch).clamp(max=limit)


def by_default(limit: float) -> Callable[..., Tensor]:
    def clip(scores: Tensor, batch: Any, *, most: float = limit) -> Tensor:
        return loss(scores, batch).clamp(max=most)

    return clip


@dataclass
class Clip:
    limit: float
    calls: int = 0

    def __call__(self, scores: Tensor, batch: Any) -> Tensor:
        self.calls += 1
        return loss(scores, batch).clamp(max=self.limit)


class ClipModule(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.register_buffer("limit", torch.tensor(limit))

    def forward(self, scores: Tensor, batch: Any) -> Tensor:
        return loss(scores, batch).minimum(self.limit)


def with_table(limit: float) -> Callable[..., Tensor]:
    table = {"limits": [limit, (1, "a")], "kinds": {"x", "y"}}
    return lambda scores, batch: loss(scores, batch).clamp(max=table["limits"][0])  # type: ignore[index]


def of_given(scores: Tensor, batch: Any, limit: float) -> Tensor:
    return loss(scores, batch).clamp(max=limit)


MAKERS: dict[str, Callable[[float], Any]] = {
    "closure": clipped,
    "keyword default": by_default,
    "object": Clip,
    "module": ClipModule,
    "table": with_table,
    "partial": lambda limit: partial(of_given, limit=limit),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_equal_functions_are_one_and_others_are_not(make: Callable[[float], Any]) -> None:
    assert code_of(make(30.0)) == code_of(make(30.0))
    assert code_of(make(30.0)) != code_of(make(31.0))


def test_other_code_is_another_function() -> None:
    codes = {code_of(one) for one in (*(make(30.0) for make in MAKERS.values()), loss, forward, torch.add, torch.mul)}
    assert len(codes) == len(MAKERS) + 4


def test_what_a_function_writes_itself_makes_it_no_other() -> None:
    calls, seen, rows = 0, list[int](), [0]

    def counting(scores: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        seen.append(calls)
        rows[0] += 1
        return scores

    clip = Clip(3.0)
    before = code_of(counting), code_of(clip)
    counting(torch.ones(1), None)
    clip(torch.ones(2), {"labels": torch.ones(2)})
    assert (calls, clip.calls) == (1, 1)
    assert (code_of(counting), code_of(clip)) == before


def test_nothing_that_is_closed_over_can_fail() -> None:
    """A generator, a lock, an open file, a tensor without values: by their types."""
    held = [(n for n in range(3)), sys.stdout, torch.empty(2, device="meta"), object(), nn.Linear(2, 2)]
    codes = []
    for _ in range(2):
        codes.append(code_of(lambda scores, batch: (scores, held)))
        held[3] = object()
    assert codes[0] == codes[1]


def test_a_function_has_one_code_in_every_process(tmp_path: Path) -> None:
    """Sets of texts lie in another order in each."""
    (tmp_path / "mine.py").write_text(
        "from precimap.searching.function_code import code_of\n"
        "kinds = lambda names: lambda s, b: s if b in {'a', 'bc', 'd', 'ef'} and b in names else -s\n"
        "print(code_of(kinds({'u', 'vw', 'x'})))\n"
    )
    told = {
        subprocess.run(
            [sys.executable, tmp_path / "mine.py"],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(told) == 1


def test_a_loss_that_agrees_on_the_first_batch_is_another_question(tmp_path: Path) -> None:
    """Clipped where no loss of the first batch is; the same loss asked again is free."""

    def task(limit: float) -> Any:
        return task_of(metric=Loss(), loss=clipped(limit))

    searched(task(30.0), tmp_path / "a", ledger=tmp_path / "ledger")
    again = searched(task(30.0), tmp_path / "b", ledger=tmp_path / "ledger").certificate
    assert again is not None
    assert again.spent_alpha == 0.05
    with pytest.raises(AlphaSpent):
        searched(task(31.0), tmp_path / "c", ledger=tmp_path / "ledger")


def test_a_run_is_refused_to_a_loss_of_other_code(tmp_path: Path) -> None:
    searched(task_of(loss=clipped(30.0)), tmp_path)
    with pytest.raises(JournalError, match="the code of the loss, or a value that it closes over"):
        searched(task_of(loss=clipped(31.0)), tmp_path)
    assert searched(task_of(loss=clipped(30.0)), tmp_path).certificate is not None


@pytest.mark.parametrize(
    ("metric", "matters"),
    [(Loss(), True), (Perplexity(), True), (LogLoss(), False), (NE(), False)],
    ids=["loss", "perplexity", "log-loss", "NE"],
)
def test_a_loss_is_part_of_a_question_where_a_metric_is_made_of_it(metric: Any, matters: bool) -> None:
    def terms(limit: float) -> dict[str, str]:
        task = task_of(metric=metric, loss=clipped(limit))
        first = check_task(task)
        prints = fingerprint_splits(task, first.reads)
        return question_terms(task, first.scored, prints, False)

    assert terms(30.0) == terms(30.0)
    assert (terms(30.0) != terms(31.0)) is matters
