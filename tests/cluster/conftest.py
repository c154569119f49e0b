import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
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


class Cluster:
    """A standalone cluster on loopback, one master and two workers, of one core each unless told otherwise."""

    def __init__(self, folder: Path, environment: dict[str, str], cores: int = 1) -> None:
        self.python = sys.executable
        self._folder = folder
        self._cores = cores
        self._environment = {**environment, "SPARK_WORKER_DIR": str(folder / "work")}
        self._logs = 0
        self._page = free_port()
        port = free_port()
        self.url = f"spark://127.0.0.1:{port}"
        self.master = self._start("master.Master", "--port", str(port), "--webui-port", str(self._page))
        self.workers = [self._start_worker() for _ in range(2)]
        self._wait()

    def kill_worker(self) -> None:
        """Kill a worker daemon, whose executors end with it, and start another."""
        worker = self.workers.pop(0)
        worker.kill()
        worker.wait(timeout=30)
        self.workers.append(self._start_worker())

    def kill_executor(self) -> bool:
        """Kill an executor, if there is one."""
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if "org.apache.spark.executor.CoarseGrainedExecutorBackend" in command and self._owns(process):
                process.kill()
                return True
        return False

    def stop(self) -> None:
        for daemon in (*self.workers, self.master):
            daemon.terminate()
        for daemon in (*self.workers, self.master):
            daemon.wait(timeout=30)

    def _owns(self, process: psutil.Process) -> bool:
        """Whether an executor is one of this cluster's: its worker is its parent."""
        return process.ppid() in {worker.pid for worker in self.workers}

    def _start_worker(self) -> "subprocess.Popen[bytes]":
        return self._start(
            "worker.Worker", "--cores", str(self._cores), "--memory", "4g", "--webui-port", "0", self.url
        )

    def _start(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        self._logs += 1
        with (self._folder / f"{self._logs}.log").open("wb") as log:
            command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{name}", "--host"]
            return subprocess.Popen([*command, "127.0.0.1", *arguments], stdout=log, stderr=log, env=self._environment)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while count_workers(self._page) < len(self.workers):
            assert time.monotonic() < deadline, "the cluster did not start"
            time.sleep(0.3)


@pytest.fixture
def big_cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[Cluster]:
    """Of such machines as conf/spark-defaults.conf is written for, if not in truth."""
    (tmp_path / "cluster").mkdir()
    cluster = Cluster(tmp_path / "cluster", environment, cores=4)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def bare_cluster(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Cluster]:
    """One whose machines know nothing of this Python: its own, `python`, has no packages."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv")
    own = {name: value for name, value in environment.items() if not name.startswith("PY")}
    own["PATH"] = os.pathsep.join([str(folder / "venv" / "bin"), "/usr/bin", "/bin"])
    cluster = Cluster(folder, own, cores=4)
    cluster.python = str(folder / "venv" / "bin" / "python")
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), environment)
    try:
        yield cluster
    finally:
        cluster.stop()


def count_workers(page: int) -> int:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{page}/json/", timeout=5) as answer:
            return int(json.load(answer)["aliveworkers"])
    except OSError:
        return 0


class Job:
    """`jobs/run_batch.py` under spark-submit, as the README says it, in a process group of its own."""

    def __init__(self, log: Path, environment: dict[str, str], master: str, *arguments: str) -> None:
        settings = {
            "spark.executor.cores": "1",
            "spark.task.cpus": "1",
            "spark.executor.memory": "1g",
            "spark.executor.memoryOverhead": "1g",
            "spark.executor.extraJavaOptions": environment["SPARK_SUBMIT_OPTS"],
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
        # Into files: a pipe that nobody reads would stop the driver once it is full.
        self._out, self._errors = log.with_suffix(".out"), log.with_suffix(".err")
        with self._out.open("w") as out, self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=errors, start_new_session=True
            )

    def kill(self) -> None:
        """Kill the driver, Python and JVM alike, as a machine that goes away would."""
        with suppress(ProcessLookupError):  # it may just have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait(self, seconds: float = 300) -> "subprocess.CompletedProcess[str]":
        code = self._process.wait(timeout=seconds)
        return subprocess.CompletedProcess([], code, self._out.read_text(), self._errors.read_text())

    @property
    def running(self) -> bool:
        return self._process.poll() is None


@pytest.fixture(scope="session")
def start_job(environment: dict[str, str]) -> Callable[..., Job]:
    """Start a job whose output goes to files of this path."""
    return lambda log, master, *arguments: Job(log, environment, master, *arguments)


@pytest.fixture
def start(start_job: Callable[..., Job], tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a job; one that still runs at the end is killed."""
    jobs: list[Job] = []

    def start(master: str, *arguments: str) -> Job:
        jobs.append(start_job(tmp_path / f"job{len(jobs)}", master, *arguments))
        return jobs[-1]

    yield start
    for each in jobs:
        if each.running:
            each.kill()


@pytest.fixture
def submit(start: Callable[..., Job]) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a job to its end."""
    return lambda *arguments: start(*arguments).wait()
