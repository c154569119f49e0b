"""Reports and comparisons of written tables, put beside the output and into MLflow."""

import re
from typing import Any

import mlflow
import yaml
from mlflow.exceptions import MlflowException
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from phibatch.config import OPENAI_BATCH, OutputConfig
from phibatch.contract import RESPONSE_COLUMNS
from phibatch.errors import InputError, RunError
from phibatch.job.compare import Comparison, compare_tables
from phibatch.job.files import Folder, beside
from phibatch.job.output import build_schema, read_responses, read_usage
from phibatch.job.page import as_png, draw_plots, render_comparison, render_report
from phibatch.job.report import Report, build_report
from phibatch.job.session import first_line

REPORT = "report.html"
COMPARISON = "comparison.html"


def find_output(spark: SparkSession, name: str, file_format: str) -> OutputConfig:
    """The output that a path or a table's name stands for.

    Raises:
        InputError: there is neither.
    """
    try:
        if Folder(spark, name).is_file():
            return OutputConfig(path=name, format=OPENAI_BATCH)
        if Folder(spark, name).exists():
            return OutputConfig(path=name, format=file_format)
        # Other names can not be a table's.
        if re.fullmatch(r"\w+(\.\w+){0,2}", name) and spark.catalog.tableExists(name):
            return OutputConfig(table=name, format=file_format)
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(f"the output {name} can not be reached: {first_line(error)}") from error
    raise InputError(f"there is no output {name}: neither a path nor a table")


def publish_report(
    spark: SparkSession,
    output: OutputConfig,
    *,
    run_id: str | None = None,
    hourly_cost: float | None = None,
    other: OutputConfig | None = None,
    log_to: str | None = None,
) -> str:
    """Write an output's report, `report.html` and the plots as PNG, to `<output>_report`.

    Args:
        spark: the session.
        output: the response table that it is of.
        run_id: of the one run that it is about; None for the whole table.
        hourly_cost: of the whole cluster.
        other: an output to compare it with, in the report.
        log_to: the MLflow run that gets it as well.

    Returns:
        The page's path.

    Raises:
        InputError: there is no such output or run.
        RunError: the report can not be written.
    """
    report = _read_report(spark, output, run_id, hourly_cost)
    comparison = read_comparison(spark, other, output) if other else None
    plots = draw_plots(report)
    page = render_report(report, plots, comparison)
    folder = Folder(spark, _place(spark, output))
    try:
        for name, figure in plots.items():
            folder.write(f"{name}.png", as_png(figure))
        folder.write(REPORT, page.encode())
    except Py4JJavaError as error:
        raise RunError(f"all rows are written, but the report is not: {folder.place}: {first_line(error)}") from error
    if log_to:
        client = mlflow.MlflowClient()
        client.log_text(log_to, page, REPORT)
        for name, figure in plots.items():
            client.log_figure(log_to, figure, f"plots/{name}.png")
    return f"{folder.place}/{REPORT}"


def read_comparison(spark: SparkSession, first: OutputConfig, second: OutputConfig, samples: int = 5) -> Comparison:
    """Compare two outputs. Raises InputError where one is none, or they have no row in common."""
    (first_rows, first_usage), (second_rows, second_usage) = _open(spark, first), _open(spark, second)
    names = (first.name, second.name)
    return compare_tables(names, (first_rows, second_rows), (first_usage, second_usage), samples)


def publish_comparison(spark: SparkSession, comparison: Comparison, second: OutputConfig) -> str:
    """Write a comparison beside its second output, as `comparison.html` in `<output>_report`; gives the page's path."""
    folder = Folder(spark, _place(spark, second))
    try:
        folder.write(COMPARISON, render_comparison(comparison).encode())
    except Py4JJavaError as error:
        raise RunError(f"the comparison can not be written: {folder.place}: {first_line(error)}") from error
    return f"{folder.place}/{COMPARISON}"


def _place(spark: SparkSession, output: OutputConfig) -> str:
    """Where an output's report goes: of a path, as the user spells it."""
    return beside(spark, output, "_report") if output.table else f"{output.name}_report"


def _read_report(spark: SparkSession, output: OutputConfig, run_id: str | None, hourly_cost: float | None) -> Report:
    responses, usage = _open(spark, output)
    told: dict[str, Any] = {}
    runs = [row["run_id"] for row in usage.select("run_id").collect()]
    if run_id is not None and run_id not in runs:
        raise InputError(
            f"the output {output.name} has no run {run_id}; its last one is {runs[-1] if runs else 'none'}"
        )
    if runs:
        told = _read_circumstances(run_id or runs[-1])
    return build_report(output.name, responses, usage, run_id, hourly_cost, **told)


def _open(spark: SparkSession, output: OutputConfig) -> tuple[DataFrame, DataFrame]:
    try:
        return read_responses(spark, output, build_schema(RESPONSE_COLUMNS)), read_usage(spark, output)
    except (PySparkException, Py4JJavaError) as error:
        raise InputError(f"{output.name} is no output of a run that ended: {first_line(error)}") from error


def _read_circumstances(run_id: str) -> dict[str, Any]:
    """A run's configuration and versions, where MLflow still has them."""
    told = {}
    for name, file in (("config", "config.yaml"), ("versions", "versions.yaml")):
        try:
            told[name] = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{run_id}/{file}"))
        except MlflowException:
            told[name] = {}
    return told
