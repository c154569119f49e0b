"""MLflow's own scoring server, on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

SPAIN = [{"role": "user", "content": "What is the capital of Spain?"}]
TUTORIAL = "<|system|>You are a stand-up comedian.<|end|><|user|>Tell me a joke about atom<|end|><|assistant|>"
JOKE = "Why don't scientists trust atoms? Because they make up everything!"


@pytest.fixture(scope="module", params=["demo_model", "chat_model"])
def ask(request, tmp_path_factory):
    """`mlflow models serve` of each variant, and a way to post to it."""
    uri = request.getfixturevalue(request.param).uri
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w+")
    binaries = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": os.pathsep.join([binaries, os.environ["PATH"]])}
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "-p", str(port), "--env-manager", "local"]
    # Its server is a child of a child: the group ends as one.
    server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def post(path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        url = f"http://127.0.0.1:{port}/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
            text = response.read()
        return json.loads(text) if body is not None else text

    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                post("ping")
                break
            except (urllib.error.URLError, ConnectionError):
                log.seek(0)
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read()) from None
                time.sleep(0.2)
        yield lambda body: post("invocations", body)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
        log.close()


def test_the_tutorials_requests_are_answered(ask):
    """Messages and a prompt, as the tutorial posts them, give its shape."""
    response = ask({"messages": SPAIN})
    assert "Madrid" in response[0]["choices"][0]["message"]["content"]
    usage = response[0]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    assert ask({"prompt": TUTORIAL})[0]["choices"][0]["message"]["content"] == JOKE
    assert ask({"messages": SPAIN, "max_tokens": 2})[0]["usage"]["completion_tokens"] == 2


def test_a_frame_is_answered_row_by_row(ask):
    """MLflow's own forms of several rows are all answered, each by its own parameters."""
    rows = [{"messages": SPAIN, "max_tokens": 3}, {"messages": SPAIN}]
    answers = ask({"dataframe_records": rows, "params": {"max_tokens": 5}})["predictions"]
    assert [each["usage"]["completion_tokens"] for each in answers] == [3, 5]
