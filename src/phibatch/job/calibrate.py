"""What a run would take in time and money, from a sample of its rows."""

import time
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from phibatch.errors import InputError, WorkerCrash
from phibatch.job.check import CheckedJob
from phibatch.job.generate import build_predict
from phibatch.job.session import count_slots, count_task_cores, explain_failure


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would take, from a sample that was generated.

    Attributes:
        sample_rows, sample_seconds: how many were generated, on `slots` task slots of `task_cores`, and in what time;
            starting the workers and loading the model is not in it.
        completion_tokens: of a row of the sample, on average.
        executors, cores: what the estimate is for; an executor runs one task with all its cores.
        seconds: of the whole run.
        total_tokens: of prompts and completions.
        cost: at the hourly cost of the cluster, by cores; None without one.
    """

    sample_rows: int
    sample_seconds: float
    slots: int
    task_cores: int
    completion_tokens: float
    executors: int
    cores: int
    seconds: float
    total_tokens: float
    cost: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """A sample that was generated: rows, seconds, completion tokens, on so many task slots of so many cores."""

    rows: int
    seconds: float
    completion_tokens: int
    slots: int
    task_cores: int


def generate_sample(spark: SparkSession, job: CheckedJob, requests: DataFrame, sample: int) -> Measured:
    """Generate rows from all over the input, with all task slots at once, and throw the answers away.

    Raises:
        InputError: a row of the sample ends its process.
    """
    slots = count_slots(spark)
    predict = build_predict(spark, job.model, job.config.model, job.config.job)
    # By content, so that the next sample is the same.
    chosen = requests.orderBy(F.xxhash64("request")).limit(sample * slots).collect()
    table = spark.createDataFrame(chosen, requests.schema)

    def run(rows: DataFrame) -> Row:
        answers = rows.repartition(slots).select(predict(F.col("request")).alias("completion"))
        return answers.agg(
            F.count("*").alias("rows"), F.sum("completion.usage.completion_tokens").alias("tokens")
        ).collect()[0]

    try:
        # Workers start and load the model at their first row.
        run(table.limit(slots))
        began = time.monotonic()
        found = run(table)
    except (PySparkException, Py4JJavaError) as error:
        if isinstance(explain_failure(error), WorkerCrash):
            raise InputError(
                "there is no estimate: a row of the sample ends its process, which a run would set aside"
            ) from error
        raise
    return Measured(
        found["rows"],
        time.monotonic() - began,
        found["tokens"] or 0,
        slots,
        count_task_cores(spark),
    )


def build_estimate(
    measured: Measured,
    rows: int,
    prompt_tokens: int,
    cluster: tuple[int | None, int | None],
    hourly_cost: float | None,
) -> Estimate:
    """What a run would take, as if speed grew with executors and cores.

    Args:
        measured: the sample.
        rows: to generate.
        prompt_tokens: of all of them.
        cluster: executors, and cores of each; None is as many as there are now.
        hourly_cost: of the cluster that there is now; None where it is not known.
    """
    executors = cluster[0] or measured.slots
    cores = cluster[1] or measured.task_cores
    used = min(measured.slots, measured.rows)
    slot_seconds = measured.seconds * used / measured.rows * measured.task_cores / cores
    seconds = rows * slot_seconds / min(executors, rows)
    a_row = measured.completion_tokens / measured.rows
    share = executors * cores / (measured.slots * measured.task_cores)
    cost = None if hourly_cost is None else hourly_cost * share * seconds / 3600
    return Estimate(
        measured.rows,
        measured.seconds,
        measured.slots,
        measured.task_cores,
        a_row,
        executors,
        cores,
        seconds,
        prompt_tokens + rows * a_row,
        cost,
    )
