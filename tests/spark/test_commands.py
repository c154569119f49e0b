import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from phibatch.cli import main

pytestmark = pytest.mark.usefixtures("demo_model")


@pytest.fixture
def phibatch(tmp_path):
    """Run the command in a folder and a process of its own."""
    folder = tmp_path / "work"
    folder.mkdir()

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "COLUMNS": "200"}
        command = [sys.executable, "-m", "phibatch.cli", *arguments]
        return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)

    run.folder = folder
    return run


@pytest.fixture
def invoke(spark, monkeypatch, write_parquet, tmp_path):
    """Run rows by the command in this process, on its session, into the folder `out` of the test's own."""
    monkeypatch.setattr("phibatch.job.session.open_session", lambda _: spark)

    def run(rows, *arguments):
        command = ["run", "--input", write_parquet(rows), "--output", str(tmp_path / "out"), *ECHO, *arguments]
        return CliRunner().invoke(main, command)

    return run


ECHO = ("--set", "model.engine=echo", "--model", "models:/demo@champion", "--set", "report.enabled=false")


def test_a_run_says_what_it_does(phibatch, write_parquet):
    """A run shows the model it resolved, the rows to do, and at the end a table of what was done and where it lies."""
    path = write_parquet([{"custom_id": "1", "prompt": "hello"}, {"custom_id": "2", "prompt": None}])
    done = phibatch("run", "--input", path, "--output", "out", *ECHO, "--set", "report.enabled=true", "--show", "2")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    for piece in (
        "model models:/demo/1 (from models:/demo@champion)",
        "rows 2: 1 to generate, 0 duplicates, 1 rejected",
        "succeeded 1",
        "failed: invalid_request 1",
        "completion tokens 1",
        "tokens per second",
        "responses out",
        "usage out_usage",
        "report out_report/report.html",
        "hello",
        "prompt is null",
    ):
        assert piece in words
    assert "\x1b" not in done.stdout
    assert sorted(each.name for each in phibatch.folder.iterdir()) == ["out", "out_report", "out_usage"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--set", "generation.max_token=5"], "unknown key generation.max_token: did you mean generation.max_tokens?"),
        (["--input", "nope"], "input.path nope does not exist"),
        (
            ["--set", "input.columns.prompt=promt"],
            "the input has no column promt (input.columns.prompt): did you mean prompt?",
        ),
        (["--model", "models:/demmo@champion"], "model models:/demmo@champion is not known at"),
        (["--config", "nope.yaml"], "the configuration nope.yaml can not be read: No such file or directory"),
        (["--set", "generation.max_tokens"], "--set generation.max_tokens has no value: write --set section.key=value"),
    ],
)
def test_a_users_mistake_is_one_sentence(invoke, tmp_path, arguments, sentence):
    """A mistake ends with exit code 2 and one sentence, and nothing is written."""
    done = invoke([{"prompt": "hello"}], *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"phibatch: {sentence}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("out")]


def test_an_input_without_a_prompt_is_one_sentence(invoke, tmp_path):
    """A table with no prompt column ends with exit code 2, and nothing is written."""
    done = invoke([{"question": "hello"}])
    assert done.exit_code == 2
    assert done.stderr.startswith("phibatch: the input has no column prompt and no column messages")
    assert not [each for each in tmp_path.iterdir() if each.name.startswith("out")]


def test_too_many_failures_are_exit_code_3(invoke, tmp_path):
    """More failures than `job.max_error_rate` end with exit code 3, after the table is written."""
    done = invoke([{"prompt": "hello" if n else None} for n in range(4)], "--set", "job.max_error_rate=0.2")
    assert done.exit_code == 3
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("phibatch: ")]
    assert sentence.startswith("phibatch: 1 of 4 rows failed, more than job.max_error_rate = 0.2 allows")
    assert (tmp_path / "out" / "_SUCCESS").exists()


def test_a_mistake_ends_the_process_without_a_traceback(phibatch):
    """With what the command gives the shell."""
    done = phibatch("run", "--input", "x", "--output", "out", *ECHO, "--set", "generation.max_token=5")
    assert done.returncode == 2
    assert done.stderr.startswith("phibatch: unknown key generation.max_token: did you mean")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert list(phibatch.folder.iterdir()) == []


def test_without_java_the_package_to_install_is_named(phibatch, write_parquet, monkeypatch, tmp_path):
    """No Java on PATH is one sentence with the package that brings it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    done = phibatch("run", "--input", write_parquet([{"prompt": "hello"}]), "--output", "out", *ECHO)
    assert done.returncode == 2
    assert "openjdk-17-jre-headless" in done.stderr.splitlines()[-1]


def test_the_default_store_is_sqlite_in_the_working_directory(phibatch, monkeypatch):
    """Without MLFLOW_TRACKING_URI a model is logged where the command stands, and its URI is printed last."""
    from phibatch import demo

    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    done = phibatch("log", "onnx", "--model-dir", str(demo.MODEL_DIR), "--name", "m", "--alias", "a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "models:/m/1"
    assert (Path(phibatch.folder) / "mlflow.db").is_file()
