"""Spark itself: the session of the command line, its task slots, and its errors in a line."""

import os
import re
import shutil
import sys
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from phibatch import QUIET
from phibatch.errors import EngineError, PhibatchError, RunError, UserError, WorkerCrash

PLATFORM = {"PYSPARK_GATEWAY_PORT", "DATABRICKS_RUNTIME_VERSION"}
"""Either is set where somebody else has configured Spark: spark-submit, Databricks."""

CRASHES = (
    "Python worker exited unexpectedly",
    "ExecutorLostFailure",
    "MemoryError",
    "Python worker process terminated",
)
"""What Spark says when a process died at its rows."""

LOG_SETTINGS = Path(__file__).with_name("log4j2.properties")


def open_session(name: str) -> SparkSession:
    """The session that spark-submit or the platform has configured; without one, all cores of this machine.

    Raises:
        UserError: there is no Java to run Spark with, or Spark does not start with the settings it was given.
    """
    # Workers must run this Python: the one that is first on PATH seldom has the packages.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName(name)
    for variable, value in QUIET.items():
        builder = builder.config(f"spark.executorEnv.{variable}", value)
    if not PLATFORM & os.environ.keys():
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
    try:
        return builder.getOrCreate()
    except (PySparkException, Py4JJavaError) as error:
        raise UserError(f"Spark does not start: {first_line(error)}") from error


def count_slots(spark: SparkSession) -> int:
    """How many tasks run at once: the cores that Spark has, by the cores that a task takes."""
    return max(1, spark.sparkContext.defaultParallelism // count_task_cores(spark))


def count_task_cores(spark: SparkSession) -> int:
    """How many cores a task takes."""
    return int(spark.conf.get("spark.task.cpus", "1") or 1)


def explain_failure(error: PySparkException | Py4JJavaError) -> PhibatchError:
    """What a failed run is to be told as: the engine's own words where it raised, else the innermost reason given."""
    engine = f"{EngineError.__module__}.{EngineError.__name__}: "
    reasons = [line for line in str(error).splitlines() if re.match(r"[\w.]+(Error|Exception): ", line)]
    for line in reasons:
        if line.startswith(engine):
            return EngineError(f"the engine failed: {line.removeprefix(engine)}")
    if any(word in str(error) for word in CRASHES):
        return WorkerCrash("the process that computed the rows died")
    return RunError(f"Spark gave the run up: {reasons[-1] if reasons else first_line(error)}")


def first_line(error: PySparkException | Py4JJavaError) -> str:
    """What Spark says went wrong, without the stack that it adds."""
    message = error.getMessage() if isinstance(error, PySparkException) else error.java_exception.getMessage()
    return (message or str(error)).splitlines()[0]
