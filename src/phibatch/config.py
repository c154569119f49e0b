"""A job's configuration: YAML in, a frozen and checked `JobConfig` out. No Spark, no MLflow."""

import difflib
import os
import posixpath
import re
import string
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from phibatch.contract import EXTRA_COLUMNS, NUMBERS, RESPONSE_COLUMNS, EngineName, GenerationParams, build_params
from phibatch.errors import ConfigError

ROOT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*:)?(//[^/]*)?")
"""What a path may begin with: a file system's scheme and authority."""

ENVIRONMENT = re.compile(r"\$\{(\w+)\}")

OPENAI_BATCH = "openai-batch"
"""The format of files for and from the OpenAI Batch API, as input and as output."""

MAPPINGS = ("options", "response_format")
"""The settings whose value is a mapping."""


class _Section(BaseModel):
    # The docstrings below fields are what docs/configuration.md says of them.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True)


def _look_up(found: re.Match[str]) -> str:
    if found[1] not in os.environ:
        raise ValueError(f"the environment has no variable {found[1]}")
    return os.environ[found[1]]


class InputColumns(_Section):
    """The input table's names for the job's columns. `n` is only read where it is named: many tables have an `n`."""

    custom_id: str = "custom_id"
    prompt: str = "prompt"
    messages: str = "messages"
    system: str = "system"
    max_tokens: str = "max_tokens"
    temperature: str = "temperature"
    top_p: str = "top_p"
    top_k: str = "top_k"
    min_p: str = "min_p"
    repetition_penalty: str = "repetition_penalty"
    seed: str = "seed"
    n: str | None = None
    stop: str = "stop"
    response_format: str = "response_format"


class InputConfig(_Section):
    """Where the prompts are: a `path` in a Spark `format`, or a `table`.

    `incremental` reads only files that are new since the last run that ended. `system` and `template` may be the URI of
    a prompt that is registered in MLflow.
    """

    path: str | None = None
    """The path of the input. One of `path` and `table` is needed."""
    table: str | None = None
    """The name of a table, instead of a path."""
    format: str = "parquet"
    """Any that Spark can read; or `openai-batch`, a file of requests as for the OpenAI Batch API."""
    options: dict[str, SecretStr] = Field(default_factory=dict)
    """Spark's own reader options; `${NAME}` in one is the environment's variable."""
    columns: InputColumns = InputColumns()
    """The table's names for the job's columns."""
    system: str | None = None
    """The system message of rows without one of their own; or `prompts:/NAME@ALIAS`, a prompt in MLflow."""
    template: str | None = None
    """The prompt, from other columns: `"Summarise: {text}"`; or `prompts:/NAME@ALIAS`."""
    incremental: bool = False
    """Read only files that are new since the last run that ended."""

    @field_validator("options", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        """Options may be secrets: `${NAME}` in one is the environment's, and none is ever shown."""
        if not isinstance(value, dict):
            return value
        return {key: ENVIRONMENT.sub(_look_up, str(text)) for key, text in value.items()}

    @field_validator("template")
    @classmethod
    def _plain_fields(cls, value: str | None) -> str | None:
        for _, field, specification, conversion in string.Formatter().parse(value or ""):
            if field is not None and (not field or specification or conversion):
                raise ValueError("it may only hold {column}, and {{ and }} for braces themselves")
        return value

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.table is None):
            raise ValueError("exactly one of path and table must be set")
        if self.format == OPENAI_BATCH and (self.table or self.template or self.columns.model_fields_set):
            raise ValueError(f"format {OPENAI_BATCH} is a file of requests, which has no table, template or columns")
        return self


class ModelConfig(_Section):
    """The logged model, and how it is run."""

    uri: str
    """The logged model: `models:/NAME@ALIAS` or `models:/NAME/VERSION`."""
    engine: EngineName = EngineName.AUTO
    """`auto` is the fastest that can run the model: `slots` or `genai` for ONNX, `transformers` for a checkpoint;
    `echo` needs no weights and says the prompt back."""
    batch_size: Annotated[int, Field(ge=1, le=32)] = 16
    """The most rows that are generated together."""
    memory: ByteSize | None = None
    """What weights, keys and values of one engine may take, such as `6GiB` (slots engine); null: half of what the
    container or machine has, by the task's share of its cores."""


class GenerationConfig(_Section):
    """The parameters of every row that does not bring its own; one that is not set is as the model was logged."""

    max_tokens: int = 300
    """The most tokens of an answer, without the end-of-turn token."""
    temperature: float = 0.0
    """0 is greedy; above it, logits are divided by it before a token is drawn."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probabilities add up to this."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is all."""
    min_p: float = 0.0
    """Draw from the tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens already seen."""
    seed: int | None = None
    """Of the sampled rows; null: each gets one, from its request and `custom_id`."""
    n: int = 1
    """Answers for each row, in a column `choices`; the first is `response`."""
    stop: tuple[str, ...] = ()
    """The answer is cut before the first of these to appear."""
    response_format: str | None = None
    """`{type: json_schema, json_schema: {schema: {...}}}`, `{type: json_object}` or `{type: regex, regex: "..."}`."""

    @field_validator(*NUMBERS)
    @classmethod
    def _in_bounds(cls, value: float | None, info: Any) -> float | None:
        if value is not None and value not in NUMBERS[info.field_name]:
            raise ValueError(f"it must be {NUMBERS[info.field_name]}")
        return value

    @field_validator("response_format", mode="before")
    @classmethod
    def _known_format(cls, value: dict[str, Any] | str | None) -> str | None:
        return build_params({"response_format": value}).response_format

    @field_validator("stop")
    @classmethod
    def _no_empty_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("it must be a list of non-empty strings")
        return value


class OutputConfig(_Section):
    """Where the responses go: a `path` in a Spark `format`, or a `table`; the usage table stands beside it.

    What is there already is kept and only the rest done (`mode: resume`), lost, or a reason to stop. Rows whose input
    row is gone are orphans.
    """

    path: str | None = None
    """The path of the responses. One of `path` and `table` is needed; usage goes to `<output>_usage`."""
    table: str | None = None
    """The name of a table, instead of a path."""
    format: str = "parquet"
    """Any that Spark can append to; or `openai-batch`, one file of answers as from the OpenAI Batch API."""
    mode: Literal["resume", "overwrite", "error"] = "resume"
    """`resume` does what is missing; `error` refuses an output that is there; `overwrite` loses what is there."""
    orphans: Literal["keep", "drop"] = "keep"
    """Whether responses whose input row is gone are kept."""
    work_path: str | None = None
    """Where a folder is made for what a run needs to resume; null: `<output>_work`. For a table, also where its
    report goes. All runs on an output must have the same."""
    keep_columns: tuple[str, ...] = ()
    """Input columns to carry through, of any name that is not the response table's own."""

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if (self.path is None) == (self.table is None):
            raise ValueError("exactly one of path and table must be set")
        lowered = [name.lower() for name in self.keep_columns]
        for place, name in enumerate(lowered):
            told = f"keep_columns names {self.keep_columns[place]!r}"
            if name in RESPONSE_COLUMNS or name in EXTRA_COLUMNS:
                raise ValueError(f"{told}, which is a column of the response table itself")
            if name in lowered[:place]:
                raise ValueError(f"{told} twice: names that differ in case alone are one")
            if "`" in name and self.table_format.lower() == "orc":
                raise ValueError(f"{told}, and format orc would cut the name at its backtick")
        if self.format == OPENAI_BATCH and self.table:
            raise ValueError(f"format {OPENAI_BATCH} is a file: set path, not table")
        return self

    @property
    def name(self) -> str:
        """The output's path or name, by which what lies beside it is named."""
        return self.table or normalise(self.path or "")

    @property
    def place(self) -> str:
        """The response table's path or name; a batch file is made from a table beside it."""
        return f"{self.name}_responses" if self.format == OPENAI_BATCH else self.name

    @property
    def table_format(self) -> str:
        """The format of the response and usage tables."""
        return "parquet" if self.format == OPENAI_BATCH else self.format

    @property
    def usage_place(self) -> str:
        """The usage table's path or name."""
        return f"{self.name[:-1]}_usage`" if self.table and self.name.endswith("`") else f"{self.name}_usage"


class JobSettings(_Section):
    """The run itself."""

    name: str = "phibatch"
    """Of the Spark application and the MLflow run."""
    chunk_rows: Annotated[int, Field(ge=1)] | None = None
    """Rows that are made durable together; null: about two minutes of work."""
    partitions: Annotated[int, Field(ge=1)] | None = None
    """Instead, into how many chunks the rows are cut."""
    retry: Literal["failed", "none", "all"] = "failed"
    """Rows that are done again: `failed` are failures that may pass."""
    regenerate_older_keys: bool = False
    """Whether answered rows whose `request_key` is of another version are generated anew; `false`: the run stops before
    it does that, and says how many rows it would be."""
    row_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a row ends as `timeout`, with its text so far."""
    worker_timeout: Annotated[float, Field(gt=0)] = 600
    """Seconds without a step after which a process is taken to hang, and ended."""
    max_error_rate: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Exit code 3 when a larger share of the rows failed."""

    @model_validator(mode="after")
    def _one_cut(self) -> Self:
        if self.chunk_rows is not None and self.partitions is not None:
            raise ValueError("only one of chunk_rows and partitions may be set")
        return self


class ReportConfig(_Section):
    """The report that is written beside the output; `hourly_cost` is what the whole cluster costs, in any currency."""

    enabled: bool = True
    """Write `<output>_report` at the end of a run."""
    hourly_cost: Annotated[float, Field(ge=0)] | None = None
    """What the whole cluster costs an hour, in any currency; null: costs are not told."""


class JobConfig(_Section):
    """A whole job."""

    input: InputConfig
    model: ModelConfig
    output: OutputConfig
    generation: GenerationConfig = GenerationConfig()
    job: JobSettings = JobSettings()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _input_is_safe(self) -> Self:
        read = self.input.table or normalise(self.input.path or "")
        if read in {self.output.name, self.output.place, self.output.usage_place}:
            raise ValueError(f"the output {read} is the input itself")
        return self

    @model_validator(mode="after")
    def _increments_add_up(self) -> Self:
        if self.input.incremental and (self.output.mode != "resume" or self.output.orphans != "keep"):
            raise ValueError(
                "input.incremental needs output.mode resume and output.orphans keep: old rows are not read"
            )
        return self

    def with_defaults(self, params: GenerationParams) -> "JobConfig":
        """The same job, with a model's own parameters where the configuration sets none."""
        given = self.generation.model_dump(include=self.generation.model_fields_set)
        generation = self.generation.model_copy(update={**asdict(params), **given})
        return self.model_copy(update={"generation": generation})


def read_config(
    path: Path | None, settings: dict[str, str] | None = None, values: dict[str, str] | None = None
) -> JobConfig:
    """Read a YAML file, then set `section.key`s: `settings` from YAML text, `values` as they are.

    Raises:
        ConfigError: unreadable file, unknown key, or a value out of range, in one sentence.
    """
    document: Any = {}
    if path is not None:
        try:
            document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"the configuration {path} can not be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"the configuration {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"the configuration {path} is not a mapping of sections")
    # A section whose lines are all comments is none.
    document = {section: values for section, values in document.items() if values is not None}
    for key, text in (settings or {}).items():
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={text} is not YAML: {' '.join(str(error).split())}") from error
        # `a: b` is meant as text elsewhere.
        _set(document, key, text if isinstance(value, dict) and not key.endswith(MAPPINGS) else value)
    for key, value in (values or {}).items():
        _set(document, key, value)
    return build_config(document)


def build_config(document: dict[str, Any]) -> JobConfig:
    """A checked configuration from plain data. Raises ConfigError."""
    try:
        return JobConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(item) for item in error.errors(include_url=False))) from None


