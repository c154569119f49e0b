"""The response and usage tables: the only file that reads and writes them."""

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import StructType

from phibatch.config import OutputConfig
from phibatch.contract import USAGE_COLUMNS
from phibatch.errors import OutputError
from phibatch.job.session import explain_failure, first_line


def check_output(spark: SparkSession, config: OutputConfig, prompts: DataFrame) -> None:
    """See that the output may be written.

    Raises:
        OutputError: it exists already and `output.mode` is `error`, or it holds files of the input.
    """
    files = _files(spark, config)
    if files is not None and set(files) & set(prompts.inputFiles()):
        raise OutputError(f"the output {config.place} holds the input itself, which would be overwritten")
    if config.mode == "error" and files is not None:
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


def read_responses(spark: SparkSession, config: OutputConfig, schema: StructType | None = None) -> DataFrame:
    """The written response table. Formats that keep no schema of their own, such as JSON, need the one written."""
    return _read(spark, config.place, config, schema)


def append_usage(spark: SparkSession, config: OutputConfig, usage: dict[str, object]) -> None:
    """Add a run's line to the usage table; `usage` has `contract.USAGE_COLUMNS`."""
    row = tuple(usage[name] for name in USAGE_COLUMNS)
    schema = ", ".join(f"{name} {kind}" for name, kind in USAGE_COLUMNS.items())
    writer = spark.createDataFrame([row], schema).coalesce(1).write.format(config.format).mode("append")
    writer.saveAsTable(config.usage_place) if config.table else writer.save(config.usage_place)


def read_usage(spark: SparkSession, config: OutputConfig) -> DataFrame:
    """The usage table, one row per run, oldest first."""
    return _read(spark, config.usage_place, config).orderBy(F.col("started"))


def _read(spark: SparkSession, place: str, config: OutputConfig, schema: StructType | None = None) -> DataFrame:
    if config.table:
        return spark.read.table(place)
    reader = spark.read.format(config.format)
    return (reader.schema(schema) if schema else reader).load(place)


def _files(spark: SparkSession, config: OutputConfig) -> list[str] | None:
    """The files that are at the output's place already; None where nothing is."""
    try:
        if config.table:
            return (
                list(spark.read.table(config.table).inputFiles()) if spark.catalog.tableExists(config.table) else None
            )
        # The one source whose schema is known without a file to look into.
        found = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(config.place)
        return list(found.inputFiles())
    except (PySparkException, Py4JJavaError) as error:
        if isinstance(error, PySparkException) and error.getCondition() == "PATH_NOT_FOUND":
            return None
        raise OutputError(f"the output {config.place} can not be reached: {first_line(error)}") from error
