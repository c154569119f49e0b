"""The response and usage tables: the only file that reads and writes them."""

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import DataType, StructField, StructType, TimestampType

from phibatch.config import OPENAI_BATCH, OutputConfig
from phibatch.contract import EXTRA_COLUMNS, RESPONSE_COLUMNS, USAGE_COLUMNS
from phibatch.errors import OutputError
from phibatch.job.columns import named
from phibatch.job.files import Folder
from phibatch.job.session import explain_failure, first_line
from phibatch.job.work import WorkFolder

FILE_FORMATS = {"parquet", "orc", "json", "avro"}
"""Formats whose tables are nothing but their files. The others are taken to be written in transactions."""

KEPT = "kept"
"""Rows that stay, of files that are going to be removed, in the work folder."""


def check_output(spark: SparkSession, config: OutputConfig, prompts: DataFrame) -> bool:
    """See that the output may be written; whether it is there already.

    Raises:
        OutputError: it exists and `output.mode` is `error`, it is no response table, or it holds files of the input.
    """
    files = _files(spark, config, config.place)
    if files is None:
        if config.format == OPENAI_BATCH and config.mode != "overwrite" and Folder(spark, config.name).exists():
            raise OutputError(f"the output {config.name} exists already, and no run has made it: name another")
        return False
    if set(files) & set(prompts.inputFiles()):
        raise OutputError(f"the output {config.place} holds the input itself, which would be overwritten")
    if config.mode == "error":
        raise OutputError(
            f"the output {config.place} exists already; name another, or set output.mode to resume or overwrite"
        )
    if config.mode == "resume" and files:
        missing = set(RESPONSE_COLUMNS) - set(_read(spark, config.place, config).columns)
        # Formats that keep no schema of their own drop what is null in every row.
        if missing - {"response", "finish_reason", "error", "generation_seconds"}:
            raise OutputError(
                f"the output {config.place} is no response table: it has no column {min(missing)}; name another, or"
                " set output.mode to overwrite to lose what is there"
            )
    return True


class ResponseTable:
    """The response table of a run.

    Args:
        spark: the session.
        config: where it is.
        schema: of its rows.
        exists: whether it is there already.

    Attributes:
        schema: of its rows.
        exists: whether there is a table now.
    """

    def __init__(self, spark: SparkSession, config: OutputConfig, schema: StructType, *, exists: bool) -> None:
        self._spark = spark
        self._config = config
        self.schema = schema
        self._mode = "overwrite" if config.mode == "overwrite" else "append"
        self.exists = exists and config.mode != "overwrite"

    def read(self) -> DataFrame | None:
        """The rows that are there; None where there is no table yet."""
        if not self.exists:
            return None
        found = read_responses(self._spark, self._config, self.schema)
        missing = [name for name in self.schema.names if name not in found.columns]
        if missing:
            raise OutputError(f"the output {self._config.place} has no column {missing[0]}, which this job writes")
        return found

    def append(self, responses: DataFrame) -> None:
        """Add rows. The table is there afterwards, even if there were none.

        Raises:
            EngineError, WorkerCrash, RunError: as `explain_failure`.
        """
        rows = responses.select(*map(named, self.schema.names))
        writer = rows.write.format(self._config.table_format).mode(self._mode)
        try:
            writer.saveAsTable(self._config.place) if self._config.table else writer.save(self._config.place)
        except (PySparkException, Py4JJavaError) as error:
            raise explain_failure(error) from error
        self._mode, self.exists = "append", True

    def locate(self) -> DataFrame | None:
        """The rows that are there, each whole in a struct `response`, with `file`, the URI of its file."""
        found = self.read()
        if found is None:
            return None
        # The table may have columns of its own that are called `_metadata` or `file`.
        file = found.metadataColumn("_metadata")["file_path"] if self._in_files else F.lit(None).cast("string")
        return found.select(F.struct(*map(named, self.schema.names)).alias("response"), file.alias("file"))

    def set_aside(self, work: WorkFolder, marked: DataFrame) -> list[str]:
        """Put rows that are kept where `replace` finds them; the table is as it was.

        Args:
            work: the run's folder.
            marked: the rows as `locate` gave them, with `keep`.

        Returns:
            The URIs of the files that `replace` removes: those with a row that is not kept.
        """
        gone = [row["file"] for row in marked.where(~F.col("keep")).select("file").distinct().collect()]
        kept = marked.where(F.col("keep"))
        work.write(
            (kept.where(F.col("file").isin(gone)) if self._in_files else kept).select("response.*"),
            work.own(KEPT),
        )
        return gone

    def replace(self, work: WorkFolder, gone: list[str], run_id: str) -> None:
        """Have the table hold what was set aside and what the run wrote, and not what they replace.

        Files are added first and removed last, so that no row is ever absent; a row may be seen twice in between. A
        format of its own transactions is written anew in one of them.
        """
        kept = work.read(work.own(KEPT), schema=self.schema)
        if self._in_files:
            self.append(kept)
            work.remove_files(gone)
        else:
            written = read_responses(self._spark, self._config, self.schema).where(F.col("run_id") == run_id)
            work.write(written.select(*map(named, self.schema.names)).unionByName(kept), work.own("final"))
            self._mode = "overwrite"
            self.append(work.read(work.own("final"), schema=self.schema))
        if self._config.table:
            self._spark.catalog.refreshTable(self._config.table)

    @property
    def _in_files(self) -> bool:
        return self._config.table_format.lower() in FILE_FORMATS


