import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from phibatch import demo
from phibatch.config import JobConfig, build_config

# What a session's processes inherit; workers must run this Python, with this package.
os.environ["PYSPARK_PYTHON"] = sys.executable
os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
# Small tables: most of a JVM's time would go into optimising code that hardly runs. Every Spark of the tests has these.
JAVA_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:+UseSerialGC"
os.environ["SPARK_SUBMIT_OPTS"] = os.environ["SPARK_DAEMON_JAVA_OPTS"] = JAVA_OPTIONS


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real MLflow store of the session's own."""
    import mlflow

    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("tests", artifact_location=folder.as_uri()))
    os.environ["MLFLOW_TRACKING_URI"] = uri
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "tests"
    return uri


@pytest.fixture(scope="session")
def demo_model(tracking: str) -> Any:
    """The embedded model, logged as `demo@champion`."""
    from phibatch.model.registry import log_onnx

    return log_onnx(demo.MODEL_DIR, "demo", "champion")


@pytest.fixture(scope="session")
def chat_model(tracking: str) -> Any:
    """The embedded model's transformers twin, logged as `chat@champion`."""
    from phibatch.model.registry import log_transformers

    return log_transformers(demo.TWIN_DIR, "chat", "champion")


@pytest.fixture(scope="session")
def counting(tmp_path_factory: pytest.TempPathFactory, tracking: str) -> Path:
    """The folder where the model `counting` notes the requests it is asked for."""
    import mlflow

    from phibatch.contract import GenerationParams
    from phibatch.model.registry import signature

    folder = tmp_path_factory.mktemp("calls")
    mlflow.pyfunc.log_model(
        name="counting",
        python_model=str(Path(__file__).with_name("counting_model.py")),
        artifacts={"model": str(demo.MODEL_DIR)},
        signature=signature(GenerationParams()),
        pip_requirements=[],
        model_config={"name": "counting", "digest": "counting", "calls": str(folder)},
        metadata={"phibatch_digest": "counting"},
        registered_model_name="counting",
    )
    return folder


@pytest.fixture
def calls(counting: Path) -> Callable[[], list[str]]:
    """The last messages that the model `counting` was asked for since the last look, in any order."""

    def look() -> list[str]:
        asked = [line for file in counting.iterdir() for line in file.read_text().splitlines()]
        for file in counting.iterdir():
            file.unlink()
        return [json.loads(line)["messages"][-1]["content"] for line in asked if line.endswith("}")]

    look()
    return look


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """A real session of two task slots."""
    from pyspark.sql import SparkSession

    from phibatch.job.session import LOG_SETTINGS

    session = (
        SparkSession.builder.master("local[2]")
        .appName("phibatch-tests")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={LOG_SETTINGS.as_uri()}")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        # Small tables: one partition a shuffle is the fastest.
        .config("spark.sql.shuffle.partitions", 1)
        # The catalog of saveAsTable, in memory, with its files where the test run keeps its own.
        .config("spark.sql.catalogImplementation", "in-memory")
        .getOrCreate()
    )
    yield session
    session.stop()


@pytest.fixture
def write_parquet(tmp_path: Path) -> Callable[..., str]:
    """Write rows as a Parquet file, with a schema in pyarrow's types where it can not be guessed."""

    def write(rows: list[dict[str, Any]] | pd.DataFrame, name: str = "input", schema: Any = None) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = tmp_path / f"{name}.parquet"
        records = rows if isinstance(rows, list) else rows.to_dict("records")
        pq.write_table(pa.Table.from_pylist(records, schema=schema), path)
        return str(path)

    return write


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobConfig]:
    """A job on the embedded model with the echo engine and without a report, unless the test says otherwise."""

    def build(path: str, **sections: dict[str, Any]) -> JobConfig:
        document: dict[str, dict[str, Any]] = {
            "input": {"path": path},
            "model": {"uri": "models:/demo@champion", "engine": "echo"},
            "output": {"path": str(tmp_path / "output")},
            "job": {"max_error_rate": 1},
            # Tests of the report ask for one.
            "report": {"enabled": False},
        }
        for section, values in sections.items():
            document.setdefault(section, {}).update(values)
        if "partitions" not in document["job"]:
            # A handful of rows in one chunk: each costs Spark a second.
            document["job"].setdefault("chunk_rows", 1000)
        return build_config(document)

    return build


@pytest.fixture(scope="session")
def bundle_command() -> Callable[..., list[str]]:
    """What the job of conf/databricks starts phibatch with: its words under a target, with a run's own parameters."""
    folder = Path(__file__).parents[1] / "conf" / "databricks"
    bundle = yaml.safe_load((folder / "databricks.yml").read_text())
    job = yaml.safe_load((folder / "resources" / "phibatch.yml").read_text())["resources"]["jobs"]["phibatch"]

    def fill(target: str, **given: str) -> list[str]:
        parameters = {each["name"]: each["default"] for each in job["parameters"]} | given
        defaults = {name: each.get("default") for name, each in bundle["variables"].items()}
        variables = defaults | bundle["targets"][target]["variables"]
        values = {f"{{{{job.parameters.{name}}}}}": value for name, value in parameters.items()}
        values |= {f"${{var.{name}}}": str(value) for name, value in variables.items()}
        # `bundle deploy` copies the folder of databricks.yml there.
        values["${workspace.file_path}"] = str(folder)
        words = list(job["tasks"][0]["python_wheel_task"]["parameters"])
        for place, value in values.items():
            words = [word.replace(place, value) for word in words]
        return words

    return fill
