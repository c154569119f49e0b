"""The same command again does what is missing, and nothing twice."""

from importlib.metadata import version

import mlflow
import pytest
from pyspark.sql import functions as F

import phibatch
from phibatch.errors import OutputError
from phibatch.job import output
from phibatch.job.output import read_usage
from phibatch.job.pipeline import run_batch
from phibatch.job.validate import validate_job

pytestmark = pytest.mark.usefixtures("demo_model")

THREE = {"a": "one", "b": "two", "c": "three"}


def answers(table):
    return {row["custom_id"]: row["response"] for row in table}


def test_a_second_run_generates_nothing(run, spark, job):
    """Rows are known by their content: the table, to the last byte, and the bill stay as they are."""
    _, first, asked = run(THREE)
    summary, second, again = run(THREE)
    assert (asked, again) == (["one", "three", "two"], [])
    assert second == first
    assert (summary.rows, summary.skipped, summary.completion_tokens, summary.table_rows) == (0, 3, 0, 3)


def test_what_changed_is_done_again_and_replaces_the_old(run, tmp_path):
    """A changed prompt, a new row and a row of other parameters are generated; one row each is left."""
    run(THREE)
    summary, table, asked = run({**THREE, "b": "zwei", "d": "four"})
    assert asked == ["four", "zwei"]
    assert answers(table) == {"a": "one", "b": "zwei", "c": "three", "d": "four"}
    assert len(table) == 4
    assert (summary.rows, summary.skipped) == (2, 2)
    _, table, asked = run({**THREE, "b": "zwei", "d": "four"}, generation={"max_tokens": 7})
    assert asked == ["four", "one", "three", "zwei"]
    assert len(table) == 4
    assert not (tmp_path / "output_work").exists()


@pytest.mark.parametrize(("orphans", "left"), [("keep", {"a", "b", "c", "d"}), ("drop", {"a", "d"})])
def test_rows_that_left_the_input_are_kept_or_dropped(run, orphans, left):
    """As `output.orphans` says; what is still in the input is not generated again."""
    run(THREE)
    _, table, asked = run({"a": "one", "d": "four"}, output={"orphans": orphans})
    assert asked == ["four"]
    assert {row["custom_id"] for row in table} == left
    assert len(table) == len(left)


def test_an_echo_is_not_the_models_answer(run, spark, job):
    """After an echo the model generates every row, after the model the echo; key, model, usage and tags tell which."""
    seen = {}
    for engine, name, library in (
        ("echo", "echo:models:/counting/1", f"phibatch {phibatch.__version__}"),
        ("auto", "models:/counting/1", f"onnxruntime {version('onnxruntime')}"),
        ("echo", "echo:models:/counting/1", f"phibatch {phibatch.__version__}"),
    ):
        settings = {"uri": "models:/counting/1", "engine": engine}
        summary, table, asked = run(THREE, model=settings, generation={"max_tokens": 4})
        assert asked == ["one", "three", "two"]
        assert [row["model"] for row in table] == [name] * 3
        keys = {row["request_key"] for row in table}
        assert seen.setdefault(engine, keys) == keys
        usage = read_usage(spark, job("x").output).collect()[-1]
        told = (name, {"echo": "echo", "auto": "slots"}[engine], library)
        assert (usage["model"], usage["engine"], usage["engine_version"]) == told
        tags = mlflow.get_run(summary.run_id).data.tags
        assert tuple(tags[f"phibatch.{word}"] for word in ("model", "engine", "engine_version")) == told
    assert not seen["echo"] & seen["auto"]
    summary, _, asked = run(THREE, generation={"max_tokens": 4})
    assert (asked, summary.engine, summary.engine_version) == ([], None, None)


