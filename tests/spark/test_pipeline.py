import json
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from mlflow.types import Schema
from pyspark.sql import functions as F

from phibatch import demo
from phibatch.contract import ENGINE_COLUMNS, RESPONSE_COLUMNS, USAGE_COLUMNS, GenerationParams
from phibatch.errors import ConfigError, ErrorRateExceeded, InputError, ModelError, OutputError
from phibatch.job.generate import Lineage, build_predict, generate
from phibatch.job.output import read_responses, read_usage
from phibatch.job.pipeline import run_batch
from phibatch.job.plan import group, identify
from phibatch.job.prompts import build_requests, check_columns, read_prompts
from phibatch.model.registry import signature

pytestmark = pytest.mark.usefixtures("demo_model")

EARLIER = """
from mlflow.models import set_model
from phibatch.model.pyfunc import ChatModel

class Earlier(ChatModel):
    def predict(self, context, model_input, params=None):
        answers = super().predict(context, model_input, params)
        for answer in answers:
            del answer["engine"], answer["engine_version"]
        return answers

set_model(Earlier())
"""


@pytest.fixture
def answers(spark, job):
    """Run a job and give its summary and its response table by custom_id."""

    def run(path, **sections):
        config = job(path, **sections)
        summary = run_batch(spark, config)
        written = read_responses(spark, config.output)
        return summary, {row["custom_id"]: row for row in written.collect()}

    return run


def test_every_row_has_one_answer_of_the_contracts_columns(spark, job, write_parquet):
    """The response table has one row per input row and just the columns, of just the types, of the contract."""
    path = write_parquet([{"custom_id": str(n), "prompt": f"say {n % 3}" if n else None} for n in range(10)])
    config = job(path)
    summary = run_batch(spark, config)
    written = read_responses(spark, config.output)
    assert {field.name: field.dataType.simpleString() for field in written.schema} == RESPONSE_COLUMNS
    rows = {row["custom_id"]: row for row in written.collect()}
    assert sorted(rows) == [str(n) for n in range(10)]
    assert rows["4"]["response"] == "say 1"
    assert (rows["4"]["finish_reason"], rows["4"]["error"]["code"], rows["4"]["error"]["message"]) == (
        "stop",
        None,
        None,
    )
    assert (rows["4"]["usage"]["prompt_tokens"], rows["4"]["usage"]["total_tokens"]) == (2, 4)
    assert (rows["4"]["model"], rows["4"]["run_id"]) == (summary.model, summary.run_id)
    assert rows["4"]["created"] is not None
    assert rows["4"]["generation_seconds"] >= 0
    assert (rows["0"]["response"], rows["0"]["finish_reason"], rows["0"]["generation_seconds"]) == (None, None, None)
    assert rows["0"]["error"]["code"] == "invalid_request"
    assert rows["0"]["usage"]["total_tokens"] == 0


def test_the_summary_is_the_written_tables(answers, spark, job, write_parquet):
    """Totals, the usage table and the MLflow metrics are the sums of what was written."""
    path = write_parquet([{"custom_id": str(n), "prompt": f"say {n % 3}" if n else None} for n in range(10)])
    config = job(path)
    summary, rows = answers(path)
    assert (summary.rows, summary.succeeded, summary.failed, summary.failed_by_code) == (
        10,
        9,
        1,
        {"invalid_request": 1},
    )
    assert summary.duplicates == 6
    assert summary.prompt_tokens == sum(row["usage"]["prompt_tokens"] for row in rows.values())
    assert summary.completion_tokens == sum(row["usage"]["completion_tokens"] for row in rows.values())
    usage = read_usage(spark, config.output)
    assert {field.name: field.dataType.simpleString() for field in usage.schema} == USAGE_COLUMNS
    line = usage.collect()
    assert len(line) == 1
    assert (line[0]["run_id"], line[0]["rows"], line[0]["failed"]) == (summary.run_id, 10, 1)
    assert line[0]["tokens_per_second"] == pytest.approx(line[0]["completion_tokens"] / line[0]["seconds"])
    run = mlflow.get_run(summary.run_id)
    assert run.data.metrics["succeeded"] == 9
    assert run.data.metrics["failed_invalid_request"] == 1
    assert f"echo:{run.data.params['model.uri']}" == summary.model
    assert run.data.tags["phibatch.model"] == summary.model
    assert run.inputs.dataset_inputs[0].dataset.name
    logged = yaml.safe_load(mlflow.artifacts.load_text(f"runs:/{summary.run_id}/config.yaml"))
    assert (logged["input"]["path"], logged["generation"]["max_tokens"]) == (path, 300)


