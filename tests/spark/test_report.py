import io
import re

import mlflow
import pytest
from click.testing import CliRunner
from rich.console import Console

from phibatch.cli import main
from phibatch.job.console import Reporter
from phibatch.job.output import read_responses
from phibatch.job.pipeline import run_batch
from phibatch.job.publish import find_output, publish_report, read_comparison
from phibatch.job.report import build_report

pytestmark = pytest.mark.usefixtures("demo_model")

ROWS = [{"custom_id": f"row-{n}", "prompt": "say " + "word " * (n % 7)} for n in range(40)]
ROWS += [{"custom_id": f"bad-{n}", "prompt": None} for n in range(7)]


@pytest.fixture(scope="module")
def ran(spark, tmp_path_factory):
    """A run with a report, and the one that answered three rows more; gives the output and both summaries."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from phibatch.config import build_config

    folder = tmp_path_factory.mktemp("report")
    summaries = []
    for rows in (ROWS, [*ROWS, *({"custom_id": f"more-{n}", "prompt": f"more <b>&amp; {n}"} for n in range(3))]):
        pq.write_table(pa.Table.from_pylist(rows), folder / "input.parquet")
        config = build_config(
            {
                "input": {"path": str(folder / "input.parquet")},
                "model": {"uri": "models:/demo@champion", "engine": "echo"},
                "output": {"path": str(folder / "output")},
                "report": {"hourly_cost": 3.6},
            }
        )
        summaries.append(run_batch(spark, config))
    return folder / "output", summaries


def read_report(spark, output, run_id=None, hourly_cost=None):
    config = find_output(spark, str(output), "parquet")
    usage = spark.read.parquet(config.usage_place)
    return build_report("here", read_responses(spark, config), usage, run_id, hourly_cost)


def test_the_numbers_are_the_tables(ran, spark):
    """Rows, tokens, reasons, errors with the first ids, and distributions are those of the response table."""
    output, summaries = ran
    report = read_report(spark, output, hourly_cost=3.6)
    rows = spark.read.parquet(str(output)).collect()
    assert (report.rows, report.succeeded, report.failed) == (50, 43, 7)
    assert report.prompt_tokens == sum(row["usage"]["prompt_tokens"] for row in rows)
    assert report.finish_reasons == {"stop": 43}
    (error,) = report.errors
    assert (error.code, error.rows, error.examples) == ("invalid_request", 7, tuple(f"bad-{n}" for n in range(5)))
    lengths = [row["usage"]["prompt_tokens"] for row in rows if row["error"]["code"] is None]
    shown = report.distributions["prompt_tokens"]
    assert (shown.low, shown.high, sum(shown.counts), shown.width) == (min(lengths), max(lengths), 43, 1)
    assert shown.counts == tuple(lengths.count(n) for n in range(min(lengths), max(lengths) + 1))
    assert [run.run_id for run in report.runs] == [each.run_id for each in summaries]
    seconds = sum(each.seconds for each in summaries)
    assert report.cost.total == pytest.approx(seconds / 1000)
    total = report.prompt_tokens + sum(run.completion_tokens for run in report.runs)
    assert report.cost.per_million_tokens == pytest.approx(seconds / 1000 / total * 1e6)


def test_throughput_adds_up(ran, spark):
    """The area below a run's line is what it generated."""
    output, summaries = ran
    for line, summary in zip(read_report(spark, output).throughput, summaries, strict=True):
        width = line.seconds[1] - line.seconds[0] if len(line.seconds) > 1 else 2 * line.seconds[0]
        assert sum(line.tokens_per_second) * width == pytest.approx(summary.prompt_tokens + summary.completion_tokens)


def test_one_run_can_be_shown_alone(ran, spark):
    """With a run's id the report is about its rows."""
    output, (_, second) = ran
    report = read_report(spark, output, second.run_id)
    assert (report.rows, report.failed, len(report.runs)) == (3, 0, 1)


def test_a_table_without_an_answer_has_a_report(spark, job, write_parquet):
    """All rows failed: there is nothing to draw of, and nothing to divide by."""
    config = job(write_parquet([{"custom_id": "a", "prompt": " "}]), report={"enabled": True})
    run_batch(spark, config)
    report = read_report(spark, config.output.path, hourly_cost=1)
    assert (report.rows, report.succeeded, report.distributions) == (1, 0, {})


