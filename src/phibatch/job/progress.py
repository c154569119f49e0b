"""How far a run is, in numbers."""

import threading
import time
from dataclasses import asdict, dataclass

from phibatch.job.answer import Committed
from phibatch.job.stage import PlanCounts


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        rows: of the input, those that are in the response table.
        total: rows of the input.
        failed: rows that ended as errors, those that were rejected among them.
        rows_per_second, tokens_per_second: of what this run generated, tokens of prompts and completions together.
        seconds: since the first chunk was started.
        seconds_left: as the rows so far show it; None before there are any.
    """

    rows: int
    total: int
    failed: int
    rows_per_second: float
    tokens_per_second: float
    seconds: float
    seconds_left: float | None

    def as_metrics(self) -> dict[str, float]:
        """As MLflow metrics of one group."""
        return {f"progress/{name}": value for name, value in asdict(self).items() if value is not None}


class Tally:
    """Adds up what is committed. Safe to use from several threads.

    Args:
        counts: of the plan.
    """

    def __init__(self, counts: PlanCounts) -> None:
        self._counts = counts
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._generations = self._rows = self._failed = self._tokens = 0

    def add(self, committed: Committed) -> None:
        with self._lock:
            self._generations += committed.generations
            self._rows += committed.rows
            self._failed += committed.failed
            self._tokens += committed.prompt_tokens + committed.completion_tokens

    def look(self) -> Progress:
        with self._lock:
            seconds = max(time.monotonic() - self._began, 0.001)
            left = self._counts.to_generate - self._generations
            return Progress(
                rows=self._counts.skipped + self._counts.rejected + self._rows,
                total=self._counts.rows,
                failed=self._counts.rejected + self._failed,
                rows_per_second=self._rows / seconds,
                tokens_per_second=self._tokens / seconds,
                seconds=seconds,
                seconds_left=seconds * left / self._generations if self._generations else None,
            )


def describe_seconds(seconds: float) -> str:
    """A time as a person says it, such as `3 h 12 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
