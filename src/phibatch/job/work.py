"""The work folder beside an output: the plan, finished chunks, and who is at work."""

import hashlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from phibatch.config import OutputConfig
from phibatch.errors import OutputError, RunError
from phibatch.job.session import first_line

CHUNKS = "chunks"
"""Where finished chunks lie in the folder."""

RUNS = "runs"
"""Where the runs that are not accounted for are noted."""

BEAT_SECONDS = 5.0
"""How often a run shows that it is alive."""

SILENCE = 3
"""So many beats without a sign, and a run counts as dead."""

TAKE_OVER_SECONDS = 1.0
READS = 5


@dataclass(frozen=True)
class RunRecord:
    """A run that wrote, or may have written, responses: ISO time of its start."""

    run_id: str
    model: str
    started: str


@dataclass
class Owner:
    """Who is at work.

    Attributes:
        token: the owner's own word.
        host, pid, since: its process; `since` is when it began, so that a number used again is told apart.
        beats: how often it has shown that it is alive.
        left: whether it has ended, without being done.
    """

    token: str
    host: str
    pid: int
    since: float
    beats: int = 0
    left: bool = False

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as can be told at once: by its word, or as a process of this machine."""
        if self.left:
            return True
        if self.host != identify_machine():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.since) > 1
        except psutil.NoSuchProcess:
            return True


def identify_machine() -> str:
    """The machine since its start, and the space of process numbers on it: containers may share the name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    space = Path("/proc/self/ns/pid")
    own = [boot.read_text().strip() if boot.exists() else "", str(space.stat().st_ino) if space.exists() else ""]
    return " ".join([socket.gethostname(), *own])


