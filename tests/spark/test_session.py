import os

import pandas as pd

from phibatch.job.session import count_slots


def test_slots_are_the_tasks_that_run_at_once(spark):
    """A session of two cores and one core a task has two slots."""
    assert count_slots(spark) == 2


def test_workers_know_their_tasks_cpus(spark):
    """Spark tells a worker how many threads its task owns; the engine takes its threads from there."""

    def look(frames):
        for _ in frames:
            yield pd.DataFrame({"threads": [os.environ["OMP_NUM_THREADS"]]})

    assert spark.range(1).mapInPandas(look, "threads string").first()["threads"] == "1"
