"""Files of the OpenAI Batch API: a line of JSON for each request, and one for each answer.

The formats are those of https://platform.openai.com/docs/api-reference/batch (`request-input`, `request-output`).
"""

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from phibatch.config import InputColumns
from phibatch.contract import NUMBERS, ErrorCode
from phibatch.errors import RunError
from phibatch.job.files import Folder
from phibatch.job.session import first_line
from phibatch.job.text import as_json
from phibatch.job.work import WorkFolder

PROBLEM = "_problem"
"""The column that says why a line is no request."""

LINE = "_line"

URL = "/v1/chat/completions"

COLUMNS = InputColumns(n="n")

READ = {"messages", "max_completion_tokens", *NUMBERS, "stop", "response_format"}
"""The keys of a body that are followed."""

IGNORED = {
    "model",
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
    "stream_options",
}
"""Those that change no answer. The model is the job's."""

NEUTRAL = ("null", "false", "0", "0.0", "[]", "{}", '"none"', '"auto"')
"""Values with which any other key asks for nothing."""

STATUS = {ErrorCode.INVALID_REQUEST: 400, ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400, ErrorCode.TIMEOUT: 408}
"""The HTTP status of a failure; of the others 500."""


def parse_lines(text: DataFrame) -> DataFrame:
    """The lines of a batch file, in a column `value`, as an input table: the columns of `COLUMNS`, `PROBLEM`, `LINE`.

    A line that is no request of the chat completions API, or asks for what can not be given, has its reason in
    `PROBLEM`. Empty lines are skipped.
    """
    lines = text.where(F.trim("value") != "")
    parsed = lines.select(F.col("value").alias(LINE), F.try_parse_json("value").alias("line"))
    body = F.try_variant_get("line", "$.body", "map<string,variant>")
    custom_id = F.try_variant_get("line", "$.custom_id", "variant")
    opened = parsed.withColumns({"body": body, "given_id": custom_id})
    values = {name: F.col("body")[name] for name in READ}
    # What the API calls it now, and did before.
    values["max_tokens"] = F.coalesce(_given(values["max_completion_tokens"]), _given(values["max_tokens"]))
    numbers = {name: _number(values[name], whole=NUMBERS[name].whole) for name in NUMBERS}
    return opened.select(
        F.when(_kind("given_id") == "STRING", F.try_variant_get("given_id", "$", "string")).alias("custom_id"),
        _messages(values["messages"]).alias("messages"),
        *(column.alias(name) for name, column in numbers.items()),
        _stop(values["stop"]).alias("stop"),
        # From the text: a variant would sort the keys, and a schema's properties are answered in their order.
        F.when(
            _kind(values["response_format"]).startswith("OBJECT"), F.get_json_object(LINE, "$.body.response_format")
        ).alias("response_format"),
        _problem(values, numbers).alias(PROBLEM),
        LINE,
    )


def write_lines(spark: SparkSession, work: WorkFolder, responses: DataFrame, path: str) -> None:
    """Write a response table as a batch file, one file whatever its size. Raises RunError where that can not be."""
    place = f"{work.place}/{work.own('lines')}"
    folder, _, name = path.rpartition("/")
    try:
        _build_lines(responses).write.mode("overwrite").option("compression", "none").text(place)
        Folder(spark, folder or ("/" if path.startswith("/") else ".")).join(place, name)
    except (PySparkException, Py4JJavaError) as error:
        raise RunError(f"all rows are answered, but {path} can not be written: {first_line(error)}") from error


def _build_lines(responses: DataFrame) -> DataFrame:
    """One line for each row: `id, custom_id, response{status_code, request_id, body}, error`."""
    row = F.sha2(F.concat_ws("\n", "run_id", "custom_id", "request_key", "error.message"), 256)
    number = F.substring(row, 1, 32)
    failed = F.col("error.code").isNotNull()
    alone = F.array(F.struct(F.lit(0).alias("index"), F.col("response"), F.col("finish_reason")))
    choices = F.col("choices") if "choices" in responses.columns else alone
    completion = F.struct(
        F.concat(F.lit("chatcmpl-"), number).alias("id"),
        F.lit("chat.completion").alias("object"),
        F.col("created").cast("double").cast("bigint").alias("created"),
        F.col("model"),
        F.transform(
            choices,
            lambda choice: F.struct(
                choice["index"].alias("index"),
                F.struct(
                    F.lit("assistant").alias("role"),
                    choice["response"].alias("content"),
                    F.lit(None).cast("string").alias("refusal"),
                ).alias("message"),
                F.lit(None).cast("string").alias("logprobs"),
                choice["finish_reason"].alias("finish_reason"),
            ),
        ).alias("choices"),
        F.struct(
            "usage.prompt_tokens",
            "usage.completion_tokens",
            "usage.total_tokens",
            F.struct("usage.cached_tokens").alias("prompt_tokens_details"),
        ).alias("usage"),
    )
    ours = F.col("error.code").isin(*(code.value for code in STATUS))
    failure = F.struct(
        F.struct(
            F.col("error.message").alias("message"),
            F.when(ours, "invalid_request_error").otherwise("server_error").alias("type"),
            F.lit(None).cast("string").alias("param"),
            F.col("error.code").alias("code"),
        ).alias("error")
    )
    status = F.create_map(*(F.lit(part) for item in STATUS.items() for part in item))
    line = F.struct(
        F.concat(F.lit("batch_req_"), number).alias("id"),
        "custom_id",
        F.struct(
            F.when(failed, F.coalesce(status[F.col("error.code")], F.lit(500))).otherwise(200).alias("status_code"),
            F.concat(F.lit("req_"), number).alias("request_id"),
            F.when(failed, _as_variant(failure)).otherwise(_as_variant(completion)).alias("body"),
        ).alias("response"),
        F.when(failed, F.struct("error.code", "error.message")).alias("error"),
    )
    return responses.select(as_json(line, nulls=True).alias("value"))


