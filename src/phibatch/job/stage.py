"""A plan written down in the work folder, so that chunks of it can be taken whatever happens to the cluster."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from phibatch.errors import InputError, RunError
from phibatch.job.chunks import Chunk
from phibatch.job.session import first_line
from phibatch.job.work import WorkFolder

FULL = "No space left on device"
PARTITION_BITS = 33
"""Below them `monotonically_increasing_id` counts a partition's rows, above them partitions."""


@dataclass(frozen=True, slots=True)
class PlanCounts:
    """Rows of the input, those done already, those rejected; and the distinct requests to generate for the rest.

    `skipped_failed` are rows done already that failed for good; they are counted for an increment only.
    """

    rows: int
    skipped: int
    rejected: int
    to_generate: int
    skipped_failed: int = 0

    @property
    def duplicates(self) -> int:
        return self.rows - self.skipped - self.rejected - self.to_generate


class StagedPlan:
    """A plan as `plan.lay_out` orders it.

    Args:
        work: where it is written.
        plan: what is to be written.
        prompts: the input, whose rows are counted.

    Raises:
        InputError: a file of the input can not be read.
        RunError: the disk is full.
    """

    def __init__(self, work: WorkFolder, plan: DataFrame, prompts: DataFrame) -> None:
        self._work = work
        self._name = work.own("plan")
        self._schema = plan.schema
        try:
            rows = prompts.count()
            work.write(plan, self._name)
        except (PySparkException, Py4JJavaError) as error:
            if FULL in str(error):
                raise RunError(f"the plan can not be written to {work.place}: {FULL}") from error
            raise InputError(f"the input can not be read: {first_line(error)}") from error
        parts = (
            self._read()
            .groupBy(F.shiftright("place", PARTITION_BITS).alias("part"))
            .agg(
                F.count("*").alias("generations"),
                F.count("request").alias("to_generate"),
                F.sum(F.size("rows").cast("bigint")).alias("rows"),
                F.sum(F.when(F.col("request").isNull(), F.size("rows").cast("bigint"))).alias("rejected"),
            )
            .orderBy("part")
            .collect()
        )
        self._parts = [part["part"] for part in parts]
        # The dense places at which parts begin.
        self._starts = list(accumulate((part["generations"] for part in parts), initial=0))
        to_generate = sum(part["to_generate"] for part in parts)
        left = sum(part["rows"] for part in parts)
        rejected = sum(part["rejected"] or 0 for part in parts)
        self.counts = PlanCounts(rows, rows - left, rejected, to_generate)

    def rejected(self) -> DataFrame:
        """The rows that are rejected."""
        return self._read().where("request IS NULL")

    def take(self, chunk: Chunk) -> DataFrame:
        """A chunk's rows, in order, as one partition. Rejected rows are not counted."""
        first = self._starts[-1] - self.counts.to_generate + chunk.first
        low, high = self._place(first), self._place(first + chunk.size)
        places = self._read().where((F.col("place") >= low) & (F.col("place") < high))
        return places.coalesce(1).sortWithinPartitions("place")

    def _place(self, dense: int) -> int:
        """The `place` of the row that so many others come before."""
        at = min(bisect_right(self._starts, dense) - 1, len(self._parts) - 1)
        return int((self._parts[at] << PARTITION_BITS) + dense - self._starts[at])

    def _read(self) -> DataFrame:
        return self._work.read(self._name, schema=self._schema)
