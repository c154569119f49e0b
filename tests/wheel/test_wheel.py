import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_types_and_demo(wheel):
    """The wheel holds `py.typed`, the embedded model with its twin and prompts, and nothing of the tests."""
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("py.typed", "model/entry.py", "job/log4j2.properties", "demo/CARD.md", "demo/prompts.parquet"):
        assert f"phibatch/{name}" in names
    assert any(name.startswith("phibatch/demo/model/") and name.endswith(".onnx") for name in names)
    assert any(name.startswith("phibatch/demo/twin/") and name.endswith(".safetensors") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"phibatch"}


@pytest.mark.soak
def test_the_onnx_path_needs_neither_torch_nor_transformers(wheel, tmp_path, chat_model, tracking):
    """In an environment with nothing but the wheel and its core dependencies, a model is logged and the job answers.

    What the other variant lacks there is one sentence that names the extra.
    """
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
        wheel,
    ]
    subprocess.run(install, check=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYSPARK", "MLFLOW"))
    }

    def start(*command, **variables):
        command = [str(part) for part in command]
        settings = {"cwd": tmp_path, "env": {**environment, **variables}}
        return subprocess.run(command, **settings, check=False, capture_output=True, text=True)

    def run(*command):
        done = start(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    probe = (
        "from importlib.util import find_spec; print([name for name in ('torch', 'transformers') if find_spec(name)])"
    )
    assert run(python, "-c", probe) == "[]"
    model_dir = run(python, "-c", "from phibatch import demo; print(demo.MODEL_DIR)")
    prompts = run(python, "-c", "from phibatch import demo; print(demo.PROMPTS)")
    assert model_dir.startswith(str(venv))
    uri = run(venv / "bin" / "phibatch", "log", "onnx", "--model-dir", model_dir, "--name", "demo")
    assert uri == "models:/demo/1"
    run(
        *(venv / "bin" / "phibatch", "run", "--input", prompts, "--output", tmp_path / "out", "--model", uri),
        *("--set", "output.keep_columns=[expected]"),
    )
    table = pd.read_parquet(tmp_path / "out")
    assert (table["response"] == table["expected"]).mean() >= 0.95

    twin = run(python, "-c", "from phibatch import demo; print(demo.TWIN_DIR)")
    logging = start(venv / "bin" / "phibatch", "log", "transformers", "--model-dir", twin, "--name", "chat")
    needed = "a transformers model needs transformers and torch to be installed: install phibatch[transformers]"
    assert (logging.returncode, logging.stderr.strip()) == (2, f"phibatch: {needed}")
    job = (
        venv / "bin" / "phibatch",
        "run",
        "--input",
        prompts,
        "--output",
        tmp_path / "chat",
        "--model",
        chat_model.uri,
    )
    running = start(*job, MLFLOW_TRACKING_URI=tracking)
    assert running.returncode == 1
    assert running.stderr.strip().splitlines()[-1] == f"phibatch: the engine failed: {needed}"
