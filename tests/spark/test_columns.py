"""Columns of the user's: whatever they are called, and whatever the session makes of names and times."""

import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest

from phibatch.config import GenerationConfig, InputConfig
from phibatch.job import output
from phibatch.job.compare import compare_tables
from phibatch.job.increment import Increment
from phibatch.job.output import read_responses, read_usage
from phibatch.job.prompts import build_requests, check_columns
from phibatch.job.report import build_report
from phibatch.job.validate import validate_job

pytestmark = pytest.mark.usefixtures("demo_model")

TEXTS = ("code", "message", "copy", "keep", "reason", "answered", "_there", "_metadata", "a.b", "file", "_file", "done")
TEXTS += ("the `best`", "`", "rows", "n", "row", "kept", "error.code", "usage.prompt_tokens", "count", "Tag", "_row")
NOON = datetime(2024, 3, 10, 12, 30, 0, 123456, tzinfo=UTC)

SESSIONS = {
    "times without a zone, in another zone": {
        "spark.sql.timestampType": "TIMESTAMP_NTZ",
        "spark.sql.session.timeZone": "Asia/Kathmandu",
    },
    "ansi off, nulls in JSON": {
        "spark.sql.ansi.enabled": "false",
        "spark.sql.jsonGenerator.ignoreNullFields": "false",
    },
    "names as they are spelled": {"spark.sql.caseSensitive": "true"},
}


@contextmanager
def session(spark, settings):
    """The session with other settings, for a while."""
    before = {key: spark.conf.get(key) for key in settings}
    try:
        for key, value in settings.items():
            spark.conf.set(key, value)
        yield
    finally:
        for key, value in before.items():
            spark.conf.set(key, value)


def build_kept(number):
    """What is kept of a row: texts, an instant, and a time of no zone."""
    at = NOON + timedelta(days=number)
    return {**{name: f"{name} of {number}" for name in TEXTS}, "at": at, "at noon": at.replace(tzinfo=None)}


def build_row(number, prompt):
    """A row of the input, where one name is spelled otherwise than in the configuration."""
    kept = build_kept(number)
    return {"custom_id": str(number), "my.`prompt`": prompt, "tag": kept.pop("Tag"), **kept}


def read_kept(row):
    kept = {name: row[name] for name in (*TEXTS, "at", "at noon")}
    return {**kept, "at": kept["at"].astimezone(UTC)}


def test_any_column_is_kept_under_any_session(spark, run, job, monkeypatch, tmp_path):
    """Run after run, each under other settings and with a changed row: that row alone is generated, every row is there
    once, and every kept value and every time is right."""
    prompts = {0: None, 1: "word 1", 2: "word 2", 3: "word 3"}
    columns = {"columns": {"prompt": "My.`prompt`"}}
    keep = {"keep_columns": [*TEXTS, "at", "at noon"]}
    rows = [build_row(number, prompt) for number, prompt in prompts.items()]
    began = time.time()
    _, _, asked = run(rows, input=columns, output=keep)
    assert asked == ["word 1", "word 2", "word 3"]
    first_ended = time.time()
    for name, settings in SESSIONS.items():
        rows[1]["my.`prompt`"] = name
        since = int(time.time())
        with session(spark, settings), monkeypatch.context() as patched:
            if name == "names as they are spelled":
                # As a format of its own transactions is written: anew.
                patched.setattr(output, "FILE_FORMATS", set())
            _, table, asked = run(rows, input=columns, output=keep)
        assert asked == [name]
        assert [row["custom_id"] for row in table] == ["0", "1", "2", "3"], name
        assert [row["response"] for row in table] == [None, name, "word 2", "word 3"], name
        assert [read_kept(row) for row in table] == [build_kept(number) for number in prompts], name
        created = [row["created"].timestamp() for row in table]
        assert since <= created[1] <= time.time()
        assert int(began) <= min(created[2:]) <= max(created[2:]) <= first_ended
    config = job(str(tmp_path / "input.parquet"), input=columns, output=keep, model={"uri": "models:/counting/1"})
    assert validate_job(spark, config).done == 4
    table, usage = read_responses(spark, config.output), read_usage(spark, config.output)
    report = build_report("here", table, usage)
    assert (report.rows, report.succeeded, len(report.runs)) == (4, 3, 1 + len(SESSIONS))
    starts = [line.started.timestamp() for line in report.runs]
    assert began <= starts[0] < first_ended < starts[1]
    assert starts == sorted(starts)
    assert starts[-1] <= time.time()
    assert compare_tables(("a", "b"), (table, table), (usage, usage), 3).equal == 3


def test_names_are_found_as_the_session_spells_them(spark):
    """Of columns that differ in case alone, each is the one that is named; else the case does not matter."""
    with session(spark, {"spark.sql.caseSensitive": "true"}):
        table = spark.createDataFrame([("low", "high", 7)], "text string, TEXT string, `a.b``` int")
        config = InputConfig(path="x", template="{TEXT} {text} {A.B`}", columns={"system": "TEXT"})
        names = ("text", "TEXT", "A.b`")
        (row,) = build_requests(table, check_columns(table, config, names), config, GenerationConfig(), names).collect()
    assert [message["content"] for message in row["_messages"]] == ["high", "high low 7"]
    assert row["_kept"].asDict() == {"text": "low", "TEXT": "high", "A.b`": 7}


def test_files_are_told_by_sparks_metadata_not_the_tables(spark, job, write_parquet):
    """An input with columns of those names has increments all the same, under any type of times."""
    path = write_parquet([{"custom_id": "a", "prompt": "x", "_metadata": "y", "file_path": "z"}])
    config, table = job(path).output, spark.read.parquet(path)
    increment = Increment(spark, config, table)
    assert increment.select(table).first()["_metadata"] == "y"
    with session(spark, SESSIONS["times without a zone, in another zone"]):
        increment.note()
        assert Increment(spark, config, spark.read.parquet(path)).new_files == 0
    assert Increment(spark, config, table).new_files == 0
