"""What of a job can be known before anything is done: input, output and model, looked at once."""

from dataclasses import dataclass

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from phibatch.config import JobConfig
from phibatch.contract import name_answerer
from phibatch.errors import InputError
from phibatch.job.generate import response_schema
from phibatch.job.increment import Increment
from phibatch.job.output import ResponseTable, check_output, read_extras
from phibatch.job.plan import identify
from phibatch.job.prompts import build_requests, check_columns, parse_prompts, read_prompts
from phibatch.job.templates import resolve_prompts
from phibatch.model.grammar import check_response_format
from phibatch.model.registry import ResolvedModel, resolve_model


@dataclass(frozen=True, slots=True)
class CheckedJob:
    """A job that can be begun.

    Attributes:
        config: with the model's own parameters where it sets none.
        model: by version.
        prompt_version: the registered prompts that it works with; None where there are none.
        prompts: the input table.
        increment: which of its files are new; None where all are read.
        rows: its rows, as from `plan.identify`.
        schema: of the response table.
    """

    config: JobConfig
    model: ResolvedModel
    prompt_version: str | None
    prompts: DataFrame
    increment: Increment | None
    rows: DataFrame
    schema: StructType

    @property
    def answerer(self) -> str:
        """What answers, by name: the model's URI, or `echo:` and it."""
        return name_answerer(self.model.uri, self.config.model.engine)

    def open_table(self, spark: SparkSession) -> ResponseTable:
        """The response table, as it is now."""
        exists = check_output(spark, self.config.output, self.prompts)
        return ResponseTable(spark, self.config.output, self.schema, exists=exists)


def check_job(spark: SparkSession, config: JobConfig) -> CheckedJob:
    """Look at what a job names.

    Raises:
        UserError: configuration, input, model or output can not be worked with.
    """
    source, prompt_version = resolve_prompts(config.input)
    keep_columns = config.output.keep_columns
    table = read_prompts(spark, source)
    prompts = parse_prompts(table, source)
    columns = check_columns(prompts, source, keep_columns)
    check_output(spark, config.output, prompts)
    model = resolve_model(config.model.uri)
    config = config.with_defaults(model.defaults)
    model.check_engine(config.model.engine)
    check_response_format(config.generation.response_format)
    increment = None
    if source.incremental:
        if "custom_id" not in columns:
            raise InputError(
                "input.incremental needs a column custom_id: of rows that are not read nothing else is known"
            )
        increment = Increment(spark, config.output, table)
        prompts = parse_prompts(increment.select(table), source)
    requests = build_requests(prompts, columns, source, config.generation, keep_columns)
    asked = {"choices": config.generation.n > 1 or "n" in columns, "prompt_version": prompt_version is not None}
    # What the table has of earlier runs stays.
    there = read_extras(spark, config.output)
    extras = [name for name, wanted in asked.items() if wanted or name in there]
    return CheckedJob(
        config,
        model,
        prompt_version,
        prompts,
        increment,
        identify(requests, name_answerer(model.digest, config.model.engine)),
        response_schema(prompts, keep_columns, extras),
    )
