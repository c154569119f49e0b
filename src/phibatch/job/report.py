"""What a report says, read from the response and usage tables. How it looks is `page.py`'s."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from phibatch.contract import USAGE_COLUMNS, ErrorCode

BINS = 40
"""Bars of a histogram, and points of a run's throughput."""

EXAMPLES = 5
"""So many `custom_id`s stand for an error."""

MEASURES = {
    "prompt_tokens": "usage.prompt_tokens",
    "completion_tokens": "usage.completion_tokens",
    "generation_seconds": "generation_seconds",
}
"""What is shown as a distribution, over the rows that succeeded."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """How a number is spread over rows: `counts` of bins of one width from `low` on; quantiles by name."""

    rows: int
    mean: float
    median: float
    p95: float
    p99: float
    low: float
    high: float
    width: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Throughput:
    """A run's tokens a second over time: for each point the seconds since its start."""

    run_id: str
    seconds: tuple[float, ...]
    tokens_per_second: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ErrorLine:
    """An error code, of how many rows it is, and the `custom_id`s of a few."""

    code: str
    rows: int
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """What the runs cost at an hourly price of the whole cluster, in its currency."""

    total: float
    per_million_tokens: float | None
    per_million_completion_tokens: float | None
    per_thousand_rows: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a response table holds, and how it came to be.

    Attributes:
        output: where the table is.
        run_id: the one run that it is about; None for the whole table.
        runs: the lines of the usage table, oldest first.
        rows, succeeded: of the response table.
        finish_reasons: rows by reason.
        errors: by code, the most frequent first.
        prompt_tokens, completion_tokens, cached_tokens: sums over the rows.
        distributions: by name, see `MEASURES`; those of no row are absent.
        throughput: of each run that generated rows of the table.
        cost: None where no hourly cost was given.
        config: the last run's resolved configuration; empty where it is not known.
        versions: of what the last run ran on.
    """

    output: str
    run_id: str | None
    runs: tuple[Row, ...]
    rows: int
    succeeded: int
    finish_reasons: dict[str, int]
    errors: tuple[ErrorLine, ...]
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    distributions: dict[str, Distribution]
    throughput: tuple[Throughput, ...]
    cost: Cost | None
    config: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return self.rows - self.succeeded

    @property
    def seconds(self) -> float:
        return math.fsum(run.seconds for run in self.runs)

    @property
    def reused(self) -> float:
        """The share of prompt tokens that were known from another row's prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def build_report(
    output: str,
    responses: DataFrame,
    usage: DataFrame,
    run_id: str | None = None,
    hourly_cost: float | None = None,
    config: dict[str, object] | None = None,
    versions: dict[str, str] | None = None,
) -> Report:
    """Read what is to be reported.

    Args:
        output: where the table is, for the reader.
        responses: the response table.
        usage: the usage table.
        run_id: of the one run that is wanted; None for the whole table.
        hourly_cost: of the whole cluster, in any currency.
        config: the last run's configuration.
        versions: of what it ran on.
    """
    if run_id is not None:
        responses, usage = responses.where(F.col("run_id") == run_id), usage.where(F.col("run_id") == run_id)
    runs = tuple(usage.select(*USAGE_COLUMNS).orderBy("started").collect())
    groups = (
        responses.groupBy("run_id", F.col("error.code").alias("code"), "finish_reason")
        .agg(
            F.count("*").alias("rows"),
            F.min(F.col("created").cast("double")).alias("first"),
            F.max(F.col("created").cast("double")).alias("last"),
            *(F.sum(f"usage.{kind}_tokens").alias(kind) for kind in ("prompt", "completion", "cached")),
        )
        .collect()
    )

    def total(name: str) -> int:
        return sum(group[name] or 0 for group in groups)

    reasons: dict[str, int] = {}
    failures: dict[str, int] = {}
    for group in groups:
        counts, name = (reasons, group["finish_reason"]) if group["code"] is None else (failures, group["code"])
        counts[name] = counts.get(name, 0) + group["rows"]
    rows = total("rows")
    spans = {
        name: (
            min(group["first"] for group in groups if group["run_id"] == name),
            max(group["last"] for group in groups if group["run_id"] == name),
        )
        for name in {group["run_id"] for group in groups}
    }
    return Report(
        output=output,
        run_id=run_id,
        runs=runs,
        rows=rows,
        succeeded=rows - sum(failures.values()),
        finish_reasons=dict(sorted(reasons.items())),
        errors=_read_errors(responses, failures),
        prompt_tokens=total("prompt"),
        completion_tokens=total("completion"),
        cached_tokens=total("cached"),
        distributions=_read_distributions(responses.where("error.code IS NULL")),
        throughput=_read_throughput(responses, runs, spans),
        cost=_compute_cost(runs, hourly_cost),
        config=config or {},
        versions=versions or {},
    )


