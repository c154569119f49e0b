import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phibatch.errors import EngineError, RunError, WorkerCrash
from phibatch.job.chunks import FIRST_ROWS, GROWTH, LEAST_ROWS, TARGET_SECONDS, Chunk, Chunks, Sizes


class Cluster:
    """Answers rows in memory: dies at poisoned ones."""

    def __init__(self, poison=()):
        self.poison = set(poison)
        self.answered, self.given_up, self.tried = [], [], []
        self.lock = threading.Lock()

    def generate(self, chunk):
        rows = range(chunk.first, chunk.first + chunk.size)
        with self.lock:
            self.tried.append(chunk)
        if self.poison & set(rows):
            raise WorkerCrash("died")
        with self.lock:
            self.answered += rows

    def give_up(self, chunk):
        assert chunk.size == 1
        self.given_up.append(chunk.first)

    def run(self, rows, slots=2, chunk_rows=None):
        committed = []
        chunks = Chunks(rows, Sizes(chunk_rows), self.generate, self.give_up)
        chunks.run(lambda: slots, committed.extend)
        return sorted(row for chunk in committed for row in range(chunk.first, chunk.first + chunk.size))


@pytest.mark.parametrize("rows", [0, 1, 31, 64, 1000, 4321])
@pytest.mark.parametrize("slots", [1, 2, 7])
@pytest.mark.parametrize("chunk_rows", [None, 1, 100])
def test_every_row_is_generated_and_committed_once(rows, slots, chunk_rows):
    """However many rows and slots there are, and however the rows are cut."""
    cluster = Cluster()
    assert cluster.run(rows, slots, chunk_rows) == sorted(cluster.answered) == list(range(rows))


@pytest.mark.parametrize("poison", [{0}, {999}, {10, 11, 500}, set(range(100, 1000, 100))])
def test_poisoned_rows_are_found_and_all_others_answered(poison):
    """A chunk whose process dies is cut until the rows that do it are alone."""
    cluster = Cluster(poison)
    assert cluster.run(1000, chunk_rows=250) == list(range(1000))
    assert sorted(cluster.given_up) == sorted(poison)
    assert sorted(cluster.answered) == [row for row in range(1000) if row not in poison]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(min_value=1, max_value=400),
    poison=st.sets(st.integers(min_value=0, max_value=399), max_size=5),
    slots=st.integers(min_value=1, max_value=4),
    chunk_rows=st.none() | st.integers(min_value=1, max_value=150),
)
def test_every_row_has_one_outcome_whatever_is_poisoned(rows, poison, slots, chunk_rows):
    """Answered or given up, once, for any rows, slots and cuts; unless nothing at all can be answered."""
    poison = {row for row in poison if row < rows}
    cluster = Cluster(poison)
    try:
        assert cluster.run(rows, slots, chunk_rows) == list(range(rows))
    except RunError:
        assert not cluster.answered
        return
    assert sorted(cluster.answered + cluster.given_up) == list(range(rows))
    assert set(cluster.given_up) == poison


def test_a_row_is_given_up_only_after_two_deaths():
    """One death may be anything's fault: a row that is a chunk of its own is tried again."""
    cluster = Cluster()
    died = []

    def generate(chunk):
        if not died:
            died.append(chunk)
            raise WorkerCrash("an executor was lost")
        cluster.generate(chunk)

    Chunks(3, Sizes(1), generate, cluster.give_up).run(lambda: 1, lambda _: None)
    assert (cluster.answered, cluster.given_up) == ([0, 1, 2], [])


def test_poisoned_rows_at_the_beginning_do_not_stop_the_run():
    """Equal beginnings lie beside each other, so that rows of one fault do: the others are answered all the same."""
    for rows in (200, 60):
        cluster = Cluster(range(50))
        assert cluster.run(rows, slots=1, chunk_rows=100) == list(range(rows))
        assert sorted(cluster.given_up) == list(range(50))


def test_a_process_that_dies_at_every_row_stops_the_run_early():
    """The first rows are enough to see it: the other 999,000 are not tried."""
    cluster = Cluster(range(1_000_000))
    with pytest.raises(RunError, match="dies at every row that is tried"):
        cluster.run(1_000_000, chunk_rows=1000)
    assert len(cluster.tried) < 50


def test_an_engines_failure_stops_the_run_at_once_and_keeps_what_is_done():
    """Nothing is cut or tried again for it; chunks finished by then are committed."""
    tried, committed = [], []

    def generate(chunk):
        tried.append(chunk)
        if chunk.first >= 20:
            raise EngineError("the weights are broken")

    with pytest.raises(EngineError, match="the weights are broken"):
        Chunks(100, Sizes(10), generate, lambda _: None).run(lambda: 1, committed.extend)
    assert [chunk.first for chunk in tried] == [0, 10, 20]
    assert committed == [Chunk(0, 10), Chunk(10, 10)]


def test_no_more_chunks_are_open_than_there_are_slots():
    """What a death of the driver costs is bounded: a chunk for every slot."""
    open_now, most = set(), []

    def generate(chunk):
        open_now.add(chunk.first)
        most.append(len(open_now))
        time.sleep(0.001)

    def commit(chunks):
        for chunk in chunks:
            open_now.discard(chunk.first)

    Chunks(300, Sizes(5), generate, lambda _: None).run(lambda: 3, commit)
    assert max(most) == 3


def test_chunks_grow_to_about_two_minutes_of_work():
    """From a small first one, by no more than a factor, to what the last ones show."""
    sizes = Sizes(None)
    assert sizes.next(10**6, 1) == FIRST_ROWS
    sizes.note(FIRST_ROWS, FIRST_ROWS / 1000)
    assert sizes.next(10**6, 1) == FIRST_ROWS * GROWTH
    sizes.note(FIRST_ROWS * GROWTH, FIRST_ROWS * GROWTH / 2)
    assert sizes.next(10**6, 1) == 2 * TARGET_SECONDS
    sizes.shrink()
    assert sizes.next(10**6, 1) == TARGET_SECONDS


def test_the_last_chunks_are_shared_out():
    """So that all slots end at about the same time, down to what an engine needs to be full."""
    sizes = Sizes(None)
    sizes.note(FIRST_ROWS, 0.01)
    assert sizes.next(400, 2) == 100
    assert sizes.next(100, 2) == LEAST_ROWS
    assert sizes.next(10, 2) == 5
    assert sizes.next(1000, 100) == 10
    assert sizes.next(400, 1) == FIRST_ROWS * GROWTH
    assert Sizes(300).next(400, 2) == 300
