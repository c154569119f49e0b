"""Two response tables of the same rows, side by side: two models, two prompts, or two settings."""

from dataclasses import dataclass

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from phibatch.errors import InputError
from phibatch.job.plan import is_duplicate

MEASURED = ("mean_tokens", "median_tokens", "mean_seconds", "length_cut")
"""What of a table is measured over the rows that both have answered."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the tables.

    Attributes:
        output: where it is.
        models: the versions that its rows were answered by.
        rows, succeeded: of the table.
        mean_tokens, median_tokens: of an answer, in completion tokens, over the rows that succeeded in both.
        mean_seconds: of a row's generation, over the same rows.
        length_cut: the share of those rows that `max_tokens` or the context cut.
        tokens_per_second: completion tokens by seconds, over all its runs.
    """

    output: str
    models: tuple[str, ...]
    rows: int
    succeeded: int
    mean_tokens: float | None
    median_tokens: float | None
    mean_seconds: float | None
    length_cut: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A row that the two answer differently: the answers, or the codes of their errors in brackets."""

    custom_id: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two tables have in common, by `custom_id`.

    Attributes:
        first, second: the tables.
        rows: that both have.
        answered: of those, that succeeded in both.
        equal: of the answered, word for word.
        alike: of the answered, but for case, white space and punctuation; the equal ones are among them.
        samples: rows that are not alike.
    """

    first: Side
    second: Side
    rows: int
    answered: int
    equal: int
    alike: int
    samples: tuple[Sample, ...]

    @property
    def agreement(self) -> float | None:
        return self.equal / self.answered if self.answered else None

    @property
    def loose_agreement(self) -> float | None:
        return self.alike / self.answered if self.answered else None


def compare_tables(
    names: tuple[str, str], tables: tuple[DataFrame, DataFrame], usages: tuple[DataFrame, DataFrame], samples: int
) -> Comparison:
    """Compare.

    Args:
        names: where the tables are.
        tables: two response tables.
        usages: their usage tables.
        samples: the most rows to show side by side: of those that differ, by `custom_id`.

    Raises:
        InputError: no row is in both, by `custom_id`.
    """
    a, b = (
        table.select(
            "custom_id",
            F.col("response").alias(f"{side}_response"),
            F.col("error.code").alias(f"{side}_code"),
            F.col("finish_reason").alias(f"{side}_reason"),
            F.col("usage.completion_tokens").alias(f"{side}_tokens"),
            F.col("generation_seconds").alias(f"{side}_seconds"),
        )
        # Of rows with one custom_id the one that keeps it.
        for side, table in zip("ab", (table.where(~is_duplicate()) for table in tables), strict=True)
    )
    both = F.col("a_code").isNull() & F.col("b_code").isNull()
    pairs = a.join(b, "custom_id").withColumns(
        {
            "both": both,
            "equal": both & (F.col("a_response") == F.col("b_response")),
            "alike": both & (_plain("a_response") == _plain("b_response")),
        }
    )
    measured = [
        column.alias(f"{side}_{word}")
        for side in "ab"
        for word, column in (
            ("mean_tokens", F.mean(F.when(both, F.col(f"{side}_tokens")))),
            ("median_tokens", F.percentile_approx(F.when(both, F.col(f"{side}_tokens")), 0.5)),
            ("mean_seconds", F.mean(F.when(both, F.col(f"{side}_seconds")))),
            ("length_cut", F.mean(F.when(both, (F.col(f"{side}_reason") == "length").cast("double")))),
        )
    ]
    counts = [F.count_if(name).alias(name) for name in ("both", "equal", "alike")]
    found = pairs.agg(F.count("*").alias("rows"), *counts, *measured).collect()[0]
    if not found["rows"]:
        raise InputError(f"{names[0]} and {names[1]} have no custom_id in common")
    shown = pairs.where(~F.col("alike") & (F.col("a_code").isNull() | F.col("b_code").isNull()))
    texts = [F.coalesce(f"{side}_response", F.concat(F.lit("["), f"{side}_code", F.lit("]"))) for side in "ab"]
    samples_found = shown.orderBy("custom_id").limit(samples).select("custom_id", *texts).collect()
    first, second = (
        _describe(name, table, usage, {word: found[f"{side}_{word}"] for word in MEASURED})
        for side, name, table, usage in zip("ab", names, tables, usages, strict=True)
    )
    return Comparison(
        first,
        second,
        rows=found["rows"],
        answered=found["both"],
        equal=found["equal"],
        alike=found["alike"],
        samples=tuple(Sample(*row) for row in samples_found),
    )


def _plain(name: str) -> Column:
    """A text without what seldom matters: case, white space, punctuation."""
    return F.lower(F.regexp_replace(F.col(name), r"[\s\p{Punct}]+", " "))


def _describe(name: str, table: DataFrame, usage: DataFrame, measured: dict[str, float]) -> Side:
    whole = table.agg(
        F.count("*").alias("rows"),
        F.count_if(F.col("error.code").isNull()).alias("succeeded"),
        F.sort_array(F.collect_set("model")).alias("models"),
    ).collect()[0]
    spent = usage.agg(F.sum("completion_tokens").alias("tokens"), F.sum("seconds").alias("seconds")).collect()[0]
    return Side(
        name,
        tuple(whole["models"]),
        whole["rows"],
        whole["succeeded"],
        **measured,
        tokens_per_second=spent["tokens"] / spent["seconds"] if spent["seconds"] else None,
    )
