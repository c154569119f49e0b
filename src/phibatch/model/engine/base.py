"""What an engine is, and the one place where a process keeps its own."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from phibatch.contract import Completion, EngineName, Request


class Engine(Protocol):
    """Answers requests. One lives in a process, and it is not called from two threads at once."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; a request that can not be answered becomes a failed completion.

        Raises:
            EngineError: the engine itself failed.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is run.

    Attributes:
        engine: which engine answers.
        batch_size: the most rows generated together, 1 to 32.
        threads: compute threads of the engine.
    """

    engine: EngineName
    batch_size: int
    threads: int


_engines: dict[tuple[str, EngineOptions], Engine] = {}
_loading = threading.Lock()


def load_engine(model_dir: Path, digest: str, options: EngineOptions) -> Engine:
    """The process's engine for these files and options, built at its first use.

    MLflow loads a model anew for every Spark task, from another folder each time, so an engine is known by the digest
    of the model's files. Only the latest is kept: two sets of weights seldom fit where one does.
    """
    key = (digest, options)
    with _loading:
        if key not in _engines:
            _engines.clear()
            _engines[key] = _build_engine(model_dir, options)
        return _engines[key]


def _build_engine(model_dir: Path, options: EngineOptions) -> Engine:
    # Imported here, so that a process loads the libraries of the one engine that it uses, after any fork.
    match options.engine:
        case EngineName.ECHO:
            from phibatch.model.engine.echo import EchoEngine

            return EchoEngine()
        case EngineName.GENAI:
            from phibatch.model.engine.genai import GenaiEngine

            return GenaiEngine(model_dir, options)