class WorkFolder:
    """The folder `<output>_work`, on whatever file system Spark writes to.

    A finished chunk is a folder of Parquet with a mark of its own beside its data: a file is there or not. Nothing is
    ever renamed. Of two runs that start in the same second on a store which can not create a file exclusively, both
    may go on until the next beat of the first shows it that it is not the owner.
    """

    def __init__(self, spark: SparkSession, config: OutputConfig) -> None:
        parent, _, name = config.place.rpartition("/")
        if config.work_path:
            # A folder of its own: it is removed at the end, with all that is in it.
            name = f"{name}-{hashlib.sha256(config.place.encode()).hexdigest()[:8]}"
            parent = config.work_path.rstrip("/")
        elif config.table:
            parent = str(spark.conf.get("spark.sql.warehouse.dir"))
        self.place = f"{parent}/{name}_work" if parent or config.place.startswith("/") else f"{name}_work"
        self._spark = spark
        self._java: Any = spark._jvm  # noqa: SLF001 - Hadoop's file systems have no other door in PySpark
        self._owner = self._path("owner.json")
        try:
            configuration = spark._jsc.hadoopConfiguration()  # noqa: SLF001 - what those file systems are configured with
            self._files: Any = self._owner.getFileSystem(configuration)
        except Py4JJavaError as error:
            raise OutputError(f"the output {config.place} can not be reached: {first_line(error)}") from error
        self._me = Owner(uuid.uuid4().hex, identify_machine(), os.getpid(), psutil.Process().create_time())
        self._writing = threading.Lock()
        self._seen = time.monotonic()

    @contextmanager
    def claimed(self) -> Iterator[list[RunRecord]]:
        """Be the one run on this output; gives the runs before that did not come to account for themselves.

        When the block ends as it should, everything is in the output, and the folder is removed.

        Raises:
            OutputError: another run is at work, or the folder can not be written.
        """
        try:
            self._claim()
        except Py4JJavaError as error:
            raise OutputError(f"the output can not be written: {self.place}: {first_line(error)}") from error
        done = threading.Event()
        beating = threading.Thread(target=self._beat, args=(done,), daemon=True)
        beating.start()
        try:
            yield self._read_records()
            self._stop_beating(done, beating)
            self.check()
            self._files.delete(self._path("."), True)
        except BaseException:
            self._stop_beating(done, beating)
            if self._is_mine():
                self._leave()
            raise

    def record(self, run: RunRecord) -> None:
        """Note the run that is going to write, so that it is accounted for even if it dies.

        In a file of its own, written once: the owner's is torn when its process dies as it writes.
        """
        stream = self._files.create(self._path(f"{RUNS}/{run.run_id}"), True)
        stream.write(bytearray(json.dumps(asdict(run)).encode()))
        stream.close()

    def check(self) -> None:
        """Raise RunError when another run has taken this one for dead and taken over."""
        if not self._is_mine():
            raise RunError(f"another run has taken over {self.place}: this one was silent for too long")

    def own(self, name: str) -> str:
        """The name of something that is this run's alone."""
        return f"{self._me.token}/{name}"

    def write(self, frame: DataFrame, name: str) -> None:
        """Write a frame as `name`; it counts as there only when it is whole."""
        frame.write.mode("overwrite").parquet(f"{self.place}/{name}")
        self._files.create(self._path(f"{name}/_WHOLE"), True).close()

    def read(self, *names: str, schema: StructType) -> DataFrame:
        """Read what was written as `names`."""
        return self._spark.read.schema(schema).parquet(*(f"{self.place}/{name}" for name in names))

    def list_whole(self, parent: str) -> list[str]:
        """The names below `parent` that are whole."""
        if not self._files.exists(self._path(parent)):
            return []
        names = [f"{parent}/{each.getPath().getName()}" for each in self._files.listStatus(self._path(parent))]
        return sorted(name for name in names if self._files.exists(self._path(f"{name}/_WHOLE")))

    def remove(self, *names: str) -> None:
        """Remove what was written as `names`, whole or not."""
        for name in names:
            # The mark first: what is half removed does not count.
            self._files.delete(self._path(f"{name}/_WHOLE"), False)
            self._files.delete(self._path(name), True)

    def remove_files(self, uris: list[str]) -> None:
        """Remove data files of the output by their URIs."""
        for uri in uris:
            self._files.delete(self._java.org.apache.hadoop.fs.Path(self._java.java.net.URI(uri)), False)

    def _path(self, name: str) -> Any:
        return self._java.org.apache.hadoop.fs.Path(self.place if name == "." else f"{self.place}/{name}")

    def _claim(self) -> None:
        try:
            self._write_owner(overwrite=False)
        except Py4JJavaError as error:
            if not self._files.exists(self._owner):
                raise
            other = self._read_owner()
            if other is None or not other.is_gone:
                self._wait_for_silence(other)
            self._write_owner()
            # Of several that take over at once the last one to write is in.
            time.sleep(TAKE_OVER_SECONDS)
            if not self._is_mine():
                raise OutputError(f"another run is at work on this output ({self.place})") from error

    def _wait_for_silence(self, other: Owner | None) -> None:
        until = time.monotonic() + SILENCE * BEAT_SECONDS
        while time.monotonic() < until:
            time.sleep(BEAT_SECONDS / 2)
            current = self._read_owner()
            if current is not None and (other is None or (current.token, current.beats) != (other.token, other.beats)):
                raise OutputError(
                    f"another run is at work on this output ({self.place}), on {current.host.split(' ')[0]} as process"
                    f" {current.pid}"
                )

    def _is_mine(self) -> bool:
        """Whether this run is still the owner; one that can not be sure, after a silence, is not."""
        current = self._read_owner()
        if current is None:
            return time.monotonic() - self._seen < SILENCE * BEAT_SECONDS
        return current.token == self._me.token

    def _beat(self, done: threading.Event) -> None:
        while not done.wait(BEAT_SECONDS):
            # A store that does not answer now may do so at the next beat.
            with suppress(Py4JJavaError):
                if not self._is_mine():
                    return
                self._me.beats += 1
                self._write_owner()

    def _stop_beating(self, done: threading.Event, beating: threading.Thread) -> None:
        done.set()
        beating.join()

    def _leave(self) -> None:
        """Let the next run in, with what it is to know of this one."""
        if self._read_records() or self.list_whole(CHUNKS):
            self._me.left = True
            self._write_owner()
        else:
            self._files.delete(self._path("."), True)

    def _read_records(self) -> list[RunRecord]:
        """The runs that are not accounted for, oldest first. One whose record is torn has written nothing yet."""
        if not self._files.exists(self._path(RUNS)):
            return []
        records = []
        for status in self._files.listStatus(self._path(RUNS)):
            with suppress(Py4JJavaError, ValueError, TypeError):
                stream = self._files.open(status.getPath())
                text = bytes(stream.readAllBytes()).decode()
                stream.close()
                records.append(RunRecord(**json.loads(text)))
        return sorted(records, key=lambda record: record.started)

    def _write_owner(self, *, overwrite: bool = True) -> None:
        with self._writing:
            stream = self._files.create(self._owner, overwrite)
            stream.write(bytearray(json.dumps(asdict(self._me)).encode()))
            stream.close()
            self._seen = time.monotonic()

    def _read_owner(self) -> Owner | None:
        """The owner as written; None where there is none. One that is being written is read again."""
        for _ in range(READS):
            try:
                stream = self._files.open(self._owner)
                text = bytes(stream.readAllBytes()).decode()
                stream.close()
                return Owner(**json.loads(text))
            except (Py4JJavaError, ValueError, TypeError):
                time.sleep(0.1)
        return None
