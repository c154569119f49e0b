"""Whatever happens to a run, every input row ends with one response row, and nothing is paid for twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest

from phibatch.errors import EngineError, OutputError, RunError
from phibatch.job import answer, chunks, work
from phibatch.job.output import read_responses, read_usage
from phibatch.job.pipeline import run_batch

pytestmark = pytest.mark.usefixtures("demo_model")

THREE = {"a": "one", "b": "two", "c": "three"}


def answers(table):
    return {row["custom_id"]: row["response"] for row in table}


def test_a_process_that_is_killed_is_gone_on_from(run, spark, job, write_parquet, calls, tmp_path):
    """SIGKILL to driver, JVM and workers between two chunks: the next run does the rest, and accounts for both."""
    rows = {str(n): f"word {n}" for n in range(60)}
    path = write_parquet([{"custom_id": k, "prompt": v} for k, v in rows.items()])
    output = tmp_path / "output"
    command = [sys.executable, "-m", "phibatch.cli", "run", "--input", path, "--output", str(output)]
    command += ["--model", "models:/counting/1", "--set", "model.engine=echo", "--set", "job.chunk_rows=5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (tmp_path / "log").open("w") as log:
        killed = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        # The first file is that of the rejected rows, of which there are none.
        while len(list(output.glob("part-*"))) < 3:
            assert killed.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    found = read_responses(spark, job("x").output).count()
    assert 0 < found < 60
    summary, table, asked = run(rows, job={"chunk_rows": 60})
    assert answers(table) == rows
    assert len(table) == 60
    # The two runs' together: a chunk that was under way is asked for again.
    assert 60 <= len(asked) <= 65
    usage = [row["rows"] for row in read_usage(spark, job("x").output).collect()]
    assert len(usage) == 2
    assert sum(usage) == 60
    assert summary.skipped >= found


def test_finished_chunks_of_a_run_that_died_are_used(run, spark, monkeypatch, tmp_path):
    """Killed after a chunk was generated and before it was in the table: the next run puts it there, unpaid."""

    def die(self, chunks):
        raise RunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(answer.Answers, "_commit", die)
        with pytest.raises(RunError):
            run(THREE, job={"chunk_rows": 3})
    summary, table, asked = run(THREE)
    # Asked by the run that died; not asked again.
    assert asked == ["one", "three", "two"]
    assert answers(table) == THREE
    assert (summary.rows, summary.skipped) == (0, 3)


def test_overwrite_begins_anew_after_a_death_too(run, spark, monkeypatch):
    """What the dead run had finished is not taken for done."""

    def die(self, chunks):
        raise RunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(answer.Answers, "_commit", die)
        with pytest.raises(RunError):
            run(THREE)
    _, table, asked = run({"a": "eins"}, output={"mode": "overwrite"})
    assert asked.count("eins") == 1
    assert answers(table) == {"a": "eins"}


def test_rows_already_in_the_table_are_not_put_there_twice(run, spark, monkeypatch):
    """Killed after a chunk was put into the table and before it was removed from the work folder."""

    def die(self, *names):
        if names:
            raise RunError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(work.WorkFolder, "remove", die)
        with pytest.raises(RunError):
            run(THREE)
    summary, table, _ = run(THREE)
    assert len(table) == 3
    assert summary.skipped == 3


def test_a_death_while_rows_are_replaced_loses_none(run, spark, monkeypatch, job):
    """Killed between adding the rows that stay and removing the files they came from: seen twice, never absent."""
    run(THREE)
    with monkeypatch.context() as patched:
        patched.setattr(work.WorkFolder, "remove_files", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        with pytest.raises(RunError):
            run({**THREE, "b": "zwei"})
    seen = {row["custom_id"] for row in read_responses(spark, job("x").output).collect()}
    assert seen == set(THREE)
    _, table, asked = run({**THREE, "b": "zwei"})
    assert asked == ["zwei"]
    assert answers(table) == {**THREE, "b": "zwei"}
    assert len(table) == 3


@pytest.mark.parametrize("torn", [False, True])
def test_a_run_that_failed_is_accounted_for(run, spark, monkeypatch, job, tmp_path, torn):
    """Its rows are in the usage table under its own run, once the next has ended; even if it died as it gave a sign."""
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.1)

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("phibatch.job.pipeline.summarise", die)
        with pytest.raises(KeyboardInterrupt):
            run(THREE)
    if torn:
        (tmp_path / "output_work" / "owner.json").write_text("")
    dead = mlflow.search_runs(order_by=["start_time desc"]).iloc[0]["run_id"]
    summary, table, _ = run({**THREE, "d": "four"})
    usage = {row["run_id"]: row for row in read_usage(spark, job("x").output).collect()}
    assert {run: (row["rows"], row["completion_tokens"]) for run, row in usage.items()} == {
        dead: (3, 3),
        summary.run_id: (1, 1),
    }
    assert sum(row["usage"]["completion_tokens"] for row in table) == 4


def test_a_second_run_at_the_same_time_stops(run, spark, job, write_parquet, monkeypatch):
    """It says who is at work, writes nothing, and the first one goes on."""
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.2)
    config = job(write_parquet([{"custom_id": "a", "prompt": "one"}]))
    runs = len(mlflow.search_runs())
    with work.WorkFolder(spark, config.output).claimed(), pytest.raises(OutputError, match="another run is at work"):
        run_batch(spark, config)
    assert len(mlflow.search_runs()) == runs
    assert run_batch(spark, config).rows == 1


def test_the_output_of_a_run_that_died_elsewhere_is_taken_over(spark, job, write_parquet, tmp_path, monkeypatch):
    """When it has not shown for some time that it is alive."""
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.1)
    config = job(write_parquet([{"custom_id": "a", "prompt": "one"}]))
    folder = tmp_path / "output_work"
    folder.mkdir()
    owner = {"token": "t", "host": "elsewhere", "pid": 1, "since": 0.0, "beats": 3}
    (folder / "owner.json").write_text(json.dumps(owner))
    assert run_batch(spark, config).rows == 1


def test_a_run_that_lost_its_output_stops(spark, job, monkeypatch, tmp_path):
    """One that was silent for too long does not write into what another has taken over."""
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.1)
    folder = work.WorkFolder(spark, job("x").output)

    def lose():
        with folder.claimed():
            owner = {"token": "another", "host": "elsewhere", "pid": 1, "since": 0.0, "beats": 3}
            # Hadoop's checksum is of what it wrote itself.
            Path(tmp_path, "output_work", ".owner.json.crc").unlink()
            Path(tmp_path, "output_work", "owner.json").write_text(json.dumps(owner))
            folder.check()

    with pytest.raises(RunError, match="another run has taken over"):
        lose()
    assert json.loads(Path(tmp_path, "output_work", "owner.json").read_text())["host"] == "elsewhere"


def test_orphans_that_a_death_left_twice_are_mended(run, spark, monkeypatch, job):
    """As rows of the input are."""
    run(THREE)
    with monkeypatch.context() as patched:
        patched.setattr(work.WorkFolder, "remove_files", lambda *_: (_ for _ in ()).throw(RunError("killed")))
        with pytest.raises(RunError):
            run({"a": "eins"})
    assert read_responses(spark, job("x").output).count() > 4
    _, table, _ = run({"a": "eins"})
    assert answers(table) == {**THREE, "a": "eins"}
    assert len(table) == 3


def test_poisoned_rows_are_recorded_and_the_others_answered(run, monkeypatch):
    """A native crash of the process that computes it costs a row alone; when it alone is left to do, nothing else."""
    rows = {str(n): f"word {n}" for n in range(20)} | {"p": "x -crash- y"}
    summary, table, _ = run(rows)
    assert {row["custom_id"]: row["error"]["code"] for row in table if row["error"]["code"]} == {"p": "worker_crashed"}
    assert summary.succeeded == 20
    monkeypatch.setattr(chunks, "HOPELESS", 1)
    summary, table, asked = run(rows)
    assert (summary.failed_by_code, summary.skipped) == ({"worker_crashed": 1}, 20)
    assert len(table) == 21
    assert asked == ["x -crash- y"] * 2


def test_a_process_that_hangs_is_ended(run):
    """After `job.worker_timeout` without a step; the rows beside the one that hangs are answered."""
    summary, _, _ = run({**THREE, "h": "-hang-"}, job={"worker_timeout": 0.5})
    assert (summary.succeeded, summary.failed_by_code) == (3, {"worker_crashed": 1})


def test_a_broken_engine_stops_the_run_with_its_words(run, calls):
    """Within a chunk, and with what the engine said; nothing is cut up to be tried again."""
    rows = {str(n): f"-break- {n}" for n in range(500)}
    with pytest.raises(EngineError, match=r"^the engine failed: the weights are broken$"):
        run(rows, job={"chunk_rows": 50})
    assert len(calls()) <= 2 * 50
