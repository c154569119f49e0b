"""Structured output: which tokens may come next, so that an answer is of the form that was asked for."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, apply_token_bitmask_inplace, fill_next_token_bitmask
from numpy.typing import NDArray

from phibatch.contract import ErrorCode
from phibatch.errors import ConfigError, EngineError, RowError

Logits = NDArray[np.float32]

SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space as Python writes it: small models left to choose it write little else."""


def build_grammar(response_format: str) -> str:
    """The grammar of a response format, as llguidance takes it.

    Args:
        response_format: JSON text, as `contract.GenerationParams` holds it.

    Raises:
        ValueError: the schema or the expression is not one, or asks for what can not be enforced.
    """
    wanted = json.loads(response_format)
    match wanted["type"]:
        case "json_object":
            grammar = LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=SPACES)
        case "json_schema":
            grammar = LLMatcher.grammar_from_json_schema(wanted["json_schema"]["schema"], overrides=SPACES)
        case _:
            grammar = LLMatcher.grammar_from_regex(wanted["regex"])
    failed, reasons = LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise ValueError(f"response_format can not be honoured: {' '.join(reasons[0].split())[:200]}")
    return str(grammar)


def check_response_format(response_format: str | None) -> None:
    """Raise ConfigError where a format that is meant for all rows can not be honoured."""
    try:
        if response_format:
            build_grammar(response_format)
    except ValueError as error:
        raise ConfigError(f"generation.{error}") from error


class Constraint:
    """One row's place in its grammar."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0)
        self._bits = allocate_token_bitmask(1, tokenizer.vocab_size)

    def mask(self, logits: Logits) -> Logits:
        """A copy of logits of shape [vocabulary] in which the tokens that may not come next are out of reach."""
        fill_next_token_bitmask(self._matcher, self._bits)
        masked = logits.copy()
        apply_token_bitmask_inplace(masked, self._bits)
        return masked

    def accept(self, token: int) -> None:
        """Go on with a chosen token. Raises EngineError where the mask did not allow it."""
        if not self._matcher.consume_token(token):
            raise EngineError("the grammar of a response_format refused a token that it had allowed")

    @property
    def complete(self) -> bool:
        """Whether what has been said is whole."""
        return bool(self._matcher.is_accepting())


class Grammars:
    """The constraints of a model's vocabulary.

    Args:
        file: the model's `tokenizer.json`.
        eos_token_ids: the tokens that end a turn.
    """

    def __init__(self, file: Path, eos_token_ids: frozenset[int]) -> None:
        self._file = file
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._grammars: dict[str, str] = {}

    def constrain(self, response_format: str) -> Constraint:
        """A fresh constraint.

        Raises:
            RowError: the format can not be honoured.
        """
        if response_format not in self._grammars:
            try:
                self._grammars[response_format] = build_grammar(response_format)
            except ValueError as error:
                raise RowError(ErrorCode.INVALID_REQUEST, str(error)) from error
        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(self._file.read_text(encoding="utf-8"), eos_token=self._eos_token_ids)
        return Constraint(self._tokenizer, self._grammars[response_format])