def test_the_page_stands_alone(ran, spark):
    """One file without scripts or anything to load; the plots lie beside it, and in MLflow too."""
    output, summaries = ran
    folder = output.parent / "output_report"
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    assert not re.search(r"(src|href)=.(?!#)", re.sub(r'xlink:href="#', "", page))
    links = re.findall(r"https?://[^\"'<> )]+", page)
    # Names of XML's vocabularies, in matplotlib's drawings.
    assert {link.split("/")[2] for link in links} <= {"www.w3.org", "purl.org", "creativecommons.org", "matplotlib.org"}
    assert page.count("<svg") == 5
    assert "bad-4" in page
    assert "bad-5" not in page
    assert "more &lt;b&gt;" not in page, "a report quotes no prompt"
    pictures = sorted(file.name for file in folder.glob("*.png"))
    assert pictures == [
        "completion_tokens.png",
        "generation_seconds.png",
        "outcomes.png",
        "prompt_tokens.png",
        "throughput.png",
    ]
    assert (folder / "outcomes.png").read_bytes().startswith(b"\x89PNG")
    logged = {file.path for file in mlflow.MlflowClient().list_artifacts(summaries[0].run_id)}
    assert {"report.html", "plots", "config.yaml", "versions.yaml"} <= logged
    assert "hourly_cost" in page
    assert "onnxruntime-genai" in page


def test_names_are_escaped(spark, job, write_parquet):
    """A custom_id of HTML is shown, not run."""
    path = write_parquet([{"custom_id": "<img src=x>", "prompt": None}, {"custom_id": "b", "prompt": "x"}])
    config = job(path, report={"enabled": True})
    run_batch(spark, config)
    page = spark.read.text(f"{config.output.path}_report/report.html", wholetext=True).collect()[0][0]
    assert "&lt;img src=x&gt;" in page
    assert "<img" not in page


def test_a_format_without_a_schema_has_a_report(spark, job, write_parquet):
    """JSON drops what is null in every row, and knows no times."""
    config = job(write_parquet([{"prompt": "x"}]), output={"format": "json"}, report={"enabled": True})
    run_batch(spark, config)
    assert "succeeded" in spark.read.text(f"{config.output.path}_report/report.html", wholetext=True).collect()[0][0]


def test_a_report_that_can_not_be_written_is_no_failed_run(spark, job, write_parquet, tmp_path):
    """The rows are written, and the line that names the report says why there is none."""
    (tmp_path / "output_report").write_text("in the way")
    out = io.StringIO()
    config = job(write_parquet([{"prompt": "x"}]), report={"enabled": True})
    assert run_batch(spark, config, Reporter(Console(file=out, width=300))).succeeded == 1
    assert "report    not written: " in out.getvalue()


def test_progress_is_in_mlflow(ran):
    """The run's page shows committed rows and rates by step."""
    _, (first, _) = ran
    history = mlflow.MlflowClient().get_metric_history(first.run_id, "progress/rows")
    assert history[-1].value == 47
    metrics = mlflow.get_run(first.run_id).data.metrics
    assert metrics["progress/failed"] == 7
    assert metrics["progress/tokens_per_second"] > 0


def test_two_outputs_are_compared(spark, job, write_parquet, tmp_path):
    """Rows of both by custom_id: equal ones, alike ones, lengths, and those that differ side by side."""
    texts = {
        "same": ("Yes.", "Yes."),
        "alike": ("Yes, sir", "yes sir"),
        "other": ("one two", "three"),
        "bad": ("x", None),
    }
    outputs = []
    for place, name in enumerate("ab"):
        rows = [{"custom_id": "same", "prompt": "zz"}, {"custom_id": "same", "prompt": "zzz"}]
        rows += [{"custom_id": key, "prompt": pair[place]} for key, pair in texts.items()]
        rows.append({"custom_id": f"only-{name}", "prompt": "alone"})
        config = job(write_parquet(rows, name), output={"path": str(tmp_path / name)})
        run_batch(spark, config)
        outputs.append(config.output)
    comparison = read_comparison(spark, *outputs)
    assert (comparison.rows, comparison.answered, comparison.equal, comparison.alike) == (4, 3, 1, 2)
    assert [(each.custom_id, each.first, each.second) for each in comparison.samples] == [
        ("bad", "x", "[invalid_request]"),
        ("other", "one two", "three"),
    ]
    assert (comparison.first.succeeded, comparison.second.succeeded) == (5, 4)
    assert comparison.first.rows == 7
    assert comparison.first.mean_tokens == pytest.approx(5 / 3)
    page = publish_report(spark, outputs[1], other=outputs[0])
    assert "Answers that differ" in spark.read.text(page, wholetext=True).collect()[0][0]


def test_the_commands_make_reports_and_comparisons(ran, spark, monkeypatch):
    """`report` and `compare` print last where their page is; what is not there is one sentence and exit code 2."""
    output, (first, _) = ran
    monkeypatch.setattr("phibatch.job.session.open_session", lambda _: spark)
    done = CliRunner().invoke(main, ["report", str(output), "--run-id", first.run_id])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1] == f"{output}_report/report.html"
    done = CliRunner().invoke(main, ["compare", str(output), str(output)])
    assert done.exit_code == 0, done.output
    assert "100.0%" in done.output
    assert done.output.splitlines()[-1] == f"{output}_report/comparison.html"
    for arguments, sentence in [
        (["report", "nope"], "there is no output nope: neither a path nor a table"),
        (["report", str(output), "--run-id", "x"], f"the output {output} has no run x"),
        (["report", str(output.parent)], "is no output of a run that ended"),
    ]:
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 2
        assert sentence in done.output
