"""The engine on onnxruntime-genai's `Generator`: sorted, right-padded batches that share nothing but the arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og

from phibatch.contract import Completion, EngineName, Message, Request
from phibatch.errors import EngineError
from phibatch.model.chat import ChatTokenizer
from phibatch.model.engine.attention import UnsupportedGraph, read_reach, read_windows, write_windows
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.batches import plan_batches
from phibatch.model.engine.row import Row, choose_tokens, generate_rows
from phibatch.model.folder import CONFIG, TOKENIZER, ModelFolder, read_json
from phibatch.model.grammar import Grammars


class GenaiEngine:
    """Generates with the classic `Generator` of onnxruntime-genai.

    The library lets the rows of a batch share one random stream and one set of parameters, and knows no stop strings.
    So each step takes its logits, every row chooses for itself, and the choices go back in as logits.
    """

    name = EngineName.GENAI.value
    version = f"onnxruntime-genai {og.__version__}"

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        self._folder = ModelFolder.open(model_dir)
        self._batch_size = options.batch_size
        self._row_timeout = options.row_timeout
        decoder: dict[str, Any] = {"session_options": {"intra_op_num_threads": options.threads}}
        config = og.Config(str(model_dir))
        graph = onnx.load(str(self._folder.graph), load_external_data=False)
        windows = read_windows(graph.graph, model_dir)
        try:
            self._reach = read_reach(graph.graph, windows)
        except UnsupportedGraph as error:
            raise EngineError(f"the genai engine can not run this graph: {error}") from error
        if windows.smallest:
            write_windows(graph.graph, windows)
            if "sliding_window" in read_json(model_dir / CONFIG)["model"]["decoder"]:
                # No cache of the window's size: over one, the kernels refuse batches of unequal rows.
                decoder["sliding_window"] = {
                    "window_size": self._folder.context_length,
                    "layers": [],
                    "slide_key_value_cache": False,
                    "slide_inputs": False,
                }
            name = self._folder.graph.relative_to(model_dir)
            # Of a graph in memory, the library looks for the data from the model's folder on.
            for entry in (entry for each in graph.graph.initializer for entry in each.external_data):
                if entry.key == "location":
                    entry.value = (name.parent / entry.value).as_posix()
            # The library reads these bytes when it opens the model, and keeps no copy.
            self._graph = graph.SerializeToString()
            config.add_model_data(name.as_posix(), self._graph)
        config.overlay(json.dumps({"model": {"decoder": decoder}}))
        self._model = og.Model(config)
        self._tokenizer = open_tokenizer(model_dir)
        self._grammars = Grammars(model_dir / TOKENIZER, self._folder.eos_token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, self._run)

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, None)

    def _build_row(self, request: Request) -> Row:
        folder = self._folder
        row = Row(
            request, self._tokenizer, folder.context_length, folder.eos_token_ids, self._grammars, self._row_timeout
        )
        if self._reach:
            self._reach.check(row)
        return row

    def _run(self, rows: list[Row]) -> None:
        # A batch is as wide as its longest prompt and its longest limit together, and may not be wider than a row.
        width = self._reach.tokens if self._reach else self._folder.context_length
        for batch in plan_batches(rows, self._batch_size, width):
            self._run_batch(batch)

    def _run_batch(self, rows: list[Row]) -> None:
        # The kernels for one row round differently from those for several, so a row alone has an idle one beside it.
        prompts = [row.prompt for row in rows] if len(rows) > 1 else [rows[0].prompt, rows[0].prompt]
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self._folder.pad_token_id, dtype=np.int32)
        for line, prompt in zip(ids, prompts, strict=True):
            line[: len(prompt)] = prompt
        for row in rows:
            row.admit()
        params = og.GeneratorParams(self._model)
        # Every choice is ours: what the folder's own search settings say must not touch the logits.
        params.set_search_options(
            batch_size=len(prompts),
            max_length=width + max(row.limit for row in rows),
            min_length=0,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        generator = og.Generator(self._model, params)
        generator.append_tokens(ids)
        while True:
            logits = generator.get_logits()[:, -1, :]
            choices = choose_tokens(rows, logits)
            if all(row.done for row in rows):
                return
            forced = np.full_like(logits, np.finfo(np.float32).min)
            forced[np.arange(len(prompts)), choices] = 0
            generator.set_logits(forced[:, None, :])
            generator.generate_next_token()


def open_tokenizer(model_dir: Path) -> ChatTokenizer:
    """The tokenizer of an onnxruntime-genai folder, with the library's own template engine."""
    library = og.Tokenizer(str(model_dir))

    def render(messages: Sequence[Message]) -> str:
        conversation = json.dumps([asdict(message) for message in messages])
        return str(library.apply_chat_template(conversation, add_generation_prompt=True))

    return ChatTokenizer(model_dir / TOKENIZER, render)
