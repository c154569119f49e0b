"""An environment that goes along with the job, to machines that have none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from phibatch import demo

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.soak


def test_the_archive_is_all_that_executors_need(bare_cluster, demo_model, environment, tmp_path):
    """`make cluster-archive`, then the command of docs/operating.md, on workers whose Python has no phibatch."""
    for name in (
        "src",
        "jobs",
        "conf",
        "docs",
        "Makefile",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "CHANGELOG.md",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    make = ["make", "-o", ".venv/.core", "-o", ".venv/.dev", "cluster-archive", f"PYTHON={sys.executable}"]
    made = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (tmp_path / "dist" / "phibatch-environment.tar.gz").stat().st_size < 400 * 2**20
    settings = {
        **{name: value for name, value in environment.items() if name != "PYTHONPATH"},
        "PYSPARK_DRIVER_PYTHON": sys.executable,
        "PYSPARK_PYTHON": "./environment/bin/python",
    }
    command = [".venv/bin/spark-submit", "--master", bare_cluster.url, "--properties-file", "conf/spark-defaults.conf"]
    command += ["--archives", "dist/phibatch-environment.tar.gz#environment", "jobs/run_batch.py"]
    command += ["--input", str(demo.PROMPTS), "--output", str(tmp_path / "out"), "--model", demo_model.uri]
    command += ["--set", "output.keep_columns=[expected]"]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    table = pd.read_parquet(tmp_path / "out")
    assert (table["response"] == table["expected"]).mean() >= 0.95
    # They had it from nowhere else.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    probe = subprocess.run([bare_cluster.python, "-c", "import phibatch"], env=bare, check=False, capture_output=True)
    assert probe.returncode == 1
