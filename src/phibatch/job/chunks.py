"""Cutting a run into chunks, and having them generated side by side until every row has its outcome. No Spark."""

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from phibatch.errors import RunError, WorkerCrash

TARGET_SECONDS = 120.0
"""What a chunk is to take, unless its rows are set: what a death costs, and a task's fixed cost is small beside it."""

FIRST_ROWS = 64
"""Rows of a slot's first chunk, when nothing is known of their cost."""

GROWTH = 4
"""A chunk has at most so many times the rows of the last one."""

LEAST_ROWS = 32
"""Smaller chunks would leave an engine's slots empty, while there are enough rows for all tasks."""

PIECES = 8
"""Into so many a chunk is cut whose process died."""

MAX_SLOTS = 1024
"""More tasks at once than one driver can follow are not started."""

RECOUNT_SECONDS = 5.0

HOPELESS = 8
"""After so many rows at which a process died, and not one that was answered, no other is tried."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a plan, by place: `size` of them from `first` on; `crashes` counts the processes that died at them."""

    first: int
    size: int
    crashes: int = 0

    def split(self) -> "list[Chunk]":
        step = math.ceil(self.size / PIECES)
        stop = self.first + self.size
        return [Chunk(at, min(step, stop - at), self.crashes) for at in range(self.first, stop, step)]


class Sizes:
    """How many rows the next chunk has.

    Args:
        chunk_rows: what the job sets; None is about two minutes of work, as the chunks before show it.
        answers: how many are generated for each row.
    """

    def __init__(self, chunk_rows: int | None, answers: int = 1) -> None:
        self._fixed = chunk_rows
        self._least = max(1, LEAST_ROWS // answers)
        self._size = max(1, FIRST_ROWS // answers)

    def next(self, left: int, slots: int) -> int:
        """Rows of the next chunk, when so many are left for so many slots."""
        if self._fixed:
            return min(self._fixed, left)
        # With several slots the last chunks are smaller, so that all end at about the same time.
        share = left if slots == 1 else math.ceil(left / (2 * slots))
        # Few rows for many slots are shared out all the same.
        least = min(self._least, math.ceil(left / slots))
        return min(left, max(least, min(self._size, share)))

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a chunk that was generated."""
        wanted = rows * TARGET_SECONDS / max(seconds, 0.001)
        if rows * GROWTH >= self._size:
            self._size = max(self._least, min(int(wanted), rows * GROWTH))

    def shrink(self) -> None:
        """Learn from a process that died."""
        self._size = max(self._least, self._size // 2)


class Chunks:
    """A run's rows, generated as many chunks at a time as there are task slots.

    A chunk whose process dies is cut into pieces, and so on down to the row that does it; the others are answered.

    Args:
        rows: how many.
        sizes: of the chunks.
        generate: makes a chunk durable; called from a thread. Raises WorkerCrash when its process died.
        give_up: makes the one row of a chunk durable as crashed.
        answered: rows that runs before have answered: not every row is hopeless, then.
    """

    def __init__(
        self,
        rows: int,
        sizes: Sizes,
        generate: Callable[[Chunk], None],
        give_up: Callable[[Chunk], None],
        *,
        answered: int = 0,
    ) -> None:
        self._rest = Chunk(0, rows)
        self._sizes = sizes
        self._generate = generate
        self._give_up = give_up
        self._crashed: deque[Chunk] = deque()
        self._answered, self._hopeless = answered, 0

    def run(self, count_slots: Callable[[], int], commit: Callable[[list[Chunk]], None]) -> None:
        """Have all rows generated.

        Args:
            count_slots: how many tasks run at once, now.
            commit: puts durable chunks into the output.

        Raises:
            RunError: processes die at row after row, and none was ever answered.
            PhibatchError: as `generate` raised it; what was finished by then is committed.
        """
        running: dict[Future[None], tuple[Chunk, float]] = {}
        pool = ThreadPoolExecutor(max_workers=MAX_SLOTS, thread_name_prefix="chunk")
        try:
            while True:
                slots = min(count_slots(), MAX_SLOTS)
                while len(running) < slots and (chunk := self._next(slots)):
                    running[pool.submit(self._generate, chunk)] = (chunk, time.monotonic())
                if not running:
                    return
                # Now and then there are more slots, though no chunk has ended.
                ended = [(each, *running.pop(each)) for each in wait(running, RECOUNT_SECONDS, FIRST_COMPLETED).done]
                finished, failures = [], []
                for future, chunk, began in ended:
                    error = future.exception()
                    if error is None:
                        self._answered += chunk.size
                        self._sizes.note(chunk.size, time.monotonic() - began)
                        finished.append(chunk)
                    elif isinstance(error, WorkerCrash):
                        finished += self._retry(chunk)
                    else:
                        failures.append(error)
                if finished:
                    commit(finished)
                if failures:
                    raise failures[0]
                if self._hopeless >= HOPELESS and not self._answered:
                    raise RunError("the process dies at every row that is tried: the executors' logs may say why")
        finally:
            # Those that still run end when their Spark jobs are cancelled, which is the caller's to do.
            pool.shutdown(wait=False, cancel_futures=True)

    def _next(self, slots: int) -> Chunk | None:
        if self._crashed:
            return self._crashed.popleft()
        rest = self._rest
        if not rest.size:
            return None
        size = self._sizes.next(rest.size, slots)
        self._rest = Chunk(rest.first + size, rest.size - size)
        return Chunk(rest.first, size)

    def _retry(self, chunk: Chunk) -> list[Chunk]:
        """Queue a crashed chunk's pieces; a single row is tried twice. Gives what is durable now."""
        self._sizes.shrink()
        again = Chunk(chunk.first, chunk.size, chunk.crashes + 1)
        if chunk.size > 1:
            self._crashed.extendleft(reversed(again.split()))
        elif again.crashes == 1:
            self._crashed.appendleft(again)
        else:
            self._give_up(chunk)
            if not self._answered:
                self._hopeless += 1
                self._look_elsewhere()
            return [chunk]
        return []

    def _look_elsewhere(self) -> None:
        """Rows beside each other are alike: whether any row can be answered is seen at the other end."""
        rest = self._rest
        if rest.size:
            self._rest = Chunk(rest.first, rest.size - 1)
            self._crashed.appendleft(Chunk(rest.first + rest.size - 1, 1))
        else:
            self._crashed.reverse()
