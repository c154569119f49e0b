"""Applying the model to a plan, through MLflow's Spark UDF. Its raw answers do not leave this file."""

from collections.abc import Callable, Sequence

import mlflow
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType

from phibatch.config import JobSettings, ModelConfig
from phibatch.contract import COMPLETION_TYPE, RESPONSE_COLUMNS, ErrorCode
from phibatch.model.registry import ResolvedModel

Predict = Callable[[Column], Column]


def build_predict(spark: SparkSession, model: ResolvedModel, config: ModelConfig, job: JobSettings) -> Predict:
    """The model as a function of a column of requests. Once a run: MLflow sends the model to the cluster here."""
    params = {
        "engine": config.engine.value,
        "batch_size": config.batch_size,
        "memory": config.memory or 0,
        "row_timeout": job.row_timeout or 0.0,
        "worker_timeout": job.worker_timeout,
    }
    predict = mlflow.pyfunc.spark_udf(spark, model.uri, result_type=COMPLETION_TYPE, params=params)
    # Deterministic functions may be evaluated again for every field that is read of their result.
    predict = predict.asNondeterministic()
    return lambda request: predict(F.struct(request.alias("request")))


def response_schema(prompts: DataFrame, keep_columns: Sequence[str]) -> StructType:
    """The response table's columns: the contract's, then the input's that are kept, as they are there."""
    kept = prompts.select(*(F.col(f"`{name}`").alias(name) for name in keep_columns)).schema
    own = (StructField(name, DataType.fromDDL(kind)) for name, kind in RESPONSE_COLUMNS.items())
    return StructType([*own, *(StructField(field.name, field.dataType) for field in kept)])


def generate(plan: DataFrame, predict: Predict, model: ResolvedModel, run_id: str) -> DataFrame:
    """Response rows, still lazy: write them before anything else is done with them.

    Args:
        plan: rows with `request` and `rows`, as from `plan.group`; each partition is a task.
        predict: as from `build_predict`.
        model: the model, by version.
        run_id: the MLflow run.

    Returns:
        One row per input row: `contract.RESPONSE_COLUMNS`, then the kept columns.
    """
    generated = plan.select("rows", predict(F.col("request")).alias("completion")).select(
        F.explode("rows").alias("row"), "completion"
    )
    failed = F.col("completion.error.code").isNotNull()
    choice = F.get("completion.choices", F.lit(0))
    answers = {
        "response": choice["message"]["content"],
        "finish_reason": F.when(~failed, choice["finish_reason"]),
        "usage": F.col("completion.usage"),
        "error": F.col("completion.error"),
        "created": F.timestamp_seconds("completion.created"),
        "generation_seconds": F.when(~failed, F.col("completion.generation_seconds")),
    }
    return _respond(generated, answers, model, run_id)


def refuse(plan: DataFrame, code: ErrorCode, message: Column, model: ResolvedModel, run_id: str) -> DataFrame:
    """Response rows of a plan's rows that have no answer, in the shape of `generate`'s."""
    no_tokens = F.struct(*(F.lit(0).alias(f"{kind}_tokens") for kind in ("prompt", "completion", "total", "cached")))
    refusals = {
        "response": F.lit(None),
        "finish_reason": F.lit(None),
        "usage": no_tokens,
        "error": F.struct(F.lit(code.value).alias("code"), message.alias("message")),
        "created": F.current_timestamp(),
        "generation_seconds": F.lit(None),
    }
    return _respond(plan.select("*", F.explode("rows").alias("row")), refusals, model, run_id)


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
