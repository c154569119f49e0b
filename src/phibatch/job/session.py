"""The Spark session of the command line and the scripts; elsewhere a session is given."""

import os
import shutil
import sys
from pathlib import Path

from pyspark import SparkConf
from pyspark.sql import SparkSession

from phibatch.errors import UserError

LOG_SETTINGS = Path(__file__).with_name("log4j2.properties")


def open_session(name: str) -> SparkSession:
    """The session that spark-submit or the platform has configured; without one, all cores of this machine.

    Raises:
        UserError: there is no Java to run Spark with.
    """
    # Workers must run this Python: the one that is first on PATH seldom has the packages.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name)
    if not SparkConf().contains("spark.master") and "SPARK_REMOTE" not in os.environ:
        if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
            raise UserError("Spark needs Java 17, and there is no java on PATH: install openjdk-17-jre-headless")
        cores = len(os.sched_getaffinity(0))
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = (
            builder.master(f"local[{cores}]")
            # One task with all cores: one copy of the weights, and batches of rows rather than of tasks.
            .config("spark.task.cpus", cores)
            .config("spark.driver.memory", "2g")
            .config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={LOG_SETTINGS.as_uri()}")
            # Planning shuffles small rows; the default of 200 is for clusters.
            .config("spark.sql.shuffle.partitions", 4 * cores)
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
        )
    session = builder.getOrCreate()
    session.sparkContext.setLogLevel("ERROR")
    return session


def count_slots(spark: SparkSession) -> int:
    """How many tasks run at once: the cores that Spark has, by the cores that a task takes."""
    task_cpus = int(spark.conf.get("spark.task.cpus", "1") or 1)
    return max(1, spark.sparkContext.defaultParallelism // task_cpus)
