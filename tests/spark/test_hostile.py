"""Input that is broken, or meant to break: each is a clear sentence or a row's error, and nothing is lost."""

import json
import logging
import os
import subprocess

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from phibatch.errors import OutputError, PhibatchError, RunError
from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch

pytestmark = pytest.mark.usefixtures("demo_model")


@pytest.fixture
def answers(spark, job):
    """Run a job and give its response table by custom_id."""

    def run(path, **sections):
        config = job(path, **sections)
        run_batch(spark, config)
        return {row["custom_id"]: row for row in read_responses(spark, config.output).collect()}

    return run


def test_nested_nulls_and_odd_characters_are_row_errors_or_text(answers, write_parquet):
    """Nulls at every depth of `messages`, NUL bytes and half characters: nothing but their own rows fails."""
    ok = {"role": "user", "content": "hi"}
    conversations = {
        "null": None,
        "empty": [],
        "null message": [ok, None],
        "null role": [{"role": None, "content": "x"}, ok],
        "null content": [{"role": "user", "content": None}],
        "nul": [{"role": "user", "content": "a\0b"}],
        "fine": [ok],
    }
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    rows = [{"custom_id": name, "messages": messages} for name, messages in conversations.items()]
    found = answers(write_parquet(rows, schema=pa.schema([("custom_id", pa.string()), ("messages", kind)])))
    assert set(found) == set(conversations)
    good = {name for name, row in found.items() if row["error"]["code"] is None}
    assert good == {"nul", "fine"}
    assert found["nul"]["response"] == "a\0b"
    texts = {"half": '[{"role": "user", "content": "a \\ud800 b"}]', "deep": "[" * 5000, "good": json.dumps([ok])}
    found = answers(
        write_parquet([{"custom_id": name, "messages": text} for name, text in texts.items()], "texts"),
        output={"mode": "overwrite"},
    )
    assert set(found) == set(texts)
    assert found["good"]["response"] == "hi"
    assert found["deep"]["error"]["code"] == "invalid_request"


def test_a_prompt_of_ten_megabytes_is_one_row(answers, write_parquet):
    """It is carried, and the rows beside it are answered."""
    found = answers(
        write_parquet([{"custom_id": "big", "prompt": "x" * 10_000_000}, {"custom_id": "a", "prompt": "b"}])
    )
    assert len(found["big"]["response"]) == 10_000_000
    assert found["a"]["response"] == "b"


def test_a_hundred_thousand_rows_of_one_custom_id(spark, job, tmp_path):
    """One is answered, each of the others is rejected by its own row, and a second run finds all of it done."""
    table = pa.table({"custom_id": ["same"] * 100_000, "prompt": [f"word {n % 10}" for n in range(100_000)]})
    pq.write_table(table, tmp_path / "input.parquet")
    config = job(str(tmp_path / "input.parquet"))
    summary = run_batch(spark, config)
    assert (summary.rows, summary.succeeded, summary.failed_by_code) == (100_000, 1, {"invalid_request": 99_999})
    again = run_batch(spark, config)
    assert (again.rows, again.skipped, again.table_rows) == (0, 100_000, 100_000)


def test_an_output_that_can_not_be_written_is_one_sentence(spark, job, write_parquet, tmp_path):
    """Found before anything is generated."""
    (tmp_path / "file").write_text("in the way")
    path = write_parquet([{"prompt": "x"}])
    with pytest.raises(OutputError, match="can not be") as error:
        run_batch(spark, job(path, output={"path": str(tmp_path / "file" / "output")}))
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_is_one_sentence_and_loses_nothing(spark, job, write_parquet, tmp_path):
    """What was finished is there when there is room again, and the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        words = [os.urandom(400).hex() for _ in range(1500)]
        path = write_parquet([{"custom_id": str(n), "prompt": word} for n, word in enumerate(words)])
        config = job(path, output={"path": str(disk / "output")}, job={"chunk_rows": 100})
        with pytest.raises(RunError, match="No space left on device") as error:
            run_batch(spark, config)
        assert "\n" not in str(error.value)
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert run_batch(spark, config).table_rows == 1500
        rows = read_responses(spark, config.output).collect()
        assert {row["custom_id"]: row["response"] for row in rows} == {str(n): word for n, word in enumerate(words)}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_prompts_are_in_no_log_and_no_error(spark, job, write_parquet, caplog, capfd):
    """Neither a run that ends well, with bad rows, nor one that fails says a word of the table's."""
    caplog.set_level(logging.DEBUG)
    rows = [
        {"custom_id": "a", "prompt": "hunter2 text", "max_tokens": 5.0, "messages": None},
        {"custom_id": "b", "prompt": None, "max_tokens": 5.0, "messages": "hunter2"},
        {"custom_id": "c", "prompt": "hunter2", "max_tokens": 0.5, "messages": None},
        {"custom_id": "d", "prompt": "hunter2", "max_tokens": 5.0, "messages": "hunter2"},
    ]
    path = write_parquet(rows)
    config = job(path, job={"max_error_rate": 0.1})
    with pytest.raises(PhibatchError) as error:
        run_batch(spark, config)
    errors = [row["error"]["message"] for row in read_responses(spark, config.output).collect()]
    told = capfd.readouterr()
    for text in (str(error.value), str(errors), told.out, told.err):
        assert "hunter2" not in text
    # Spark's Python side logs what is sent to the JVM at this level, column expressions and all; not the rows.
    assert not [record for record in caplog.records if "hunter2" in record.getMessage()]
