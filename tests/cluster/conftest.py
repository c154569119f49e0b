import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pyspark
import pytest

ROOT = Path(__file__).parents[2]
SPARK_HOME = Path(pyspark.__file__).parent
START_SECONDS = 60


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def environment(tracking: str) -> dict[str, str]:
    return {
        **os.environ,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[str]:
    """A standalone cluster on loopback, one master and two workers of one core each; its URL."""
    folder = tmp_path_factory.mktemp("cluster")
    port, page = free_port(), free_port()
    url = f"spark://127.0.0.1:{port}"
    daemons: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> None:
        with (folder / f"{len(daemons)}.log").open("wb") as log:
            command = [
                str(SPARK_HOME / "bin" / "spark-class"),
                f"org.apache.spark.deploy.{name}",
                "--host",
                "127.0.0.1",
            ]
            own = {**environment, "SPARK_WORKER_DIR": str(folder / "work")}
            daemons.append(subprocess.Popen([*command, *arguments], stdout=log, stderr=log, env=own))

    try:
        start("master.Master", "--port", str(port), "--webui-port", str(page))
        for _ in range(2):
            start("worker.Worker", "--cores", "1", "--memory", "2g", "--webui-port", "0", url)
        deadline = time.monotonic() + START_SECONDS
        while count_workers(page) < 2:
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(0.3)
        yield url
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def count_workers(page: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/json/", timeout=5) as answer:
            return int(json.load(answer)["aliveworkers"])
    except OSError:
        return 0


@pytest.fixture
def submit(environment: dict[str, str]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run `jobs/run_batch.py` under spark-submit, as the README says it."""

    def run(master: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        settings = {
            "spark.executor.cores": "1",
            "spark.task.cpus": "1",
            "spark.executor.memory": "1g",
            "spark.executor.memoryOverhead": "1g",
            "spark.driver.memory": "1g",
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.ui.enabled": "false",
            "spark.sql.shuffle.partitions": "2",
        }
        configured = [part for key, value in settings.items() for part in ("--conf", f"{key}={value}")]
        command = [str(SPARK_HOME / "bin" / "spark-submit"), "--master", master]
        command += ["--properties-file", str(ROOT / "conf" / "spark-defaults.conf"), *configured]
        command += [str(ROOT / "jobs" / "run_batch.py"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)

    return run
