"""What a run shows while it goes: on a terminal a bar, elsewhere a line now and then."""

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.sql import DataFrame, SparkSession
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from phibatch.job.plan import PlanCounts
from phibatch.job.summary import BatchSummary
from phibatch.model.registry import ResolvedModel

POLL_SECONDS = 0.5
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

    def say_plan(self, counts: PlanCounts, partitions: int, slots: int) -> None:
        self._say(
            f"rows    {counts.rows:,}: {counts.to_generate:,} to generate, {counts.duplicates:,} duplicates,"
            f" {counts.rejected:,} rejected"
        )
        self._say(f"tasks   {partitions:,} partitions on {slots:,} task slots")

    @contextmanager
    def watch(self, spark: SparkSession) -> Iterator[None]:
        """Show how many of the tasks are done while the block, which runs Spark's jobs, goes on."""
        group = f"phibatch-{uuid.uuid4().hex}"
        spark.sparkContext.setJobGroup(group, "phibatch: generate and write")
        done = threading.Event()
        watcher = threading.Thread(target=self._follow, args=(spark, group, done), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            spark.sparkContext.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]  # None clears it

    def say_summary(self, summary: BatchSummary, output: str, usage: str) -> None:
        table = Table(title=None, show_header=False, box=None, pad_edge=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("rows", f"{summary.rows:,}")
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

    def _follow(self, spark: SparkSession, group: str, done: threading.Event) -> None:
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
        with bar:
            task = bar.add_task("generating", total=None)
            while not done.wait(POLL_SECONDS):
                finished, tasks = _count_tasks(spark, group)
                bar.update(task, completed=finished, total=tasks or None)
                now = time.monotonic()
                if not self._console.is_terminal and now - last >= LINE_SECONDS:
                    last = now
                    left = (now - started) * (tasks - finished) / finished if finished else None
                    self._say(
                        f"        {finished:,} of {tasks:,} tasks after {now - started:,.0f} s"
                        + (f", about {left:,.0f} s left" if left is not None else "")
                    )


def _count_tasks(spark: SparkSession, group: str) -> tuple[int, int]:
    """Tasks done and tasks in all of the newest stage: the one that generates and writes is the last."""
    tracker = spark.sparkContext.statusTracker()
    jobs = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(group)]
    stages = [tracker.getStageInfo(stage) for job in jobs if job for stage in job.stageIds]
    newest = max((stage for stage in stages if stage), key=lambda stage: stage.stageId, default=None)
    return (newest.numCompletedTasks, newest.numTasks) if newest else (0, 0)
