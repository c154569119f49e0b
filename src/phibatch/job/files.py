"""Folders and files on whatever file system Spark writes to: the one door to Hadoop's."""

import hashlib
import os
from typing import Any
from urllib.parse import quote

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from phibatch.config import OutputConfig
from phibatch.errors import OutputError
from phibatch.job.session import first_line

BUILT_IN = "spark_catalog"
"""Spark's own catalog: its tables belong to the metastore that the session is configured with."""


def beside(spark: SparkSession, config: OutputConfig, suffix: str) -> str:
    """The path of a folder beside an output. All spellings of the output give the same path.

    For a path it is `<output><suffix>`. For a table it is in `output.work_path`; without one it is in the database's
    location, or in the warehouse where the catalog names no location.

    Raises:
        OutputError: there is no file system for the path, or no database for the table.
    """
    if config.table is None:
        return f"{Folder(spark, config.name).qualified}{suffix}"
    parent = config.work_path or _qualify_table(spark, config.table)[0] or spark.conf.get("spark.sql.warehouse.dir")
    return within(spark, config, str(parent), suffix)


def within(spark: SparkSession, config: OutputConfig, parent: str, suffix: str) -> str:
    """The path of an output's folder in a parent that outputs share. All spellings of the output give the same path.

    Its name holds a hash of the output's full name, so outputs with equal last names have different folders.
    Raises as `beside`.
    """
    if config.table is None:
        full = Folder(spark, config.place).qualified
        name = full.rpartition("/")[2]
    else:
        parts = _qualify_table(spark, config.table)
        full, name = "\n".join(parts), quote(parts[-1], safe="")
    return f"{parent.rstrip('/')}/{name}-{hashlib.sha256(full.encode()).hexdigest()[:16]}{suffix}"


def _qualify_table(spark: SparkSession, table: str) -> list[str]:
    """What tells a table from all others: its database's location, its catalog, database and name.

    Names are in lower case unless `spark.sql.caseSensitive` is set. The location tells apart the built-in catalogs of
    two metastores; it is empty for other catalogs. Raises OutputError where the name or its database is wrong.
    """
    state: Any = spark._jsparkSession.sessionState()  # noqa: SLF001 - PySpark resolves no name of a table to come
    catalogs = state.catalogManager()
    try:
        parsed = state.sqlParser().parseMultipartIdentifier(table)
        parts = [str(parsed.apply(at)) for at in range(parsed.size())]
        if len(parts) == 1:
            parts = [spark.catalog.currentCatalog(), *catalogs.currentNamespace(), *parts]
        elif not catalogs.isCatalogRegistered(parts[0]):
            parts = [spark.catalog.currentCatalog(), *parts]
        if str(spark.conf.get("spark.sql.caseSensitive")).lower() != "true":
            parts = [part.lower() for part in parts]
        location = ""
        if parts[0].lower() == BUILT_IN:
            database = parts[1].replace("`", "``")
            location = spark.catalog.getDatabase(f"{BUILT_IN}.`{database}`").locationUri
        return [location, *parts]
    except (PySparkException, Py4JJavaError) as error:
        raise OutputError(f"the output {table} can not be reached: {first_line(error)}") from error


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

    @property
    def qualified(self) -> str:
        """The absolute path with its file system, without `..` and, on this machine, without symbolic links."""
        path = self._files.makeQualified(self._path())
        if str(path.toUri().getScheme()).lower() == "file":
            return f"file:{os.path.realpath(path.toUri().getPath())}"
        return str(path.toString())

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
