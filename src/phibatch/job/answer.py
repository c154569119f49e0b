"""Having a plan's chunks generated on the cluster and put into the response table, now or after a run that died."""

import math
from collections.abc import Callable

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from phibatch.config import JobConfig
from phibatch.contract import ErrorCode
from phibatch.job.chunks import Chunk, Chunks, Sizes
from phibatch.job.generate import build_predict, generate, refuse
from phibatch.job.output import ResponseTable
from phibatch.job.plan import DUPLICATE, group, lay_out, mark, match, number_responses
from phibatch.job.session import count_slots, explain_failure
from phibatch.job.stage import StagedPlan
from phibatch.job.work import CHUNKS, WorkFolder
from phibatch.model.registry import ResolvedModel

ROWS_PER_FILE = 250_000
CRASHED = "the process died each time that this row was generated: by a native fault, for lack of memory, or hanging"


def recover(work: WorkFolder, table: ResponseTable, mode: str) -> None:
    """Put into the table what a run that died had finished, and had not put there yet; unless all begins anew."""
    names = work.list_whole(CHUNKS)
    if mode == "overwrite":
        work.remove(*names)
        return
    if not names:
        return
    finished = work.read(*names, schema=table.schema)
    there = table.read()
    if there is not None:
        known = ["custom_id", "request_key", "run_id"]
        # A copy that was rejected is another row.
        own = there.where(~F.coalesce(F.col("error.message") == DUPLICATE, F.lit(False)))
        finished = finished.join(own.select(*known), known, "left_anti")
    table.append(finished.coalesce(1))
    work.remove(*names)


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
        todo = match(rows, numbered, config.job.retry).where(~F.col("done")).drop("done")
    plan = StagedPlan(work, lay_out(group(todo)), prompts)
    if located is None or numbered is None or located.count() == plan.counts.skipped:
        return plan, []
    return plan, table.set_aside(work, mark(numbered, rows, config.job.retry, config.output.orphans))


class Answers:
    """A plan's rows on their way into the response table.

    Args:
        spark: the session.
        work: the run's folder.
        table: where the responses go.
        plan: what is to be done.
        model: the model, by version.
        run_id: the MLflow run.
    """

    def __init__(
        self,
        spark: SparkSession,
        work: WorkFolder,
        table: ResponseTable,
        plan: StagedPlan,
        model: ResolvedModel,
        run_id: str,
    ) -> None:
        self._spark = spark
        self._work = work
        self._table = table
        self._plan = plan
        self._model = model
        self._run_id = run_id
        self._jobs = f"phibatch-{run_id}"

    def reject(self) -> None:
        """Write the rows that can not be answered; the table is there afterwards, if it was not."""
        if self._plan.counts.rejected or not self._table.exists:
            rejected = self._plan.rejected()
            self._table.append(
                refuse(rejected, ErrorCode.INVALID_REQUEST, F.col("reason"), self._model, self._run_id).coalesce(1)
            )

    def generate(self, config: JobConfig, advance: Callable[[int], None]) -> None:
        """Generate chunk by chunk, each made durable in the work folder and then put into the table.

        Args:
            config: the job.
            advance: is told how many generations more are in the table.

        Raises:
            EngineError: the engine failed; nothing else is tried.
            RunError: Spark could not go on.
        """
        rows = self._plan.counts.to_generate
        if not rows:
            return
        predict = build_predict(self._spark, self._model, config.model, config.job)
        parts = config.job.partitions
        sizes = Sizes(math.ceil(rows / parts) if parts else config.job.chunk_rows)

        def answer(chunk: Chunk) -> None:
            self._write(chunk, generate(self._plan.take(chunk), predict, self._model, self._run_id))

        def commit(chunks: list[Chunk]) -> None:
            self._commit(chunks)
            advance(sum(chunk.size for chunk in chunks))

        try:
            skipped = self._plan.counts.skipped
            Chunks(rows, sizes, answer, self._give_up, answered=skipped).run(lambda: count_slots(self._spark), commit)
        finally:
            self._spark.sparkContext.cancelJobGroup(self._jobs)

    def _give_up(self, chunk: Chunk) -> None:
        plan, message = self._plan.take(chunk), F.lit(CRASHED)
        self._write(chunk, refuse(plan, ErrorCode.WORKER_CRASHED, message, self._model, self._run_id))

    def _write(self, chunk: Chunk, responses: DataFrame) -> None:
        told = f"phibatch: generations {chunk.first:,} to {chunk.first + chunk.size - 1:,}"
        self._spark.sparkContext.setJobGroup(self._jobs, told)
        try:
            self._work.write(responses, self._name(chunk))
        except (PySparkException, Py4JJavaError) as error:
            raise explain_failure(error) from error

    def _commit(self, chunks: list[Chunk]) -> None:
        self._work.check()
        names = [self._name(chunk) for chunk in chunks]
        files = math.ceil(sum(chunk.size for chunk in chunks) / ROWS_PER_FILE)
        self._table.append(self._work.read(*names, schema=self._table.schema).coalesce(files))
        self._work.remove(*names)

    def _name(self, chunk: Chunk) -> str:
        return f"{CHUNKS}/{self._run_id}-{chunk.first}-{chunk.size}"
