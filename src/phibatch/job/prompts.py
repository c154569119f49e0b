"""The input table: reading it, checking its columns, and making a request of every row."""

import difflib
import string
from dataclasses import dataclass

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from phibatch.config import OPENAI_BATCH, GenerationConfig, InputConfig
from phibatch.contract import NUMBERS, ROLES, Bounds
from phibatch.errors import InputError
from phibatch.job.columns import find, find_name, named, pick
from phibatch.job.openai_batch import COLUMNS, LINE, PROBLEM, parse_lines
from phibatch.job.session import first_line
from phibatch.job.text import as_json

MESSAGES_TYPE = "array<struct<role:string,content:string>>"
ANY_TEXT = r"(?U)\S"


def read_prompts(spark: SparkSession, config: InputConfig) -> DataFrame:
    """Open the input table, or a batch file as its lines; with Spark's `_metadata`.

    Raises:
        InputError: it is absent or can not be read, in one sentence.
    """
    place = f"input.path {config.path}" if config.table is None else f"input.table {config.table}"
    reader = spark.read.options(**{key: value.get_secret_value() for key, value in config.options.items()})
    file_format = "text" if config.format == OPENAI_BATCH else config.format
    try:
        if config.table is not None:
            return reader.table(config.table)
        return reader.format(file_format).load(config.path)
    except (PySparkException, Py4JJavaError) as error:
        condition = error.getCondition() if isinstance(error, PySparkException) else None
        if condition in {"PATH_NOT_FOUND", "TABLE_OR_VIEW_NOT_FOUND"}:
            raise InputError(f"{place} does not exist") from error
        raise InputError(f"{place} can not be read as {config.format}: {first_line(error)}") from error


def parse_prompts(table: DataFrame, config: InputConfig) -> DataFrame:
    """What `read_prompts` opened, with the job's columns."""
    return parse_lines(table) if config.format == OPENAI_BATCH else table


@dataclass(frozen=True, slots=True)
class Columns:
    """The input table's columns that the job reads: the job's word to the table's name, for those that are there."""

    names: dict[str, str]
    types: dict[str, T.DataType]

    def __contains__(self, word: str) -> bool:
        return word in self.names

    def __getitem__(self, word: str) -> Column:
        return named(self.names[word])

    def type(self, word: str) -> T.DataType:
        return self.types[word]


def check_columns(df: DataFrame, config: InputConfig, keep_columns: tuple[str, ...] = ()) -> Columns:
    """Find the job's columns in the table, and check their types.

    Needed is one of `prompt` (string), `messages` (array of structs of `role` and `content`, or the same as JSON text)
    and a template. `custom_id`, `system` and the generation parameters are read where they are there.

    Raises:
        InputError: a column is missing or of another type; the sentence names it, and the nearest one there is.
    """
    batch = config.format == OPENAI_BATCH
    wanted = (COLUMNS if batch else config.columns).model_dump(exclude_none=True)
    found = {word: find_name(df, name) for word, name in wanted.items()}
    names = {word: name for word, name in found.items() if name is not None}
    for word in config.columns.model_fields_set:
        if word not in names:
            raise InputError(
                f"the input has no column {wanted[word]} (input.columns.{word}){_nearest(wanted[word], df)}"
            )
    for name in (*_template_fields(config), *keep_columns):
        if find_name(df, name) is None:
            raise InputError(f"the input has no column {name}{_nearest(name, df)}")
    if config.template is None and not {"prompt", "messages"} & set(names):
        absent = f"no column {wanted['prompt']} and no column {wanted['messages']}"
        raise InputError(f"the input has {absent}{_nearest(wanted['prompt'], df)}")
    columns = Columns(names, {word: df.schema[name].dataType for word, name in names.items()})
    for word, name in names.items():
        expected = _expected_type(word, columns.type(word))
        if expected:
            raise InputError(f"the column {name} is {columns.type(word).simpleString()}; it must be {expected}")
    return columns


