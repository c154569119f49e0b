"""The words and records that the job and the model share. Standard library only."""

import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

ROLES = ("system", "user", "assistant")


class FinishReason(StrEnum):
    """Why a completion ended: by itself or at a stop string (`stop`), or cut by its limit (`length`)."""

    STOP = "stop"
    LENGTH = "length"


class ErrorCode(StrEnum):
    """Why a row has no answer."""

    INVALID_REQUEST = "invalid_request"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    TIMEOUT = "timeout"
    ENGINE_ERROR = "engine_error"
    WORKER_CRASHED = "worker_crashed"
    INVALID_OUTPUT = "invalid_output"


RETRYABLE = (ErrorCode.INSUFFICIENT_MEMORY, ErrorCode.TIMEOUT, ErrorCode.ENGINE_ERROR, ErrorCode.WORKER_CRASHED)
"""The errors of rows that may have an answer when they are tried again; the others would come out the same."""


class EngineName(StrEnum):
    """The engines a model can be asked to answer with; `auto` is the best that can run it."""

    AUTO = "auto"
    SLOTS = "slots"
    GENAI = "genai"
    TRANSFORMERS = "transformers"
    ECHO = "echo"


class ModelFormat(StrEnum):
    """What a logged model's files are: an onnxruntime-genai folder, or a transformers checkpoint."""

    ONNX = "onnx"
    TRANSFORMERS = "transformers"


ENGINES = {
    ModelFormat.ONNX: (EngineName.AUTO, EngineName.SLOTS, EngineName.GENAI, EngineName.ECHO),
    ModelFormat.TRANSFORMERS: (EngineName.AUTO, EngineName.TRANSFORMERS, EngineName.ECHO),
}
"""The engines that can answer with a model of each format."""


def name_answerer(model: str, engine: EngineName) -> str:
    """A model's URI or digest as that of what answers: `echo:<model>` where the engine is not the model."""
    return f"{engine}:{model}" if engine == EngineName.ECHO else model


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values one generation parameter may take; `low` itself is excluded where `above` is set."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    whole: bool = False

    def __contains__(self, value: float) -> bool:
        inside = (self.low < value if self.above else self.low <= value) and value <= self.high
        return inside and (not self.whole or float(value).is_integer())

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"{'above' if self.above else 'from'} {self.low:.15g}" if math.isfinite(self.low) else ""
        high = f"up to {self.high:.15g}" if math.isfinite(self.high) else ""
        return " ".join(word for word in (kind, low, high) if word)


NUMBERS: dict[str, Bounds] = {
    "max_tokens": Bounds(low=1, high=2**31 - 1, whole=True),
    "temperature": Bounds(low=0, high=2),
    "top_p": Bounds(low=0, high=1, above=True),
    "top_k": Bounds(low=0, high=2**31 - 1, whole=True),
    "min_p": Bounds(low=0, high=1),
    "repetition_penalty": Bounds(low=0.01, high=10),
    "seed": Bounds(low=-(2**63), high=2**63 - 1, whole=True),
    "n": Bounds(low=1, high=128, whole=True),
}
"""The numeric generation parameters and what each may be; the others are `stop` and `response_format`."""

PARAMETERS = (*NUMBERS, "stop", "response_format")