def test_keys_of_another_version_are_generated_anew_only_when_that_is_said(run, spark, job, write_parquet, calls):
    """A run and `validate` say how many answered rows it is, of those that are in the input."""
    run({**THREE, "d": "four", "bad": " "})
    place = job("x").output.path
    older = F.when(F.col("custom_id") == "a", F.col("request_key")).otherwise(F.substring("request_key", 4, 64))
    table = spark.read.parquet(place).withColumn("request_key", older)
    spark.createDataFrame(table.collect(), table.schema).write.mode("overwrite").parquet(place)
    sentence = "has answered 2 of the rows, and this run would generate them anew: set job.regenerate_older_keys"
    rows = {**THREE, "bad": " "}
    with pytest.raises(OutputError, match=sentence):
        run(rows)
    assert calls() == []
    path = write_parquet([{"custom_id": name, "prompt": text} for name, text in rows.items()])
    config = job(path, model={"uri": "models:/counting/1"})
    validation = validate_job(spark, config)
    assert (validation.done, validation.older) == (1, 2)
    with pytest.raises(OutputError, match=sentence):
        validation.check()
    assert len(calls()) == 2, "validate has had its prompts counted"
    _, table, asked = run(rows, job={"regenerate_older_keys": True})
    assert asked == ["three", "two"]
    assert [row["custom_id"] for row in table] == ["a", "b", "bad", "c", "d"]
    assert [row["request_key"][:3] == "v2:" for row in table] == [True] * 4 + [False]
    assert run(rows)[2] == []


def test_failures_that_may_pass_are_tried_again(run, monkeypatch, spark, job):
    """By default those, with `none` nothing, with `all` everything; rejected rows come out the same."""
    rows = [{"custom_id": "ok", "prompt": "fine"}, {"custom_id": "bad", "prompt": None}]
    rows += [{"custom_id": "slow", "prompt": "a -late- b"}]
    summary, table, _ = run(rows)
    assert {row["custom_id"]: row["error"]["code"] for row in table} == {
        "ok": None,
        "bad": "invalid_request",
        "slow": "timeout",
    }
    for retry, asked_for in (("none", []), ("failed", ["a -late- b"]), ("all", ["a -late- b", "fine"])):
        summary, table, asked = run(rows, job={"retry": retry})
        assert asked == asked_for, retry
        assert len(table) == 3
        assert (summary.table_rows, summary.table_failed) == (3, 2)


def test_copies_of_a_custom_id_stay_one_row_each(run):
    """Of five rows with one custom_id one is answered and four are rejected, however often the job runs."""
    rows = [{"custom_id": "x", "prompt": text} for text in ("b", "b", "c", "a", None)] + [
        {"custom_id": "y", "prompt": "y"}
    ]
    _, first, asked = run(rows)
    assert len(first) == 6
    assert sum(row["error"]["code"] is None for row in first) == 2
    _, second, again = run(rows)
    assert (second, again) == (first, [])
    # When the others leave, the one that is left is answered.
    last = next(text for text in "abc" if text not in asked)
    _, table, asked = run([{"custom_id": "x", "prompt": last}, {"custom_id": "y", "prompt": "y"}])
    assert asked == [last]
    assert answers(table) == {"x": last, "y": "y"}
    assert len(table) == 2


def test_json_is_resumed_too(run):
    """A format that keeps no schema is read with the run's own."""
    run(THREE, output={"format": "json"})
    summary, table, asked = run({**THREE, "b": "zwei"}, output={"format": "json"})
    assert asked == ["zwei"]
    assert len(table) == 3
    assert summary.skipped == 2


def test_a_format_of_its_own_transactions_is_written_anew(run, monkeypatch):
    """What such a format needs, shown on Parquet: the rows that stay and the new ones, in one overwrite."""
    run(THREE)
    monkeypatch.setattr(output, "FILE_FORMATS", set())
    _, table, asked = run({**THREE, "b": "zwei"})
    assert asked == ["zwei"]
    assert answers(table) == {**THREE, "b": "zwei"}
    assert len(table) == 3


def test_an_output_that_is_something_else_is_left_alone(spark, job, write_parquet):
    """A folder of other data is not appended to."""
    other = write_parquet([{"colour": "red"}], "other")
    with pytest.raises(OutputError, match="is no response table: it has no column"):
        run_batch(spark, job(write_parquet([{"prompt": "x"}]), output={"path": other}))
    assert spark.read.parquet(other).columns == ["colour"]


def test_what_is_beside_the_work_folder_stays(run, tmp_path):
    """`output.work_path` is where the folder is made, not the folder itself: its other content is not touched."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "precious").write_text("x")
    run(THREE, output={"work_path": str(scratch)})
    assert [each.name for each in scratch.iterdir()] == ["precious"]
