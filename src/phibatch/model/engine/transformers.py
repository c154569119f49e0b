"""The engine on transformers' `generate`: left-padded batches in torch, on the CPU."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
)
from transformers.utils import logging

from phibatch.contract import Completion, EngineName, Message, Request
from phibatch.errors import EngineError
from phibatch.model.chat import ChatTokenizer
from phibatch.model.checkpoint import context_length
from phibatch.model.engine.base import EngineOptions
from phibatch.model.engine.batches import plan_batches
from phibatch.model.engine.row import Row, choose_tokens, generate_rows
from phibatch.model.folder import TOKENIZER
from phibatch.model.grammar import Grammars

TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError)
"""What a template of somebody's raises on a conversation that it was not written for."""

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


class TransformersEngine:
    """Generates with a transformers checkpoint, in the type that its `config.json` names.

    `generate` has one set of parameters for a batch. Here every row chooses its own token at each step, from the logits
    that a `LogitsProcessor` is shown, and a `StoppingCriteria` tells which rows are done. Padding is masked, so a row's
    logits are the same in any batch up to the rounding of sums of another shape: some 1e-5 in float32.
    """

    name = EngineName.TRANSFORMERS.value
    version = f"transformers {transformers.__version__}"

    def __init__(self, model_dir: Path, options: EngineOptions) -> None:
        torch.set_num_threads(options.threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._batch_size = options.batch_size
        self._row_timeout = options.row_timeout
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir, use_safetensors=True, output_loading_info=True, **LOCAL
        )
        model, loading = loaded
        absent = sorted({*loading["missing_keys"], *loading["mismatched_keys"]})
        if absent:
            # The library would draw them at random.
            raise EngineError(
                f"the checkpoint has no weights for {len(absent)} of the model's tensors: {absent[0]} ..."
            )
        self._model = model.eval()
        length = context_length(model.config)
        if length is None:
            raise EngineError("the checkpoint's configuration gives no max_position_embeddings")
        self._context_length = length
        self._boundary = _read_boundary(model.config)
        if self._boundary is not None:
            # The library makes the long table at its first use, and writes the boundary anew as it does so.
            self._pin_table(long=False)
            with torch.inference_mode():
                self._model(torch.zeros((1, 1), dtype=torch.int64), use_cache=False)
        own = self._model.generation_config
        eos = own.eos_token_id
        self._eos_token_ids = frozenset(eos if isinstance(eos, list) else [eos])
        self._pad_token_id = min(self._eos_token_ids) if own.pad_token_id is None else int(own.pad_token_id)
        # Every choice is ours: what the checkpoint's own settings say must not touch the logits.
        self._model.generation_config = GenerationConfig()
        self._tokenizer = open_tokenizer(model_dir)
        self._grammars = Grammars(model_dir / TOKENIZER, self._eos_token_ids)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, self._run)

    def count(self, requests: Sequence[Request]) -> list[Completion]:
        return generate_rows(requests, self._build_row, None)

    def _build_row(self, request: Request) -> Row:
        return Row(
            request, self._tokenizer, self._context_length, self._eos_token_ids, self._grammars, self._row_timeout
        )

    def _run(self, rows: list[Row]) -> None:
        for long in (False, True):
            group = [row for row in rows if self._is_long(row) is long]
            if group and self._boundary is not None:
                self._pin_table(long=long)
            for batch in plan_batches(group, self._batch_size, self._context_length):
                self._run_batch(batch)

    def _is_long(self, row: Row) -> bool:
        return self._boundary is not None and len(row.prompt) + row.limit > self._boundary

    def _pin_table(self, *, long: bool) -> None:
        """Have LongRoPE's long or short table turn all that is computed from now on.

        The library picks the table by the longest row of a batch, and changes it in mid-answer. Here it follows from a
        row's prompt and limit together. The library reads its boundary at each step, so moving it pins the table.
        """
        never = sys.maxsize // 2
        self._model.config.rope_parameters["original_max_position_embeddings"] = 0 if long else never
        # At this one the library throws its keys and values away, to compute them by the other table.
        self._model.config.original_max_position_embeddings = never

    def _run_batch(self, rows: list[Row]) -> None:
        width = max(len(row.prompt) for row in rows)
        ids = torch.full((len(rows), width), self._pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[place, width - len(row.prompt) :] = 1
            row.admit()
        with torch.inference_mode():
            self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=max(row.limit for row in rows),
                    pad_token_id=self._pad_token_id,
                ),
                logits_processor=[_RowsChoose(rows)],
                stopping_criteria=[_RowsStop(rows)],
            )


def _read_boundary(config: Any) -> int | None:
    """The length beyond which LongRoPE's long table turns a row; None where the model has one table."""
    rope = getattr(config, "rope_parameters", None) or {}
    return int(rope["original_max_position_embeddings"]) if rope.get("rope_type") == "longrope" else None


class _RowsChoose(LogitsProcessor):
    """Replaces the logits by ones that leave `generate` each row's own choice."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the library's
        choices = torch.from_numpy(choose_tokens(self._rows, scores.numpy()))
        return torch.full_like(scores, -torch.inf).scatter_(1, choices[:, None], 0)


class _RowsStop(StoppingCriteria):
    """Tells `generate` which rows are done."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 - as above
        return torch.tensor([row.done for row in self._rows])


def open_tokenizer(model_dir: Path) -> ChatTokenizer:
    """The tokenizer of a checkpoint, with transformers' own template engine."""
    library = AutoTokenizer.from_pretrained(model_dir, **LOCAL)

    def render(messages: Sequence[Message]) -> str:
        conversation = [asdict(message) for message in messages]
        try:
            return str(library.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
        except TEMPLATE_ERRORS as error:
            raise ValueError(str(error)) from error

    return ChatTokenizer(model_dir / TOKENIZER, render)
