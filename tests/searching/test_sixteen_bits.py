"""A float32 model that a cast to BF16 breaks: the search keeps the layers that break it wide, and certifies the rest.

The model reads timestamps, and what counts is the difference of two: BF16 has 8 bits, and a difference of 1 between two
numbers around 2,500 is lost in it.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from helpers.small_tasks import COUNTED_INT8
from precimap import EMULATED, Splits, Task, compare, deploy, search
from precimap.layers.target import Target
from precimap.metrics import NE
from precimap.precision_map import Verdict
from precimap.runtime.x86.target import has_bf16, int8_scheme

MARGIN = 0.003
WIDE = "times.weight"


class Clicks(nn.Module):
    """times [n, 8]: four pairs of timestamps; plain [n, 32]: features of ordinary size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times, self.plain, self.deep = nn.Linear(8, 64), nn.Linear(32, 256), nn.Linear(256, 64)
        self.join, self.logit = nn.Linear(128, 64), nn.Linear(64, 1)
        with torch.no_grad():
            self.times.weight.zero_()
            self.times.bias.zero_()
            for row in range(64):  # the difference of a pair, or its negative
                sign, first = 1 - 2 * (row // 4 % 2), 2 * (row % 4)
                self.times.weight[row, first], self.times.weight[row, first + 1] = sign, -sign
            self.logit.weight.mul_(3)

    def forward(self, times: Tensor, plain: Tensor) -> Tensor:
        sides = torch.relu(self.times(times)), torch.relu(self.deep(torch.relu(self.plain(plain))))
        logits: Tensor = self.logit(torch.relu(self.join(torch.cat(sides, 1)))).squeeze(1)
        return logits


@pytest.fixture(scope="module")
def task() -> Task:
    model, n = Clicks().eval(), 24_000
    torch.manual_seed(1)
    later = torch.randint(1000, 4000, (n, 4)).float()
    times, plain = torch.stack([later, later - torch.randn(n, 4)], 2).reshape(n, 8), torch.randn(n, 32)
    with torch.no_grad():
        model.logit.bias -= model(times, plain).mean()
        labels = torch.bernoulli(torch.sigmoid(model(times, plain)))
    batches = [
        {"times": times[i : i + 500], "plain": plain[i : i + 500], "labels": labels[i : i + 500]}
        for i in range(0, n, 500)
    ]
    splits = Splits(batches[:2], batches[2:24], batches[24:])
    return Task(model, splits=splits, metric=NE(), name="times")


def test_the_cast_breaks_the_metric(task: Task, tmp_path: Path) -> None:
    short = copy.deepcopy(task.model).bfloat16()

    def cast(batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = short(batch["times"].bfloat16(), batch["plain"].bfloat16()).float()
        return scores

    found = compare(task, cast, margin=MARGIN, ledger=tmp_path)
    assert not found.certified
    assert found.drop > 10 * MARGIN


@pytest.mark.parametrize(
    "target",
    [EMULATED, pytest.param(COUNTED_INT8, marks=pytest.mark.skipif(not has_bf16(), reason="this CPU has no BF16"))],
    ids=["emulated", "cpu-int8"],
)
def test_the_map_keeps_what_breaks_and_is_certified(task: Task, target: Target, tmp_path: Path) -> None:
    schemes = ["bf16"] if target is EMULATED else ["bf16", int8_scheme()]
    result = search(task, schemes=schemes, target=target, margin=MARGIN, ledger=tmp_path)
    assert result.certified
    kept = result.map.layers[WIDE]
    assert (kept.scheme, kept.verdict) == (None, Verdict.SENSITIVE)
    assert {"plain.weight", "deep.weight"} <= set(result.map.low)
    fast = deploy(task.model, result.map, task=task)
    before, after = _entropy(task, task.model), _entropy(task, fast)
    assert before != after
    assert after / before - 1 < MARGIN  # NE is relative, and its denominator the same


@torch.no_grad()
def _entropy(task: Task, model: nn.Module) -> float:
    found = [
        binary_cross_entropy_with_logits(model(batch["times"], batch["plain"]), batch["labels"], reduction="sum")
        for batch in task.splits.certify
    ]
    return float(sum(found))
