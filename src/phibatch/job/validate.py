"""What a run would do, found out without doing it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from phibatch.config import JobConfig
from phibatch.errors import ConfigError, InputError, ModelError
from phibatch.job.answer import find_finished
from phibatch.job.calibrate import Estimate, build_estimate, generate_sample
from phibatch.job.check import CheckedJob, check_job
from phibatch.job.columns import named
from phibatch.job.generate import build_predict
from phibatch.job.plan import check_older, count_older, group, match, number_responses
from phibatch.job.session import count_slots, explain_failure
from phibatch.job.work import WorkFolder

MOST_REASONS = 10
BINS = 8


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """How long prompts are, in tokens, over the requests that are to be generated: exact, of all of them.

    Attributes:
        total: tokens of all.
        bins: equal stretches of lengths, each with its first and last length and how many requests have one of them.
    """

    total: int
    mean: float
    median: int
    p95: int
    p99: int
    high: int
    bins: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Validation:
    """What would become of an input's rows.

    Attributes:
        rows: of the input: the sum of the following, where `duplicates` share the answers of `to_generate`.
        done_failed: of the rows that are done already, those that failed for good.
        reasons: why rows are rejected, the most frequent first, and `other reasons` after ten.
        refused: rows, of those to generate, that the engine would refuse, by error code.
        max_error_rate: the share of all rows that may fail.
        prompt_tokens: None where nothing is to be generated.
        estimate: None without a sample.
        regenerate_older_keys: whether rows may be generated anew that another version of phibatch has answered.
        older: how many rows these are, of those to generate.
    """

    rows: int
    done: int
    done_failed: int
    rejected: int
    to_generate: int
    duplicates: int
    reasons: dict[str, int]
    refused: dict[str, int]
    max_error_rate: float
    prompt_tokens: PromptTokens | None
    estimate: Estimate | None
    regenerate_older_keys: bool
    older: int = 0

    def check(self) -> None:
        """Raise UserError when the run would fail: more rows than it allows would, or it may not generate them anew."""
        check_older(self.older, allowed=self.regenerate_older_keys)
        failed = self.done_failed + self.rejected + sum(self.refused.values())
        if failed > self.rows * self.max_error_rate:
            raise InputError(
                f"the run would fail: {failed:,} of {self.rows:,} rows would, more than job.max_error_rate ="
                f" {self.max_error_rate:g} allows"
            )


def validate_job(
    spark: SparkSession,
    config: JobConfig,
    sample: int | None = None,
    executors: int | None = None,
    cores: int | None = None,
) -> Validation:
    """Look at a job, its rows and its model. The output is claimed meanwhile, and left as it was.

    Args:
        spark: the session.
        config: the job.
        sample: how many rows to generate for each task slot, to estimate time and cost; None for no estimate.
        executors: what the estimate is for; None for what there is.
        cores: of each executor.

    Raises:
        UserError: the run would fail.
    """
    if (executors or cores) and not sample:
        raise ConfigError("--executors and --cores are for an estimate: give --calibrate as well")
    job = check_job(spark, config)
    work = WorkFolder(spark, config.output)
    with work.visited():
        matched, responses = _match(spark, job, work)
        rows = matched.persist(StorageLevel.DISK_ONLY)
        undone = rows.where(~F.col("done")).drop("done", "code")
        todo = group(undone).persist(StorageLevel.DISK_ONLY)
        try:
            counts = rows.groupBy("done", F.col("reason").isNotNull().alias("rejected")).agg(
                F.count("*").alias("rows"), F.count("code").alias("failed")
            )
            reasons = rows.where(~F.col("done") & F.col("reason").isNotNull()).groupBy("reason").count()
            frequent = reasons.orderBy(F.desc("count"), "reason").limit(MOST_REASONS)
            requests = todo.where("request IS NOT NULL").select("request", F.size("rows").alias("rows"))
            told = {row["reason"]: row["count"] for row in frequent.collect()}
            validation = _validate(spark, job, counts.collect(), told, requests, sample, (executors, cores))
            older = count_older(undone, responses, config.job.retry) if responses is not None else 0
            return replace(validation, older=older)
        except (PySparkException, Py4JJavaError) as error:
            raise ModelError(f"the run would fail: {explain_failure(error)}") from error
        finally:
            todo.unpersist()
            rows.unpersist()


def _match(spark: SparkSession, job: CheckedJob, work: WorkFolder) -> tuple[DataFrame, DataFrame | None]:
    """The rows, with whether they are done, and the responses that say so; None where there are none.

    Responses are in the table, or of a run that died before it put them there.
    """
    table = job.open_table(spark)
    there = table.read()
    finished = find_finished(work, table, job.config.output.mode)
    if there is not None:
        there = there.select(*map(named, table.schema.names))
    found = there.unionByName(finished) if there is not None and finished is not None else there or finished
    if found is None:
        return job.rows.withColumns({"done": F.lit(False), "code": F.lit(None).cast("string")}), None
    numbered = number_responses(found.select(F.struct("*").alias("response")))
    return match(job.rows, numbered, job.config.job.retry), numbered


def _validate(
    spark: SparkSession,
    job: CheckedJob,
    counts: Sequence[Row],
    reasons: dict[str, int],
    requests: DataFrame,
    sample: int | None,
    cluster: tuple[int | None, int | None],
) -> Validation:
    slots = count_slots(spark)
    config = job.config
    predict = build_predict(spark, job.model, config.model, config.job, count_only=True)
    counted = (
        requests.repartition(slots)
        .select("rows", predict(F.col("request")).alias("completion"))
        .groupBy(F.col("completion.error.code").alias("code"), F.col("completion.usage.prompt_tokens").alias("tokens"))
        .agg(F.count("*").alias("requests"), F.sum("rows").alias("rows"))
        .collect()
    )
    refused: dict[str, int] = {}
    for row in counted:
        if row["code"] is not None:
            refused[row["code"]] = refused.get(row["code"], 0) + row["rows"]
    lengths = {row["tokens"]: row["requests"] for row in counted if row["code"] is None}
    rows = sum(row["rows"] for row in counts)
    done = sum(row["rows"] for row in counts if row["done"])
    rejected = sum(row["rows"] for row in counts if row["rejected"] and not row["done"])
    if rejected > sum(reasons.values()):
        reasons = {**reasons, "other reasons": rejected - sum(reasons.values())}
    to_generate = sum(row["requests"] for row in counted)
    tokens = _describe_lengths(lengths)
    estimate = None
    if sample and tokens:
        measured = generate_sample(spark, job, requests, sample)
        estimate = build_estimate(measured, sum(lengths.values()), tokens.total, cluster, config.report.hourly_cost)
    return Validation(
        rows=rows,
        done=done,
        done_failed=sum(row["failed"] for row in counts if row["done"]),
        rejected=rejected,
        to_generate=to_generate,
        duplicates=rows - done - rejected - to_generate,
        reasons=reasons,
        refused=refused,
        max_error_rate=config.job.max_error_rate,
        prompt_tokens=tokens,
        estimate=estimate,
        regenerate_older_keys=config.job.regenerate_older_keys,
    )


def _describe_lengths(lengths: dict[int, int]) -> PromptTokens | None:
    """From how many requests there are of each length."""
    if not lengths:
        return None
    ordered = sorted(lengths.items())
    count = sum(lengths.values())

    def at(share: float) -> int:
        below = 0
        for length, requests in ordered:
            below += requests
            if below >= share * count:
                return length
        return ordered[-1][0]

    low, high = ordered[0][0], ordered[-1][0]
    width = math.ceil((high - low + 1) / BINS)
    bins = tuple(
        (first, first + width - 1, sum(lengths.get(length, 0) for length in range(first, first + width)))
        for first in range(low, high + 1, width)
    )
    total = sum(length * requests for length, requests in ordered)
    return PromptTokens(total, total / count, at(0.5), at(0.95), at(0.99), high, bins)
