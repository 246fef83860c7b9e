"""The generated logs: the planted model is in them, in Criteo's layout, the same bytes on every call."""

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from typer.testing import CliRunner

from precimap.data import CRITEO
from precimap.demos.click_logs import DAYS, ITEM_FIELD, SECONDS_A_DAY, START, generate, lines
from precimap.errors import InputError


def test_the_layout_is_criteos_and_two_columns() -> None:
    clicks = generate(500, seed=3)
    text = "".join(lines(clicks))
    rows = [line.split("\t") for line in text.splitlines()]
    assert CRITEO.header is not None
    assert {len(row) for row in rows} == {len(CRITEO.header) + 2}
    assert text == "".join(lines(generate(500, seed=3)))
    assert text != "".join(lines(generate(500, seed=4)))
    for row, label, user, time in zip(rows, clicks.label, clicks.user, clicks.time, strict=True):
        assert (row[0], row[-2], row[-1]) == (str(int(label)), str(user), str(time))
        assert all(field == "" or int(field) >= 0 for field in row[1:14])
        assert all(field == "" or (len(field) == 8 and int(field, 16) >= 0) for field in row[14:40])
    assert any(row[1:14].count("") for row in rows)
    assert any(row[14:40].count("") for row in rows)


def test_time_runs_on_and_users_come_back_for_some_days() -> None:
    clicks = generate(20_000)
    assert (np.diff(clicks.time) >= 0).all()
    assert START <= clicks.time[0] < clicks.time[-1] < START + DAYS * SECONDS_A_DAY
    users, visits = np.unique(clicks.user, return_counts=True)
    stays = [np.ptp(clicks.time[clicks.user == user]) / SECONDS_A_DAY for user in users[visits > 5][:300]]
    assert 0.5 < np.median(stays) < 5


def test_clicks_follow_the_planted_model() -> None:
    clicks = generate(20_000)
    planted = 1 / (1 + np.exp(-clicks.logit))
    assert clicks.label.mean() == pytest.approx(planted.mean(), abs=0.01)
    assert 0.2 < planted.mean() < 0.3
    assert roc_auc_score(clicks.label, planted) > 0.75
    # Calibrated over the whole range, not only on average.
    order = np.array_split(np.argsort(planted), 10)
    assert all(abs(clicks.label[part].mean() - planted[part].mean()) < 0.05 for part in order)
    # A fit that sees the dense columns only must find something, and less than the truth.
    seen = np.log1p(np.maximum(clicks.dense, 0))
    fitted = LogisticRegression().fit(seen[:10_000], clicks.label[:10_000])
    known = log_loss(clicks.label[10_000:], fitted.predict_proba(seen[10_000:])[:, 1])
    rate = clicks.label[:10_000].mean()
    assert (
        log_loss(clicks.label[10_000:], planted[10_000:])
        < known
        < log_loss(clicks.label[10_000:], np.full(10_000, rate))
    )


def test_items_drift() -> None:
    """What is shown in the first days says little of what is shown in the last; within a day it says much."""
    clicks = generate(60_000)
    day = (clicks.time - START) // SECONDS_A_DAY
    item = clicks.categorical[:, ITEM_FIELD]
    odd = np.arange(len(day)) % 2 == 1

    def shown(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(item[chosen], minlength=item.max() + 1)

    same_days = spearmanr(shown((day < 3) & odd), shown((day < 3) & ~odd)).statistic
    far_days = spearmanr(shown((day < 3) & odd), shown((day >= 11) & ~odd)).statistic
    assert far_days < same_days - 0.1


def test_the_command_writes_them_and_refuses_none(tmp_path: Path) -> None:
    import typer

    from precimap.demos.click_logs import main

    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, [str(tmp_path / "logs.tsv"), "--rows", "300", "--seed", "3"])
    assert done.exit_code == 0
    assert "300 generated impressions" in done.output
    assert (tmp_path / "logs.tsv").read_text() == "".join(lines(generate(300, seed=3)))
    with pytest.raises(InputError, match="at least one row, got 0"):
        generate(0)
