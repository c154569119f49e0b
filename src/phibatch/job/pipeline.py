"""A run, from configuration to written tables."""

import time
from datetime import UTC, datetime

from pyspark import StorageLevel
from pyspark.sql import SparkSession
from rich.console import Console

from phibatch.config import JobConfig
from phibatch.errors import ErrorRateExceeded
from phibatch.job.generate import generate
from phibatch.job.output import append_usage, check_output, read_responses, write_responses
from phibatch.job.plan import build_plan, count_partitions, count_plan
from phibatch.job.progress import Reporter
from phibatch.job.prompts import build_requests, check_columns, read_prompts
from phibatch.job.session import count_slots
from phibatch.job.summary import BatchSummary, log_summary, summarise, track_run
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
    keep_columns = config.output.keep_columns
    prompts = read_prompts(spark, config.input)
    columns = check_columns(prompts, config.input, keep_columns)
    check_output(spark, config.output, prompts)
    model = resolve_model(config.model.uri)
    config = config.with_defaults(model.defaults)
    model.check_engine(config.model.engine)
    check_response_format(config.generation.response_format)
    reporter.say_model(model, config.model.uri)

    requests = build_requests(prompts, columns, config.input, config.generation, keep_columns)
    plan = build_plan(requests, model.digest).persist(StorageLevel.MEMORY_AND_DISK)
    try:
        with track_run(config, model, prompts) as run_id:
            started, clock = datetime.now(UTC), time.perf_counter()
            counts = count_plan(plan)
            slots = count_slots(spark)
            partitions = config.job.partitions or count_partitions(counts.to_generate, slots)
            reporter.say_plan(counts, partitions, slots)
            responses = generate(spark, plan, model, config.model, partitions, run_id)
            with reporter.watch(spark):
                write_responses(responses, config.output)
            seconds = time.perf_counter() - clock
            written = read_responses(spark, config.output, responses.schema)
            summary = summarise(written, model, run_id, started, seconds, counts)
            append_usage(spark, config.output, summary.as_usage())
            log_summary(summary)
    finally:
        plan.unpersist()
    reporter.say_summary(summary, config.output.place, config.output.usage_place)
    if summary.error_rate > config.job.max_error_rate:
        raise ErrorRateExceeded(
            f"{summary.failed:,} of {summary.rows:,} rows failed, more than"
            f" job.max_error_rate = {config.job.max_error_rate:g} allows; all rows are written to {config.output.place}"
        )
    return summary
