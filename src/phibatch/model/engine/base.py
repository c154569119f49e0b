"""What an engine is, and the one place where a process keeps its own."""

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from phibatch.contract import ENGINES, Completion, EngineName, ModelFormat, Request
from phibatch.errors import EngineError, ModelError
from phibatch.model.checkpoint import check_extra
from phibatch.model.engine.watchdog import watch


class Engine(Protocol):
    """Answers requests. One lives in a process, and it is not called from two threads at once."""

    @property
    def name(self) -> str:
        """One of `contract.EngineName`."""
        ...

    @property
    def version(self) -> str:
        """The library that computes, and its version: `onnxruntime 1.31.1`."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order; a request that can not be answered becomes a failed completion.

        Raises:
            EngineError: the engine itself failed.
        """
        ...

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        """The same without generating: each completion is empty and tells its prompt's tokens, or is the failure."""
        ...


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a model is run.

    Attributes:
        engine: which engine answers.
        batch_size: the most rows generated together, 1 to 32.
        threads: compute threads of the engine.
        memory: bytes that weights, keys and values may take; 0 is a share of what there is.
        model_format: what the model's files are.
        row_timeout: seconds that a row may take from its admission; 0 is no limit.
        worker_timeout: seconds without a step after which the process is taken to hang, and ends; 0 is never.
    """

    engine: EngineName
    batch_size: int
    threads: int
    memory: int = 0
    model_format: ModelFormat = ModelFormat.ONNX
    row_timeout: float = 0.0
    worker_timeout: float = 0.0


def check_engine(model_format: ModelFormat, name: EngineName) -> None:
    """Raise ModelError where a model's format is another engine's."""
    engines = ENGINES[model_format]
    if name not in engines:
        raise ModelError(
            f"the {name} engine can not run a model of {model_format} format; set model.engine to"
            f" {', '.join(engines[:-1])} or {engines[-1]}"
        )


logger = logging.getLogger(__name__)

_engines: dict[tuple[str, EngineOptions], Engine] = {}
_one_at_a_time = threading.Lock()


def generate(
    model_dir: Path, digest: str, options: EngineOptions, requests: Sequence[Request], *, count_only: bool = False
) -> tuple[Engine, list[Completion]]:
    """Generate with the process's engine, one caller at a time: a scoring server calls from many threads.

    Gives the engine too: with `auto` it is known only here.
    With `count_only` prompts are read and their tokens counted, as `Engine.count`.
    """
    with _one_at_a_time, watch(options.worker_timeout):
        engine = load_engine(model_dir, digest, options)
        return engine, engine.count(requests) if count_only else engine.generate(requests)


def load_engine(model_dir: Path, digest: str, options: EngineOptions) -> Engine:
    """The process's engine for these files and options, built at its first use.

    MLflow loads a model anew for every Spark task, from another folder each time, so an engine is known by the digest
    of the model's files. Only the latest is kept: two sets of weights seldom fit where one does.
    """
    key = (digest, options)
    if key not in _engines:
        _engines.clear()
        _engines[key] = _build_engine(model_dir, options)
    return _engines[key]


def _build_engine(model_dir: Path, options: EngineOptions) -> Engine:
    # Imported here, so that a process loads the libraries of the one engine that it uses, after any fork.
    match options.engine:
        case EngineName.AUTO if options.model_format == ModelFormat.TRANSFORMERS:
            return _build_engine(model_dir, replace(options, engine=EngineName.TRANSFORMERS))
        case EngineName.AUTO:
            return _build_fastest(model_dir, options)
        case EngineName.ECHO:
            from phibatch.model.engine.echo import EchoEngine

            return EchoEngine()
        case EngineName.SLOTS:
            from phibatch.model.engine.attention import UnsupportedGraph
            from phibatch.model.engine.slots import SlotsEngine

            try:
                return SlotsEngine(model_dir, options)
            except UnsupportedGraph as error:
                raise EngineError(f"the slots engine can not run this graph: {error}") from error
        case EngineName.GENAI:
            from phibatch.model.engine.genai import GenaiEngine

            return GenaiEngine(model_dir, options)
        case EngineName.TRANSFORMERS:
            try:
                check_extra()
            except ModelError as error:
                raise EngineError(str(error)) from error
            from phibatch.model.engine.transformers import TransformersEngine

            return TransformersEngine(model_dir, options)


def _build_fastest(model_dir: Path, options: EngineOptions) -> Engine:
    """The engine on slots, or, where the graph is not made for it, the one on onnxruntime-genai; its log says why."""
    from phibatch.model.engine.attention import UnsupportedGraph
    from phibatch.model.engine.slots import SlotsEngine

    try:
        return SlotsEngine(model_dir, options)
    except UnsupportedGraph as error:
        logger.warning("the model runs on the genai engine, not on slots: %s", error)
        return _build_engine(model_dir, replace(options, engine=EngineName.GENAI))