def evaluations(frame):
    """How often a plan evaluates Python functions."""
    return frame._jdf.queryExecution().executedPlan().toString().count("ArrowEvalPython")


def test_the_model_is_evaluated_once(spark, job, write_parquet, demo_model):
    """The written frame's plan holds the model once, whatever is read of its answers."""
    config = job(write_parquet([{"prompt": str(n)} for n in range(4)]))
    prompts = read_prompts(spark, config.input)
    columns = check_columns(prompts, config.input)
    plan = group(identify(build_requests(prompts, columns, config.input, config.generation), demo_model.digest))
    frame = generate(plan, build_predict(spark, demo_model, config.model, config.job), Lineage("m", "run"))
    assert evaluations(frame) == 1
    assert (
        evaluations(frame.where(F.col("error.code").isNull() & (F.length("response") > 0)).select("usage", "response"))
        == 1
    )


def test_the_engine_is_asked_once_for_each_distinct_request(answers, write_parquet, calls):
    """Counted in the model itself: every distinct request once, and rejected rows never."""
    path = write_parquet([{"custom_id": str(n), "prompt": f"word {n % 7}" if n else None} for n in range(50)])
    _, rows = answers(path, model={"uri": "models:/counting/1"}, output={"keep_columns": ["prompt"]})
    assert len(rows) == 50
    assert sorted(calls()) == [f"word {n}" for n in range(7)]


def test_messages_and_parameters_reach_the_engine(answers, write_parquet):
    """Conversations, limits and stop strings arrive row by row."""
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c d e"},
    ]
    rows = [
        {"custom_id": "1", "messages": json.dumps(conversation), "max_tokens": 2, "stop": None},
        {"custom_id": "2", "messages": json.dumps(conversation), "max_tokens": 9, "stop": "e"},
    ]
    _, found = answers(write_parquet(rows))
    assert [(found[n]["response"], found[n]["finish_reason"]) for n in "12"] == [("c d", "length"), ("c d ", "stop")]
    assert found["1"]["usage"]["prompt_tokens"] == 5


def test_kept_columns_follow_the_contracts(answers, write_parquet):
    """`output.keep_columns` come after the contract's columns, with rejected rows as with answered ones."""
    path = write_parquet(
        [{"custom_id": "1", "prompt": "x", "tag": "t"}, {"custom_id": "2", "prompt": None, "tag": "u"}]
    )
    _, rows = answers(path, output={"keep_columns": ["tag", "prompt"]})
    assert {name: row["tag"] for name, row in rows.items()} == {"1": "t", "2": "u"}
    assert list(rows["1"].asDict()) == [*RESPONSE_COLUMNS, "tag", "prompt"]


def test_an_existing_output_is_not_touched(spark, job, write_parquet, tmp_path):
    """With `output.mode` error a second run stops before anything is generated; with overwrite it begins anew."""
    path = write_parquet([{"custom_id": "1", "prompt": "first"}])
    run_batch(spark, job(path))
    runs = len(mlflow.search_runs())
    with pytest.raises(OutputError, match=r"exists already; name another, or set output\.mode to resume or overwrite"):
        run_batch(spark, job(path, output={"mode": "error"}))
    assert len(mlflow.search_runs()) == runs
    again = job(write_parquet([{"custom_id": "1", "prompt": "second"}], "other"), output={"mode": "overwrite"})
    run_batch(spark, again)
    assert [row["response"] for row in read_responses(spark, again.output).collect()] == ["second"]
    assert read_usage(spark, again.output).count() == 2


