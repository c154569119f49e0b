"""MLflow's shape around an engine: a frame of requests in, one OpenAI `chat.completion` per row out."""

import math
import os
import time
import uuid
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from phibatch.contract import (
    PARAMETERS,
    Completion,
    EngineName,
    ErrorCode,
    GenerationParams,
    Request,
    build_messages,
    build_params,
)
from phibatch.model.engine.base import EngineOptions, load_engine

ARTIFACT = "model"
"""The logged folder's name among the model's artifacts."""


class ChatModel(PythonModel):
    """Answers every row of `predict`'s frame, in order."""

    def load_context(self, context: PythonModelContext) -> None:
        """Remember where the model is; the engine is built at the first row, once per process."""
        self._model_dir = Path(context.artifacts[ARTIFACT])
        self._name = str(context.model_config["name"])
        self._digest = str(context.model_config["digest"])

    def predict(
        self,
        context: PythonModelContext,  # noqa: ARG002 - MLflow passes it; load_context has read it
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer.

        Args:
            context: unused.
            model_input: columns `messages`, `prompt` (verbatim, control tokens and all) and `request` (the job's
                compact form, `contract.Request.from_json`); each row gives one of them.
            params: generation parameters of the rows without their own, and `engine` and `batch_size`.

        Returns:
            One dict per row: `id, object, created, model, choices, usage, error, generation_seconds`, never null.
            A row that failed has `choices: []` and `error: {code, message}`.

        Raises:
            EngineError: the engine itself failed.
        """
        params = params or {}
        options = EngineOptions(EngineName(params["engine"]), int(params["batch_size"]), _threads())
        outcomes: dict[int, Completion] = {}
        requests: dict[int, Request] = {}
        for place, row in enumerate(model_input.to_dict("records")):
            try:
                requests[place] = _build_request(row, params)
            except ValueError as error:
                outcomes[place] = Completion.failed(ErrorCode.INVALID_REQUEST, str(error))
        engine = load_engine(self._model_dir, self._digest, options)
        outcomes.update(zip(requests, engine.generate(list(requests.values())), strict=True))
        return [_as_openai(outcomes[place], self._name) for place in range(len(model_input))]


def _build_request(row: dict[Hashable, Any], params: dict[str, Any]) -> Request:
    # Absent optional columns arrive as NaN or None, and arrays as numpy's.
    if isinstance(row.get("request"), str):
        return Request.from_json(row["request"])
    generation = _build_params(params)
    if isinstance(row.get("prompt"), str):
        return Request(generation, prompt=row["prompt"])
    messages = row.get("messages")
    if messages is None or isinstance(messages, float):
        raise ValueError("the row has neither messages nor a prompt")
    return Request(generation, messages=build_messages(messages))


def _build_params(params: dict[str, Any]) -> GenerationParams:
    return build_params({name: params[name] for name in PARAMETERS if params.get(name) is not None})


def _threads() -> int:
    """Spark sets OMP_NUM_THREADS from the task's cpus; elsewhere all of the process's own."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def _as_openai(completion: Completion, model: str) -> dict[str, Any]:
    choice = {
        "index": 0,
        "finish_reason": str(completion.finish_reason),
        "message": {"role": "assistant", "content": completion.text},
    }
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": math.floor(time.time()),
        "model": model,
        "choices": [] if completion.error_code else [choice],
        "usage": completion.usage.as_dict(),
        "error": {"code": completion.error_code, "message": completion.error_message},
        "generation_seconds": completion.generation_seconds,
    }
