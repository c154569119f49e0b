"""The response and usage tables: the only file that reads and writes them."""

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from phibatch.config import OutputConfig
from phibatch.contract import USAGE_COLUMNS
from phibatch.errors import OutputError
from phibatch.job.session import explain_failure, first_line


def check_output(spark: SparkSession, config: OutputConfig) -> None:
    """See that the output may be written.

    Raises:
        OutputError: it exists already, and `output.mode` is `error`.
    """
    if config.mode == "error" and _exists(spark, config):
        raise OutputError(
            f"the output {config.place} exists already; name another, or set output.mode to overwrite to lose it"
        )


def write_responses(responses: DataFrame, config: OutputConfig) -> None:
    """Write the response table: the one action on the generated frame.

    Raises:
        EngineError: the engine failed, on every attempt.
        RunError: Spark could not finish for another reason.
    """
    writer = responses.write.format(config.format).mode("errorifexists" if config.mode == "error" else config.mode)
    try:
        writer.saveAsTable(config.place) if config.table else writer.save(config.place)
    except (PySparkException, Py4JJavaError) as error:
        raise explain_failure(error) from error


def read_responses(spark: SparkSession, config: OutputConfig) -> DataFrame:
    """The written response table."""
    return _read(spark, config.place, config)


def append_usage(spark: SparkSession, config: OutputConfig, usage: dict[str, object]) -> None:
    """Add a run's line to the usage table; `usage` has `contract.USAGE_COLUMNS`."""
    row = tuple(usage[name] for name in USAGE_COLUMNS)
    schema = ", ".join(f"{name} {kind}" for name, kind in USAGE_COLUMNS.items())
    writer = spark.createDataFrame([row], schema).coalesce(1).write.format(config.format).mode("append")
    writer.saveAsTable(config.usage_place) if config.table else writer.save(config.usage_place)


def read_usage(spark: SparkSession, config: OutputConfig) -> DataFrame:
    """The usage table, one row per run, oldest first."""
    return _read(spark, config.usage_place, config).orderBy(F.col("started"))


def _read(spark: SparkSession, place: str, config: OutputConfig) -> DataFrame:
    return spark.read.table(place) if config.table else spark.read.format(config.format).load(place)


def _exists(spark: SparkSession, config: OutputConfig) -> bool:
    if config.table:
        return spark.catalog.tableExists(config.table)
    try:
        # The one source whose schema is known without a file to look into.
        spark.read.format("binaryFile").load(config.place)
    except (PySparkException, Py4JJavaError) as error:
        if isinstance(error, PySparkException) and error.getCondition() == "PATH_NOT_FOUND":
            return False
        raise OutputError(f"the output {config.place} can not be reached: {first_line(error)}") from error
    return True
