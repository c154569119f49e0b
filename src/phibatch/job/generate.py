"""Applying the model to a plan, through MLflow's Spark UDF. Its raw answers do not leave this file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlflow
from pyspark.sql import Column, DataFrame, Observation, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructField, StructType

from phibatch.config import JobSettings, ModelConfig
from phibatch.contract import COMPLETION_COLUMNS, ENGINE_COLUMNS, EXTRA_COLUMNS, RESPONSE_COLUMNS, ErrorCode
from phibatch.errors import ModelError
from phibatch.job.columns import pick
from phibatch.job.output import build_schema
from phibatch.model.registry import ResolvedModel


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a run's responses come from.

    Attributes:
        model: the model's URI, by version, as `contract.name_answerer` gives it.
        run_id: the MLflow run.
        prompt_version: the registered prompts; None where there are none.
    """

    model: str
    run_id: str
    prompt_version: str | None = None


Predict = Callable[[Column], Column]


def build_predict(
    spark: SparkSession, model: ResolvedModel, config: ModelConfig, job: JobSettings, *, count_only: bool = False
) -> Predict:
    """The model as a function of a column of requests. Once a run: MLflow sends the model to the cluster here.

    With `count_only` it generates nothing: completions are empty, and have their prompts' tokens or an error.

    Raises:
        ModelError: the model was logged by a version of phibatch that did not know an option.
    """
    params = {
        "engine": config.engine.value,
        "batch_size": config.batch_size,
        # MLflow takes an int, and no class of int.
        "memory": int(config.memory or 0),
        "row_timeout": job.row_timeout or 0.0,
        "worker_timeout": job.worker_timeout,
        **({"count_only": True} if count_only else {}),
    }
    unknown = params.keys() - model.options
    if unknown:
        # MLflow would drop them with no more than a warning.
        raise ModelError(
            f"model {model.uri} was logged by an earlier phibatch, which had no {min(unknown)}: log it again"
        )
    # MLflow fails where an answer lacks a field of the result's type.
    absent = set(ENGINE_COLUMNS) - model.outputs
    fields = ",".join(f"{name}:{kind}" for name, kind in COMPLETION_COLUMNS.items() if name not in absent)
    predict = mlflow.pyfunc.spark_udf(spark, model.uri, result_type=f"struct<{fields}>", params=params)
    # Deterministic functions may be evaluated again for every field that is read of their result.
    predict = predict.asNondeterministic()
    return lambda request: predict(F.struct(request.alias("request")))


def response_schema(prompts: DataFrame, keep_columns: Sequence[str], extras: Sequence[str] = ()) -> StructType:
    """The response table's columns: the contract's, `extras` of its `EXTRA_COLUMNS`, then the input's kept ones."""
    kept = prompts.select(*pick(prompts, keep_columns)).schema
    columns = {**RESPONSE_COLUMNS, **{name: EXTRA_COLUMNS[name] for name in extras}}
    return StructType([*build_schema(columns), *(StructField(field.name, field.dataType) for field in kept)])


def generate(plan: DataFrame, predict: Predict, lineage: Lineage, told: Observation | None = None) -> DataFrame:
    """Response rows, still lazy: write them before anything else is done with them.

    Args:
        plan: rows with `request` and `rows`, as from `plan.group`; each partition is a task.
        predict: as from `build_predict`.
        lineage: of the rows.
        told: has, once the rows are written, `engine`: the struct of `ENGINE_COLUMNS` that came with the answers. A
            partition is one process, and so has one engine.

    Returns:
        One row per input row: `contract.RESPONSE_COLUMNS`, `EXTRA_COLUMNS` and the kept columns.
    """
    completions = plan.select("rows", predict(F.col("request")).alias("completion"))
    if told:
        known = completions.select("completion.*").columns
        engine = (F.col(f"completion.{name}") if name in known else F.lit(None) for name in ENGINE_COLUMNS)
        named = (column.cast("string").alias(name) for name, column in zip(ENGINE_COLUMNS, engine, strict=True))
        completions = completions.observe(told, F.max(F.struct(*named)).alias("engine"))
    generated = completions.select(F.explode("rows").alias("row"), "completion")
    failed = F.col("completion.error.code").isNotNull()
    choice = F.get("completion.choices", F.lit(0))
    answers = {
        "response": choice["message"]["content"],
        "finish_reason": F.when(~failed, choice["finish_reason"]),
        "usage": F.col("completion.usage"),
        "error": F.col("completion.error"),
        "created": F.timestamp_seconds("completion.created"),
        "generation_seconds": F.when(~failed, F.col("completion.generation_seconds")),
        "choices": F.transform(
            "completion.choices",
            lambda each: F.struct(
                each["index"].alias("index"),
                each["message"]["content"].alias("response"),
                F.when(~failed, each["finish_reason"]).alias("finish_reason"),
            ),
        ),
    }
    return _respond(generated, answers, lineage)


def refuse(plan: DataFrame, code: ErrorCode, message: Column, lineage: Lineage) -> DataFrame:
    """Response rows of a plan's rows that have no answer, in the shape of `generate`'s."""
    no_tokens = F.struct(*(F.lit(0).alias(f"{kind}_tokens") for kind in ("prompt", "completion", "total", "cached")))
    refusals = {
        "response": F.lit(None),
        "finish_reason": F.lit(None),
        "usage": no_tokens,
        "error": F.struct(F.lit(code.value).alias("code"), message.alias("message")),
        "created": F.current_timestamp(),
        "generation_seconds": F.lit(None),
        "choices": F.array(),
    }
    return _respond(plan.select("*", F.explode("rows").alias("row")), refusals, lineage)


def _respond(rows: DataFrame, values: dict[str, Column], lineage: Lineage) -> DataFrame:
    given = {
        "custom_id": F.col("row.custom_id"),
        "request_key": F.col("row.request_key"),
        "model": F.lit(lineage.model),
        "run_id": F.lit(lineage.run_id),
        "prompt_version": F.lit(lineage.prompt_version),
        **values,
    }
    kept = rows.select("row.kept").schema[0].dataType
    names = kept.names if isinstance(kept, StructType) else []
    return rows.select(
        *(
            given[field.name].cast(field.dataType).alias(field.name)
            for field in build_schema({**RESPONSE_COLUMNS, **EXTRA_COLUMNS})
        ),
        *(F.col("row.kept")[name].alias(name) for name in names),
    )
