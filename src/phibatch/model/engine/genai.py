"""The engine on onnxruntime-genai's `Generator`: sorted, right-padded batches that share nothing but the arithmetic."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from phibatch.contract import Completion, Message, Request
from phibatch.errors import EngineError, RowError
from phibatch.model.chat import ChatTokenizer
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.row import Row
from phibatch.model.folder import TOKENIZER, ModelFolder

MAX_BATCH_TOKENS = 8192
"""Rows times padded length of one batch. The library allocates and zeroes that much KV at once, in fp32: 768 KiB a
token for Phi-3-mini, so 6 GiB at the most. Two rows of its 4k context just fit, and two are the smallest batch."""


class GenaiEngine:
    """Generates with the classic `Generator` of onnxruntime-genai.

    The library lets the rows of a batch share one random stream and one set of parameters, and knows no stop strings.
    So each step takes its logits, every row chooses for itself, and the choices go back in as logits.
    """

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        self._folder = ModelFolder.open(model_dir)
        self._batch_size = options.batch_size
        session = {"intra_op_num_threads": options.threads}
        config = og.Config(str(model_dir))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = og.Model(config)
        self._library_tokenizer = og.Tokenizer(self._model)
        self._tokenizer = ChatTokenizer(model_dir / TOKENIZER, self._render)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        outcomes: dict[int, Completion] = {}
        rows: dict[int, Row] = {}
        for place, request in enumerate(requests):
            try:
                rows[place] = Row(request, self._tokenizer, self._folder.context_length, self._folder.eos_token_ids)
            except RowError as error:
                outcomes[place] = Completion.failed(error.code, str(error))
        for batch in plan_batches(list(rows.values()), self._batch_size, self._folder.context_length):
            self._run(batch)
        outcomes.update({place: row.completion() for place, row in rows.items()})
        return [outcomes[place] for place in range(len(requests))]

    def _render(self, messages: Sequence[Message]) -> str:
        return str(
            self._library_tokenizer.apply_chat_template(
                json.dumps([asdict(message) for message in messages]), add_generation_prompt=True
            )
        )

    def _run(self, rows: list[Row]) -> None:
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
            if not np.isfinite(logits).all():
                raise EngineError("the model's logits are not finite: the weights or the CPU kernels are broken")
            choices = np.zeros(len(prompts), dtype=np.int64)
            for place, row in enumerate(rows):
                if row.finish_reason is None:
                    choices[place] = row.step(logits[place])
            if all(row.finish_reason is not None for row in rows):
                return
            forced = np.full_like(logits, np.finfo(np.float32).min)
            forced[np.arange(len(prompts)), choices] = 0
            generator.set_logits(forced[:, None, :])
            generator.generate_next_token()


def plan_batches(rows: list[Row], batch_size: int, context_length: int) -> Iterator[list[Row]]:
    """Cut rows into batches that can share a generator and waste little.

    Rows of like length meet. All rows of a batch are padded to the longest prompt and run until the longest limit, and
    the two together must stay within the context and within `MAX_BATCH_TOKENS`.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: (-len(row.prompt), -row.limit)):
        # The longest prompt comes first, so it sets the width.
        width = len((batch or [row])[0].prompt)
        length = width + max(member.limit for member in (*batch, row))
        fits = length <= context_length and length * (len(batch) + 1) <= MAX_BATCH_TOKENS and len(batch) < batch_size
        if batch and not fits:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
