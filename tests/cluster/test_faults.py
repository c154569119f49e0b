"""Real parts that die, by chance and at length. tests/spark/test_deaths.py has one death of each kind."""

import logging
import random
import time

import pandas as pd
import pytest

pytestmark = [pytest.mark.usefixtures("counting"), pytest.mark.soak]

CHUNK_ROWS = 50
SLOTS = 2
SETTINGS = ("--model", "models:/counting/1", "--set", f"job.chunk_rows={CHUNK_ROWS}")
SETTINGS += ("--set", "generation.max_tokens=24", "--set", "model.engine=slots")


@pytest.fixture
def rows(write_parquet):
    """Make an input of so many rows, some of them sampled or bad, and some marked to kill the process."""

    def make(count, poisoned=0):
        table = [
            {
                "custom_id": f"row-{place}",
                "prompt": f"what is word {place}" if place % 97 else None,
                "temperature": 0.8 if place % 2 else 0.0,
            }
            for place in range(count)
        ]
        for place in range(poisoned):
            table[7 + place * count // poisoned]["prompt"] = f"word -crash- {place}"
        return write_parquet(table, f"rows{count}-{poisoned}")

    return make


def read(path):
    table = pd.read_parquet(path).set_index("custom_id").sort_index()
    assert table.index.is_unique
    # How much of a prompt was known hangs on the rows before it.
    table["usage"] = table["usage"].map(lambda usage: {**usage, "cached_tokens": 0})
    return table[["response", "finish_reason", "usage", "error", "request_key", "model"]]


def assert_equal(found, expected):
    assert found.index.tolist() == expected.index.tolist()
    for column in found.columns:
        assert found[column].tolist() == expected[column].tolist(), column


def finish(job):
    done = job.wait()
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def clean(start_job, counting, tmp_path_factory):
    """What a run that nothing happens to writes, asks the model for, and takes in seconds; by master and rows."""
    done = {}

    def run(master, count, path):
        if (master, count) not in done:
            folder = tmp_path_factory.mktemp(f"clean{count}")
            noted = set(counting.iterdir())
            began = time.monotonic()
            finish(start_job(folder / "job", master, "--input", path, "--output", f"{folder}/out", *SETTINGS))
            seconds = time.monotonic() - began
            asked = sum(len(file.read_text().splitlines()) for file in set(counting.iterdir()) - noted)
            done[master, count] = read(f"{folder}/out"), asked, seconds
        return done[master, count]

    return run


def test_a_driver_may_be_killed_at_any_moment(start, rows, clean, calls, tmp_path):
    """SIGKILL at random moments, and started again: the same table, and at most a chunk for each slot paid twice."""
    master, count, rounds = "local[2]", 2000, 20
    rng = random.Random(count)
    path = rows(count)
    expected, asked_once, seconds = clean(master, count, path)
    for number in range(rounds):
        calls()
        arguments = (master, "--input", path, "--output", str(tmp_path / f"killed{number}"), *SETTINGS)
        kills = 0
        for _ in range(1 + number % 2):
            job = start(*arguments)
            # Spark starts in the first part of the time.
            time.sleep(rng.uniform(0.3, 0.9) * seconds)
            kills += job.running
            job.kill()
        finish(start(*arguments))
        assert_equal(read(tmp_path / f"killed{number}"), expected)
        assert len(calls()) - asked_once <= kills * SLOTS * CHUNK_ROWS
        usage = pd.read_parquet(tmp_path / f"killed{number}_usage")
        assert usage["rows"].sum() == count


def test_executors_may_die_all_the_time(cluster, start, rows, clean, tmp_path):
    """An executor is killed every ten seconds: all rows are answered, and none is taken for poisoned."""
    path = rows(2000)
    expected, *_ = clean(cluster.url, 2000, path)
    job = start(cluster.url, "--input", path, "--output", str(tmp_path / "output"), *SETTINGS)
    kills = 0
    while job.running:
        time.sleep(10)
        kills += cluster.kill_executor()
    finish(job)
    assert_equal(read(tmp_path / "output"), expected)
    assert kills


def test_a_worker_daemon_may_die(cluster, start, rows, clean, tmp_path):
    """With its executor; another daemon that comes is used."""
    path = rows(2000)
    expected, _, seconds = clean(cluster.url, 2000, path)
    job = start(cluster.url, "--input", path, "--output", str(tmp_path / "output"), *SETTINGS)
    time.sleep(seconds / 2)
    cluster.kill_worker()
    finish(job)
    assert_equal(read(tmp_path / "output"), expected)


def test_poisoned_rows_cost_themselves_alone(cluster, start, rows, clean, tmp_path):
    """Rows that crash the process are named, and all others answered."""
    count, poisoned = 2000, 5
    expected, _, seconds = clean(cluster.url, count, rows(count))
    began = time.monotonic()
    path = rows(count, poisoned)
    finish(start(cluster.url, "--input", path, "--output", str(tmp_path / "output"), *SETTINGS))
    logging.getLogger(__name__).info("clean %.1f s, poisoned %.1f s", seconds, time.monotonic() - began)
    table = read(tmp_path / "output")
    crashed = table[table["error"].map(lambda error: error["code"] == "worker_crashed")]
    assert len(crashed) == poisoned
    others = table.index.difference(crashed.index)
    assert_equal(table.loc[others], expected.loc[others])
