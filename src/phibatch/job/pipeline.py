"""A run, from configuration to written tables."""

import time
from datetime import UTC, datetime

from pyspark.sql import SparkSession
from rich.console import Console

from phibatch.config import JobConfig
from phibatch.errors import ErrorRateExceeded
from phibatch.job.answer import Answers, recover, stage
from phibatch.job.generate import response_schema
from phibatch.job.output import ResponseTable, append_usage, check_output, read_responses
from phibatch.job.plan import identify
from phibatch.job.progress import Reporter
from phibatch.job.prompts import build_requests, check_columns, read_prompts
from phibatch.job.session import count_slots
from phibatch.job.summary import BatchSummary, close_runs, log_summary, summarise, track_run
from phibatch.job.work import RunRecord, WorkFolder
from phibatch.model.grammar import check_response_format
from phibatch.model.registry import resolve_model


def run_batch(spark: SparkSession, config: JobConfig, reporter: Reporter | None = None) -> BatchSummary:
    """Answer every row of the input table, and write responses and usage.

    Args:
        spark: the session.
        config: the job.
        reporter: who is told how it goes; without one, nobody.

    Raises:
        UserError: configuration, input, model or output can not be worked with; nothing was generated or written.
        ErrorRateExceeded: the tables are written, and too many rows failed.
    """
    reporter = reporter or Reporter(Console(quiet=True))
    prompts = read_prompts(spark, config.input)
    columns = check_columns(prompts, config.input, config.output.keep_columns)
    check_output(spark, config.output, prompts)
    model = resolve_model(config.model.uri)
    config = config.with_defaults(model.defaults)
    model.check_engine(config.model.engine)
    check_response_format(config.generation.response_format)
    reporter.say_model(model, config.model.uri)

    requests = build_requests(prompts, columns, config.input, config.generation, config.output.keep_columns)
    rows = identify(requests, model.digest)
    work = WorkFolder(spark, config.output)
    with work.claimed() as earlier_runs:
        started, clock = datetime.now(UTC), time.perf_counter()
        schema = response_schema(prompts, config.output.keep_columns)
        # Looked at again: another run may have ended since.
        table = ResponseTable(spark, config.output, schema, exists=check_output(spark, config.output, prompts))
        recover(work, table, config.output.mode)
        plan, replaced = stage(config, work, table, rows, prompts)
        with track_run(config, model, prompts) as run_id:
            run = RunRecord(run_id, model.uri, started.isoformat())
            work.record(run)
            reporter.say_plan(plan.counts, count_slots(spark))
            answers = Answers(spark, work, table, plan, model, run_id)
            work.check()
            answers.reject()
            with reporter.watch(plan.counts.to_generate) as advance:
                answers.generate(config, advance)
            work.check()
            if replaced:
                table.replace(work, replaced, run_id)
            seconds = time.perf_counter() - clock
            written = read_responses(spark, config.output, schema)
            summaries = summarise(written, [*earlier_runs, run], seconds, plan.counts)
            append_usage(spark, config.output, [each.as_usage() for each in summaries])
            summary = summaries[-1]
            log_summary(summary)
        close_runs(earlier_runs)
    reporter.say_summary(summary, config.output.place, config.output.usage_place)
    if summary.error_rate > config.job.max_error_rate:
        raise ErrorRateExceeded(
            f"{summary.table_failed:,} of {summary.table_rows:,} rows failed, more than"
            f" job.max_error_rate = {config.job.max_error_rate:g} allows; all rows are written to {config.output.place}"
        )
    return summary
