"""What a person sees: on a terminal a panel while a run goes, elsewhere a line now and then; and tables at the end."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pyspark.sql import DataFrame
from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from phibatch.config import OutputConfig
from phibatch.job.answer import Committed
from phibatch.job.calibrate import Estimate
from phibatch.job.compare import Comparison, Side
from phibatch.job.increment import Increment
from phibatch.job.progress import Progress, Tally, describe_seconds
from phibatch.job.stage import PlanCounts
from phibatch.job.summary import BatchSummary
from phibatch.job.validate import Validation
from phibatch.model.registry import ResolvedModel

LINE_SECONDS = 30.0


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
        if not model.takes_system:
            self._say("system  the chat template has no place for it: a system text goes before the first user turn's")

    def say_increment(self, increment: Increment) -> None:
        self._say(f"input   {increment.new_files:,} new files of {increment.files:,}")

    def say_plan(self, counts: PlanCounts, slots: int) -> None:
        done = f"{counts.skipped:,} done already, " if counts.skipped else ""
        self._say(
            f"rows    {counts.rows:,}: {done}{counts.to_generate:,} to generate, {counts.duplicates:,} duplicates,"
            f" {counts.rejected:,} rejected"
        )
        self._say(f"slots   {slots:,} tasks at a time")

    @contextmanager
    def watch(self, counts: PlanCounts, tell: Callable[[Progress], None]) -> Iterator[Callable[[Committed], None]]:
        """Show how far a run is; gives what is to be called with what was committed.

        Args:
            counts: of the run's plan.
            tell: is given the same numbers every 30 seconds, and at the end.
        """
        tally = Tally(counts)
        ended = threading.Event()

        def repeat() -> None:
            while not ended.wait(LINE_SECONDS):
                progress = tally.look()
                tell(progress)
                if not self._console.is_terminal:
                    self._say(f"        {_describe(progress)}")

        repeating = threading.Thread(target=repeat, daemon=True)
        repeating.start()
        try:
            if self._console.is_terminal:
                with Live(get_renderable=lambda: _panel(tally.look()), console=self._console, transient=True):
                    yield tally.add
            else:
                yield tally.add
        finally:
            ended.set()
            repeating.join()
            tell(tally.look())

    def say_summary(self, summary: BatchSummary, output: OutputConfig) -> None:
        table = _plain_table()
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
        self._say(f"responses {output.name}")
        self._say(f"usage     {output.usage_place}")
        self._say(f"run       {summary.run_id}")
        if summary.engine:
            self._say(f"engine    {summary.engine} ({summary.engine_version})")

    def say_report(self, page: str) -> None:
        self._say(f"report    {page}")

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

    def say_validation(self, validation: Validation) -> None:
        table = _plain_table()
        table.add_row("rows", f"{validation.rows:,}")
        table.add_row("done already", f"{validation.done:,}")
        table.add_row("to generate", f"{validation.to_generate:,}")
        if validation.older:
            table.add_row("answered by another version", f"{validation.older:,}")
        table.add_row("duplicates of those", f"{validation.duplicates:,}")
        table.add_row("rejected", f"{validation.rejected:,}")
        for reason, count in validation.reasons.items():
            table.add_row(Text(f"  {reason}"), f"{count:,}")
        table.add_row("refused by the engine", f"{sum(validation.refused.values()):,}")
        for code, count in validation.refused.items():
            table.add_row(f"  {code}", f"{count:,}")
        self._console.print(table)
        tokens = validation.prompt_tokens
        if tokens:
            self._say(
                f"prompt tokens: {tokens.total:,} in all; mean {tokens.mean:,.1f}, median {tokens.median:,},"
                f" 95 % up to {tokens.p95:,}, 99 % up to {tokens.p99:,}, most {tokens.high:,}"
            )
            bars = Table.grid(padding=(0, 2))
            for low, high, count in tokens.bins:
                bars.add_row(
                    f"{low:,} to {high:,}", Bar(max(c for *_, c in tokens.bins), 0, count, width=40), f"{count:,}"
                )
            self._console.print(bars)
        if validation.estimate:
            self._say_estimate(validation.estimate)
        elif validation.to_generate:
            self._say("time and cost: --calibrate estimates them from a sample")

    def _say_estimate(self, estimate: Estimate) -> None:
        self._say(
            f"measured: {estimate.sample_rows:,} rows, {estimate.sample_seconds:,.1f} s with {estimate.slots:,} task"
            f" slots of {estimate.task_cores:,} cores; {estimate.completion_tokens:,.1f} completion tokens a row"
        )
        cost = "" if estimate.cost is None else f", costs {estimate.cost:,.2f}"
        self._say(
            f"estimate: {describe_seconds(estimate.seconds)} on {estimate.executors:,} executors of"
            f" {estimate.cores:,} cores{cost}, for {estimate.total_tokens:,.0f} tokens"
        )
        if (estimate.executors, estimate.cores) != (estimate.slots, estimate.task_cores):
            self._say("          (as if a slot's speed grew with its cores: it grows by less)")

    def say_comparison(self, comparison: Comparison) -> None:
        shares = (comparison.agreement, comparison.loose_agreement)
        equal, alike = (f" ({share:.1%})" if share is not None else "" for share in shares)
        self._say(f"rows in both        {comparison.rows:,}")
        self._say(f"answered in both    {comparison.answered:,}")
        self._say(f"equal               {comparison.equal:,}{equal}")
        self._say(f"but for case and punctuation {comparison.alike:,}{alike}")
        first, second = comparison.first, comparison.second
        table = Table("", escape(first.output), escape(second.output))
        lines: dict[str, Callable[[Side], str]] = {
            "model": lambda side: ", ".join(side.models),
            "rows": lambda side: f"{side.rows:,}",
            "succeeded": lambda side: f"{side.succeeded:,}",
            "tokens of an answer, mean": lambda side: _number(side.mean_tokens),
            "tokens of an answer, median": lambda side: _number(side.median_tokens),
            "cut by their limit": lambda side: "-" if side.length_cut is None else f"{side.length_cut:.1%}",
            "seconds a row, mean": lambda side: _number(side.mean_seconds),
            "completion tokens/s, all runs": lambda side: _number(side.tokens_per_second),
        }
        for word, value in lines.items():
            table.add_row(word, Text(value(first)), Text(value(second)))
        self._console.print(table)
        if comparison.samples:
            samples = Table(
                "custom_id", escape(first.output), escape(second.output), title="Answers that differ", show_lines=True
            )
            for sample in comparison.samples:
                samples.add_row(Text(sample.custom_id), Text(sample.first), Text(sample.second))
            self._console.print(samples)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _describe(progress: Progress) -> str:
    return (
        f"{progress.rows:,} of {progress.total:,} rows after {describe_seconds(progress.seconds)}:"
        f" {progress.rows_per_second:,.1f} rows/s, {progress.tokens_per_second:,.0f} tokens/s,"
        f" {progress.failed:,} failed, {_left(progress)}"
    )


def _left(progress: Progress) -> str:
    left = progress.seconds_left
    return "no chunk is done yet" if left is None else f"about {describe_seconds(left)} left"


def _panel(progress: Progress) -> RenderableType:
    failed = f"[red]{progress.failed:,} failed[/]" if progress.failed else "none failed"
    lines = Table.grid()
    lines.add_row(ProgressBar(total=max(progress.total, 1), completed=progress.rows))
    lines.add_row(Text.from_markup(f"[bold]{progress.rows:,}[/] of {progress.total:,} rows, {failed}"))
    lines.add_row(f"{progress.rows_per_second:,.1f} rows/s, {progress.tokens_per_second:,.0f} tokens/s")
    lines.add_row(f"{describe_seconds(progress.seconds)} gone, {_left(progress)}")
    return Panel(lines, title="phibatch", title_align="left", width=90)


def _plain_table() -> Table:
    """Of words and numbers."""
    table = Table(title=None, show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
