"""What becomes of each request: answered already, rejected, answered with another, or generated. No input or output."""

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from phibatch.contract import PARAMETERS, RETRYABLE, ErrorCode, GenerationParams
from phibatch.errors import OutputError
from phibatch.job.text import as_json, sort_json

DUPLICATE = "duplicate custom_id: the input has it in another row too, and one row alone may keep it"
ROW = ("custom_id", "request_key", "copy")
"""What tells one row from all others. Rows with one `custom_id` and one request are copies, numbered."""
KEY_VERSION = "v2:"
"""How a `request_key` begins. Keys of another version can not be compared with these: those of 0.1.0 have no prefix."""


def identify(requests: DataFrame, digest: str) -> DataFrame:
    """Give every row its identity and the reason, if there is one, why it is rejected.

    Args:
        requests: as from `prompts.build_requests`.
        digest: of what answers.

    Returns:
        `ROW`'s columns; `reason`, null where the row is to be answered; `kept`, the struct of kept columns; and
        `_messages` and `_params`.
    """
    identity = F.coalesce(F.col("_custom_id"), F.sha2("_content", 256))
    # Which of several rows keeps a custom_id, or has which ordinal, must not hang on their order in the table.
    words = F.sha2(F.concat_ws("\n", "_content", as_json(F.struct("_kept"))), 256)
    same = Window.partitionBy("_identity").orderBy(F.col("_reason").isNotNull(), "request_key", words)
    numbered = requests.select("*", _key(digest).alias("request_key"), identity.alias("_identity")).select(
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


def _key(digest: str) -> Column:
    """The `request_key`: a hash of the messages, of the parameters that are not at their default, and of `digest`.

    The text that is hashed is the same in any session. A parameter that a later version adds changes no key as long as
    it is at its default.
    """
    defaults, params = GenerationParams(), F.col("_params")
    given = {word: params[word] for word in PARAMETERS}
    for word, column in given.items():
        default = getattr(defaults, word)
        if word == "stop":
            given[word] = F.when(F.size(column) > 0, column)
        elif default is not None:
            given[word] = F.when(column != default, column)
    wanted = given["response_format"]
    kind = F.try_variant_get(F.try_parse_json(wanted), "$.type", "string")
    asks_nothing = F.coalesce((wanted == "") | (kind == "text"), F.lit(False))
    given["response_format"] = F.when(~asks_nothing, sort_json(wanted))
    words = (given[word].alias(word) for word in sorted(given))
    body = as_json(F.struct(F.col("_messages").alias("messages"), *words))
    return F.concat(F.lit(KEY_VERSION), F.sha2(F.concat_ws("\n", body, F.lit(digest)), 256))


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


def is_older(request_key: str = "request_key") -> Column:
    """Whether the `request_key` of a row of a response table is of another version."""
    return ~F.col(request_key).startswith(KEY_VERSION)


def count_older(todo: DataFrame, numbered: DataFrame, retry: str) -> int:
    """How many answered rows would be generated anew because their keys are of another version.

    Args:
        todo: rows as from `match` that are not done.
        numbered: the response table's rows as from `number_responses`.
        retry: as for `is_done`; with `all` every row is to be generated anew in any case.
    """
    if retry == "all":
        return 0
    answered = numbered.where(is_older() & F.col("code").isNull()).select("custom_id").distinct()
    return todo.where(F.col("reason").isNull()).join(answered, "custom_id", "left_semi").count()


def check_older(rows: int, *, allowed: bool) -> None:
    """Raise OutputError where so many rows would be generated anew, as `count_older` says, and it is not allowed."""
    if rows and not allowed:
        raise OutputError(
            f"another version of phibatch, whose request keys can not be compared, has answered {rows:,} of the rows,"
            " and this run would generate them anew: set job.regenerate_older_keys to true to allow that, or name"
            " another output"
        )


def mark(numbered: DataFrame, rows: DataFrame, retry: str, orphans: str) -> DataFrame:
    """Rows as from `number_responses`, with `keep`: whether they are still to be in the response table.

    Kept are those that `match` takes for done and, unless orphans are to be dropped, those of rows that left the input.
    """
    known = rows.select(*ROW, "reason", F.lit(True).alias("answered"))
    marked = numbered.join(known, list(ROW), "left").withColumn("keep", is_done(retry))
    if orphans == "keep":
        there = rows.select("custom_id", F.lit(True).alias("_there")).distinct()
        marked = marked.join(there, "custom_id", "left")
        # A death may have left an orphan twice, or an answer beside the failure that it replaces. Only rejected rows
        # may be copies in truth.
        first = (F.col("copy") == 1) | F.coalesce(F.col("code") == ErrorCode.INVALID_REQUEST, F.lit(False))
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
    body = as_json(F.struct(F.col("_messages").alias("messages"), *_decoding()))
    request = F.when(F.col("reason").isNull(), body)
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
