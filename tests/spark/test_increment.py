import pyarrow as pa
import pytest

from phibatch.errors import ConfigError, ErrorRateExceeded, InputError
from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch

pytestmark = pytest.mark.usefixtures("demo_model")


@pytest.fixture
def nightly(spark, job, write_parquet, tmp_path, calls):
    """Write files into the input's folder and run: gives what was asked of the model, and the table's ids."""
    (tmp_path / "inbox").mkdir()

    def run(**files):
        for name, rows in files.items():
            write_parquet([{"custom_id": key, "prompt": text} for key, text in rows.items()], f"inbox/{name}")
        config = job(str(tmp_path / "inbox"), input={"incremental": True}, model={"uri": "models:/counting/1"})
        calls()
        summary = run_batch(spark, config)
        ids = sorted(row["custom_id"] for row in read_responses(spark, config.output).collect())
        return summary, sorted(calls()), ids

    return run


@pytest.mark.usefixtures("counting")
def test_only_new_files_are_read(nightly):
    """A night's files are answered once; a night without one does nothing; a file written anew is read anew."""
    assert nightly(monday={"a": "one", "b": "two"})[1:] == (["one", "two"], ["a", "b"])
    summary, asked, ids = nightly(tuesday={"c": "three"})
    assert (summary.rows, summary.skipped, asked, ids) == (1, 0, ["three"], ["a", "b", "c"])
    summary, asked, ids = nightly()
    assert (summary.rows, summary.skipped, asked, ids) == (0, 0, [], ["a", "b", "c"])
    summary, asked, ids = nightly(monday={"a": "one", "b": "changed"})
    assert (summary.skipped, asked, ids) == (1, ["changed"], ["a", "b", "c"])


@pytest.mark.usefixtures("counting")
def test_files_of_a_run_that_died_are_read_again(nightly, monkeypatch):
    """They are noted when every row of theirs is answered, not before."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("phibatch.job.pipeline.summarise", die)
        with pytest.raises(KeyboardInterrupt):
            nightly(monday={"a": "one"})
    summary, asked, ids = nightly()
    assert (summary.skipped, asked, ids) == (1, [], ["a"])


@pytest.mark.usefixtures("counting")
def test_old_rows_stay_as_they_are(spark, job, write_parquet, nightly, tmp_path):
    """Copies that were rejected are rows too, and stay when their file is not read."""
    (tmp_path / "inbox").mkdir(exist_ok=True)
    texts = pa.schema([("custom_id", pa.string()), ("prompt", pa.string())])
    write_parquet([{"custom_id": "twice", "prompt": None}] * 2, "inbox/bad", texts)
    assert nightly()[2] == ["twice", "twice"]
    assert nightly(monday={"a": "one"})[2] == ["a", "twice", "twice"]
    assert nightly(monday={"a": "two"})[2] == ["a", "twice", "twice"]


def test_a_bad_night_fails_until_it_is_mended(spark, job, write_parquet, tmp_path, counting):
    """The rate is of all rows of the new files, of those done already too; the nights before do not count."""
    (tmp_path / "inbox").mkdir()
    settings = {"input": {"incremental": True}, "job": {"max_error_rate": 0.5}, "model": {"uri": "models:/counting/1"}}

    def run(**files):
        for name, rows in files.items():
            write_parquet([{"custom_id": key, "prompt": text} for key, text in rows.items()], f"inbox/{name}")
        return run_batch(spark, job(str(tmp_path / "inbox"), **settings))

    run(sunday={str(n): "x" for n in range(9)})
    monday = {"fine": "x", "bad": " ", "worse": "  "}
    for files in ({"monday": monday}, {}, {}):
        with pytest.raises(ErrorRateExceeded, match="2 of 3 rows of the new files failed"):
            run(**files)
    with pytest.raises(ErrorRateExceeded, match="3 of 5 rows of the new files failed"):
        run(tuesday={"fine too": "y", "late": "a -late- b"})
    mended = counting.with_name("mended")
    mended.touch()
    try:
        summary = run()
    finally:
        mended.unlink()
    assert (summary.rows, summary.succeeded, summary.skipped, summary.table_failed) == (1, 1, 4, 2)
    # The files are noted: they are not read again.
    assert run().skipped == 0


def test_rows_without_a_custom_id_have_no_increments(spark, job, write_parquet):
    """A text that was answered before would be taken for that row."""
    config = job(write_parquet([{"prompt": "x"}]), input={"incremental": True})
    with pytest.raises(InputError, match="needs a column custom_id"):
        run_batch(spark, config)


def test_increments_need_what_keeps_old_rows(job):
    """Rows of files that are not read would be lost otherwise."""
    for output in ({"mode": "overwrite"}, {"orphans": "drop"}):
        with pytest.raises(ConfigError, match=r"input\.incremental needs"):
            job("x", input={"incremental": True}, output=output)


def test_an_input_that_has_no_files_is_told(spark, job):
    """A view can not say what is new."""
    spark.createDataFrame([("a", "one")], "custom_id string, prompt string").createOrReplaceTempView("numbers")
    config = job("x", input={"path": None, "table": "numbers", "incremental": True})
    with pytest.raises(InputError, match="needs an input of files"):
        run_batch(spark, config)