def test_tables_by_name_work_as_paths_do(spark, job, write_parquet):
    """Input and output may be tables of the catalog, of any name."""
    rows = [{"custom_id": "1", "prompt": "hello", "code": "mine"}]
    spark.read.parquet(write_parquet(rows)).write.saveAsTable("prompts")
    config = job(None, input={"table": "prompts"}, output={"path": None, "table": "error", "keep_columns": ["code"]})
    assert run_batch(spark, config).succeeded == 1
    try:
        assert spark.read.table("`error`").select("response", "code").collect() == [("hello", "mine")]
        assert spark.read.table("error_usage").count() == 1
        # As phibatch 0.1.0 has left it.
        usage = spark.read.table("error_usage").drop(*ENGINE_COLUMNS)
        usage = spark.createDataFrame(usage.collect(), usage.schema)
        spark.sql("DROP TABLE error_usage")
        usage.write.saveAsTable("error_usage")
        assert [row["engine"] for row in read_usage(spark, config.output).collect()] == [None]
        assert run_batch(spark, config).skipped == 1
        retried = {"retry": "all"}
        config = config.model_copy(update={"job": config.job.model_copy(update=retried)})
        assert run_batch(spark, config).rows == 1
        assert spark.read.table("`error`").count() == 1
        assert [row["engine"] for row in read_usage(spark, config.output).collect()] == [None, None, "echo"]
    finally:
        for name in ("prompts", "error", "error_usage"):
            spark.sql(f"DROP TABLE IF EXISTS {name}")


def test_a_model_that_was_logged_by_an_earlier_version_answers(spark, job, write_parquet, tmp_path):
    """Its answers name no engine, nor does the usage table then; a usage table without the columns gets them."""
    code = tmp_path / "earlier.py"
    code.write_text(EARLIER)
    known = signature(GenerationParams())
    known.outputs = Schema([each for each in known.outputs if each.name not in ENGINE_COLUMNS])
    info = mlflow.pyfunc.log_model(
        name="earlier",
        python_model=str(code),
        artifacts={"model": str(demo.MODEL_DIR)},
        signature=known,
        pip_requirements=[],
        model_config={"name": "earlier", "digest": "earlier"},
        metadata={"phibatch_digest": "earlier"},
    )
    config = job(write_parquet([{"custom_id": "1", "prompt": "x"}]), model={"uri": info.model_uri})
    assert run_batch(spark, config).succeeded == 1
    usage = spark.read.parquet(config.output.usage_place).drop(*ENGINE_COLUMNS)
    usage = spark.createDataFrame(usage.collect(), usage.schema)
    usage.write.mode("overwrite").parquet(config.output.usage_place)
    run_batch(spark, job(write_parquet([{"custom_id": "2", "prompt": "x"}], "other")))
    usage = read_usage(spark, config.output).collect()
    assert [(row["engine"], row["engine_version"] is None) for row in usage] == [(None, True), ("echo", False)]


def test_the_sessions_settings_change_nothing(spark, job, write_parquet, tmp_path):
    """The table, its keys and what a second run does are the same under each; nulls in a request are no values."""
    rows = [{"custom_id": str(n), "prompt": f"say {n % 3}" if n else None, "max_tokens": 1 + n % 2} for n in range(6)]
    tables = []
    for settings in ({}, {"jsonGenerator.ignoreNullFields": "false", "ansi.enabled": "false", "caseSensitive": "true"}):
        session = spark.newSession()
        for name, value in settings.items():
            session.conf.set(f"spark.sql.{name}", value)
        config = job(write_parquet(rows), output={"path": str(tmp_path / f"output{len(tables)}")})
        assert run_batch(session, config).succeeded == 5
        assert run_batch(spark, config).skipped == 6
        written = read_responses(session, config.output)
        tables.append(written.drop("run_id", "created", "generation_seconds").orderBy("custom_id").collect())
    assert tables[0] == tables[1]


def test_an_empty_table_is_a_finished_job(answers, write_parquet):
    """No rows in, no rows out, and a usage line of zeros."""
    summary, rows = answers(write_parquet([], schema=pa.schema([("prompt", pa.string())])))
    assert (summary.rows, summary.error_rate, rows) == (0, 0, {})


def test_too_many_failures_raise_after_the_table_is_written(spark, job, write_parquet):
    """Above `job.max_error_rate` the run raises, and everything is written all the same."""
    path = write_parquet([{"custom_id": str(n), "prompt": "x" if n else None} for n in range(4)])
    config = job(path, job={"max_error_rate": 0.2})
    with pytest.raises(ErrorRateExceeded, match=r"1 of 4 rows failed, more than job\.max_error_rate = 0\.2"):
        run_batch(spark, config)
    assert read_responses(spark, config.output).count() == 4
    assert read_usage(spark, config.output).count() == 1


