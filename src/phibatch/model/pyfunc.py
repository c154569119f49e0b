"""MLflow's shape around an engine: a frame of requests in, one OpenAI `chat.completion` per row out."""

import logging
import math
import os
import uuid
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from phibatch.contract import (
    PARAMETERS,
    Completion,
    EngineName,
    ErrorCode,
    ModelFormat,
    Request,
    build_messages,
    build_params,
)
from phibatch.errors import InputError
from phibatch.model.engine.base import Engine, EngineOptions, check_engine, generate

ARTIFACT = "model"
"""The logged folder's name among the model's artifacts."""


class Predictor:
    """Answers every row of `predict`'s frame, in order.

    Args:
        model_dir: the model's files; the engine is built of them at the first row, once per process.
        name: the registered model's name.
        digest: of the files.
        model_format: what the files are.
    """

    def __init__(self, model_dir: Path, name: str, digest: str, model_format: ModelFormat) -> None:
        self._model_dir = model_dir
        self._name = name
        self._digest = digest
        self._format = model_format
        _show_log()

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any]) -> list[dict[str, Any]]:
        """Answer.

        Args:
            model_input: columns `messages`, `prompt` (verbatim, control tokens and all) and `request` (the job's
                compact form, `contract.Request.from_json`), of which each row gives one; and the generation
                parameters, for the rows that bring their own.
            params: generation parameters of the rows without their own, and the engine's
                options: `engine`, `batch_size`, `memory`, `row_timeout`, `worker_timeout`; `count_only` generates
                nothing, and tells of each row its prompt's tokens, or why it would fail.

        Returns:
            One dict per row: `id, object, created, model, choices, usage, error, generation_seconds,
            engine, engine_version`, never null.
            A row that failed has `choices: []` and `error: {code, message}`.

        Raises:
            InputError: the frame has no column to answer.
            ModelError: the model's format is not the engine's.
            EngineError: the engine itself failed.
        """
        if not {"messages", "prompt", "request"} & set(model_input.columns):
            raise InputError("there is nothing to answer: the input has neither messages nor a prompt")
        chosen = EngineName(params["engine"])
        check_engine(self._format, chosen)
        # A model that was logged by an earlier version has not all of the parameters.
        options = EngineOptions(
            chosen,
            int(params["batch_size"]),
            _threads(),
            int(params.get("memory", 0)),
            self._format,
            float(params.get("row_timeout", 0)),
            float(params.get("worker_timeout", 0)),
        )
        outcomes: dict[int, list[Completion]] = {}
        requests: dict[int, Request] = {}
        for place, row in enumerate(model_input.to_dict("records")):
            try:
                requests[place] = _build_request(row, params)
            except ValueError as error:
                outcomes[place] = [Completion.failed(ErrorCode.INVALID_REQUEST, str(error))]
        # A request that wants several answers is several to the engine.
        count_only = bool(params.get("count_only"))
        choices = [
            (place, choice)
            for place, request in requests.items()
            for choice in request.choices()[: 1 if count_only else None]
        ]
        engine, completions = generate(
            self._model_dir,
            self._digest,
            options,
            [choice for _, choice in choices],
            count_only=count_only,
        )
        for (place, _), completion in zip(choices, completions, strict=True):
            outcomes.setdefault(place, []).append(completion)
        for place, request in requests.items():
            # Greedy answers are all the same one.
            outcomes[place] *= request.params.n // len(outcomes[place])
        return [_as_openai(outcomes[place], self._name, engine) for place in range(len(model_input))]


class ChatModel(PythonModel):
    """The logged form of an onnxruntime-genai folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Remember where the model is."""
        config = context.model_config
        self._predictor = Predictor(
            Path(context.artifacts[ARTIFACT]), str(config["name"]), str(config["digest"]), ModelFormat.ONNX
        )

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002 - MLflow passes it; load_context has read it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """As `Predictor.predict`."""
        return self._predictor.predict(model_input, params or {})


def _show_log() -> None:
    """Have the engines' own lines (which engine, how much memory) on stderr, where Spark keeps them by executor."""
    log = logging.getLogger("phibatch")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s phibatch: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


def _build_request(row: dict[Hashable, Any], params: dict[str, Any]) -> Request:
    # Absent optional columns arrive as NaN or None, and arrays as numpy's.
    if isinstance(row.get("request"), str):
        return Request.from_json(row["request"])
    own = {name: row[name] for name in PARAMETERS if name in row and not _is_absent(row[name])}
    generation = build_params({name: params[name] for name in PARAMETERS if name in params} | own)
    if isinstance(row.get("prompt"), str):
        return Request(generation, prompt=row["prompt"])
    if _is_absent(row.get("messages")):
        raise ValueError("the row has neither messages nor a prompt")
    return Request(generation, messages=build_messages(row["messages"]))


def _is_absent(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _threads() -> int:
    """Spark sets OMP_NUM_THREADS from the task's cpus; elsewhere all of the process's own."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _as_openai(completions: list[Completion], model: str, engine: Engine) -> dict[str, Any]:
    """One row's completions as one `chat.completion`; it has failed when one of them has."""
    failed = next((each for each in completions if each.error_code), None)
    choices = [
        {
            "index": place,
            "finish_reason": each.finish_reason and str(each.finish_reason),
            "message": {"role": "assistant", "content": each.text},
        }
        for place, each in enumerate(completions)
    ]
    # The prompt is one, whatever is said to it.
    usage = replace(completions[0].usage, completion_tokens=sum(each.usage.completion_tokens for each in completions))
    # Of a row that was cut off the texts so far are kept.
    has_texts = all(each.text is not None for each in completions)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": math.floor(max(each.created for each in completions)),
        "model": model,
        "choices": choices if has_texts else [],
        "usage": usage.as_dict(),
        "error": {
            "code": failed and failed.error_code and str(failed.error_code),
            "message": failed and failed.error_message,
        },
        "generation_seconds": max(each.generation_seconds for each in completions),
        "engine": engine.name,
        "engine_version": engine.version,
    }
