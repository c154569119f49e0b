"""A run, from configuration to written tables."""

import time
from datetime import UTC, datetime
from functools import partial

from mlflow.exceptions import MlflowException
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from rich.console import Console

from phibatch.config import OPENAI_BATCH, JobConfig
from phibatch.errors import ErrorRateExceeded, PhibatchError
from phibatch.job.answer import Answers, recover, stage
from phibatch.job.check import check_job
from phibatch.job.console import Reporter
from phibatch.job.generate import Lineage
from phibatch.job.openai_batch import write_lines
from phibatch.job.output import append_usage, read_responses
from phibatch.job.progress import Progress
from phibatch.job.publish import publish_report
from phibatch.job.session import count_slots
from phibatch.job.summary import BatchSummary, close_runs, log_progress, log_summary, summarise, track_run
from phibatch.job.work import RunRecord, WorkFolder


def run_batch(spark: SparkSession, config: JobConfig, reporter: Reporter | None = None) -> BatchSummary:
    """Answer every row of the input table, and write responses, usage and a report.

    Args:
        spark: the session.
        config: the job.
        reporter: who is told how it goes; without one, nobody.

    Raises:
        UserError: configuration, input, model or output can not be worked with; nothing was generated or written.
        ErrorRateExceeded: the tables are written, and too many rows failed.
    """
    reporter = reporter or Reporter(Console(quiet=True))
    job = check_job(spark, config)
    reporter.say_model(job.model, config.model.uri)
    if job.increment:
        reporter.say_increment(job.increment)
    config = job.config
    work = WorkFolder(spark, config.output)
    with work.claimed() as earlier_runs:
        started, clock = datetime.now(UTC), time.perf_counter()
        # Looked at again: another run may have ended since.
        table = job.open_table(spark)
        recover(work, table, config.output.mode)
        plan, replaced = stage(config, work, table, job.rows, job.prompts)
        with track_run(config, job.model, job.prompts, job.prompt_version) as run_id:
            run = RunRecord(run_id, job.answerer, started.isoformat())
            work.record(run)
            reporter.say_plan(plan.counts, count_slots(spark))
            lineage = Lineage(job.answerer, run_id, job.prompt_version)
            answers = Answers(spark, work, table, plan, job.model, lineage)
            work.check()
            answers.reject()
            with reporter.watch(plan.counts, partial(_log_progress, run_id)) as advance:
                answers.generate(config, advance)
            work.check()
            if replaced:
                table.replace(work, replaced, run_id)
            seconds = time.perf_counter() - clock
            written = read_responses(spark, config.output, job.schema)
            summaries = summarise(written, [*earlier_runs, run], seconds, plan.counts, answers.engines)
            append_usage(spark, config.output, [each.as_usage() for each in summaries])
            summary = summaries[-1]
            log_summary(summary)
            if config.output.format == OPENAI_BATCH:
                write_lines(spark, work, written, config.output.name)
            failed, rows, of = summary.table_failed, summary.table_rows, ""
            if job.increment:
                failed, rows, of = summary.failed + plan.counts.skipped_failed, plan.counts.rows, " of the new files"
            too_many = rows > 0 and failed / rows > config.job.max_error_rate
            if job.increment and not too_many:
                job.increment.note()
        close_runs(earlier_runs)
    reporter.say_summary(summary, config.output)
    if config.report.enabled:
        reporter.say_report(_publish(spark, config, run_id))
    if too_many:
        raise ErrorRateExceeded(
            f"{failed:,} of {rows:,} rows{of} failed, more than job.max_error_rate = {config.job.max_error_rate:g}"
            f" allows; all rows are written to {config.output.name}"
        )
    return summary


def _publish(spark: SparkSession, config: JobConfig, run_id: str) -> str:
    """Write the report; a run whose rows are all written has not failed for the want of one, but says so."""
    try:
        return publish_report(spark, config.output, hourly_cost=config.report.hourly_cost, log_to=run_id)
    except (PhibatchError, PySparkException, Py4JJavaError, MlflowException) as error:
        return f"not written: {str(error).splitlines()[0]}"


def _log_progress(run_id: str, progress: Progress) -> None:
    log_progress(run_id, progress.as_metrics(), step=round(progress.seconds))