def _as_variant(value: Column) -> Column:
    """Structs of different fields in one column."""
    return F.parse_json(as_json(value, nulls=True))


def _kind(value: Column | str) -> Column:
    return F.coalesce(F.schema_of_variant(value), F.lit("VOID"))


def _given(value: Column) -> Column:
    """Null where the value is JSON's null."""
    return F.when(_kind(value) != "VOID", value)


def _number(value: Column, *, whole: bool) -> Column:
    """A JSON number; a whole one keeps all its digits."""
    kind = "bigint" if whole else "double"
    number = F.coalesce(F.try_variant_get(value, "$", kind).cast(kind), F.lit(None).cast(kind))
    fits = F.try_variant_get(value, "$", "double") == number.cast("double")
    return F.when(_is_number(value) & fits, number)


def _is_number(value: Column) -> Column:
    return _kind(value).rlike("^(BIGINT|DOUBLE|DECIMAL)")


def _messages(value: Column) -> Column:
    """The conversation as a typed array; a content that is neither text nor parts of text is null."""
    parsed = F.try_variant_get(value, "$", "array<struct<role:variant,content:variant>>")
    return F.transform(parsed, _message)


def _message(message: Column) -> Column:
    role, content = message["role"], message["content"]
    parts = F.try_variant_get(content, "$", "array<struct<type:string,text:string>>")
    texts = F.transform(parts, lambda part: part["text"])
    whole = F.forall(parts, lambda part: F.coalesce((part["type"] == "text") & part["text"].isNotNull(), F.lit(False)))
    text = F.when(_kind(content) == "STRING", F.try_variant_get(content, "$", "string")).when(
        whole, F.array_join(texts, "\n")
    )
    name = F.when(_kind(role) == "STRING", F.try_variant_get(role, "$", "string"))
    # The API's newer word.
    return F.struct(F.when(name == "developer", "system").otherwise(name).alias("role"), text.alias("content"))


def _stop(value: Column) -> Column:
    kind = _kind(value)
    return F.when(kind == "STRING", F.array(F.try_variant_get(value, "$", "string"))).when(
        kind == "ARRAY<STRING>", F.try_variant_get(value, "$", "array<string>")
    )


def _problem(values: dict[str, Column], numbers: dict[str, Column]) -> Column:
    """Why a line can not be answered, or null."""
    asked = F.map_filter(
        "body",
        lambda key, value: ~key.isin(*READ, *IGNORED) & ~F.coalesce(F.to_json(value), F.lit("null")).isin(*NEUTRAL),
    )
    unsupported = F.element_at(F.array_sort(F.map_keys(asked)), 1)

    def text(name: str) -> Column:
        return F.coalesce(F.try_variant_get("line", f"$.{name}", "string"), F.lit(""))

    return F.coalesce(
        F.when(
            ~F.coalesce(F.schema_of_variant("line"), F.lit("")).startswith("OBJECT"), "the line is not a JSON object"
        ),
        F.when(_kind("given_id") != "STRING", "the line has no custom_id of text"),
        F.when(text("method") != "POST", "method is not POST"),
        F.when(text("url") != URL, f"url is not {URL}"),
        F.when(F.col("body").isNull(), "the line has no body"),
        F.when(
            F.size(F.map_keys(asked)) > 0,
            F.concat(F.lit("body."), F.substring(unsupported, 1, 40), F.lit(" is not supported")),
        ),
        F.when(_messages(values["messages"]).isNull(), "body.messages is not a list of objects with role and content"),
        *(
            F.when(_given(values[name]).isNotNull() & column.isNull(), f"body.{name} is not {NUMBERS[name]}")
            for name, column in numbers.items()
        ),
        F.when(
            _given(values["stop"]).isNotNull() & _stop(values["stop"]).isNull(),
            "body.stop is not text or a list of texts",
        ),
        F.when(
            _given(values["response_format"]).isNotNull() & ~_kind(values["response_format"]).startswith("OBJECT"),
            "body.response_format is not an object",
        ),
    )
