"""What a run shows while it goes: on a terminal a bar, elsewhere a line now and then."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyspark.sql import DataFrame
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from phibatch.job.stage import PlanCounts
from phibatch.job.summary import BatchSummary
from phibatch.model.registry import ResolvedModel

LINE_SECONDS = 10.0


class Reporter:
    """Tells a person how a run goes.

    Args:
        console: where to; one without a terminal gets plain lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def say_model(self, model: ResolvedModel, uri: str) -> None:
        alias = "" if model.uri == uri else f" (from {uri})"
        self._say(f"model   {model.uri}{alias}, {model.digest[:12]}")

    def say_plan(self, counts: PlanCounts, slots: int) -> None:
        done = f"{counts.skipped:,} done already, " if counts.skipped else ""
        self._say(
            f"rows    {counts.rows:,}: {done}{counts.to_generate:,} to generate, {counts.duplicates:,} duplicates,"
            f" {counts.rejected:,} rejected"
        )
        self._say(f"slots   {slots:,} tasks at a time")

    @contextmanager
    def watch(self, total: int) -> Iterator[Callable[[int], None]]:
        """Show how many of the generations are committed; gives what is to be called with those that are new."""
        bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        started = last = time.monotonic()
        done = 0
        with bar:
            task = bar.add_task("generating", total=total)

            def advance(rows: int) -> None:
                nonlocal done, last
                done += rows
                bar.update(task, completed=done)
                now = time.monotonic()
                if not self._console.is_terminal and now - last >= LINE_SECONDS:
                    last = now
                    left = (now - started) * (total - done) / done
                    self._say(f"        {done:,} of {total:,} after {now - started:,.0f} s, about {left:,.0f} s left")

            yield advance

    def say_summary(self, summary: BatchSummary, output: str, usage: str) -> None:
        table = Table(title=None, show_header=False, box=None, pad_edge=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("rows", f"{summary.rows:,}")
        if summary.skipped:
            table.add_row("done already", f"{summary.skipped:,}")
        table.add_row("succeeded", f"{summary.succeeded:,}")
        for code, count in sorted(summary.failed_by_code.items()):
            table.add_row(f"failed: {code}", f"{count:,}")
        table.add_row("prompt tokens", f"{summary.prompt_tokens:,}")
        table.add_row("completion tokens", f"{summary.completion_tokens:,}")
        table.add_row("seconds", f"{summary.seconds:,.1f}")
        table.add_row("tokens per second", f"{summary.tokens_per_second:,.1f}")
        self._console.print(table)
        self._say(f"responses {output}")
        self._say(f"usage     {usage}")
        self._say(f"run       {summary.run_id}")

    def show_answers(self, responses: DataFrame, rows: int) -> None:
        """Print the first answers by `custom_id`."""
        if not rows:
            return
        table = Table(
            "custom_id", "response", "finish_reason", "prompt", "completion", title="Answers and their tokens"
        )
        for row in responses.orderBy("custom_id").limit(rows).collect():
            usage = row["usage"]
            text = (
                row["response"]
                if row["error"]["code"] is None
                else f"{row['error']['code']}: {row['error']['message']}"
            )
            numbers = (str(usage["prompt_tokens"]), str(usage["completion_tokens"]))
            table.add_row(Text(row["custom_id"]), Text(text), row["finish_reason"], *numbers)
        self._console.print(table)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)
