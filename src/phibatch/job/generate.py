"""Applying the model to a plan, through MLflow's Spark UDF. Its raw answers do not leave this file."""

import mlflow
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from phibatch.config import ModelConfig
from phibatch.contract import COMPLETION_TYPE, RESPONSE_COLUMNS, ErrorCode
from phibatch.model.registry import ResolvedModel


def generate(
    spark: SparkSession, plan: DataFrame, model: ResolvedModel, config: ModelConfig, partitions: int, run_id: str
) -> DataFrame:
    """The response table, still lazy: write it before anything else is done with it.

    Args:
        spark: the session.
        plan: as from `plan.build_plan`.
        model: the model, by version.
        config: how it is run.
        partitions: into how many tasks the generation is cut.
        run_id: the MLflow run.

    Returns:
        One row per input row: `contract.RESPONSE_COLUMNS`, then the kept columns.
    """
    params = {"engine": config.engine.value, "batch_size": config.batch_size, "memory": config.memory or 0}
    predict = mlflow.pyfunc.spark_udf(spark, model.uri, result_type=COMPLETION_TYPE, params=params)
    # Deterministic functions may be evaluated again for every field that is read of their result.
    predict = predict.asNondeterministic()
    generated = (
        plan.where("reason IS NULL")
        # By content: round-robin would hang on the order of `rows`, which a recomputed plan may have otherwise.
        .repartition(partitions, "request")
        # So that requests which begin alike, with a system prompt for instance, reach the engine together.
        .sortWithinPartitions("request")
        .select("rows", predict(F.struct("request")).alias("completion"))
        .select(F.explode("rows").alias("row"), "completion")
    )
    failed = F.col("completion.error.code").isNotNull()
    choice = F.get("completion.choices", F.lit(0))
    answers = {
        "response": choice["message"]["content"],
        "finish_reason": choice["finish_reason"],
        "usage": F.col("completion.usage"),
        "error": F.col("completion.error"),
        "created": F.timestamp_seconds("completion.created"),
        "generation_seconds": F.when(~failed, F.col("completion.generation_seconds")),
    }
    # In few tasks: there is nothing to compute, and a plan has as many partitions as Spark's shuffles.
    rejected = plan.where("reason IS NOT NULL").coalesce(1).select(F.explode("rows").alias("row"), "reason")
    no_tokens = F.struct(*(F.lit(0).alias(f"{kind}_tokens") for kind in ("prompt", "completion", "total", "cached")))
    refusals = {
        "response": F.lit(None),
        "finish_reason": F.lit(None),
        "usage": no_tokens,
        "error": F.struct(F.lit(ErrorCode.INVALID_REQUEST.value).alias("code"), F.col("reason").alias("message")),
        "created": F.current_timestamp(),
        "generation_seconds": F.lit(None),
    }
    return _respond(generated, answers, model, run_id).unionByName(_respond(rejected, refusals, model, run_id))


def _respond(rows: DataFrame, values: dict[str, Column], model: ResolvedModel, run_id: str) -> DataFrame:
    given = {
        "custom_id": F.col("row.custom_id"),
        "request_key": F.col("row.request_key"),
        "model": F.lit(model.uri),
        "run_id": F.lit(run_id),
        **values,
    }
    kept = rows.select("row.kept").schema[0].dataType
    names = kept.names if isinstance(kept, StructType) else []
    return rows.select(
        *(given[name].cast(kind).alias(name) for name, kind in RESPONSE_COLUMNS.items()),
        *(F.col("row.kept")[name].alias(name) for name in names),
    )
