"""The work folder beside an output: the plan, finished chunks, and who is at work."""

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

import psutil
from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import StructType

from phibatch.config import OutputConfig
from phibatch.errors import OutputError, RunError
from phibatch.job.files import Folder, beside, within
from phibatch.job.session import first_line

CHUNKS = "chunks"
"""Where finished chunks lie in the folder."""

OWNER = "owner.json"

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
    """The folder `<output>_work`, on whatever file system Spark writes to; one, however the output is spelled.

    A finished chunk is a folder of Parquet with a mark of its own beside its data: a file is there or not. Nothing is
    ever renamed. Of two runs that start in the same second on a store which can not create a file exclusively, both
    may go on until the next beat of the first shows it that it is not the owner.
    """

    def __init__(self, spark: SparkSession, config: OutputConfig) -> None:
        if config.work_path:
            # A folder of its own: it is removed at the end, with all that is in it.
            self.place = within(spark, config, config.work_path, "_work")
        else:
            self.place = beside(spark, config, "_work")
        self._spark = spark
        self._folder = Folder(spark, self.place)
        self._me = Owner(uuid.uuid4().hex, identify_machine(), os.getpid(), psutil.Process().create_time())
        self._done = False
        self._writing = threading.Lock()
        self._seen = time.monotonic()

    @contextmanager
    def claimed(self) -> Iterator[list[RunRecord]]:
        """Be the one run on this output; gives the runs before that did not come to account for themselves.

        When the block ends as it should, everything is in the output, and the folder is removed.

        Raises:
            OutputError: another run is at work, or the folder can not be written.
        """
        with self.visited():
            yield self._read_records()
            self.check()
            self._done = True

    @contextmanager
    def visited(self) -> Iterator[None]:
        """Keep runs away from this output, and leave it as it was found: for a look. Raises as `claimed`."""
        try:
            self._claim()
        except Py4JJavaError as error:
            raise OutputError(f"the output can not be written: {self.place}: {first_line(error)}") from error
        ended = threading.Event()
        beating = threading.Thread(target=self._beat, args=(ended,), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            if self._done:
                self._folder.remove()
            elif self._is_mine():
                self._leave()

    def record(self, run: RunRecord) -> None:
        """Note the run that is going to write, so that it is accounted for even if it dies.

        In a file of its own, written once: the owner's is torn when its process dies as it writes.
        """
        self._folder.write(f"{RUNS}/{run.run_id}", json.dumps(asdict(run)).encode())

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
        self._folder.write(f"{name}/_WHOLE", b"")

    def read(self, *names: str, schema: StructType) -> DataFrame:
        """Read what was written as `names`."""
        return self._spark.read.schema(schema).parquet(*(f"{self.place}/{name}" for name in names))

    def list_whole(self, parent: str) -> list[str]:
        """The names below `parent` that are whole."""
        names = [f"{parent}/{name}" for name in self._folder.list(parent)]
        return [name for name in names if self._folder.exists(f"{name}/_WHOLE")]

    def remove(self, *names: str) -> None:
        """Remove what was written as `names`, whole or not."""
        for name in names:
            # The mark first: what is half removed does not count.
            self._folder.remove(f"{name}/_WHOLE")
            self._folder.remove(name)

    def remove_files(self, uris: list[str]) -> None:
        """Remove data files of the output by their URIs."""
        for uri in uris:
            self._folder.remove_file(uri)

    def _claim(self) -> None:
        try:
            self._write_owner(overwrite=False)
        except Py4JJavaError as error:
            if not self._folder.exists(OWNER):
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

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT_SECONDS):
            # A store that does not answer now may do so at the next beat.
            with suppress(Py4JJavaError):
                if not self._is_mine():
                    return
                self._me.beats += 1
                self._write_owner()

    def _leave(self) -> None:
        """Let the next run in, with what it is to know of this one."""
        if self._read_records() or self.list_whole(CHUNKS):
            self._me.left = True
            self._write_owner()
        else:
            self._folder.remove()

    def _read_records(self) -> list[RunRecord]:
        """The runs that are not accounted for, oldest first. One whose record is torn has written nothing yet."""
        records = []
        for name in self._folder.list(RUNS):
            with suppress(Py4JJavaError, ValueError, TypeError):
                records.append(RunRecord(**json.loads(self._folder.read(f"{RUNS}/{name}"))))
        return sorted(records, key=lambda record: record.started)

    def _write_owner(self, *, overwrite: bool = True) -> None:
        with self._writing:
            self._folder.write(OWNER, json.dumps(asdict(self._me)).encode(), overwrite=overwrite)
            self._seen = time.monotonic()

    def _read_owner(self) -> Owner | None:
        """The owner as written; None where there is none. One that is being written is read again."""
        for _ in range(READS):
            try:
                return Owner(**json.loads(self._folder.read(OWNER)))
            except (Py4JJavaError, ValueError, TypeError):
                time.sleep(0.1)
        return None
