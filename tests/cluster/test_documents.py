"""The commands of README.md and docs/, as they stand there, one after the other in a checkout of their own."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pyspark
import pytest

from phibatch import demo
from phibatch.cli import main

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/getting-started.md", "docs/tables.md", "docs/operating.md")
REQUEST = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
BODY = {"messages": [{"role": "user", "content": "hi"}]}
WEIGHTS = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
STAND_INS = {
    # The stamps say what is installed: what runs this test is.
    "make run": "make -o .venv/.core -o .venv/.dev run",
    # tests/model/test_hub.py downloads.
    f"--hf-repo microsoft/Phi-3-mini-4k-instruct-onnx --subfolder {WEIGHTS}": f"--model-dir {demo.MODEL_DIR}",
    "--hf-repo microsoft/Phi-3-mini-4k-instruct": f"--model-dir {demo.TWIN_DIR}",
}
NOT_HERE = ("make test", ".venv/bin/pip install")
"""The first runs this test, and what the second installs is here. tests/model/test_serving.py runs MLflow's server, and
test_archive.py, in `make soak`, the archive."""


def blocks(language):
    """Every fenced block of a language: page, number, text."""
    for page in PAGES:
        found = re.findall(rf"(?ms)^```{language}\n(.*?)^```", (ROOT / page).read_text())
        yield from ((page, number, text) for number, text in enumerate(found))


def commands(text):
    """Single commands, with lines that continue joined and comments gone."""
    joined = re.sub(r"\s*\\\n\s*", " ", text)
    return [line.partition("  #")[0].strip() for line in joined.splitlines() if line.strip()]


def adapt(text, cluster):
    """A block as it can run here; nothing where what it is about is run by another test."""
    if "models serve" in text or "make cluster-archive" in text:
        return ""
    kept = [each for each in commands(text) if not each.startswith(tuple(NOT_HERE))]
    script = "\n".join(kept).replace("spark://HOST:7077", cluster)
    for old, new in STAND_INS.items():
        script = script.replace(old, new)
    return script


@pytest.mark.soak
def test_every_command_works_as_it_stands(big_cluster, environment, tmp_path):
    """From README's first line to the last page, with the embedded model where the real one is named."""
    for name in ("src/phibatch/demo", "conf", "jobs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "requests.jsonl").write_text(json.dumps({**REQUEST, "body": BODY}))
    settings = {name: value for name, value in environment.items() if not name.startswith(("MLFLOW_", "PYSPARK_"))}
    ran = 0
    for page, number, text in blocks("sh"):
        script = adapt(text, big_cluster.url)
        if not script:
            continue
        done = subprocess.run(
            ["bash", "-e"], input=script, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page}, block {number}:\n{script}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 9
    for page in ("output/demo_report/report.html", "output/warm_report/comparison.html", "answers.jsonl"):
        assert (tmp_path / page).is_file()
    for _, _, text in blocks("python"):
        script = f"import mlflow\n{text}"
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=settings, check=True, capture_output=True)


@pytest.mark.parametrize("language", ["yarn", "kubernetes"])
def test_what_can_not_run_here_is_spelled_right(language):
    """Options of spark-submit are spark-submit's, and those of the job phibatch's."""
    spark_submit = Path(pyspark.__file__).parent / "bin" / "spark-submit"
    known = subprocess.run([spark_submit, "--help"], capture_output=True, text=True, check=False)
    ((_, _, text),) = blocks(language)
    (command,) = commands(text)
    words = command.split()
    script = next(place for place, word in enumerate(words) if word.endswith("jobs/run_batch.py"))
    for option in {word for word in words[:script] if word.startswith("--")}:
        assert re.search(rf"{option}[ ,]", known.stdout + known.stderr), option
    main.commands["run"].make_context("run", words[script + 1 :])


def test_no_command_is_in_a_block_that_nobody_runs():
    """Every block is of a language that one of these tests, or the reader, knows."""
    languages = {word for page in PAGES for word in re.findall(r"(?m)^```(\w+)$", (ROOT / page).read_text())}
    assert languages == {"sh", "python", "yarn", "kubernetes", "databricks"}


def test_every_command_of_phibatch_is_in_the_readme():
    """With its name, in the table of commands."""
    readme = (ROOT / "README.md").read_text()
    for name, command in main.commands.items():
        words = [name] if not isinstance(command, click.Group) else [f"{name} {each}" for each in command.commands]
        for each in words:
            assert f"`phibatch {each}" in readme


def test_links_lead_somewhere():
    """Every relative link of the pages is to a file that is there."""
    for page in (*PAGES, "docs/design.md", "docs/benchmark.md", "docs/configuration.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text()):
            assert os.path.exists((ROOT / page).parent / target), (page, target)  # noqa: PTH110 - as a browser does
