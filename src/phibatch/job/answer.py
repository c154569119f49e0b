"""Having a plan's chunks generated on the cluster and put into the response table, now or after a run that died."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from phibatch.config import JobConfig
from phibatch.contract import ErrorCode
from phibatch.job.chunks import Chunk, Chunks, Sizes
from phibatch.job.columns import named
from phibatch.job.generate import Lineage, build_predict, generate, refuse
from phibatch.job.output import ResponseTable
from phibatch.job.plan import group, is_duplicate, lay_out, mark, match, number_responses
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
    """What a run that died had finished, and had not put into the table yet; None where there is nothing."""
    names = work.list_whole(CHUNKS)
    if not names or mode == "overwrite":
        return None
    finished = work.read(*names, schema=table.schema)
    there = table.read()
    if there is None:
        return finished
    known = ["custom_id", "request_key", "run_id"]
    # A copy that was rejected is another row.
    own = there.where(~is_duplicate())
    return finished.join(own.select(*known), known, "left_anti")


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
    """
    located = table.locate()
    todo, numbered = rows, None
    if located is not None:
        numbered = number_responses(located)
        todo = match(rows, numbered, config.job.retry).where(~F.col("done")).drop("done", "code")
    plan = StagedPlan(work, lay_out(group(todo)), prompts)
    if located is None or numbered is None or located.count() == plan.counts.skipped:
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
        self._jobs = f"phibatch-{lineage.run_id}"

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
            self._write(chunk, generate(self._plan.take(chunk), predict, self._lineage))

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
