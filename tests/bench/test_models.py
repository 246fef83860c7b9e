"""The models that the benchmarks train, and their tasks: what a score may depend on, and what training may have seen."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from measuring import rival_scores
from models import sasrec
from models.click_training import ClickTraining
from models.sasrec import PAD, SASRec, SASRecRecipe
from models.wukong import Compression, FactorizationMachine, Wukong, WukongRecipe
from precimap import Task, discover
from precimap.layers.refusals import refusal
from precimap.numerics.schemes import scheme
from precimap.task import first_batch, score
from tasks import real_data, real_tasks
from tasks.sequence import NEGATIVES, amazon_sasrec

TINY = SASRecRecipe(width=16, blocks=1, heads=1, longest=6, negatives=32, epochs=1, batch_size=32)


def present(make: Callable[[], Task]) -> Task:
    try:
        return make()
    except FileNotFoundError as error:
        pytest.skip(str(error))


# Published weights


def test_gmf_gives_its_published_ranking_and_takes_weight_only_schemes_alone() -> None:
    task = present(lambda: real_tasks.gmf(search_users=3000, certify_users=3000, calibration_users=40))

    splits = (task.splits.calibration, task.splits.search, task.splits.certify)
    scored = [score(task, task.model, split) for split in splits]

    ndcg = np.concatenate([part.reported["nDCG@10"] for part in scored])
    assert len(ndcg) == 6040
    assert ndcg.mean() == pytest.approx(0.36674, abs=1e-5)
    inventory = discover(task.model, task.forward, first_batch(task, task.splits.search))
    assert rival_scores.eligible(inventory, scheme("fp8")) == rival_scores.eligible(inventory, scheme("int8")) == ()
    assert all(refusal(layer, scheme("int8-weight")) is None for layer in inventory.layers)


# Wukong


def test_wukong_learns_frappe(tmp_path: Path) -> None:
    training = ClickTraining(epochs=2, batch_size=2048, learning_rate=5e-3)
    quick = WukongRecipe(width=8, layers=1, hidden=32, training=training)
    task = present(lambda: real_tasks.frappe_wukong(4000, 8000, 1000, tmp_path, quick))

    assert score(task, task.model, task.splits.search).values.mean() == pytest.approx(0.32, abs=0.05)
    splits = (task.splits.calibration, task.splits.search, task.splits.certify)
    users = [{int(user) for batch in split for user in batch["features"][:, 0]} for split in splits]
    assert sum(map(len, users)) == len(set().union(*users)), "no user is in two splits"
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["wukong"]


def test_a_factorization_machine_multiplies_every_pair() -> None:
    """X (X^T Y) against the full X X^T, of which Y takes columns."""
    machine = FactorizationMachine(5, 3, WukongRecipe(width=4, rank=2)).eval()
    x = torch.randn(7, 5, 4)

    pairs = torch.einsum("nik,njk->nij", x, x) @ machine.project.weight
    expected = machine.mlp(machine.norm(pairs.flatten(1))).reshape(7, 3, 4)

    torch.testing.assert_close(machine(x), expected, rtol=1e-4, atol=1e-5)


def test_wukong_has_a_residual_of_another_width_in_its_first_layer_only() -> None:
    model = Wukong(WukongRecipe(), features=40, fields=10)
    assert [isinstance(layer.residual, Compression) for layer in model.layers] == [True, False, False]


# SASRec


def test_a_score_does_not_depend_on_padding_or_on_what_comes_later() -> None:
    model = SASRec(TINY, 30).eval()
    short = torch.tensor([[3, 9, 4], [PAD, 5, 6]])
    padded = torch.nn.functional.pad(short, (3, 0), value=PAD)
    candidates = torch.randint(1, 31, (2, 5))

    torch.testing.assert_close(model(short, candidates), model(padded, candidates))
    later = torch.cat([padded[:, :-1], torch.tensor([[7], [8]])], dim=1)
    torch.testing.assert_close(model.states(padded)[:, :-1], model.states(later)[:, :-1])
    assert not torch.allclose(model.states(padded)[:, -1], model.states(later)[:, -1])
    assert model.states(padded).isfinite().all()


def test_every_item_but_the_first_is_a_target_once_in_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1, 2, 5, 6, 6, 3]
    sequences = torch.zeros(6, 6, dtype=torch.long)
    for row, length in enumerate(lengths):
        sequences[row, 6 - length :] = 10 * (row + 1) + torch.arange(length)
    seen: list[tuple[int, int]] = []

    def record(_: object, states: Tensor, wanted: Tensor, negatives: Tensor) -> Tensor:
        seen.extend(zip(states.tolist(), wanted.tolist(), strict=True))
        return wanted.float()

    monkeypatch.setattr(sasrec, "_loss", record)
    for batch in sasrec._batches(sequences, size=2):
        items_themselves = SimpleNamespace(states=lambda history: history)
        sasrec._sampled_softmax(items_themselves, batch[:, :-1], batch[:, 1:], torch.zeros(1))

    expected = [(10 * (row + 1) + i, 10 * (row + 1) + i + 1) for row, n in enumerate(lengths) for i in range(n - 1)]
    assert sorted(seen) == sorted(expected)


def small_file(folder: Path, last: int = 0) -> None:
    """90 users of 2 to 12 items out of 300; `last` is added to the last item of each."""
    rng = np.random.default_rng(3)
    lines = ["1 300", "1 1", "1 2", "1 3"]
    for user in range(2, 91):
        items = rng.choice(290, size=rng.integers(2, 13), replace=False) + 1
        items[-1] += last
        lines += [f"{user} {item}" for item in items]
    path = folder / "amazon_video_seq" / "Video.txt.gz"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


def test_training_has_not_seen_the_item_that_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other last items change what is judged and nothing else: the weights are the ones that were kept."""
    monkeypatch.setattr(real_data, "DATA", tmp_path)
    tasks = []
    for last in (0, 5):
        small_file(tmp_path, last)
        tasks.append(amazon_sasrec(20, 30, 10, tmp_path / "cache", TINY))
    one, other = (list(task.splits.search) for task in tasks)

    assert len(list((tmp_path / "cache").iterdir())) == 1
    for before, after in zip(one, other, strict=True):
        assert torch.equal(before["history"], after["history"])
        assert torch.equal(before["candidates"][:, 0] + 5, after["candidates"][:, 0])
        for row, candidates in zip(after["history"], after["candidates"], strict=True):
            assert candidates.shape == (1 + NEGATIVES,)
            assert not set(candidates[1:].tolist()) & {*row.tolist(), int(candidates[0])}


def test_users_are_in_one_split_and_of_four_items_or_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_data, "DATA", tmp_path)
    small_file(tmp_path)
    task = amazon_sasrec(20, 30, 10, tmp_path / "cache", TINY)

    splits = (task.splits.calibration, task.splits.search, task.splits.certify)
    users = [int(user) for split in splits for batch in split for user in batch["user"]]
    assert len(users) == len(set(users)) == 60
    assert all((batch["history"] != PAD).sum(1).min() >= 3 for split in splits for batch in split)


def test_sasrec_learns_what_follows_what() -> None:
    """Items go round in a circle: after 9 comes 10, whoever the user is."""
    starts = torch.randint(0, 40, (400, 1))
    sequences = (starts + torch.arange(8)) % 40 + 1
    before = torch.get_rng_state()
    recipe = replace(TINY, negatives=40, epochs=10, learning_rate=1e-2, dropout=0.1)

    model = sasrec.train(recipe, sequences, 40)
    again = sasrec.train(recipe, sequences, 40)

    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    every = torch.arange(1, 41).expand(400, -1)
    best = model(sequences[:, :6], every).argmax(1) + 1
    assert (best == sequences[:, 6]).float().mean() > 0.95
