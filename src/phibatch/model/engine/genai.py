"""The engine on onnxruntime-genai's `Generator`: sorted, right-padded batches that share nothing but the arithmetic."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from phibatch.contract import Completion, EngineName, Message, Request
from phibatch.model.chat import ChatTokenizer
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.batches import plan_batches
from phibatch.model.engine.row import Row, choose_tokens, generate_rows
from phibatch.model.folder import TOKENIZER, ModelFolder
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
        session = {"intra_op_num_threads": options.threads}
        config = og.Config(str(model_dir))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._tokenizer = open_tokenizer(model_dir)
        self._grammars = Grammars(model_dir / TOKENIZER, self._folder.eos_token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, self._run)

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, None)

    def _build_row(self, request: Request) -> Row:
        folder = self._folder
        return Row(
            request, self._tokenizer, folder.context_length, folder.eos_token_ids, self._grammars, self._row_timeout
        )

    def _run(self, rows: list[Row]) -> None:
        for batch in plan_batches(rows, self._batch_size, self._folder.context_length):
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
