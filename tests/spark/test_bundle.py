"""The job of conf/databricks, started as its task starts it, on tables of Spark's own catalog."""

import re
import sys
from importlib.metadata import entry_points

import pytest

from phibatch import demo
from phibatch.model.registry import log_onnx

TRANSACTIONS = "org.apache.spark.sql.parquet"
"""Stands in for Delta, which is not here. To Spark it is Parquet; phibatch does not know it, and writes it as Delta."""
SCHEMA = "spark_catalog.phibatch_dev"


@pytest.fixture
def start(spark, tracking, monkeypatch, tmp_path, bundle_command):
    """Start the wheel's `phibatch` with the words of the target `dev`, but for places that only a workspace has."""
    log_onnx(demo.MODEL_DIR, "main.phibatch.phi3", "champion")
    monkeypatch.setattr("phibatch.job.session.open_session", lambda _: spark)
    words = bundle_command(
        "dev",
        input=f"{SCHEMA}.prompts",
        output=f"{SCHEMA}.responses",
        work_path=str(tmp_path / "Volumes" / "work"),
    )
    (phibatch,) = entry_points(group="console_scripts", name="phibatch")

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["phibatch", *words, *more])
        phibatch.load()()

    spark.sql(f"CREATE SCHEMA {SCHEMA} LOCATION '{tmp_path / 'warehouse'}'")
    yield run
    spark.sql(f"DROP SCHEMA {SCHEMA} CASCADE")


def write_prompts(spark, rows):
    spark.createDataFrame(rows).write.mode("overwrite").saveAsTable(f"{SCHEMA}.prompts")


def read(spark, name):
    return [row.asDict(recursive=True) for row in spark.read.table(f"{SCHEMA}.{name}").collect()]


def test_the_bundles_own_command_runs_to_its_end(spark, start, tmp_path, capsys):
    """Tables in, tables out, answered by the model; the next night does what is new and changed, and nothing else.

    The command line and the file are the bundle's. Only the format is overridden, since Delta is not installed: without
    that the run stops at the output table, before anything is generated.
    """
    rows = spark.read.parquet(str(demo.PROMPTS)).limit(7).toPandas().to_dict("records")
    write_prompts(spark, rows[:5])
    with pytest.raises(SystemExit) as ended:
        start()
    assert ended.value.code == 1
    assert "Failed to find the data source: delta" in capsys.readouterr().err
    assert not spark.catalog.tableExists(f"{SCHEMA}.responses")

    start("--set", f"output.format={TRANSACTIONS}")
    expected = {row["custom_id"]: row["expected"] for row in rows}
    answers = {row["custom_id"]: row["response"] for row in read(spark, "responses")}
    assert answers == {row["custom_id"]: row["expected"] for row in rows[:5]}
    (report,) = (tmp_path / "Volumes" / "work").rglob("report.html")
    assert re.fullmatch("responses-[0-9a-f]{16}_report", report.parent.name)

    changed = {**rows[5], "custom_id": rows[0]["custom_id"]}
    write_prompts(spark, [changed, *rows[1:5], rows[6]])
    start("--set", f"output.format={TRANSACTIONS}")
    table = read(spark, "responses")
    assert len(table) == 6
    expected[changed["custom_id"]] = changed["expected"]
    assert all(row["response"] == expected[row["custom_id"]] for row in table)
    assert {row["model"] for row in table} == {"models:/main.phibatch.phi3/1"}
    assert sorted(row["rows"] for row in read(spark, "responses_usage")) == [0, 2, 5]
    assert {each.name for each in (tmp_path / "Volumes" / "work").iterdir()} == {report.parent.name}
