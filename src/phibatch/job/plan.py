"""What becomes of each request: answered already, rejected, answered with another, or generated. No input or output."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from phibatch.contract import PARAMETERS, RETRYABLE, ErrorCode

DUPLICATE = "duplicate custom_id: the input has it in another row too, and one row alone may keep it"
ROW = ("custom_id", "request_key", "copy")
"""What tells one row from all others. Rows with one `custom_id` and one request are copies, numbered."""


def identify(requests: DataFrame, digest: str) -> DataFrame:
    """Give every row its identity and the reason, if there is one, why it is rejected.

    Args:
        requests: as from `prompts.build_requests`.
        digest: the model's.

    Returns:
        `ROW`'s columns; `reason`, null where the row is to be answered; `kept`, the struct of kept columns; and
        `_messages` and `_params`.
    """
    key = F.sha2(F.concat_ws("\n", F.to_json(F.struct("_messages", "_params")), F.lit(digest)), 256)
    identity = F.coalesce(F.col("_custom_id"), F.sha2("_content", 256))
    # Which of several rows keeps a custom_id, or has which ordinal, must not hang on their order in the table.
    words = F.sha2(F.concat_ws("\n", "_content", F.to_json(F.struct("_kept"))), 256)
    same = Window.partitionBy("_identity").orderBy(F.col("_reason").isNotNull(), "request_key", words)
    numbered = requests.select("*", key.alias("request_key"), identity.alias("_identity")).select(
        "*", F.row_number().over(same).alias("_ordinal")
    )
    repeated = F.col("_ordinal") > 1
    named = F.col("_custom_id").isNotNull()
    suffixed = F.concat_ws("-", "_identity", "_ordinal")
    named_rows = numbered.select(
        F.when(repeated & ~named, suffixed).otherwise(F.col("_identity")).alias("custom_id"),
        "request_key",
        "_messages",
        "_params",
        F.coalesce("_reason", F.when(named & repeated, DUPLICATE)).alias("reason"),
        F.col("_kept").alias("kept"),
        "_ordinal",
    )
    copies = Window.partitionBy("custom_id", "request_key").orderBy("_ordinal")
    return named_rows.withColumn("copy", F.row_number().over(copies)).drop("_ordinal")


def is_duplicate(message: str = "error.message") -> Column:
    """Whether a row of a response table was rejected since another one has its `custom_id`."""
    return F.coalesce(F.col(message) == DUPLICATE, F.lit(False))


def number_responses(found: DataFrame) -> DataFrame:
    """Number the rows of a response table that have one request.

    Args:
        found: the rows, each whole in a struct `response`, so that none of its columns is taken for the job's own.

    Returns:
        The same, with the row's `custom_id`, `request_key`, `run_id` and `created`, the `code` and `message` of its
        error, and the `copy` that it stands for: answers first, rejected copies last.
    """
    words = {name: F.col(f"response.{name}") for name in ("custom_id", "request_key", "run_id", "created")}
    words |= {name: F.col(f"response.error.{name}") for name in ("code", "message")}
    code = F.col("code")
    order = (code.isNotNull(), is_duplicate("message"), code.isin(*RETRYABLE), F.col("created").desc())
    copies = Window.partitionBy("custom_id", "request_key").orderBy(*order)
    return found.withColumns(words).withColumn("copy", F.row_number().over(copies))


def is_done(retry: str) -> Column:
    """Whether a row's `code` and `message`, as found in the response table, are what it would get again.

    Args:
        retry: `failed` does failures again that may succeed; `none` does not; `all` takes nothing for done.
    """
    code, message, reason = F.col("code"), F.col("message"), F.col("reason")
    again = code.isin(*RETRYABLE) if retry == "failed" else F.lit(False)
    # Another row had the custom_id then, and has not now.
    freed = F.coalesce(message == DUPLICATE, F.lit(False))
    answered = F.col("answered").isNotNull() & (code.isNull() | ~(again | freed))
    rejected = F.col("answered").isNotNull() & (message == reason)
    return F.coalesce(F.when(reason.isNull(), answered).otherwise(rejected), F.lit(False)) & F.lit(retry != "all")


def match(rows: DataFrame, numbered: DataFrame, retry: str) -> DataFrame:
    """Rows as from `identify`, with `done`: what the response table says of them need not be done again.

    `code` is the error that it has of them; null where it has an answer, or nothing.
    """
    found = numbered.select(*ROW, "code", "message", F.lit(True).alias("answered"))
    return rows.join(found, list(ROW), "left").withColumn("done", is_done(retry)).drop("message", "answered")


def mark(numbered: DataFrame, rows: DataFrame, retry: str, orphans: str) -> DataFrame:
    """Rows as from `number_responses`, with `keep`: whether they are still to be in the response table.

    Kept are those that `match` takes for done and, unless orphans are to be dropped, those of rows that left the input.
    """
    known = rows.select(*ROW, "reason", F.lit(True).alias("answered"))
    marked = numbered.join(known, list(ROW), "left").withColumn("keep", is_done(retry))
    if orphans == "keep":
        there = rows.select("custom_id", F.lit(True).alias("_there")).distinct()
        marked = marked.join(there, "custom_id", "left")
        # A death may have left an orphan twice, word for word.
        alike = Window.partitionBy(*ROW[:2], "run_id", "code", "message").orderBy("created")
        # Rows that were rejected may be copies in truth.
        rejected = F.coalesce(F.col("code") == ErrorCode.INVALID_REQUEST, F.lit(False))
        first = (F.row_number().over(alike) == 1) | rejected
        marked = marked.withColumn("keep", F.col("keep") | (F.col("_there").isNull() & first)).drop("_there")
    return marked


def group(rows: DataFrame) -> DataFrame:
    """One row per distinct generation, with the input rows that it answers.

    Requests with equal messages and parameters are one generation when decoding is greedy, or sampled with equal seeds.
    A sampled row without a seed gets one from its request key and `custom_id`, and so is generated by itself.

    Args:
        rows: as from `identify`.

    Returns:
        request: string, the compact JSON that the model takes (`contract.Request.from_json`); null for rejected rows.
        reason: string, why the rows are rejected; null where they are not.
        rows: array of structs of `custom_id`, `request_key` and `kept`, the struct of kept columns.
    """
    request = F.when(F.col("reason").isNull(), F.to_json(F.struct(F.col("_messages").alias("messages"), *_decoding())))
    # Rejected rows are grouped by nothing but themselves.
    own = F.concat_ws("\n", *ROW)
    return (
        rows.select("*", request.alias("request"))
        .groupBy(F.coalesce(F.sha2("request", 256), own).alias("generation_key"))
        .agg(
            F.first("request").alias("request"),
            F.first("reason").alias("reason"),
            F.collect_list(F.struct("custom_id", "request_key", "kept")).alias("rows"),
        )
        .drop("generation_key")
    )


def lay_out(grouped: DataFrame) -> DataFrame:
    """Put generations in the order of their requests, so that equal beginnings meet; rejected rows come first.

    Returns:
        The same with `place`: growing in that order, consecutive within a partition, `2**33` apart between two.
    """
    order = F.col("request").asc_nulls_first()
    # In as many partitions as Spark finds right; equal keys, those of the rejected rows, fall into one.
    laid = grouped.repartitionByRange(order).sortWithinPartitions(order)
    return laid.withColumn("place", F.monotonically_increasing_id())


def _decoding() -> list[Column]:
    """The parameters that tell one generation from another: under greedy decoding the sampling ones do not."""
    params = F.col("_params")
    greedy = params["temperature"] == 0
    digits = F.substring(F.sha2(F.concat_ws("\n", "request_key", "custom_id"), 256), 1, 15)
    derived = F.conv(digits, 16, 10).cast("bigint")
    own = {word: params[word] for word in PARAMETERS}
    own["seed"] = F.coalesce(params["seed"], derived)
    for word in ("top_p", "top_k", "min_p", "seed"):
        own[word] = F.when(~greedy, own[word])
    return [column.alias(word) for word, column in own.items()]