def build_requests(
    df: DataFrame,
    columns: Columns,
    config: InputConfig,
    generation: GenerationConfig,
    keep_columns: tuple[str, ...] = (),
) -> DataFrame:
    """Make a request of every row.

    Returns:
        _custom_id: string, null where the row has none.
        _content: string, the row's own words as JSON; equal where rows ask for the same.
        _messages: the conversation, or null.
        _params: struct of the generation parameters.
        _reason: string, why the row can not be answered; null where it can.
        _kept: struct of the input's columns that are carried through; null where none are.
    """
    system = columns["system"] if "system" in columns else F.lit(None).cast("string")
    prompt = _prompt(df, columns, config)
    messages, kinds = _messages(columns)
    own_system = F.exists(messages, lambda message: message["role"] == "system")
    default_system = F.when(own_system, None).otherwise(F.lit(config.system))
    opening = F.coalesce(system, default_system)
    has_opening = F.coalesce(opening.rlike(ANY_TEXT), F.lit(False))
    conversation = F.coalesce(messages, F.when(prompt.isNotNull(), F.array(_message("user", prompt))))
    params = {word: _param(word, columns, generation) for word in NUMBERS}
    stop = _stop(columns, generation)
    batch = config.format == OPENAI_BATCH
    reasons = [
        *([F.col(PROBLEM)] if batch else []),
        _conversation_reason(prompt, messages, kinds, columns, config),
        F.when(own_system & system.rlike(ANY_TEXT), "the row has a system column and a system message"),
        *(_number_reason(word, params[word], NUMBERS[word]) for word in NUMBERS),
        F.when(F.exists(stop, lambda text: text.isNull() | (text == "")), "stop holds an empty string"),
    ]
    whole = {word: params[word].try_cast("bigint") if NUMBERS[word].whole else params[word] for word in NUMBERS}
    # The row's own words; what the configuration adds to all rows is not among them.
    content = [columns[word].alias(word) for word in columns.names if word != "custom_id"]
    kept = F.struct(*pick(df, keep_columns))
    return df.select(
        (columns["custom_id"].cast("string") if "custom_id" in columns else F.lit(None).cast("string")).alias(
            "_custom_id"
        ),
        (F.col(LINE) if batch else as_json(F.struct(*content, prompt.alias("_prompt")))).alias("_content"),
        F.when(has_opening, F.concat(F.array(_message("system", opening)), conversation))
        .otherwise(conversation)
        .cast(MESSAGES_TYPE)
        .alias("_messages"),
        F.struct(
            *(column.alias(word) for word, column in whole.items()),
            stop.alias("stop"),
            _response_format(columns, generation).alias("response_format"),
        ).alias("_params"),
        F.coalesce(*reasons).alias("_reason"),
        (kept if keep_columns else F.lit(None).cast("string")).alias("_kept"),
    )


def _prompt(df: DataFrame, columns: Columns, config: InputConfig) -> Column:
    if config.template is None:
        return columns["prompt"] if "prompt" in columns else F.lit(None).cast("string")
    parts = []
    for text, field, _, _ in string.Formatter().parse(config.template):
        parts.append(F.lit(text))
        if field is not None:
            parts.append(find(df, field).cast("string"))
    return F.concat(*parts)


def _messages(columns: Columns) -> tuple[Column, Column]:
    """The `messages` column as an array of structs, and the JSON types of its contents (null for a typed column)."""
    if "messages" not in columns:
        return F.lit(None).cast(MESSAGES_TYPE), F.lit(None).cast("array<string>")
    if isinstance(columns.type("messages"), T.StringType):
        # As variants first: a cast to string would take numbers and lists of parts for text.
        parsed = F.try_variant_get(
            F.try_parse_json(columns["messages"]), "$", "array<struct<role:variant,content:variant>>"
        )
        kinds = F.transform(parsed, lambda message: F.schema_of_variant(message["content"]))
        return F.transform(
            parsed,
            lambda message: F.struct(
                F.try_variant_get(message["role"], "$", "string").alias("role"),
                F.try_variant_get(message["content"], "$", "string").alias("content"),
            ),
        ), kinds
    typed = F.transform(
        columns["messages"],
        lambda message: F.struct(message["role"].alias("role"), message["content"].alias("content")),
    )
    return typed, F.lit(None).cast("array<string>")


