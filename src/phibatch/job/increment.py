"""Which files of an input are new since the last run that ended: for jobs on a schedule."""

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from phibatch.config import OutputConfig
from phibatch.errors import InputError, RunError
from phibatch.job.files import Folder, beside
from phibatch.job.session import first_line

FILE = {"path": "file_path", "modified": "file_modification_time", "size": "file_size"}
"""What a file is known by, and Spark's words for it. One that is written anew is another."""

SCHEMA = "path string, modified timestamp_ltz, size bigint"


class Increment:
    """The files of an input that no run which ended has read; they are noted in `<output>_inputs`.

    Args:
        spark: the session.
        output: the output that the input is for.
        table: the input, as it is read: of a format that is read from files.

    Raises:
        InputError: the input is not made of files, or can not be read.
    """

    def __init__(self, spark: SparkSession, output: OutputConfig, table: DataFrame) -> None:
        self._spark = spark
        self._place = beside(spark, output, "_inputs")
        try:
            files = table.select(*(table.metadataColumn("_metadata")[word].alias(name) for name, word in FILE.items()))
            there = files.distinct().collect()
            known = set(self._read().collect())
        except (PySparkException, Py4JJavaError) as error:
            raise InputError(f"input.incremental needs an input of files: {first_line(error)}") from error
        self._new = [file for file in there if file not in known]
        self.files, self.new_files = len(there), len(self._new)

    def select(self, table: DataFrame) -> DataFrame:
        """The rows of the new files."""
        return table.where(table.metadataColumn("_metadata")["file_path"].isin([file["path"] for file in self._new]))

    def note(self) -> None:
        """Take the new files for read: every row of theirs has its response. Raises RunError."""
        if self._new:
            noted = self._spark.createDataFrame(self._new, SCHEMA).coalesce(1)
            try:
                noted.write.mode("append").parquet(self._place)
            except (PySparkException, Py4JJavaError) as error:
                told = f"all rows are written, but {self._place} can not be: {first_line(error)}"
                raise RunError(f"{told}; the files will be read again") from error

    def _read(self) -> DataFrame:
        if not Folder(self._spark, self._place).exists():
            return self._spark.createDataFrame([], SCHEMA)
        return self._spark.read.schema(SCHEMA).parquet(self._place)
