import io
import threading
import time

import pytest
from rich.console import Console
from rich.text import Text

from phibatch.job import console
from phibatch.job.answer import Committed
from phibatch.job.console import Reporter
from phibatch.job.progress import Tally, describe_seconds
from phibatch.job.stage import PlanCounts

COUNTS = PlanCounts(rows=100, skipped=20, rejected=5, to_generate=50)


def test_progress_counts_what_is_in_the_table():
    """Rows that were there, were rejected or are committed; rates and time left are of what was generated."""
    tally = Tally(COUNTS)
    assert (tally.look().rows, tally.look().failed, tally.look().seconds_left) == (25, 5, None)
    time.sleep(0.05)
    tally.add(Committed(generations=10, rows=15, failed=2, prompt_tokens=100, completion_tokens=50))
    progress = tally.look()
    assert (progress.rows, progress.total, progress.failed) == (40, 100, 7)
    assert progress.rows_per_second == pytest.approx(15 / progress.seconds)
    assert progress.tokens_per_second == pytest.approx(150 / progress.seconds)
    assert progress.seconds_left == pytest.approx(4 * progress.seconds)
    assert progress.as_metrics()["progress/rows"] == 40


def test_without_a_terminal_there_are_lines(monkeypatch):
    """A line and the same numbers for MLflow now and then, and once more at the end, without control characters."""
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    out, told, waiting = io.StringIO(), [], threading.Event()

    def tell(progress):
        told.append(progress)
        if progress.rows == 40 and len(told) > 1:
            waiting.set()

    with Reporter(Console(file=out, width=200)).watch(COUNTS, tell) as advance:
        advance(Committed(generations=10, rows=15, failed=2, prompt_tokens=100, completion_tokens=50))
        assert waiting.wait(5)
    assert "40 of 100 rows after 0 s" in out.getvalue()
    assert "7 failed" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert told[-1].rows == 40


def test_on_a_terminal_there_is_a_panel():
    """It shows rows, rates, failures and the time left, and is gone at the end."""
    out = io.StringIO()
    with Reporter(Console(file=out, force_terminal=True, width=100)).watch(COUNTS, lambda _: None) as advance:
        advance(Committed(generations=10, rows=15, failed=2, prompt_tokens=100, completion_tokens=50))
        until = time.monotonic() + 10
        while "7 failed" not in Text.from_ansi(out.getvalue()).plain and time.monotonic() < until:
            time.sleep(0.05)
    shown = Text.from_ansi(out.getvalue()).plain
    for piece in ("40", "of 100 rows", "rows/s", "tokens/s", "7 failed", "left"):
        assert piece in shown


def test_an_error_ends_the_watch():
    """What the run raises comes through, and the last numbers are told."""
    told = []
    with pytest.raises(ValueError, match="broken"), Reporter(Console(quiet=True)).watch(COUNTS, told.append):
        raise ValueError("broken")
    assert len(told) == 1


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (75, "1 min 15 s"), (11_520, "3 h 12 min")])
def test_times_are_for_people(seconds, words):
    assert describe_seconds(seconds) == words
