"""Progress tells stages, and an ETA that follows from what was done."""

import io

import pytest
from rich.console import Console

from precimap.report.progress_bar import progress_bar, reading_bar


def test_a_log_gets_a_line_a_stage_and_an_honest_eta(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("precimap.report.progress_bar.time.monotonic", lambda: now)
    log = io.StringIO()
    with progress_bar(Console(file=log)) as progress:
        progress("probe", 0, 40)
        for done, second in ((1, 105.0), (10, 150.0), (11, 155.0)):
            now = second
            progress("probe", done, 40)
        now = 156.0
        progress("certify", 0, 3)
    assert log.getvalue().splitlines() == ["probe: 0 of 40", "probe: 10 of 40, about 150 s left", "certify: 0 of 3"]


def test_a_terminal_gets_bars() -> None:
    screen = io.StringIO()
    with progress_bar(Console(file=screen, force_terminal=True, width=80)) as progress:
        progress("probe", 3, 40)
    shown = screen.getvalue()
    assert "probe" in shown
    assert "3/40" in shown
    assert "left" in shown


def test_reading_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("precimap.report.progress_bar.time.monotonic", lambda: now)
    log, screen = io.StringIO(), io.StringIO()
    with reading_bar(Console(file=log)) as progress:
        progress("read logs.tsv", 1_000_000, 90_000_000)
        now = 140.0
        progress("read logs.tsv", 30_000_000, 90_000_000)
    assert log.getvalue().splitlines() == [
        "read logs.tsv: 1.0 MB of 90.0 MB",
        "read logs.tsv: 30.0 MB of 90.0 MB, about 80 s left",
    ]
    now = 150.0
    log.truncate(0)
    with reading_bar(Console(file=log)) as progress:  # the second pass has a time of its own
        for done in (80_000_000, 90_000_000, 1_000_000):
            progress("read logs.tsv", done, 90_000_000)
        now = 190.0
        progress("read logs.tsv", 45_000_000, 90_000_000)
    assert log.getvalue().endswith("1.0 MB of 90.0 MB\nread logs.tsv: 45.0 MB of 90.0 MB, about 40 s left\n")
    with reading_bar(Console(file=screen, force_terminal=True, width=80)) as progress:
        progress("read logs.tsv", 30_000_000, 90_000_000)
    assert "30.0/90.0 MB" in screen.getvalue()
    assert "left" in screen.getvalue()