RESPONSE_FORMATS = {"json_object": (), "json_schema": ("json_schema", "schema"), "regex": ("regex",)}
"""The types of `response_format` beside `text`, and under which keys each has what it asks for."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one row is generated, in OpenAI's and Hugging Face's words.

    Attributes:
        max_tokens: the most tokens to generate, without the end-of-turn token.
        temperature: 0 is greedy; above it the logits are divided by it before sampling.
        top_p: sample from the smallest set of tokens whose probabilities add up to this.
        top_k: sample from this many likeliest tokens; 0 is all of them.
        min_p: sample from the tokens that are at least this share as likely as the likeliest; 0 is all of them.
        repetition_penalty: divides the logits of tokens already seen, or multiplies negative ones (Keskar et al. 2019).
        seed: the row's own random stream; None leaves the choice to the job.
        n: how many answers; the first is the one that there would be alone.
        stop: the answer is cut before the first of these strings to appear.
        response_format: JSON text of OpenAI's `{"type": "json_schema", "json_schema": {"schema": {...}}}`, or
            `{"type": "json_object"}`, or `{"type": "regex", "regex": "..."}`; None is any text.

    Raises:
        ValueError: a value is out of its bounds, in one sentence.
    """

    max_tokens: int = 300
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    response_format: str | None = None

    def __post_init__(self) -> None:
        for name, bounds in NUMBERS.items():
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value not in bounds:
                raise ValueError(f"{name} is {value!r}; it must be {bounds}")
            if bounds.whole:
                object.__setattr__(self, name, int(value))
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError("stop must be a list of non-empty strings")
        object.__setattr__(self, "response_format", _read_response_format(self.response_format))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def _read_response_format(text: str | None) -> str | None:
    """The format, checked, without extra white space and with its keys in the user's order; None for any text."""
    if not text:
        return None
    try:
        wanted = json.loads(text)
    except (TypeError, ValueError):
        wanted = None
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    if kind not in RESPONSE_FORMATS:
        raise ValueError(f"response_format must be JSON with a type of text, {' or '.join(RESPONSE_FORMATS)}")
    value: Any = wanted
    for key in RESPONSE_FORMATS[kind]:
        value = value.get(key) if isinstance(value, dict) else None
    if value is None or (kind == "regex" and not isinstance(value, str)):
        raise ValueError(f"response_format of type {kind} needs {'.'.join(RESPONSE_FORMATS[kind])}")
    return json.dumps(wanted)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Request:
    """What one row asks for: `messages`, or a `prompt` that already carries the control tokens.

    The job only ever sends `messages`, so that a table's text can not open a turn.
    """

    params: GenerationParams
    messages: tuple[Message, ...] = ()
    prompt: str | None = None

    def choices(self) -> "list[Request]":
        """A request for each different answer that is wanted: `n`, each with a seed of its own, or one if greedy.

        The first has the seed itself, so that its answer is the one of `n: 1`.
        """
        seed = self.params.seed
        seeds = [seed if seed is None or not place else _derive(seed, place) for place in range(self.params.n)]
        wanted = seeds[:1] if self.params.greedy else seeds
        return [replace(self, params=replace(self.params, n=1, seed=each)) for each in wanted]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what the job sends: OpenAI's request body, `{"messages": [...], "max_tokens": 64, ...}`.

        Raises:
            ValueError: the text is not such a body, in one sentence.
        """
        body = json.loads(text)
        params = build_params({name: body[name] for name in PARAMETERS if name in body})
        return cls(params=params, messages=build_messages(body["messages"]))


def _derive(seed: int, place: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{place}".encode()).digest()[:8], signed=True)


def build_params(values: dict[str, Any]) -> GenerationParams:
    """Parameters from loose values; absent and null ones take their defaults.

    Raises:
        ValueError: as `GenerationParams` does.
    """
    values = {name: value for name, value in values.items() if value is not None}
    stop = values.get("stop")
    if stop is None or isinstance(stop, str):
        stop = [stop] if stop else []
    elif isinstance(stop, Mapping) or not isinstance(stop, Iterable):
        raise ValueError(f"stop is {stop!r}; it must be a list of non-empty strings")
    response_format = values.get("response_format")
    if isinstance(response_format, dict):
        response_format = json.dumps(response_format)
    return GenerationParams(**{**values, "stop": tuple(stop), "response_format": response_format})


def build_messages(values: Any) -> tuple[Message, ...]:
    """A checked conversation from dicts of `role` and `content`.

    Raises:
        ValueError: it is no list or empty, a message lacks a known role or its text, or the last is not the user's.
    """
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise ValueError("messages is not a list of objects of role and content")
    messages = []
    for position, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"messages[{position}] is not an object of role and content")
        role, content = value.get("role"), value.get("content")
        if role not in ROLES:
            raise ValueError(f"messages[{position}].role is {str(role)[:20]!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"messages[{position}].content is not text")
        if role != "assistant" and not content.strip():
            raise ValueError(f"messages[{position}].content is blank")
        if role == "system" and position:
            raise ValueError("a system message may only come first")
        messages.append(Message(role, content))
    if not messages:
        raise ValueError("messages is empty")
    if messages[-1].role != "user":
        raise ValueError("the last message is not the user's")
    return tuple(messages)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one completion; `cached_tokens` are those of the prompt that did not have to be computed again."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total_tokens": self.total_tokens}


@dataclass(frozen=True, slots=True)
class Completion:
    """One request's outcome: a text with its `finish_reason`, or an `error_code` with its message.

    `generation_seconds` runs from the row's admission to its last token; `created` is when that was, in seconds since
    the epoch.
    """

    text: str | None
    finish_reason: FinishReason | None
    usage: Usage = Usage()
    generation_seconds: float = 0.0
    error_code: str | None = None
    error_message: str | None = None
    created: float = field(default_factory=time.time, compare=False)

    @classmethod
    def failed(cls, code: str, message: str, usage: Usage | None = None) -> Self:
        """A failure; `usage` is what was computed all the same."""
        return cls(None, None, usage or Usage(), error_code=code, error_message=message)


RESPONSE_COLUMNS = {
    "custom_id": "string",
    "response": "string",
    "finish_reason": "string",
    "usage": "struct<prompt_tokens:bigint,completion_tokens:bigint,total_tokens:bigint,cached_tokens:bigint>",
    "error": "struct<code:string,message:string>",
    "request_key": "string",
    "model": "string",
    "run_id": "string",
    "created": "timestamp",
    "generation_seconds": "double",
}
"""The response table: column to Spark type, in order."""

EXTRA_COLUMNS = {
    "choices": "array<struct<index:bigint,response:string,finish_reason:string>>",
    "prompt_version": "string",
}
"""Columns that a response table has where they are asked for: all answers of a row, where it may have several, and the
versions of the registered prompts that it was made from."""

USAGE_COLUMNS = {
    "run_id": "string",
    "model": "string",
    "started": "timestamp",
    "seconds": "double",
    "rows": "bigint",
    "succeeded": "bigint",
    "failed": "bigint",
    "prompt_tokens": "bigint",
    "completion_tokens": "bigint",
    "cached_tokens": "bigint",
    "tokens_per_second": "double",
    "engine": "string",
    "engine_version": "string",
}
"""The usage table, one row per run: column to Spark type, in order."""

COMPLETION_COLUMNS = {
    "choices": "array<struct<index:bigint,finish_reason:string,message:struct<role:string,content:string>>>",
    "usage": RESPONSE_COLUMNS["usage"],
    "error": RESPONSE_COLUMNS["error"],
    "created": "bigint",
    "generation_seconds": "double",
    "engine": "string",
    "engine_version": "string",
}
"""What of the model's answer crosses Spark. No top-level leaf is ever null: MLflow would make it the text `nan`."""

ENGINE_COLUMNS = ("engine", "engine_version")
"""Those of them that models which were logged by phibatch 0.1.0 do not have."""
