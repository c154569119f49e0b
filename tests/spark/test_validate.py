import io
import json

import pytest
from rich.console import Console

from phibatch.errors import ConfigError, ErrorRateExceeded, InputError, ModelError, OutputError
from phibatch.job import work
from phibatch.job.console import Reporter
from phibatch.job.pipeline import run_batch
from phibatch.job.validate import validate_job

pytestmark = pytest.mark.usefixtures("demo_model")


def rows(*prompts):
    return [{"custom_id": str(n), "prompt": prompt} for n, prompt in enumerate(prompts)]


def test_rows_are_counted_by_what_would_become_of_them(spark, job, write_parquet, tmp_path):
    """Done, duplicates, rejected with reasons and to generate add up, and a run then does just that."""
    config = job(write_parquet(rows("one", "two")))
    run_batch(spark, config)
    path = write_parquet(rows("one", "two", "three", "four five", "three", None, " ", " "))
    config = job(path)
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    found = validate_job(spark, config)
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before, "nothing is written"
    assert (found.rows, found.done, found.to_generate, found.duplicates, found.rejected) == (8, 2, 2, 1, 3)
    assert found.reasons == {"prompt is blank": 2, "the row has no prompt: prompt is null": 1}
    assert (found.prompt_tokens.total, found.prompt_tokens.median, found.prompt_tokens.high) == (3, 1, 2)
    assert found.estimate is None
    summary = run_batch(spark, config)
    assert (summary.skipped, summary.failed, summary.duplicates) == (2, 3, 1)


def test_prompts_are_counted_by_the_models_own_tokenizer(spark, job, write_parquet):
    """Token counts are those that the run's usage has, and what is too long for the model is found."""
    path = write_parquet(rows("What is the capital of Spain?", "hello", "word " * 3000))
    config = job(path, model={"engine": "auto"}, generation={"max_tokens": 4})
    found = validate_job(spark, config)
    assert found.refused == {"context_length_exceeded": 1}
    summary = run_batch(spark, config)
    assert summary.failed_by_code == {"context_length_exceeded": 1}
    assert found.prompt_tokens.total == summary.prompt_tokens
    assert sum(count for *_, count in found.prompt_tokens.bins) == 2


def test_a_sample_tells_time_and_cost(spark, job, write_parquet):
    """Twice the executors take half the time and cost the same; without a sample there is nothing to ask."""
    config = job(
        write_parquet(rows(*(f"say {n}" for n in range(400)))),
        model={"engine": "slots"},
        report={"hourly_cost": 3600.0},
    )
    found = validate_job(spark, config, sample=8, executors=10, cores=1).estimate
    assert found.sample_rows == 16
    assert found.slots == 2
    # 16 rows on two slots are 8 rows a slot; 40 rows come to each of ten.
    assert found.seconds == pytest.approx(found.sample_seconds * 40 / 8)
    assert found.cost == pytest.approx(found.seconds * 5)
    assert found.total_tokens > 400 * found.completion_tokens
    out = io.StringIO()
    validation = validate_job(spark, config, sample=8)
    Reporter(Console(file=out, width=120)).say_validation(validation)
    for piece in ("to generate", "400", "prompt tokens:", "measured: 16 rows", "estimate:", "costs"):
        assert piece in out.getvalue()
    with pytest.raises(ConfigError, match="--calibrate"):
        validate_job(spark, config, executors=2)


def test_what_failed_for_good_counts(spark, job, write_parquet):
    """A table that has too many rejected rows ends the next run as it did this one."""
    config = job(write_parquet(rows(None, None, "x")), job={"max_error_rate": 0.5})
    with pytest.raises(ErrorRateExceeded):
        run_batch(spark, config)
    found = validate_job(spark, config)
    assert (found.done, found.done_failed) == (3, 2)
    with pytest.raises(InputError, match="2 of 3 rows would"):
        found.check()


def test_reasons_are_few_and_text(spark, job, write_parquet):
    """Those that hold values are summed up after ten, and none is taken for markup."""
    odd = [{"custom_id": "m", "messages": '[{"role": "[/user]", "content": "x"}]', "max_tokens": None}]
    odd += [
        {"custom_id": str(n), "messages": '[{"role": "user", "content": "x"}]', "max_tokens": -n} for n in range(14)
    ]
    found = validate_job(spark, job(write_parquet(odd)))
    assert (found.rejected, len(found.reasons), sum(found.reasons.values())) == (15, 11, 15)
    out = io.StringIO()
    Reporter(Console(file=out, width=200)).say_validation(found)
    assert "other reasons" in out.getvalue()


def test_a_run_that_would_fail_is_refused(spark, job, write_parquet, tmp_path, monkeypatch):
    """Too many bad rows, an engine that breaks, another run at work: each is an error of the user's, exit code 2."""
    bad = job(write_parquet(rows(None, None, "x")), job={"max_error_rate": 0.5})
    with pytest.raises(InputError, match="2 of 3 rows would"):
        validate_job(spark, bad).check()
    config = job(write_parquet(rows("x")), model={"engine": "slots", "memory": 1000})
    with pytest.raises(ModelError, match="the run would fail: the engine failed: the weights alone take"):
        validate_job(spark, config)
    monkeypatch.setattr(work, "BEAT_SECONDS", 0.2)
    config = job(write_parquet(rows("x")))
    with work.WorkFolder(spark, config.output).claimed(), pytest.raises(OutputError, match="another run is at work"):
        validate_job(spark, config)


def test_a_look_leaves_what_a_dead_run_left(spark, job, write_parquet, monkeypatch, tmp_path):
    """Rows that it had finished count as done, and the next run still finds them."""

    def die(*_):
        raise KeyboardInterrupt

    config = job(write_parquet(rows("one", "two", "three")))
    with monkeypatch.context() as patched:
        patched.setattr("phibatch.job.output.ResponseTable.append", die)
        patched.setattr("phibatch.job.answer.Answers.reject", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            run_batch(spark, config)
    found = validate_job(spark, config)
    # Those of the chunks that had ended when it died.
    assert found.done > 0
    assert found.done + found.to_generate == 3
    assert json.loads((tmp_path / "output_work" / "owner.json").read_text())["left"]
    assert run_batch(spark, config).skipped == found.done
