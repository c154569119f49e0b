import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner

from phibatch import demo
from phibatch.cli import main

REPO = "example/tiny-onnx"
CHAT_REPO = "example/tiny-chat"
SUBFOLDER = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
COMMIT = "0" * 39 + "1"


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a Hugging Face hub as its client asks of one: a listing, and files by commit."""

    protocol_version = "HTTP/1.1"
    asked: list[str]

    def files(self, repo):
        if repo == REPO:
            model = {f"{SUBFOLDER}/{file.name}": file.read_bytes() for file in demo.MODEL_DIR.iterdir()}
            return {**model, f"{SUBFOLDER}/configuration.py": b"raise SystemExit", "README.md": b"a readme"}
        model = {file.name: file.read_bytes() for file in demo.TWIN_DIR.iterdir()}
        others = ("modeling_phi3.py", "pytorch_model.bin", "onnx/config.json", "original/consolidated.safetensors")
        return {**model, **dict.fromkeys(others, b"raise SystemExit"), "LICENSE": b"a licence"}

    def do_GET(self):
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def answer(self, *, body):
        self.asked.append(self.path)
        path = self.path.partition("?")[0]
        repo = next((repo for repo in (REPO, CHAT_REPO) if f"/{repo}" in path), None)
        if repo and (path.startswith(f"/api/models/{repo}/revision/") or path == f"/api/models/{repo}"):
            listing = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files(repo)]}
            return self.send(json.dumps(listing).encode(), body, {"Content-Type": "application/json"})
        if repo and path.startswith(f"/api/models/{repo}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}  # noqa: S324 - git's
                for name, content in self.files(repo).items()
            ]
            return self.send(json.dumps(tree).encode(), body, {"Content-Type": "application/json"})
        name = path.removeprefix(f"/{repo}/resolve/").partition("/")[2]
        content = self.files(repo).get(name) if repo and path.startswith(f"/{repo}/resolve/") else None
        if content is None:
            return self.send(
                b"{}", body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"}, 404
            )
        etag = hashlib.sha256(content).hexdigest()
        return self.send(content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def send(self, content, body, headers, status=200):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, tracking):
    """A hub on loopback, and a way to run `phibatch log` against it."""
    Hub.asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def log(variant, *arguments):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "hub"),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        command = [sys.executable, "-m", "phibatch.cli", "log", variant, "--name", f"hub-{variant}", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    yield log
    server.shutdown()
    server.server_close()


def test_a_model_is_logged_from_a_hub(hub):
    """`--hf-repo` and `--subfolder` fetch that folder with a progress bar, without its code, and log it."""
    done = hub("onnx", "--hf-repo", REPO, "--subfolder", SUBFOLDER, "--alias", "champion")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("models:/hub-onnx/")
    assert "%|" in done.stderr
    fetched = {path for path in Hub.asked if "/resolve/" in path}
    assert any(path.endswith("model.onnx") for path in fetched)
    assert not any(path.endswith((".py", "README.md")) for path in fetched)


def test_a_checkpoint_is_logged_from_a_hub(hub, tmp_path):
    """Of a checkpoint's repository only its own safetensors and texts are fetched, and nothing else is asked."""
    done = hub("transformers", "--hf-repo", CHAT_REPO)
    assert done.returncode == 0, done.stderr
    uri = done.stdout.splitlines()[-1]
    assert uri.startswith("models:/hub-transformers/")
    fetched = {path.rpartition("/")[2] for path in Hub.asked if "/resolve/" in path}
    assert fetched == {file.name for file in demo.TWIN_DIR.iterdir()} | {"LICENSE"}
    assert all(f"/{CHAT_REPO}" in path for path in Hub.asked)
    logged = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path / "logged")))
    assert {file.name for file in (logged / "model").iterdir()} == fetched
    assert (logged / "model" / "LICENSE").read_bytes() == b"a licence"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hf-repo", "example/nope"], "example/nope can not be downloaded"),
        (["--hf-repo", REPO, "--subfolder", "nope"], f"{REPO} has no folder nope"),
    ],
)
def test_what_a_hub_lacks_is_one_sentence(hub, arguments, sentence):
    """A repository or folder that is not there ends with exit code 2 and a sentence."""
    done = hub("onnx", *arguments)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"phibatch: {sentence}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--hf-repo", "x/y", "--model-dir", "z"]])
def test_a_model_comes_from_one_place(arguments):
    """Neither none nor two."""
    done = CliRunner().invoke(main, ["log", "onnx", "--name", "x", *arguments])
    assert done.exit_code == 2
    assert done.stderr == "phibatch: exactly one of --model-dir and --hf-repo must be given\n"