def _conversation_reason(
    prompt: Column, messages: Column, kinds: Column, columns: Columns, config: InputConfig
) -> Column:
    """Why prompt and messages make no conversation, or null."""
    given = columns["messages"] if "messages" in columns else F.lit(None)
    has_prompt = "prompt" in columns or config.template is not None
    absent = "no prompt" if has_prompt else "no messages"
    word = "prompt" if has_prompt else "messages"
    roles = F.transform(messages, lambda message: message["role"])
    contents = F.transform(messages, lambda message: message["content"])
    unknown = F.filter(roles, lambda role: F.coalesce(~role.isin(*ROLES), F.lit(True)))
    named = F.coalesce(F.substring(F.element_at(unknown, 1), 1, 20), F.lit("null"))
    spoken = F.filter(messages, lambda message: message["role"] != "assistant")
    return F.coalesce(
        F.when(prompt.isNotNull() & given.isNotNull(), "the row has both a prompt and messages"),
        F.when(prompt.isNull() & given.isNull(), f"the row has {absent}: {word} is null"),
        F.when(~prompt.rlike(ANY_TEXT), "prompt is blank"),
        F.when(given.isNotNull() & messages.isNull(), "messages is not a JSON array of objects with role and content"),
        F.when(F.size(messages) == 0, "messages is empty"),
        F.when(
            F.size(unknown) > 0,
            F.concat(F.lit("unknown role '"), named, F.lit(f"' in messages; it must be one of {', '.join(ROLES)}")),
        ),
        F.when(
            F.exists(contents, lambda text: text.isNull()) | F.exists(kinds, lambda kind: kind != "STRING"),
            "the content of a message is not text",
        ),
        F.when(
            F.exists(spoken, lambda message: ~message["content"].rlike(ANY_TEXT)), "the content of a message is blank"
        ),
        F.when(
            F.exists(F.slice(roles, F.lit(2), F.greatest(F.size(roles) - 1, F.lit(0))), lambda role: role == "system"),
            "a system message may only come first",
        ),
        F.when(F.element_at(roles, -1) != "user", "the last message is not the user's"),
    )


def _param(word: str, columns: Columns, generation: GenerationConfig) -> Column:
    """One numeric parameter: the row's own, else the configuration's. It keeps its type until it is checked."""
    default = F.lit(getattr(generation, word))
    kind = "bigint" if NUMBERS[word].whole else "double"
    if word not in columns:
        return default.cast(kind)
    own = columns[word]
    if not isinstance(columns.type(word), T.IntegralType):
        # pandas writes a column of whole numbers with gaps as doubles, and the gaps as NaN.
        own, kind = own.cast("double"), "double"
        own = F.when(~F.isnan(own), own)
    return F.coalesce(own.cast(kind), default.cast(kind))


def _stop(columns: Columns, generation: GenerationConfig) -> Column:
    default = F.array(*(F.lit(text) for text in generation.stop)).cast("array<string>")
    if "stop" not in columns:
        return default
    own = columns["stop"]
    if isinstance(columns.type("stop"), T.StringType):
        own = F.when(own.isNotNull(), F.array(own))
    return F.coalesce(own, default)


def _response_format(columns: Columns, generation: GenerationConfig) -> Column:
    default = F.lit(generation.response_format).cast("string")
    return F.coalesce(columns["response_format"], default) if "response_format" in columns else default


def _number_reason(word: str, value: Column, bounds: Bounds) -> Column:
    low = value > bounds.low if bounds.above else value >= bounds.low
    inside = low & (value <= bounds.high)
    if bounds.whole:
        inside = inside & (value == F.floor(value))
    message = F.concat(F.lit(f"{word} is "), value.cast("string"), F.lit(f"; it must be {bounds}"))
    return F.when(~inside, message)


def _message(role: str, content: Column) -> Column:
    return F.struct(F.lit(role).alias("role"), content.alias("content"))


def _template_fields(config: InputConfig) -> list[str]:
    if config.template is None:
        return []
    return [field for _, field, _, _ in string.Formatter().parse(config.template) if field is not None]


def _expected_type(word: str, actual: T.DataType) -> str | None:
    """What a column must be, when it is not."""
    if word == "custom_id":
        return None if isinstance(actual, T.StringType | T.IntegralType) else "string or integer"
    if word in {"prompt", "system", "response_format"}:
        return None if isinstance(actual, T.StringType) else "string"
    if word == "messages":
        element = actual.elementType if isinstance(actual, T.ArrayType) else None
        fields = {field.name: field.dataType for field in element} if isinstance(element, T.StructType) else {}
        typed = all(isinstance(fields.get(name), T.StringType) for name in ("role", "content"))
        return None if typed or isinstance(actual, T.StringType) else f"{MESSAGES_TYPE} or a JSON string of it"
    if word == "stop":
        listed = isinstance(actual, T.ArrayType) and isinstance(actual.elementType, T.StringType)
        return None if listed or isinstance(actual, T.StringType) else "string or array<string>"
    return None if isinstance(actual, T.NumericType) else "a number"


def _nearest(name: str, df: DataFrame) -> str:
    near = difflib.get_close_matches(name, df.columns, n=1, cutoff=0.5)
    there = f"its columns are {', '.join(df.columns)}"
    return f": did you mean {near[0]}? ({there})" if near else f": {there}"