def normalise(path: str) -> str:
    """A path as Hadoop reads it: without `.`, `..`, doubled slashes and a slash at its end."""
    rest = ROOT.sub("", path, count=1)
    if not rest:
        return path
    return path[: -len(rest)] + posixpath.normpath(rest).replace("//", "/")


def _set(document: dict[str, Any], key: str, value: object) -> None:
    *sections, last = key.split(".")
    for section in sections:
        document = document.setdefault(section, {})
        if not isinstance(document, dict):
            raise ConfigError(f"{key} can not be set: {section} is not a section")
    document[last] = value


def _sentence(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    name = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _names(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        prefix = "".join(f"{part}." for part in location[:-1])
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here are {', '.join(known)}"
        return f"unknown key {name}: {hint}"
    if item["type"] == "missing":
        return f"{name} is missing"
    reason = item["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list, such as [a, b]")
    if isinstance(item["input"], dict | BaseModel):
        return f"{name}: {reason}" if name else reason
    return f"{name} is {item['input']!r}: {reason}"


def _names(location: list[str]) -> list[str]:
    """The keys that the section at `location` knows."""
    section: Any = JobConfig
    for part in location:
        kind = section.model_fields[part].annotation
        section = next((option for option in (kind, *get_args(kind)) if isinstance(option, type)), kind)
    return list(section.model_fields)
