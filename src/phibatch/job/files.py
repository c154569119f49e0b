"""Folders and files on whatever file system Spark writes to: the one door to Hadoop's."""

from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import SparkSession

from phibatch.config import OutputConfig
from phibatch.errors import OutputError
from phibatch.job.session import first_line


def beside(spark: SparkSession, config: OutputConfig, suffix: str) -> str:
    """The path of what lies beside an output: `<output><suffix>`; of a table, in the work path or the warehouse."""
    if config.table is None:
        return f"{config.name}{suffix}"
    parent = config.work_path or str(spark.conf.get("spark.sql.warehouse.dir"))
    return f"{parent.rstrip('/')}/{config.name}{suffix}"


class Folder:
    """A folder that may be there or not. Its methods raise Py4JJavaError where the file system refuses.

    Args:
        spark: the session.
        place: the folder's path, as Spark takes it.

    Raises:
        OutputError: there is no file system for such a path.
    """

    def __init__(self, spark: SparkSession, place: str) -> None:
        self.place = place
        self._spark = spark
        self._java: Any = spark._jvm  # noqa: SLF001 - Hadoop's file systems have no other door in PySpark
        self._configuration: Any = spark._jsc.hadoopConfiguration()  # noqa: SLF001 - what they are configured with
        try:
            self._files: Any = self._path().getFileSystem(self._configuration)
        except Py4JJavaError as error:
            raise OutputError(f"the output {place} can not be reached: {first_line(error)}") from error

    def exists(self, name: str = "") -> bool:
        return bool(self._files.exists(self._path(name)))

    def is_file(self, name: str = "") -> bool:
        return self.exists(name) and bool(self._files.getFileStatus(self._path(name)).isFile())

    def list(self, name: str = "") -> list[str]:
        """The names of what is in a folder of the folder, sorted; nothing where there is none."""
        if not self.exists(name):
            return []
        return sorted(each.getPath().getName() for each in self._files.listStatus(self._path(name)))

    def read(self, name: str) -> bytes:
        stream = self._files.open(self._path(name))
        try:
            return bytes(stream.readAllBytes())
        finally:
            stream.close()

    def write(self, name: str, content: bytes, *, overwrite: bool = True) -> None:
        """Write a file; without `overwrite` only where there is none yet, as far as the store can tell."""
        stream = self._files.create(self._path(name), overwrite)
        stream.write(bytearray(content))
        stream.close()

    def join(self, parts: str, name: str) -> None:
        """Write what Spark wrote to a folder, as part files, into one file; no byte passes through Python."""
        source = Folder(self._spark, parts)
        out = self._files.create(self._path(name), True)
        try:
            for part in source.list():
                if part.startswith("part-"):
                    source.copy(part, out)
        finally:
            out.close()

    def copy(self, name: str, out: Any) -> None:
        """Copy a file into an open stream of Hadoop's."""
        stream = self._files.open(self._path(name))
        try:
            self._java.org.apache.hadoop.io.IOUtils.copyBytes(stream, out, self._configuration, False)
        finally:
            stream.close()

    def remove(self, name: str = "") -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        self._files.delete(self._path(name), True)

    def remove_file(self, uri: str) -> None:
        """Remove a file by its URI."""
        self._files.delete(self._java.org.apache.hadoop.fs.Path(self._java.java.net.URI(uri)), False)

    def _path(self, name: str = "") -> Any:
        return self._java.org.apache.hadoop.fs.Path(f"{self.place}/{name}" if name else self.place)