@pytest.mark.parametrize(
    ("sections", "error", "sentence"),
    [
        ({"input": {"path": "/nope"}}, InputError, r"^input\.path /nope does not exist$"),
        ({"model": {"uri": "models:/demp@champion"}}, ModelError, r"did you mean demo\?$"),
        ({"model": {"uri": "models:/demo/latest"}}, ModelError, r"name a version or an alias$"),
        ({"model": {"uri": "models:/demo/99"}}, ModelError, r"version=99\) not found$"),
        ({"output": {"keep_columns": ["promt"]}}, InputError, r"no column promt: did you mean prompt\?"),
    ],
)
def test_a_mistake_leaves_nothing_behind(spark, job, write_parquet, tmp_path, sections, error, sentence):
    """Before the first row is generated nothing is written: no output, no usage, no MLflow run."""
    path = write_parquet([{"prompt": "x"}])
    runs = len(mlflow.search_runs())
    with pytest.raises(error, match=sentence):
        run_batch(spark, job(path, **sections))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["input.parquet"]
    assert len(mlflow.search_runs()) == runs


def test_the_order_and_the_cut_of_the_table_do_not_matter(answers, write_parquet):
    """Shuffled, in one partition or in seven, the table is the same."""
    rows = pd.DataFrame({"custom_id": [str(n) for n in range(40)], "prompt": [f"say {n % 9}" for n in range(40)]})
    tables = []
    for place, (seed, partitions) in enumerate([(1, 1), (2, 7)]):
        shuffled = rows.sample(frac=1, random_state=seed)
        _, found = answers(
            write_parquet(shuffled, f"shuffled{place}"), job={"partitions": partitions}, output={"mode": "overwrite"}
        )
        tables.append({name: (row["response"], row["request_key"]) for name, row in found.items()})
    assert tables[0] == tables[1]


def test_an_output_that_holds_the_input_is_refused(spark, job, write_parquet, tmp_path):
    """The input is not overwritten, however its path or a folder above it is spelled."""
    path = write_parquet([{"prompt": "precious"}])
    for place in (f"{tmp_path}/../{tmp_path.name}/input.parquet", str(tmp_path), f"file://{path}"):
        with pytest.raises((ConfigError, OutputError), match=r"(is|holds) the input itself"):
            run_batch(spark, job(path, output={"path": place, "mode": "overwrite"}))
    assert spark.read.parquet(path).first()["prompt"] == "precious"


def test_formats_without_a_schema_work(spark, job, write_parquet):
    """JSON drops a struct of nulls; the run is added up all the same."""
    config = job(write_parquet([{"custom_id": "1", "prompt": "x"}]), output={"format": "json"})
    assert run_batch(spark, config).succeeded == 1


def test_an_earlier_response_table_may_be_the_input(answers, write_parquet):
    """Columns named as the job's own do not confuse it."""
    names = {"reason": "b", "request": "c", "_reason": "d", "row": "e", "kept": "f"}
    path = write_parquet([{"custom_id": "1", "prompt": "x", "request_key": "a", **names}])
    _, rows = answers(path, output={"keep_columns": list(names)})
    assert rows["1"]["response"] == "x"
    assert {name: rows["1"][name] for name in names} == names


def test_a_file_that_is_broken_inside_stops_the_run(spark, job, tmp_path, write_parquet):
    """A file that only fails when it is read, after another that is whole, is one sentence."""
    folder = tmp_path / "prompts"
    folder.mkdir()
    content = Path(write_parquet([{"prompt": "x" * 1000} for _ in range(100)])).read_bytes()
    (folder / "a.parquet").write_bytes(content)
    (folder / "b.parquet").write_bytes(b"PAR1" + b"\0" * (len(content) - 4))
    with pytest.raises(InputError, match="can not be read") as error:
        run_batch(spark, job(str(folder)))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "output").exists()


def test_a_readers_options_are_not_logged(spark, job, write_parquet):
    """A password among the reader's options does not reach MLflow."""
    config = job(write_parquet([{"prompt": "x"}]), input={"options": {"password": "hunter2"}})
    run = mlflow.get_run(run_batch(spark, config).run_id)
    assert run.data.params["input.options.password"] == "**********"
    assert "hunter2" not in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.yaml")