def _read_errors(responses: DataFrame, failures: dict[str, int]) -> tuple[ErrorLine, ...]:
    lines = []
    for code, rows in sorted(failures.items(), key=lambda item: (-item[1], item[0])):
        found = responses.where(F.col("error.code") == code).select("custom_id").orderBy("custom_id").limit(EXAMPLES)
        lines.append(ErrorLine(code, rows, tuple(row["custom_id"] for row in found.collect())))
    return tuple(lines)


def _read_distributions(succeeded: DataFrame) -> dict[str, Distribution]:
    """Two passes: the extremes and quantiles of all measures, then their bins."""
    values = succeeded.select(*(F.col(path).cast("double").alias(name) for name, path in MEASURES.items()))
    shares = [0.5, 0.95, 0.99]
    wanted = [
        column.alias(f"{name}_{word}")
        for name in MEASURES
        for word, column in (
            ("rows", F.count(name)),
            ("mean", F.mean(name)),
            ("low", F.min(name)),
            ("high", F.max(name)),
            ("shares", F.percentile_approx(name, shares)),
        )
    ]
    found = values.agg(*wanted).collect()[0]
    widths = {
        name: _width(found[f"{name}_low"], found[f"{name}_high"], name) for name in MEASURES if found[f"{name}_rows"]
    }
    binned: dict[str, dict[int, int]] = {name: {} for name in widths}
    if widths:
        bins = F.array(
            *(
                F.struct(F.lit(name).alias("name"), _bin(name, found[f"{name}_low"], width).alias("bin"))
                for name, width in widths.items()
            )
        )
        for row in values.select(F.explode(bins).alias("each")).groupBy("each.name", "each.bin").count().collect():
            binned[row["name"]][row["bin"]] = row["count"]
    return {
        name: Distribution(
            rows=found[f"{name}_rows"],
            mean=found[f"{name}_mean"],
            low=found[f"{name}_low"],
            high=found[f"{name}_high"],
            **dict(zip(("median", "p95", "p99"), found[f"{name}_shares"], strict=True)),
            width=width,
            counts=tuple(binned[name].get(place, 0) for place in range(max(binned[name]) + 1)),
        )
        for name, width in widths.items()
    }


def _width(low: float, high: float, name: str) -> float:
    """Of at most `BINS` bins; tokens are whole numbers, and so is the width of their bins."""
    if name.endswith("_tokens"):
        return math.ceil((high - low + 1) / BINS)
    return (high - low) / BINS or 1.0


def _bin(name: str, low: float, width: float) -> Column:
    """Which bin a value falls into; the highest one belongs to the last."""
    return F.least(F.floor((F.col(name) - low) / width), F.lit(BINS - 1)).cast("int")


def _read_throughput(
    responses: DataFrame, runs: Sequence[Row], spans: dict[str, tuple[float, float]]
) -> tuple[Throughput, ...]:
    """Tokens of each run by the time at which the rows were done; rows that were rejected took none."""
    known = [run for run in runs if run.run_id in spans]
    if not known:
        return ()
    starts = {run.run_id: run.started.timestamp() for run in known}
    # No finer than the seconds that `created` counts.
    widths = {run.run_id: max(1.0, (spans[run.run_id][1] - starts[run.run_id]) / BINS) for run in known}
    run = F.col("run_id")
    start = F.create_map(*(F.lit(part) for item in starts.items() for part in item))[run]
    width = F.create_map(*(F.lit(part) for item in widths.items() for part in item))[run]
    place = F.greatest(F.floor((F.col("created").cast("double") - start) / width), F.lit(0)).cast("int")
    done = responses.where(
        run.isin(*starts) & ~F.coalesce(F.col("error.code") == ErrorCode.INVALID_REQUEST, F.lit(False))
    )
    tokens = F.sum(F.col("usage.prompt_tokens") + F.col("usage.completion_tokens")).alias("tokens")
    sums: dict[tuple[str, int], int] = {
        (row["run_id"], row["place"]): row["tokens"]
        for row in done.groupBy("run_id", place.alias("place")).agg(tokens).collect()
    }
    lines = []
    for each in known:
        places = [at for name, at in sums if name == each.run_id]
        if not places:
            continue
        last = max(places)
        width_seconds = widths[each.run_id]
        lines.append(
            Throughput(
                each.run_id,
                tuple((at + 0.5) * width_seconds for at in range(last + 1)),
                tuple(sums.get((each.run_id, at), 0) / width_seconds for at in range(last + 1)),
            )
        )
    return tuple(lines)


def _compute_cost(runs: Sequence[Row], hourly_cost: float | None) -> Cost | None:
    if hourly_cost is None:
        return None
    total = hourly_cost * sum(run.seconds for run in runs) / 3600
    completion = sum(run.completion_tokens for run in runs)
    tokens = completion + sum(run.prompt_tokens for run in runs)
    rows = sum(run.rows for run in runs)
    return Cost(
        total,
        total / tokens * 1e6 if tokens else None,
        total / completion * 1e6 if completion else None,
        total / rows * 1e3 if rows else None,
    )