def build_schema(columns: dict[str, str]) -> StructType:
    """Columns by name and type, as Spark's schema: the same under any session."""
    # What the word `timestamp` stands for is the session's to say: `spark.sql.timestampType`.
    kinds = {"timestamp": TimestampType()}
    return StructType([StructField(name, kinds.get(kind) or DataType.fromDDL(kind)) for name, kind in columns.items()])


def read_extras(spark: SparkSession, config: OutputConfig) -> list[str]:
    """Those of `contract.EXTRA_COLUMNS` that the response table has already; none where it begins anew."""
    files = None if config.mode == "overwrite" else _files(spark, config, config.place)
    there = _read(spark, config.place, config).schema if files else StructType()
    wanted = build_schema(EXTRA_COLUMNS)
    return [
        field.name for field in there if field.name in EXTRA_COLUMNS and field.dataType == wanted[field.name].dataType
    ]


def read_responses(spark: SparkSession, config: OutputConfig, schema: StructType | None = None) -> DataFrame:
    """The written response table. Formats that keep no schema of their own, such as JSON, need the one written."""
    return _read(spark, config.place, config, schema)


def append_usage(spark: SparkSession, config: OutputConfig, usages: list[dict[str, object]]) -> None:
    """Add a line for each run that has none yet to the usage table; each has `contract.USAGE_COLUMNS`."""
    known = set()
    if len(usages) > 1 and _files(spark, config, config.usage_place):
        # A run that died may have come as far as this.
        known = {row["run_id"] for row in read_usage(spark, config).select("run_id").collect()}
    rows = [tuple(usage[name] for name in USAGE_COLUMNS) for usage in usages if usage["run_id"] not in known]
    if config.table and spark.catalog.tableExists(config.usage_place):
        there = spark.read.table(config.usage_place).columns
        added = [f"{name} {kind}" for name, kind in USAGE_COLUMNS.items() if name not in there]
        if added:
            # An earlier version made the table.
            spark.sql(f"ALTER TABLE {config.usage_place} ADD COLUMNS ({', '.join(added)})")
    writer = (
        spark.createDataFrame(rows, build_schema(USAGE_COLUMNS))
        .coalesce(1)
        .write.format(config.table_format)
        .mode("append")
    )
    # An earlier version may have made what is at a path, in a format that holds to its columns.
    evolving = writer if config.table_format in FILE_FORMATS else writer.option("mergeSchema", "true")
    writer.saveAsTable(config.usage_place) if config.table else evolving.save(config.usage_place)


def read_usage(spark: SparkSession, config: OutputConfig) -> DataFrame:
    """The usage table, one row per run, oldest first; what an earlier version did not write is null."""
    found = _read(spark, config.usage_place, config, build_schema(USAGE_COLUMNS))
    absent = {name: F.lit(None).cast(kind) for name, kind in USAGE_COLUMNS.items() if name not in found.columns}
    return found.withColumns(absent).orderBy(F.col("started"))


def _read(spark: SparkSession, place: str, config: OutputConfig, schema: StructType | None = None) -> DataFrame:
    if config.table:
        # Of a table that is called `error`, `error.code` would be a column `code`.
        return spark.read.table(place).alias("phibatch")
    reader = spark.read.format(config.table_format)
    return (reader.schema(schema) if schema else reader).load(place)


def _files(spark: SparkSession, config: OutputConfig, place: str) -> list[str] | None:
    """The files that are at a place of the output already; None where nothing is."""
    try:
        if config.table:
            return list(spark.read.table(place).inputFiles()) if spark.catalog.tableExists(place) else None
        # The one source whose schema is known without a file to look into.
        found = spark.read.format("binaryFile").option("recursiveFileLookup", "true").load(place)
        return list(found.inputFiles())
    except (PySparkException, Py4JJavaError) as error:
        if isinstance(error, PySparkException) and error.getCondition() == "PATH_NOT_FOUND":
            return None
        raise OutputError(f"the output {place} can not be reached: {first_line(error)}") from error
