"""Having a plan's chunks generated on the cluster and put into the response table, now or after a run that died."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Observation, SparkSession, Window
from pyspark.sql import functions as F

from phibatch.config import JobConfig
from phibatch.contract import RETRYABLE, ErrorCode
from phibatch.job.chunks import Chunk, Chunks, Sizes
from phibatch.job.columns import named
from phibatch.job.generate import Lineage, build_predict, generate, refuse
from phibatch.job.output import ResponseTable
from phibatch.job.plan import (
    check_older,
    count_older,
    group,
    is_duplicate,
    is_older,
    lay_out,
    mark,
    match,
    number_responses,
)
from phibatch.job.session import count_slots, explain_failure
from phibatch.job.stage import StagedPlan
from phibatch.job.work import CHUNKS, WorkFolder
from phibatch.model.registry import ResolvedModel

ROWS_PER_FILE = 250_000
CRASHED = "the process died each time that this row was generated: by a native fault, for lack of memory, or hanging"


def recover(work: WorkFolder, table: ResponseTable, mode: str) -> None:
    """Put into the table what a run that died had finished, and had not put there yet; unless all begins anew."""
    finished = find_finished(work, table, mode)
    if finished is not None:
        table.append(finished.coalesce(1))
    work.remove(*work.list_whole(CHUNKS))


def find_finished(work: WorkFolder, table: ResponseTable, mode: str) -> DataFrame | None:
    """What runs that died had finished and the table lacks: one response a row; None where there is nothing.

    The table lacks a response when it has none as good for that row, from any run. An answer is better than a
    failure, and a failure that is final is better than one that a run tries again.
    """
    names = work.list_whole(CHUNKS)
    if not names or mode == "overwrite":
        return None
    # A chunk has no two responses to one `custom_id` and request: only rejected rows are copies, and they are in none.
    row = ["custom_id", "request_key"]
    code = F.col("error.code")
    badness = F.when(code.isNull(), 0).when(code.isin(*RETRYABLE), 2).otherwise(1)
    best = Window.partitionBy(*row).orderBy("badness", F.desc("created"))
    finished = (
        work.read(*names, schema=table.schema)
        .select(*row, "created", badness.alias("badness"), F.struct("*").alias("response"))
        .withColumn("rank", F.row_number().over(best))
        .where("rank = 1")
    )
    there = table.read()
    if there is not None:
        # A copy that was rejected is another row.
        known = there.where(~is_duplicate()).groupBy(*row).agg(F.min(badness).alias("known"))
        finished = finished.join(known, row, "left").where("known IS NULL OR badness < known")
    return finished.select("response.*")


def stage(
    config: JobConfig, work: WorkFolder, table: ResponseTable, rows: DataFrame, prompts: DataFrame
) -> tuple[StagedPlan, list[str]]:
    """Write down what is to be done, and set aside what stays of files that will go.

    Args:
        config: the job.
        work: the run's folder.
        table: where the responses are.
        rows: as from `plan.identify`.
        prompts: the input that they are of.

    Returns:
        The plan, and the files to remove at the end: see `ResponseTable.replace`.

    Raises:
        OutputError: the table has answers with keys of another version, and the job does not say to replace them.
    """
    located = table.locate()
    if located is None:
        return StagedPlan(work, lay_out(group(rows)), prompts), []
    numbered = number_responses(located)
    matched = match(rows, numbered, config.job.retry)
    todo = matched.where(~F.col("done")).drop("done", "code")
    there, older = located.agg(F.count("*"), F.count(F.when(is_older("response.request_key"), 1))).collect()[0]
    if older and not config.job.regenerate_older_keys:
        check_older(count_older(todo, numbered, config.job.retry), allowed=False)
    plan = StagedPlan(work, lay_out(group(todo)), prompts)
    if config.input.incremental and plan.counts.skipped:
        # The new files are read once more, but only on a night that found rows of theirs done.
        failed = matched.where(F.col("done") & F.col("code").isNotNull()).count()
        plan.counts = replace(plan.counts, skipped_failed=failed)
    if there == plan.counts.skipped:
        return plan, []
    return plan, table.set_aside(work, mark(numbered, rows, config.job.retry, config.output.orphans))


@dataclass(frozen=True, slots=True)
class Committed:
    """What has come into the table: generations, the rows that they answer, and those rows' totals."""

    generations: int
    rows: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class Answers:
    """A plan's rows on their way into the response table.

    Args:
        spark: the session.
        work: the run's folder.
        table: where the responses go.
        plan: what is to be done.
        model: the model, by version.
        lineage: of the rows.
    """

    def __init__(
        self,
        spark: SparkSession,
        work: WorkFolder,
        table: ResponseTable,
        plan: StagedPlan,
        model: ResolvedModel,
        lineage: Lineage,
    ) -> None:
        self._spark = spark
        self._work = work
        self._table = table
        self._plan = plan
        self._model = model
        self._lineage = lineage
        self._engines: set[tuple[str, str]] = set()
        self._jobs = f"phibatch-{lineage.run_id}"

    @property
    def engines(self) -> list[tuple[str, str]]:
        """The engines that have answered so far, each with its version; models of earlier versions do not tell."""
        return sorted(self._engines)

    def reject(self) -> None:
        """Write the rows that can not be answered; the table is there afterwards, if it was not."""
        if self._plan.counts.rejected or not self._table.exists:
            rejected = self._plan.rejected()
            self._table.append(refuse(rejected, ErrorCode.INVALID_REQUEST, F.col("reason"), self._lineage).coalesce(1))

    def generate(self, config: JobConfig, advance: Callable[[Committed], None]) -> None:
        """Generate chunk by chunk, each made durable in the work folder and then put into the table.

        Args:
            config: the job.
            advance: is told what more is in the table.

        Raises:
            EngineError: the engine failed; nothing else is tried.
            RunError: Spark could not go on.
        """
        rows = self._plan.counts.to_generate
        if not rows:
            return
        predict = build_predict(self._spark, self._model, config.model, config.job)
        parts = config.job.partitions
        sizes = Sizes(math.ceil(rows / parts) if parts else config.job.chunk_rows, config.generation.n)

        def answer(chunk: Chunk) -> None:
            told = Observation()
            self._write(chunk, generate(self._plan.take(chunk), predict, self._lineage, told))
            engine = told.get["engine"]
            if engine is not None and engine["engine"] is not None:
                self._engines.add((engine["engine"], engine["engine_version"]))

        chunks = Chunks(rows, sizes, answer, self._give_up, answered=self._plan.counts.skipped)
        try:
            chunks.run(lambda: count_slots(self._spark), lambda ended: advance(self._commit(ended)))
        finally:
            self._spark.sparkContext.cancelJobGroup(self._jobs)

    def _give_up(self, chunk: Chunk) -> None:
        plan, message = self._plan.take(chunk), F.lit(CRASHED)
        self._write(chunk, refuse(plan, ErrorCode.WORKER_CRASHED, message, self._lineage))

    def _write(self, chunk: Chunk, responses: DataFrame) -> None:
        told = f"phibatch: generations {chunk.first:,} to {chunk.first + chunk.size - 1:,}"
        self._spark.sparkContext.setJobGroup(self._jobs, told)
        try:
            self._work.write(responses.select(*map(named, self._table.schema.names)), self._name(chunk))
        except (PySparkException, Py4JJavaError) as error:
            raise explain_failure(error) from error

    def _commit(self, chunks: list[Chunk]) -> Committed:
        self._work.check()
        names = [self._name(chunk) for chunk in chunks]
        generations = sum(chunk.size for chunk in chunks)
        totals = Observation()
        finished = self._work.read(*names, schema=self._table.schema).observe(
            totals,
            F.count("*").alias("rows"),
            F.count("error.code").alias("failed"),
            *(F.sum(f"usage.{name}").alias(name) for name in ("prompt_tokens", "completion_tokens")),
        )
        self._table.append(finished.coalesce(math.ceil(generations / ROWS_PER_FILE)))
        self._work.remove(*names)
        return Committed(generations, **totals.get)

    def _name(self, chunk: Chunk) -> str:
        return f"{CHUNKS}/{self._lineage.run_id}-{chunk.first}-{chunk.size}"
